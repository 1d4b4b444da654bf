"""The attachment contract: every architecture of the layout table passes all of it."""

import copy
import dataclasses

import pytest
import torch
import transformers

from heterolora.adapters.lora import LoRA
from heterolora.errors import SettingError
from heterolora.layouts import LAYOUTS, find_layouts
from heterolora.linear import features
from heterolora.model import AdaptedModel
from heterolora.sites import Tap
from heterolora.space import SearchSpace, survey
from tests.architectures import ARCHITECTURES, ENCODERS, KINDS, SINGLE, make_backbone, make_batch, make_config, shown
from tests.blocks import BLOCKS, Parallel, PostLN, by_hand
from tests.conftest import adapt, randomise, some_sites

COMPILED = [
    pytest.param(name, marks=pytest.mark.medium if name == "bert" else pytest.mark.slow) for name in ARCHITECTURES
]


def ranks_everywhere(model, rank=3):
    return dict.fromkeys(model.ranks, rank)


def logits(model, batch):
    return model(**{k: v for k, v in batch.items() if k != "labels"}).logits


def capture_taps(model, batch):
    """The values at every tap, read by hooks of the test's own, after everything that joins them."""
    seen, handles = {}, []
    for stream, stack in model.space.survey.stacks.items():
        for index in range(stack.num_taps):
            if not stack.has_tap(index):
                continue
            tap = Tap(index, stream)
            point = stack.read(tap)
            wanted, calls = (0 if point.call is None else point.call), iter(range(100))

            def keep(value, tap=tap, wanted=wanted, calls=calls):
                if next(calls) == wanted:
                    seen[tap] = value.reshape((*batch["input_ids"].shape, -1)).detach().clone()

            module = model.backbone.get_submodule(point.module)
            if point.side == "pre":
                handles.append(module.register_forward_pre_hook(lambda m, a, p=point, k=keep: k(a[p.index])))
            else:
                handles.append(
                    module.register_forward_hook(
                        lambda m, a, o, p=point, k=keep: k(o if p.index is None else o[p.index])
                    )
                )
    logits(model, batch)
    for handle in handles:
        handle.remove()
    return seen


def test_every_layout_entry_has_a_tiny_model_and_a_formula():
    assert set(BLOCKS) == set(ARCHITECTURES)
    configs = [make_config(name) for name in ARCHITECTURES]
    tested = {(config.model_type, id(layout)) for config in configs for layout in find_layouts(config)}
    assert tested == {(name, id(layout)) for name, group in LAYOUTS.items() for layout in group}


def test_each_role_is_found_once_a_module(adapted):
    for stream, stack in adapted.space.survey.stacks.items():
        for layer, block in enumerate(stack.blocks):
            sites = [s for s in adapted.space.sites if (s.layer, s.stream, s.kind) == (layer, stream, "lora")]
            if block in stack.blocks[:layer]:  # a shared block: its sites are those of the first layer that uses it
                assert not sites
                continue
            linears = [m for m in adapted.backbone.get_submodule(block).modules() if features(m)]
            assert len({site.role for site in sites}) == len({site.source.module for site in sites}) == len(linears)


def test_shortcuts_are_those_that_the_architecture_can_have(adapted, architecture):
    """DESIGN.md section 3; parallel residuals have no feed-forward tap, and streams are never crossed."""
    for stream, stack in adapted.space.survey.stacks.items():
        depth = len(stack.blocks)
        expected = {
            (start, start + span)
            for span in (1, 2, 3, 4)
            for start in range(2 * depth + 1 - span)
            if not isinstance(BLOCKS[architecture], Parallel) or start % 2 == span % 2 == 0
        }
        found = [s for s in adapted.space.sites if s.kind == "shortcut" and s.stream == stream]
        assert sorted((site.source.index, site.sink.index) for site in found) == sorted(expected)
        assert {(site.source.stream, site.sink.stream) for site in found} == {(stream, stream)}
    assert len({site.name for site in adapted.space.sites}) == len(adapted.space.sites)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train_dropout_0.5"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_zero_deltas_leave_the_function_bit_identical(architecture, training, dtype):
    backbone = make_backbone(architecture, dropout=0.5, dtype=dtype).train(training)
    backbone.requires_grad_(False)  # torch chooses attention kernels by what needs a gradient
    batch = make_batch(backbone)

    @torch.no_grad()
    def run(model):
        torch.manual_seed(1)
        return logits(model, batch)

    expected = run(backbone)
    model = adapt(backbone)
    assert torch.equal(run(model), expected)  # no adapter
    model.enable(ranks_everywhere(model), seed=0)
    assert torch.equal(run(model), expected)  # B = 0
    randomise(model)
    assert not torch.equal(run(model), expected)
    with model.disabled():
        assert torch.equal(run(model), expected)  # off
    assert not torch.equal(run(model), expected)


def test_taps_are_the_residual_stream(adapted, batch):
    taps = capture_taps(adapted, batch)
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    if "decoder" in adapted.space.survey.stacks:
        inputs["decoder_input_ids"] = adapted.backbone._shift_right(batch["input_ids"])
    output = adapted.backbone.base_model(**inputs, output_hidden_states=True)
    for stream, stack in adapted.space.survey.stacks.items():
        states = output[f"{stream}_hidden_states" if stream else "hidden_states"]
        assert len(states) == len(stack.blocks) + 1
        for layer in range(len(stack.blocks)):  # the last state may be normed once more
            torch.testing.assert_close(taps[Tap(2 * layer, stream)], states[layer], rtol=0, atol=0)
    known = [Tap(i, s) for s, k in adapted.space.survey.stacks.items() for i in range(k.num_taps) if k.has_tap(i)]
    assert taps.keys() == set(known)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train_dropout_0.5"])
def test_a_delta_changes_exactly_its_sink(architecture, training):
    """A shortcut's delta is added to its sink's tap, whole, past every dropout, and to no earlier tap."""
    backbone = make_backbone(architecture, dropout=0.5).train(training)
    batch = make_batch(backbone)
    model = adapt(backbone, include=["shortcut"])

    @torch.no_grad()
    def taps():
        torch.manual_seed(5)
        return capture_taps(model, batch)

    before = taps()
    for site in model.space.sites:
        if site.span == 1 and isinstance(BLOCKS[architecture], PostLN):
            continue  # before a post-norm the sum itself is no tap: test_deltas_follow_the_formula covers it
        model.enable({site.name: 2}, seed=0)
        randomise(model)
        after = taps()
        expected = model.adapter(site.name)(after[site.source])
        scale = max(1.0, after[site.sink].abs().max().item())
        torch.testing.assert_close(after[site.sink] - before[site.sink], expected, rtol=0, atol=1e-12 * scale)
        for tap in before:
            if tap.stream == site.sink.stream and tap.index < site.sink.index:
                assert torch.equal(after[tap], before[tap]), (site.name, tap)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train_dropout_0.5"])
def test_deltas_follow_the_formula(architecture, training):
    """All sites on, spans 1 to 4: every tap equals the stack written out by hand with merged LoRA weights."""
    check_formula(adapt(make_backbone(architecture, dropout=0.5).train(training)), architecture)


def check_formula(model, architecture):
    batch = make_batch(model.backbone)
    model.enable(ranks_everywhere(model), seed=0)
    randomise(model, std=0.1)
    found = {}

    def run():
        torch.manual_seed(5)
        found.update(capture_taps(model, batch))

    with torch.no_grad():
        expected = by_hand(model, architecture, run)
    tolerance = 1e-5 if architecture in SINGLE else 1e-9
    assert expected.keys() == found.keys()
    for tap, value in expected.items():
        atol = tolerance * max(1.0, value.abs().max().item())
        torch.testing.assert_close(found[tap], value, rtol=tolerance, atol=atol, msg=lambda m, t=tap: f"{t}: {m}")


@pytest.mark.parametrize("spans", [[1, 2], [2], [1, 2, 3, 4]], ids=str)
@pytest.mark.parametrize("architecture", ["opt_pre", "opt_post", "llama", "qwen2"])
def test_renorm_follows_the_papers_formula(architecture, spans):
    """REFERENCE.md 1.2, the norm only after adds of span 2 or more that are on."""
    model = adapt(make_backbone(architecture), spans=spans, renorm=True)
    check_formula(model, architecture)
    batch = make_batch(model.backbone)
    with model.disabled():
        off = logits(model, batch)
    model.enable({}, seed=0)
    assert torch.equal(logits(model, batch), off)


def test_renorm_needs_a_norm_in_the_layout():
    with pytest.raises(SettingError, match=r"search_space\.renorm"):
        adapt(make_backbone("bert"), renorm=True)


def test_span_1_deltas_do_not_pass_through_dropout(architecture):
    """Their gradient is the same linear function of the tap in training mode: no zeros, no factor 1/(1-p)."""
    backbone = make_backbone(architecture, dropout=0.5).train()
    batch = make_batch(backbone)
    if isinstance(BLOCKS[architecture], Parallel):
        with pytest.raises(SettingError, match="matches no site"):
            adapt(backbone, include=["shortcut"], spans=[1])
        return
    model = adapt(backbone, include=["shortcut"], spans=[1])
    for name in model.ranks:
        seen = {}
        torch.manual_seed(5)
        with model.probing(lambda s, x, g, seen=seen: seen.update(gradient=g.reshape(-1, g.shape[-1])), [name]) as zero:
            loss = logits(model, batch).square().sum()
            torch.autograd.grad(loss, zero)
        rows = seen["gradient"][batch["attention_mask"].reshape(-1).bool()]
        touched = rows.abs().sum(1) > 0
        # dropout on the delta would put exact zeros in about half of the entries of every row it touches
        assert (rows[touched] == 0).double().mean() < 0.05, name


def gradients(model, batch, seed=2):
    torch.manual_seed(seed)
    model.zero_grad()
    torch.nn.functional.cross_entropy(logits(model, batch), batch["labels"]).backward()
    return {name: p.grad.clone() for name, p in model.adapters.named_parameters()}


RECOMPUTES = shown(sorted(name for name in ARCHITECTURES if not name.startswith("albert")), KINDS)
# gptj's attention is float32, and its sums come in another order without a cache.
CLOSE = {
    name: {"rtol": 1e-3, "atol": 1e-5} if name == "gptj" else {"rtol": 1e-9, "atol": 1e-12} for name in ARCHITECTURES
}


def test_albert_cannot_recompute_and_says_so():
    with pytest.raises(SettingError, match=r"model\.gradient_checkpointing=True: Albert"):
        adapt(make_backbone("albert")).gradient_checkpointing()


def checkpointing_model(architecture):
    backbone = make_backbone(architecture, dropout=0.25).train()
    model = adapt(backbone)
    model.enable(ranks_everywhere(model, 2), seed=0)
    randomise(model)
    return model, make_batch(backbone)


@pytest.mark.parametrize("architecture", RECOMPUTES)
def test_gradient_checkpointing_gives_equal_gradients(architecture):
    model, batch = checkpointing_model(architecture)
    expected = gradients(model, batch)
    model.gradient_checkpointing()
    for name, gradient in gradients(model, batch).items():
        torch.testing.assert_close(gradient, expected[name], **CLOSE[architecture])


@pytest.mark.parametrize("architecture", RECOMPUTES)
def test_two_forwards_before_one_backward_under_checkpointing(architecture):
    """A recomputed block must see the taps of its own forward."""
    model, batch = checkpointing_model(architecture)
    other = make_batch(model.backbone, seed=11)

    def run():
        torch.manual_seed(2)
        model.zero_grad()
        (logits(model, batch).square().sum() + logits(model, other).sum()).backward()
        return {name: p.grad.clone() for name, p in model.adapters.named_parameters()}

    expected = run()
    model.gradient_checkpointing()
    for name, gradient in run().items():
        torch.testing.assert_close(gradient, expected[name], **CLOSE[architecture])


@pytest.mark.parametrize("architecture", RECOMPUTES)
def test_checkpointing_switched_on_from_outside_is_refused(architecture):
    model, batch = checkpointing_model(architecture)
    model.backbone.activation_checkpointing_enable()
    with pytest.raises(RuntimeError, match=r"AdaptedModel\.gradient_checkpointing"):
        logits(model, batch)


def test_observed_gradient_is_that_of_the_map(adapted, batch):
    """G = sum of sink gradient times source, at every site without an adapter, equals autograd's for a real map.

    A layer that is called several times in a forward (deberta's, albert's) is observed as often.
    """
    observed = {}

    def keep(site, source, gradient):
        G = gradient.reshape(-1, site.out_features).T @ source.reshape(-1, site.in_features)
        observed[site.name] = observed.get(site.name, 0) + G

    def loss():
        return torch.nn.functional.cross_entropy(logits(adapted, batch), batch["labels"])

    with adapted.probing(keep, adapted.ranks) as zero:
        torch.autograd.grad(loss(), zero)
    assert observed.keys() == adapted.ranks.keys()
    assert all(p.grad is None for p in adapted.parameters())
    adapted.enable(ranks_everywhere(adapted, 2), seed=0)
    loss().backward()
    for name, G in observed.items():
        adapter = adapted.adapter(name)
        torch.testing.assert_close(adapter.B.grad, adapter.scale * G @ adapter.A.detach().T, rtol=1e-9, atol=1e-12)
        assert torch.count_nonzero(adapter.A.grad) == 0  # B = 0


def test_lora_equals_merged_weights_where_the_linear_is_no_nn_linear(batch):
    """A hook does not care what computes its sink."""

    class Wrapped(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner
            self.in_features, self.out_features = inner.in_features, inner.out_features

        def forward(self, x):
            return torch.einsum("...i,oi->...o", x, self.inner.weight) + self.inner.bias

    backbone = make_backbone("bert")
    batch = make_batch(backbone)
    for layer in backbone.bert.encoder.layer:
        layer.attention.self.query = Wrapped(layer.attention.self.query)
    model = adapt(backbone, include=[{"kind": "lora", "role": ["q"]}])
    model.enable(ranks_everywhere(model), seed=0)
    randomise(model)
    actual = logits(model, batch)
    with torch.no_grad(), model.disabled():
        for layer, block in enumerate(backbone.bert.encoder.layer):
            adapter = model.adapter(f"{layer}.q")
            block.attention.self.query.inner.weight += adapter.scale * adapter.B @ adapter.A
        torch.testing.assert_close(logits(model, batch), actual, rtol=1e-10, atol=1e-10)


def test_the_backbone_keeps_its_names_and_values(backbone, batch):
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    modules = [name for name, _ in backbone.named_modules()]
    model = adapt(backbone)
    model.enable(ranks_everywhere(model), seed=0)
    randomise(model)
    logits(model, batch).sum().backward()
    assert [name for name, _ in backbone.named_modules()] == modules
    after = backbone.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_only_adapters_and_head_are_trainable(adapted):
    lora, _, shortcut = some_sites(adapted)
    adapted.enable({lora: 2, shortcut: 1}, seed=0)
    trainable = {name for name, p in adapted.named_parameters() if p.requires_grad}
    expected = {f"adapters.{name.replace('.', '/')}.{factor}" for name in (lora, shortcut) for factor in "AB"}
    assert trainable == expected | {f"backbone.{name}" for name in adapted.head}


def test_held_and_active_parameters_are_counted(adapted):
    q, shortcut = (adapted.space[name] for name in some_sites(adapted)[::2])
    adapted.enable({q.name: 3, shortcut.name: 2}, seed=0)
    held = 3 * (q.in_features + q.out_features) + 2 * (shortcut.in_features + shortcut.out_features)
    assert adapted.held_parameters == adapted.active_parameters == held
    adapted.switch_off([q.name])
    assert adapted.held_parameters == held
    assert adapted.active_parameters == 2 * (shortcut.in_features + shortcut.out_features)


def test_adapters_are_nested_in_the_rank_and_drawn_by_name(adapted):
    adapted.enable(ranks_everywhere(adapted, 2), seed=5)
    small = {name: adapted.adapter(name).A.clone() for name in adapted.ranks}
    adapted.enable({name: 7 for name in list(adapted.ranks)[::2]}, seed=5)
    for name, rank in adapted.ranks.items():
        if rank:
            assert torch.equal(adapted.adapter(name).A[:2], small[name])
    adapted.enable(ranks_everywhere(adapted, 2), seed=6)
    assert not torch.equal(adapted.adapter(some_sites(adapted)[0]).A, small[some_sites(adapted)[0]])
    first = list(small.values())
    assert not any(torch.equal(a, b) for i, a in enumerate(first) for b in first[:i] if a.shape == b.shape)


def test_state_dict_round_trip_and_refusal(adapted, batch):
    lora, _, shortcut = some_sites(adapted)
    adapted.enable({lora: 2, shortcut: 3}, seed=0)
    randomise(adapted)
    state = {name: value.clone() for name, value in adapted.adapter_state_dict().items()}
    expected = logits(adapted, batch)
    adapted.enable({lora: 2, shortcut: 3}, seed=1)
    adapted.load_adapter_state_dict(state)
    assert torch.equal(logits(adapted, batch), expected)
    adapted.enable({lora: 2}, seed=1)
    with pytest.raises(KeyError, match="unexpected"):
        adapted.load_adapter_state_dict(state)
    adapted.enable({lora: 2, shortcut: 4}, seed=1)
    with pytest.raises(RuntimeError, match="size mismatch"):
        adapted.load_adapter_state_dict(state)


def test_a_copy_is_independent(adapted, batch):
    adapted.enable(ranks_everywhere(adapted, 2), seed=0)
    randomise(adapted)
    expected = logits(adapted, batch)
    twin = copy.deepcopy(adapted)
    assert torch.equal(logits(twin, batch), expected)
    with torch.no_grad():
        for parameter in twin.adapters.parameters():
            parameter.zero_()
    assert torch.equal(logits(adapted, batch), expected)
    with adapted.disabled():
        plain = logits(adapted, batch)
    assert torch.equal(logits(twin, batch), plain)
    twin.enable({}, seed=0)  # removing the twin's hooks must not touch the original's
    assert torch.equal(logits(adapted, batch), expected)


def test_hidden_states_asked_for_before_attaching_still_see_the_deltas(architecture):
    backbone = make_backbone(architecture)
    batch = {k: v for k, v in make_batch(backbone).items() if k != "labels"}
    backbone(**batch, output_hidden_states=True)
    model = adapt(backbone)
    model.enable(ranks_everywhere(model), seed=0)
    randomise(model)
    output, taps = model(**batch, output_hidden_states=True), capture_taps(model, batch)
    for stream, stack in model.space.survey.stacks.items():
        states = output[f"{stream}_hidden_states" if stream else "hidden_states"]
        for layer in range(len(stack.blocks)):
            torch.testing.assert_close(states[layer], taps[Tap(2 * layer, stream)], rtol=0, atol=0)


def test_adapters_are_float32_on_a_half_precision_backbone(architecture):
    backbone = make_backbone(architecture, dtype=torch.bfloat16)
    batch = make_batch(backbone)
    model = adapt(backbone)
    model.enable(ranks_everywhere(model), seed=0)
    randomise(model)
    out = logits(model, batch)
    assert {p.dtype for p in model.adapters.parameters()} == {torch.float32}
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.adapters.parameters())


def test_autocast_runs(architecture):
    backbone = make_backbone(architecture, dtype=torch.float32)
    batch = make_batch(backbone)
    model = adapt(backbone)
    model.enable(ranks_everywhere(model), seed=0)
    randomise(model)
    exact = logits(model, batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = logits(model, batch)
    assert (out.float() - exact).abs().max() < 0.1 * exact.abs().max()


def test_enabling_or_switching_an_unknown_site_is_an_error(adapted):
    with pytest.raises(KeyError, match=r"9\.q"):
        adapted.enable({"9.q": 1}, seed=0)
    first, second, _ = some_sites(adapted)
    adapted.enable({first: 1}, seed=0)
    with pytest.raises(KeyError, match=second):
        adapted.switch_off([second])


def test_swapped_adapters_come_back(adapted, batch):
    first, second, _ = some_sites(adapted)
    adapted.enable({first: 2, second: 1}, seed=0)
    randomise(adapted)
    adapted.switch_off([second])
    before, held = logits(adapted, batch), adapted.adapter(first)

    def fail():
        with adapted.swapped({}):
            assert adapted.held_parameters == 0
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert adapted.adapter(first) is held
    assert torch.equal(logits(adapted, batch), before)


@pytest.mark.parametrize("architecture", shown(sorted(ARCHITECTURES.keys() - ENCODERS), ("llama", "gpt2")))
@pytest.mark.parametrize("beams", [1, 3])
def test_generation_with_a_cache_equals_generation_without(architecture, beams):
    auto = transformers.AutoModelForSeq2SeqLM if architecture.startswith("t5") else transformers.AutoModelForCausalLM
    backbone = make_backbone(architecture, auto=auto)
    model = adapt(backbone)
    assert not any("lm_head" in name and p.requires_grad for name, p in adapt_frozen(backbone).named_parameters())
    model.enable(ranks_everywhere(model), seed=0)
    randomise(model, std=0.05)
    prompt = torch.tensor([[5, 9, 11, 4], [7, 3, 8, 6]])
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "num_beams": beams}
    options |= {"attention_mask": torch.ones_like(prompt), "output_scores": True, "return_dict_in_generate": True}
    cached = backbone.generate(prompt, use_cache=True, **options)
    plain = backbone.generate(prompt, use_cache=False, **options)
    assert torch.equal(cached.sequences, plain.sequences)
    tolerance = 1e-4 if architecture in SINGLE else 1e-5  # transformers hands out scores in float32
    for with_cache, without in zip(cached.scores, plain.scores, strict=True):
        torch.testing.assert_close(with_cache, without, rtol=tolerance, atol=tolerance)


def adapt_frozen(backbone):
    """Attached without a head, as a library user would for a language model: nothing of it is trained."""
    space = SearchSpace(["lora"], [], None, [1, 2], False, "kind").resolve(survey(backbone))
    return AdaptedModel(backbone, space, LoRA("constant", 2.0, 0.0))


@pytest.mark.filterwarnings("ignore:.*torch.autograd.function.Function.*should not be instantiated")  # bloom's gelu
@pytest.mark.parametrize("architecture", COMPILED)
def test_compiled_equals_eager_and_follows_what_is_switched(architecture):
    """In one graph, without a break; switching sites afterwards must not be ignored."""
    backbone = make_backbone(architecture)
    batch = make_batch(backbone)
    model = adapt(backbone)
    model.enable(ranks_everywhere(model), seed=0)
    randomise(model, std=0.05)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)

    def check():
        with torch.no_grad():
            torch.testing.assert_close(logits(compiled, batch), logits(model, batch), rtol=1e-9, atol=1e-9)

    check()
    everything = logits(model, batch)
    model.switch_off(model.held[::2])
    check()
    assert not torch.equal(logits(model, batch), everything)
    with model.disabled():
        check()
    model.enable({model.held[0]: 2}, seed=1)
    randomise(model)
    check()


def test_attaching_to_a_compiled_backbone_is_refused():
    """Hooks that come after a compilation are ignored without a word."""
    with pytest.raises(SettingError, match=r"compiled.*attach first"):
        adapt(torch.compile(make_backbone("bert"), backend="eager"))
    backbone = make_backbone("bert")
    backbone.compile(backend="eager")
    with pytest.raises(SettingError, match=r"compiled.*attach first"):
        adapt(backbone)


def test_a_backbone_whose_config_breaks_the_hooks_is_refused():
    backbone = make_backbone("opt_pre")
    backbone.config.layerdrop = 0.1
    with pytest.raises(SettingError, match="layerdrop"):
        adapt(backbone)


def test_a_model_that_is_observed_cannot_be_observed_again(adapted):
    name = some_sites(adapted)[0]
    with (
        adapted.probing(lambda *seen: None, [name]),
        pytest.raises(RuntimeError, match="observed already"),
        adapted.probing(lambda *seen: None, [name]),
    ):
        pass


def test_a_layout_whose_point_is_no_tuple_says_so():
    backbone = make_backbone("bert")
    layout = dataclasses.replace(LAYOUTS["bert"][0], out_add=("B.post[0]",))
    space = SearchSpace(["shortcut"], [], None, [2], False, "kind").resolve(survey(backbone, layout))
    model = AdaptedModel(backbone, space, LoRA("constant", 2.0, 0.0))
    model.enable(ranks_everywhere(model), seed=0)
    with pytest.raises(RuntimeError, match=r"encoder\.layer\.0 gives a tensor and no tuple"):
        logits(model, make_batch(backbone))
