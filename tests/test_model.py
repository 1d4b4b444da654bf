"""The attachment contract: every architecture of the layout table passes all of it."""

import copy

import pytest
import torch
import transformers

from heterolora.errors import SettingError
from heterolora.layouts import LAYOUTS
from heterolora.sites import Tap
from tests.architectures import ARCHITECTURES, make_backbone, make_batch
from tests.conftest import adapt, randomise


def ranks_everywhere(model, rank=3):
    return dict.fromkeys(model.ranks, rank)


def logits(model, batch):
    return model(**{k: v for k, v in batch.items() if k != "labels"}).logits


def capture_taps(model, batch):
    """The values at every tap, read by hooks of the test's own, after everything that joins them."""
    layout = model.space.survey.layout
    seen, handles = {}, []
    for index in range(layout.num_taps):
        if not layout.has_tap(index):
            continue
        point = layout.read(Tap(index))
        module = model.backbone.get_submodule(point.module)

        def keep(value, index=index):
            seen[index] = value.reshape((*batch["input_ids"].shape, -1)).detach().clone()

        if point.side == "pre":
            handles.append(module.register_forward_pre_hook(lambda m, a, p=point, k=keep: k(a[p.index])))
        else:
            handles.append(
                module.register_forward_hook(lambda m, a, o, p=point, k=keep: k(o if p.index is None else o[p.index]))
            )
    logits(model, batch)
    for handle in handles:
        handle.remove()
    return seen


def test_every_layout_entry_has_a_tiny_model():
    variants = {(options["model_type"], options.get("do_layer_norm_before")) for options in ARCHITECTURES.values()}
    entries = {(name, entry.when.get("do_layer_norm_before")) for name, group in LAYOUTS.items() for entry in group}
    assert entries == variants


def test_each_role_is_found_once_a_layer(adapted):
    for layer in range(3):
        sites = [site for site in adapted.space.sites if site.layer == layer and site.kind == "lora"]
        roles = [site.role for site in sites]
        modules = {site.source.module for site in sites}
        assert len(roles) == len(set(roles)) == len(modules) >= 6


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train_dropout_0.5"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_zero_deltas_leave_the_function_bit_identical(architecture, training, dtype):
    backbone = make_backbone(architecture, dropout=0.5, dtype=dtype).train(training)
    batch = make_batch(backbone)

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
    states = adapted.backbone.base_model(
        **{k: v for k, v in batch.items() if k != "labels"}, output_hidden_states=True
    ).hidden_states
    depth = len(states) - 1
    for layer in range(depth):  # the last state may be normed once more
        torch.testing.assert_close(taps[2 * layer], states[layer], rtol=0, atol=0)
    assert len(taps) == 2 * depth + 1


def test_a_delta_changes_exactly_its_sink(adapted, batch):
    """A shortcut's delta is added to its sink's tap, to the last digit, and to no earlier tap."""
    before = capture_taps(adapted, batch)
    for site in adapted.space.sites:
        if site.kind != "shortcut" or (site.span == 1 and adapted.space.survey.model_type != "llama"):
            continue  # before a post-norm the sum itself is no tap: test_deltas_follow_the_formula covers it
        adapted.enable({site.name: 2}, seed=0)
        randomise(adapted)
        after = capture_taps(adapted, batch)
        sink, source = site.sink.index, site.source.index
        expected = adapted.adapter(site.name)(after[source])
        torch.testing.assert_close(after[sink] - before[sink], expected, rtol=0, atol=1e-12)
        for index in range(sink):
            assert torch.equal(after[index], before[index]), (site.name, index)


def formula(model, batch):
    """The stack by hand (DESIGN.md section 3), calling the blocks' own attention and feed-forward modules."""
    backbone, layout = model.backbone, model.space.survey.layout
    kind = backbone.config.model_type
    captured = {}
    block0 = backbone.get_submodule(layout.blocks[0])
    handle = block0.register_forward_pre_hook(
        lambda m, a, k: captured.setdefault("call", (a, k)) and None, with_kwargs=True
    )
    plain = copy.deepcopy(model)
    plain.enable({}, seed=0)
    with model.disabled():
        logits(model, batch)
    handle.remove()
    args, kwargs = captured["call"]
    kwargs = {key: value for key, value in kwargs.items() if "cache" not in key and key != "past_key_values"}
    taps = {0: args[0]}
    longer_sinks = {s.sink.index for s in model.space.sites if s.kind == "shortcut" and s.span > 1}

    def deltas(index, longer):
        total = 0
        for site in model.space.sites:
            if site.kind == "shortcut" and site.sink.index == index and (site.span > 1) == longer:
                total = total + model.adapter(site.name)(taps[site.source.index])
        return total

    for layer, path in enumerate(layout.blocks):
        block, x = plain.backbone.get_submodule(path), taps[2 * layer]
        # Attention with LoRA inside: merged weights on a copy, an independent way to the same function.
        attention = block.attention.self if kind == "bert" else block.self_attn
        sites = [site for site in model.space.sites if site.layer == layer and site.kind == "lora"]
        names = {site.role: site.source.module for site in sites}
        with torch.no_grad():
            for role, path_of_role in names.items():
                adapter = model.adapter(f"{layer}.{role}")
                target = plain.backbone.get_submodule(path_of_role)
                target.weight += adapter.scale * adapter.B @ adapter.A
        if kind == "bert":
            attended = block.attention.output.dense(attention(x, attention_mask=args[1])[0])
            h = block.attention.output.LayerNorm(x + deltas(2 * layer + 1, False) + attended)
            taps[2 * layer + 1] = h = h + deltas(2 * layer + 1, True)
            ffn = block.output.dense(block.intermediate(h))
            y = block.output.LayerNorm(h + deltas(2 * layer + 2, False) + ffn)
        else:
            llama = kind == "llama"
            pre = llama or backbone.config.do_layer_norm_before
            norm1 = block.input_layernorm if llama else block.self_attn_layer_norm
            norm2 = block.post_attention_layernorm if llama else block.final_layer_norm
            run = (lambda v, b=block: b.mlp(v)) if llama else (lambda v, b=block: b.fc2(b.activation_fn(b.fc1(v))))
            attended = attention(hidden_states=norm1(x) if pre else x, **kwargs)[0]
            h = x + deltas(2 * layer + 1, False) + attended
            h = (h if pre else norm1(h)) + deltas(2 * layer + 1, True)
            if model.space.renorm and 2 * layer + 1 in longer_sinks:
                h = (norm2 if llama else norm1)(h)
            taps[2 * layer + 1] = h
            y = h + deltas(2 * layer + 2, False) + run(norm2(h) if pre else h)
            y = y if pre else norm2(y)
        taps[2 * layer + 2] = y + deltas(2 * layer + 2, True)
        if model.space.renorm and 2 * layer + 2 in longer_sinks:
            taps[2 * layer + 2] = (norm1 if llama else norm2)(taps[2 * layer + 2])
    return taps


def test_deltas_follow_the_formula(adapted, batch):
    """All sites on, spans 1 to 4: every tap equals the stack written out by hand with merged LoRA weights."""
    adapted.enable(ranks_everywhere(adapted), seed=0)
    randomise(adapted, std=0.1)
    with torch.no_grad():
        expected, taps = formula(adapted, batch), capture_taps(adapted, batch)
    for index, value in expected.items():
        torch.testing.assert_close(taps[index], value, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("spans", [[1, 2], [2], [1, 2, 3, 4]], ids=str)
@pytest.mark.parametrize("architecture", ["opt_pre", "opt_post", "llama"])
def test_renorm_follows_the_papers_formula(architecture, spans):
    """REFERENCE.md 1.2, the norm only after adds of span 2 or more that are on."""
    backbone = make_backbone(architecture)
    batch = make_batch(backbone)
    model = adapt(backbone, spans=spans, renorm=True)
    model.enable(ranks_everywhere(model), seed=0)
    randomise(model, std=0.1)
    tolerance = 1e-5 if architecture == "llama" else 1e-9  # its norms compute in float32
    with torch.no_grad():
        expected, taps = formula(model, batch), capture_taps(model, batch)
    for index, value in expected.items():
        torch.testing.assert_close(taps[index], value, rtol=tolerance, atol=tolerance)
    with model.disabled():
        off = logits(model, batch)
    model.enable({}, seed=0)
    assert torch.equal(logits(model, batch), off)


def test_renorm_needs_a_norm_in_the_layout():
    with pytest.raises(SettingError, match=r"search_space\.renorm"):
        adapt(make_backbone("bert"), renorm=True)


def test_no_delta_passes_through_the_backbones_dropout(architecture):
    """With every dropout of the backbone at 0.5, a shortcut's delta arrives whole and unscaled at its sink."""
    backbone = make_backbone(architecture, dropout=0.5).train()
    batch = make_batch(backbone)
    model = adapt(backbone, include=["shortcut"], spans=[2])
    torch.manual_seed(5)
    before = capture_taps(model, batch)
    for site in model.space.sites:
        model.enable({site.name: 2}, seed=0)
        randomise(model)
        torch.manual_seed(5)
        after = capture_taps(model, batch)
        expected = model.adapter(site.name)(after[site.source.index])
        torch.testing.assert_close(after[site.sink.index] - before[site.sink.index], expected, rtol=0, atol=1e-12)


def test_span_1_deltas_do_not_pass_through_dropout(architecture):
    """Their gradient is the same linear function of the tap in training mode: no zeros, no factor 1/(1-p)."""
    backbone = make_backbone(architecture, dropout=0.5).train()
    batch = make_batch(backbone)
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


def checkpointing_model(architecture):
    backbone = make_backbone(architecture, dropout=0.25).train()
    model = adapt(backbone)
    model.enable(ranks_everywhere(model, 2), seed=0)
    randomise(model)
    return model, make_batch(backbone)


def test_gradient_checkpointing_gives_equal_gradients(architecture):
    model, batch = checkpointing_model(architecture)
    expected = gradients(model, batch)
    model.gradient_checkpointing()
    for name, gradient in gradients(model, batch).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-9, atol=1e-12)


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
        torch.testing.assert_close(gradient, expected[name], rtol=1e-9, atol=1e-12)


def test_checkpointing_switched_on_from_outside_is_refused(architecture):
    model, batch = checkpointing_model(architecture)
    model.backbone.activation_checkpointing_enable()
    with pytest.raises(RuntimeError, match=r"AdaptedModel\.gradient_checkpointing"):
        logits(model, batch)


def test_observed_gradient_is_that_of_the_map(adapted, batch):
    """G = sum of sink gradient times source, at every site without an adapter, equals autograd's for a real map."""
    observed = {}

    def keep(site, source, gradient):
        observed[site.name] = gradient.reshape(-1, site.out_features).T @ source.reshape(-1, site.in_features)

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
    adapted.enable({"0.q": 2, "1.shortcut_attn": 1}, seed=0)
    trainable = {name for name, p in adapted.named_parameters() if p.requires_grad}
    expected = {"adapters.0/q.A", "adapters.0/q.B", "adapters.1/shortcut_attn.A", "adapters.1/shortcut_attn.B"}
    assert trainable == expected | {f"backbone.{name}" for name in adapted.head}


def test_held_and_active_parameters_are_counted(adapted):
    q, shortcut = adapted.space["0.q"], adapted.space["1.shortcut_attn"]
    adapted.enable({"0.q": 3, "1.shortcut_attn": 2}, seed=0)
    held = 3 * (q.in_features + q.out_features) + 2 * (shortcut.in_features + shortcut.out_features)
    assert adapted.held_parameters == adapted.active_parameters == held
    adapted.switch_off(["0.q"])
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
    assert not torch.equal(adapted.adapter("0.q").A, small["0.q"])
    first = list(small.values())
    assert not any(torch.equal(a, b) for i, a in enumerate(first) for b in first[:i] if a.shape == b.shape)


def test_state_dict_round_trip_and_refusal(adapted, batch):
    adapted.enable({"0.q": 2, "1.shortcut_ffn": 3}, seed=0)
    randomise(adapted)
    state = {name: value.clone() for name, value in adapted.adapter_state_dict().items()}
    expected = logits(adapted, batch)
    adapted.enable({"0.q": 2, "1.shortcut_ffn": 3}, seed=1)
    adapted.load_adapter_state_dict(state)
    assert torch.equal(logits(adapted, batch), expected)
    adapted.enable({"0.q": 2}, seed=1)
    with pytest.raises(KeyError, match="unexpected"):
        adapted.load_adapter_state_dict(state)
    adapted.enable({"0.q": 2, "1.shortcut_ffn": 4}, seed=1)
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
    states = model(**batch, output_hidden_states=True).hidden_states
    taps = capture_taps(model, batch)
    for layer in range(len(states) - 1):
        torch.testing.assert_close(states[layer], taps[2 * layer], rtol=0, atol=0)


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
    adapted.enable({"0.q": 1}, seed=0)
    with pytest.raises(KeyError, match=r"0\.v"):
        adapted.switch_off(["0.v"])


def test_swapped_adapters_come_back(adapted, batch):
    adapted.enable({"0.q": 2, "0.v": 1}, seed=0)
    randomise(adapted)
    adapted.switch_off(["0.v"])
    before, held = logits(adapted, batch), adapted.adapter("0.q")

    def fail():
        with adapted.swapped({}):
            assert adapted.held_parameters == 0
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert adapted.adapter("0.q") is held
    assert torch.equal(logits(adapted, batch), before)


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES.keys() - {"bert"}))
def test_generation_with_a_cache_equals_generation_without(architecture):
    config = make_backbone(architecture).config
    torch.manual_seed(0)
    backbone = transformers.AutoModelForCausalLM.from_config(config).double().eval()
    model = adapt(backbone)
    model.enable(ranks_everywhere(model), seed=0)
    randomise(model)
    prompt = torch.tensor([[5, 9, 11, 4]])
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(prompt)}
    cached = backbone.generate(prompt, use_cache=True, **options)
    assert torch.equal(cached, backbone.generate(prompt, use_cache=False, **options))


def test_a_backbone_whose_config_breaks_the_hooks_is_refused():
    backbone = make_backbone("opt_pre")
    backbone.config.layerdrop = 0.1
    with pytest.raises(SettingError, match="layerdrop"):
        adapt(backbone)
