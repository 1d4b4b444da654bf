"""What is particular to one family of adapters: the numbered oracles of SYSTEMS.md, and PEFT where it has it."""

import math
import warnings

import pytest
import torch
from torch import nn

from heterolora.adapters.base import Surroundings, plain_factors
from heterolora.adapters.dora import DoRA
from heterolora.adapters.lora import LoRA, LowRank
from heterolora.adapters.lora_xs import LoRAXS, truncated
from heterolora.adapters.prolora import PRoLoRA, expanded
from heterolora.adapters.shared import TiedLoRA, VeRA
from heterolora.adapters.svd import SVD
from heterolora.errors import SettingError
from heterolora.model import AdaptedModel
from heterolora.sites import Port, Site
from heterolora.space import SearchSpace, survey
from tests.architectures import make_backbone, make_batch
from tests.conftest import randomise
from tests.surroundings import ALONE
from tests.test_families import made, step
from tests.test_model import logits

SETTINGS = ("constant", 2.0, 0.0)


def site_of(name="0.q", wide=384, out=384):
    return Site(
        name, "lora", name.split(".")[1], int(name.split(".")[0]), Port(name, "in"), Port(name, "out"), wide, out
    )


def reference(roles=("q", "v")):
    """The model of SYSTEMS.md 0.3: six layers of width 384."""
    return [site_of(f"{layer}.{role}") for layer in range(6) for role in roles]


def tied(switches: str, tie=True):
    a, b, uv = (letter in switches for letter in "ABu")
    return TiedLoRA("constant", 1.0, 0.0, tie=tie, train_A=a, train_B=b, train_uv=uv, initial=0.1)


# -- counts (0.3, 2.2, 3.4, 4.3, 6.4) ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "rank", "expected"),
    [
        (LoRA(*SETTINGS), 8, 73_728),
        (LoRA(*SETTINGS), 4, 36_864),
        (LoRAXS(*SETTINGS, core_std=0.0, frozen="svd"), 8, 768),
        (LoRAXS(*SETTINGS, core_std=0.0, frozen="svd"), 16, 3_072),
        (SVD(*SETTINGS, std=0.02), 12, 110_736),
        (SVD(*SETTINGS, std=0.02), 8, 73_824),
        (PRoLoRA(*SETTINGS, sharing_in=1, sharing_out=1, unshared=0), 8, 73_728),
        (PRoLoRA(*SETTINGS, sharing_in=3, sharing_out=3, unshared=8), 8, 73_728),
        (PRoLoRA(*SETTINGS, sharing_in=3, sharing_out=3, unshared=2), 8, 36_864),
        (PRoLoRA(*SETTINGS, sharing_in=4, sharing_out=4, unshared=0), 8, 18_432),
        (PRoLoRA(*SETTINGS, sharing_in=7, sharing_out=7, unshared=1), 8, 18_456),
        (PRoLoRA(*SETTINGS, sharing_in=3, sharing_out=3, unshared=4), 16, 73_728),
        (PRoLoRA(*SETTINGS, sharing_in=2, sharing_out=2, unshared=0), 16, 73_728),
        (PRoLoRA(*SETTINGS, sharing_in=7, sharing_out=7, unshared=4), 32, 73_824),
        (VeRA("constant", 1.0, 0.0, initial=0.1), 8, 12 * (8 + 384)),
    ],
    ids=str,
)
def test_worked_counts_of_q_and_v(family, rank, expected):
    sites = reference()
    assert family.cost(sites)({site.name: rank for site in sites}) == expected


@pytest.mark.parametrize(
    ("switches", "expected"),
    [("u", 6_960), ("A", 3_072), ("Au", 10_032), ("B", 9_216), ("Bu", 16_176), ("AB", 12_288), ("ABu", 19_248)],
)
def test_worked_counts_of_tied_lora_on_the_fused_qkv(switches, expected):
    """The table of 2.2: one A of 384, one B of 3 x 384."""
    sites = [site_of(f"{layer}.qkv", 384, 3 * 384) for layer in range(6)]
    assert tied(switches).cost(sites)({site.name: 8 for site in sites}) == expected


def test_an_untied_one_costs_what_lora_does_and_published_counts_come_out():
    sites = [site_of(f"{layer}.qkv", 384, 3 * 384) for layer in range(6)]
    ranks = {site.name: 8 for site in sites}
    assert tied("AB", tie=False).cost(sites)(ranks) == LoRA(*SETTINGS).cost(sites)(ranks) == 73_728
    large = [site_of(f"{layer}.qkv", 4096, 3 * 4096) for layer in range(32)]
    ranks = {site.name: 8 for site in large}
    assert tied("AB").cost(large)(ranks) == 131_072  # the paper's -96.875 %
    assert tied("ABu").cost(large)(ranks) == 524_544  # its 12.5 %
    roberta = [site_of(f"{layer}.{role}", 1024, 1024) for layer in range(24) for role in "qkvo"]
    xs = LoRAXS(*SETTINGS, core_std=0.0, frozen="svd").cost(roberta)
    assert [xs({site.name: rank for site in roberta}) for rank in (16, 25)] == [24_576, 60_000]


def test_a_pool_is_as_large_as_its_largest_rank_and_differs_by_shape():
    sites = [site_of("0.q"), site_of("1.q"), site_of("0.up", 384, 1536)]
    cost = tied("AB").cost(sites)
    assert cost({"0.q": 3, "1.q": 8, "0.up": 2}) == 8 * 768 + 2 * 1920
    assert cost.marginal({"0.q": 3, "1.q": 8, "0.up": 2}, "0.q") == 0
    assert cost.marginal({"0.q": 8, "1.q": 8, "0.up": 2}, "0.q") == 768


# -- LoRA-XS (4.8) ----------------------------------------------------------------------------------------------------


def xs_layer(rank, wide=7, out=5, scale=2.0):
    torch.manual_seed(1)
    layer = nn.Linear(wide, out).double()
    site = site_of("0.q", wide, out)
    around = Surroundings(lambda name: layer.weight.detach(), {site: rank})
    adapter = LoRAXS("constant", scale, 0.0, core_std=0.0, frozen="svd").build(site, rank, 0, around).double()
    a, b = truncated(layer.weight, rank)  # float32, as families build them: here to all digits
    u, s, vh = torch.linalg.svd(layer.weight.detach(), full_matrices=False)
    signs = torch.gather(u, 0, u.abs().argmax(0, keepdim=True)).sign()[:, :rank]
    torch.testing.assert_close(a.double(), (s[:, None] * vh)[:rank] * signs.T, rtol=1e-5, atol=1e-6)
    adapter.A, adapter.B = (s[:, None] * vh)[:rank] * signs.T, u[:, :rank] * signs
    torch.testing.assert_close(b.double(), adapter.B, rtol=1e-5, atol=1e-6)
    return layer, adapter


def test_xs_gradient_of_the_core_is_s_bt_g_at():
    layer, adapter = xs_layer(3)
    x, target = torch.randn(11, 7).double(), torch.randn(11, 5).double()
    assert torch.equal(layer(x) + adapter(x), layer(x))
    loss = (layer(x) + adapter(x) - target).square().sum()
    loss.backward()
    g = 2 * (layer(x) - target).T @ x
    torch.testing.assert_close(adapter.R.grad, 2.0 * adapter.B.T @ g @ adapter.A.T)


def test_xs_takes_the_top_of_the_spectrum_away_or_adds_it():
    layer, adapter = xs_layer(3)
    weight = layer.weight.detach()
    s = torch.linalg.svdvals(weight)
    with torch.no_grad():
        adapter.R.copy_(-torch.eye(3) / 2.0)
    assert torch.linalg.matrix_rank(weight + adapter.delta_weight(), atol=1e-10) == 2
    with torch.no_grad():
        adapter.R.copy_(torch.eye(3) / 2.0)
    u, _, vh = torch.linalg.svd(weight, full_matrices=False)
    torch.testing.assert_close(adapter.delta_weight(), (u[:, :3] * s[:3]) @ vh[:3])


def test_xs_frozen_factors_are_a_truncated_svd():
    layer, adapter = xs_layer(3)
    s = torch.linalg.svdvals(layer.weight.detach())
    torch.testing.assert_close(adapter.B.T @ adapter.B, torch.eye(3).double())
    torch.testing.assert_close(adapter.A @ adapter.A.T, torch.diag(s[:3].square()))
    rest = adapter.B @ adapter.A - layer.weight.detach()
    torch.testing.assert_close(rest.square().sum(), s[3:].square().sum())
    assert (adapter.B.gather(0, adapter.B.abs().argmax(0, keepdim=True)) > 0).all()


def test_xs_trains_the_core_alone_and_reaches_every_matrix_at_full_rank():
    model, batch = made("lora_xs", training=True)
    model.enable(dict.fromkeys(model.ranks, 2), seed=0)
    assert {key.rpartition(".")[2] for key, _ in model.adapters.named_parameters()} == {"R"}
    before = {key: value.clone() for key, value in model.adapters.named_buffers()}
    step(model, batch, times=10)
    assert all(torch.equal(value, before[key]) for key, value in model.adapters.named_buffers())
    _, adapter = xs_layer(5, wide=5)
    wanted = torch.randn(5, 5).double()
    with torch.no_grad():
        adapter.R.copy_(torch.linalg.solve(adapter.B, wanted) @ torch.linalg.inv(adapter.A) / 2.0)
    torch.testing.assert_close(adapter.delta_weight(), wanted)


# -- Tied-LoRA (2.8) --------------------------------------------------------------------------------------------------


def tied_model(switches, roles=("q", "v"), training=True):
    backbone = make_backbone("bert", dtype=torch.float64)
    space = SearchSpace([{"kind": "lora", "role": list(roles)}], [], None, [], False, "kind").resolve(survey(backbone))
    model = AdaptedModel(backbone, space, tied(switches), ["classifier.weight", "classifier.bias"])
    model.enable({site.name: 3 for site in space.sites}, seed=0)
    return model.train(training), make_batch(backbone)


def backward(model, batch):
    loss = torch.nn.functional.cross_entropy(logits(model, batch), batch["labels"])
    loss.backward()


@pytest.mark.parametrize(
    ("switches", "speaking"),
    [("AB", {"B"}), ("ABu", {"B"}), ("B", {"B"}), ("Bu", {"B"}), ("A", {"A"}), ("Au", {"v"}), ("u", {"v"})],
)
def test_tied_at_the_first_step_one_tensor_has_a_gradient(switches, speaking):
    """2.8.1 and the rule of 2.3 for those whose B is frozen."""
    model, batch = tied_model(switches)
    backward(model, batch)
    found = {key.rpartition(".")[2] for key, p in model.adapters.named_parameters() if p.grad.any()}
    assert found == speaking


def test_tied_gradient_is_the_sum_over_untied_copies():
    model, batch = tied_model("ABu")
    randomise(model)
    backward(model, batch)
    pool = model.adapter("0.q").shared
    assert all(model.adapter(name).shared is pool for name in model.held)
    other, _ = tied_model("ABu")
    copies = {name: LowRank(*plain_factors(model.adapter(name)), 1.0, 0.0) for name in model.held}
    other.install(copies)
    backward(other, batch)
    v, u = ({name: getattr(model.adapter(name), key).detach() for name in model.held} for key in "vu")
    of_b = sum(v[name][:, None] * copies[name].B.grad for name in copies)
    of_a = sum(u[name][:, None] * copies[name].A.grad for name in copies)
    torch.testing.assert_close(pool.B.grad, of_b)
    torch.testing.assert_close(pool.A.grad, of_a)


def test_tied_layers_share_their_map_unless_vectors_tell_them_apart():
    for switches, alike in (("AB", True), ("ABu", False)):
        model, batch = tied_model(switches)
        step(model, batch, times=2)
        deltas = [model.adapter(name).delta_weight() for name in model.held]
        assert all(torch.allclose(delta, deltas[0], rtol=1e-12) for delta in deltas) == alike
        assert deltas[0].any()


def test_tied_with_one_site_and_nothing_but_factors_is_lora():
    site = site_of("0.q", 6, 4)
    family, lora = tied("AB", tie=False), LoRA("constant", 1.0, 0.0)
    one = family.build(site, 3, 0, ALONE)
    other = lora.build(site, 3, 0, ALONE)
    with torch.no_grad():
        for key, value in (("A", torch.randn(3, 6)), ("B", torch.randn(4, 3))):
            getattr(one.shared, key).copy_(value)
            getattr(other, key).copy_(value)
    x = torch.randn(5, 6)
    assert torch.equal(one(x), other(x))


def test_tied_vectors_take_no_weight_decay():
    model, _ = tied_model("ABu")
    spared = model.undecayed
    assert spared == {getattr(model.adapter(name), key) for name in model.held for key in "uv"}
    assert made("lora")[0].undecayed == set()


def test_tied_needs_something_to_train():
    with pytest.raises(SettingError, match="nothing is left to train"):
        tied("")


# -- PRoLoRA (3.9) ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{"unshared": 4}, {"sharing_in": 1, "sharing_out": 1, "unshared": 0}], ids=str)
def test_prolora_without_sharing_is_lora(settings):
    family = PRoLoRA(*SETTINGS, **{"sharing_in": 3, "sharing_out": 2} | settings)
    site = site_of("0.q", 10, 9)
    adapter, lora = family.build(site, 4, 0, ALONE).double(), LoRA(*SETTINGS).build(site, 4, 0, ALONE).double()
    a, b = torch.randn(4, 10).double(), torch.randn(9, 4).double()
    own = settings["unshared"] == 4
    with torch.no_grad():
        (adapter.own_A if own else adapter.chunk_A).copy_(a)
        (adapter.own_B if own else adapter.chunk_B).copy_(b)
        lora.A.copy_(a)
        lora.B.copy_(b)
    x = torch.randn(3, 10).double()
    assert torch.equal(adapter(x), lora(x))
    for one in (adapter, lora):
        one(x).square().sum().backward()
    grads = (adapter.own_A, adapter.own_B) if own else (adapter.chunk_A, adapter.chunk_B)
    torch.testing.assert_close([p.grad for p in grads], [lora.A.grad, lora.B.grad])
    assert family.cost([site])({"0.q": 4}) == LoRA(*SETTINGS).cost([site])({"0.q": 4})


@pytest.mark.parametrize(("rank", "copies", "width"), [(6, 3, 12), (6, 3, 11), (4, 7, 30), (1, 2, 5), (5, 2, 9)])
def test_prolora_expansion_is_the_codes_gather(rank, copies, width):
    """3.9.2: row k of copy i is the chunk's row ``(k + i s) mod r``."""
    part, stride = -(-width // copies), max(rank // copies, 1)
    chunk = torch.randn(rank, part).double().requires_grad_()
    found = expanded(chunk, width)
    for i in range(copies):
        for k in range(rank):
            block = found[k, i * part : (i + 1) * part]
            assert torch.equal(block, chunk[(k + i * stride) % rank, : len(block)])
    if width == copies * part:
        found.sum().backward()
        assert (chunk.grad == copies).all()


def test_prolora_blocks_depend_on_their_displacement_alone():
    """3.9.3: with u = 0, m = n and a stride of r / m there are m distinct blocks."""
    m, rank, part = 3, 6, 4
    family = PRoLoRA(*SETTINGS, sharing_in=m, sharing_out=m, unshared=0)
    adapter = family.probe(site_of("0.q", m * part, m * part), rank, 1.0, 0, ALONE).double()
    blocks = adapter.delta_weight().reshape(m, part, m, part).permute(0, 2, 1, 3)
    for i in range(m):
        for j in range(m):
            torch.testing.assert_close(blocks[i, j], blocks[(i + 1) % m, (j + 1) % m])
    distinct = {tuple(block.flatten().round(decimals=9).tolist()) for row in blocks for block in row}
    assert len(distinct) == m


def test_prolora_draws_both_parts_within_the_bounds_of_the_whole_width():
    """3.9.4, the rectified initialisation."""
    site = site_of("0.q", 384, 384)
    adapter = PRoLoRA(*SETTINGS, sharing_in=3, sharing_out=3, unshared=2).build(site, 66, 0, ALONE)
    bound = 1 / math.sqrt(384)
    for part in (adapter.chunk_A, adapter.own_A):
        assert part.abs().max() <= bound
    assert adapter.chunk_A.abs().max() > 0.99 * bound
    assert not adapter.delta_weight().any()


# -- AdaLoRA's parametrisation (6.9.1, 6.9.5) -------------------------------------------------------------------------


def test_svd_at_the_first_step_only_the_singular_values_have_a_gradient():
    model, batch = made("svd", training=True)
    model.enable(dict.fromkeys(model.ranks, 2), seed=0)
    backward(model, batch)
    found = {key.rpartition(".")[2] for key, p in model.adapters.named_parameters() if p.grad.any()}
    assert found == {"E"}


def test_svd_masked_is_sliced():
    torch.manual_seed(0)
    site = site_of("0.q", 7, 5)
    adapter = SVD(*SETTINGS, std=0.02).probe(site, 4, 1.0, 0, ALONE).double()
    live = [0, 2]
    sliced = LowRank(adapter.A[live].detach(), (adapter.B * adapter.E)[:, live].detach(), 2.0, 0.0)
    with torch.no_grad():
        adapter.E[[1, 3]] = 0
    torch.testing.assert_close(adapter.delta_weight(), sliced.delta_weight())


# -- VeRA and DoRA, as PEFT has them ----------------------------------------------------------------------------------


def in_peft(config):
    """A tiny BERT in PEFT's hands, float64."""
    from peft import get_peft_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return get_peft_model(make_backbone("bert", dtype=torch.float64), config)


TARGETS = ["attention.self.query", "attention.self.value", "intermediate.dense"]


def ours_for(family, rank):
    backbone = make_backbone("bert", dtype=torch.float64)
    space = SearchSpace([{"kind": "lora", "role": ["q", "v", "up"]}], [], None, [], False, "kind")
    model = AdaptedModel(backbone, space.resolve(survey(backbone)), family, [])
    model.enable(dict.fromkeys(model.ranks, rank), seed=0)
    return model.eval(), make_batch(backbone)


def trained_alike(theirs, model, batch, pairs, times=3):
    """Both trained by the same steps; logits before and after, theirs and ours."""
    found = []
    for whole, parameters in ((theirs, [p for p, _ in pairs]), (model, [p for _, p in pairs])):
        optimizer = torch.optim.SGD(parameters, lr=0.5)
        answers = []
        for _ in range(times):
            value = whole(**{key: v for key, v in batch.items() if key != "labels"}).logits
            answers.append(value.detach())
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(value, batch["labels"]).backward()
            optimizer.step()
        found.append(torch.stack(answers))
    return found


def test_vera_is_pefts():
    from peft import VeraConfig

    config = VeraConfig(r=6, target_modules=TARGETS, d_initial=0.1, vera_dropout=0.0, projection_prng_key=3)
    theirs = in_peft(config).eval()
    model, batch = ours_for(VeRA("constant", 1.0, 0.0, initial=0.1), 6)
    layers = {key: layer for key, layer in theirs.get_base_model().named_modules() if hasattr(layer, "vera_lambda_b")}
    assert layers.keys() == {model.site(name).sink.module for name in model.held}
    pool = model.adapter("0.q").shared
    first = next(iter(layers.values()))
    assert first.vera_A["default"].shape == pool.A.shape
    assert first.vera_B["default"].shape == pool.B.shape
    bounds = {"A": math.sqrt(6 / pool.A.shape[1]), "B": math.sqrt(6 / 6)}
    for key, bound in bounds.items():
        for value in (getattr(pool, key), getattr(first, f"vera_{key}")["default"]):
            assert 0.9 * bound < value.abs().max() <= bound
    with torch.no_grad():
        pool.A.copy_(first.vera_A["default"])
        pool.B.copy_(first.vera_B["default"])
    pairs = []
    for name in model.held:
        layer, adapter = layers[model.site(name).sink.module], model.adapter(name)
        assert torch.equal(layer.vera_lambda_d["default"].double(), adapter.u.double())
        pairs += [(layer.vera_lambda_d["default"], adapter.u), (layer.vera_lambda_b["default"], adapter.v)]
    expected, found = trained_alike(theirs, model, batch, pairs)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    assert not torch.allclose(found[0], found[-1])


def test_dora_is_pefts():
    from peft import LoraConfig

    config = LoraConfig(r=3, lora_alpha=6, target_modules=TARGETS, use_dora=True, lora_dropout=0.0)
    theirs = in_peft(config).eval()
    model, batch = ours_for(DoRA(*SETTINGS), 3)
    layers = {key: layer for key, layer in theirs.get_base_model().named_modules() if hasattr(layer, "lora_A")}
    pairs = []
    for name in model.held:
        layer, adapter = layers[model.site(name).sink.module], model.adapter(name)
        lengths = layer.lora_magnitude_vector["default"].weight
        torch.testing.assert_close(lengths.detach(), adapter.m.detach(), rtol=1e-12, atol=0)
        with torch.no_grad():
            adapter.A.copy_(layer.lora_A["default"].weight)
        pairs += [(layer.lora_A["default"].weight, adapter.A), (layer.lora_B["default"].weight, adapter.B)]
        pairs.append((lengths, adapter.m))
    expected, found = trained_alike(theirs, model, batch, pairs)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    assert not torch.allclose(found[0], found[-1])


def test_dora_moves_direction_and_length_apart():
    model, _ = ours_for(DoRA(*SETTINGS), 3)
    randomise(model)
    adapter = model.adapter("0.q")
    weight = model.frozen_weight("0.q")
    new = weight + adapter.delta_weight()
    torch.testing.assert_close(new.norm(dim=1), adapter.m.abs())
    low = weight + 2.0 * adapter.B @ adapter.A
    cosines = torch.nn.functional.cosine_similarity(new, low, dim=1)
    torch.testing.assert_close(cosines, adapter.m.sign())
