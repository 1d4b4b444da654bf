"""Every architecture's block written out by hand (DESIGN.md section 3), as an oracle for where deltas enter.

Only the modules inside a branch are the model's own; residual sums, norms and dropouts of the block are written here,
so that nothing is shared with the hooks or with the layout table. LoRA is merged into the weights of a copy.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn import functional

from heterolora.sites import Tap


@dataclass
class Call:
    """One call of one block in a forward of the adapted model: what it was given besides the stream."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    random_state: torch.Tensor

    @property
    def mask(self):
        return self.kwargs.get("attention_mask", self.args[1] if len(self.args) > 1 else None)

    @property
    def stateless(self) -> dict[str, Any]:
        """The keywords without the cache, which the first forward has filled."""
        return {k: v for k, v in self.kwargs.items() if "cache" not in k and k not in ("past_key_values", "layer_past")}


@dataclass
class Stream:
    """One residual stream while it is computed by hand."""

    model: Any
    stream: str
    taps: dict[Tap, torch.Tensor] = field(default_factory=dict)

    def deltas(self, index: int, longer: bool):
        """Sum of the deltas of span 1, or of the longer ones, that join a tap."""
        total: Any = 0
        for site in self.model.space.sites:
            if site.sink == Tap(index, self.stream) and (site.span > 1) == longer:
                total = total + self.model.adapter(site.name)(self.taps[site.source])
        return total

    def joined(self, index: int, value: torch.Tensor, norm: Any = None) -> torch.Tensor:
        """The tap: the value, the longer deltas, and the paper's second norm if it is asked for."""
        value = value + self.deltas(index, True)
        sinks = {site.sink for site in self.model.space.sites if (site.span or 0) > 1}
        if self.model.space.renorm and Tap(index, self.stream) in sinks:
            value = norm(value)
        self.taps[Tap(index, self.stream)] = value
        return value


Branch = Callable[[Any, torch.Tensor, Call], torch.Tensor]


@dataclass
class PostLN:
    """h = N1(x + d + attend(x)) + d', y = N2(h + d + feed(h)) + d'."""

    attend: Branch
    first: str
    feed: Branch
    second: str

    def run(self, block, stream: Stream, layer: int, call: Call) -> None:
        x = stream.taps[Tap(2 * layer, stream.stream)]
        first, second = block.get_submodule(self.first), block.get_submodule(self.second)
        h = first(self.attend(block, x, call) + x + stream.deltas(2 * layer + 1, False))
        h = stream.joined(2 * layer + 1, h, first)
        y = second(self.feed(block, h, call) + h + stream.deltas(2 * layer + 2, False))
        stream.joined(2 * layer + 2, y, second)


@dataclass
class PreLN:
    """h = x + d + attend(x) + d', y = h + d + feed(h) + d'; the branches have their own norms."""

    attend: Branch
    feed: Branch
    renorms: tuple[str, str] | None = None  # what the paper applies after a longer add into the middle, the output
    middle: Callable[..., torch.Tensor] = lambda block, h, call: h  # what else happens before the feed-forward
    carried: tuple[Callable[..., torch.Tensor], Callable[..., torch.Tensor]] = (lambda b, x: x, lambda b, h: h)

    def run(self, block, stream: Stream, layer: int, call: Call) -> None:
        x = stream.taps[Tap(2 * layer, stream.stream)]
        middle, out = [block.get_submodule(name) for name in self.renorms] if self.renorms else [None, None]
        h = self.carried[0](block, x) + self.attend(block, x, call)
        h = self.middle(block, h, call) + stream.deltas(2 * layer + 1, False)
        h = stream.joined(2 * layer + 1, h, middle)
        y = self.carried[1](block, h) + self.feed(block, h, call) + stream.deltas(2 * layer + 2, False)
        stream.joined(2 * layer + 2, y, out)


@dataclass
class Parallel:
    """y = x + attend(x) + feed(x) + d."""

    attend: Branch
    feed: Branch

    def run(self, block, stream: Stream, layer: int, call: Call) -> None:
        x = stream.taps[Tap(2 * layer, stream.stream)]
        y = x + self.attend(block, x, call) + self.feed(block, x, call)
        stream.joined(2 * layer + 2, y)


def _drop(value, p, block):
    return functional.dropout(value, p, block.training)


def _bert_output(module, value):
    return module.dropout(module.dense(value))


def _albert_attend(b, x, c):
    b.attention.LayerNorm.forward = lambda value: value  # the sum and the norm are inside the attention module
    try:
        return b.attention(x, c.mask)[0] - x
    finally:
        del b.attention.LayerNorm.forward


def _deberta_attend(b, x, c):
    options = {key: c.kwargs[key] for key in ("relative_pos", "rel_embeddings")}
    return _bert_output(b.attention.output, b.attention.self(x, c.mask, **options)[0])


BERT = PostLN(
    lambda b, x, c: _bert_output(b.attention.output, b.attention.self(x, attention_mask=c.mask)[0]),
    "attention.output.LayerNorm",
    lambda b, h, c: _bert_output(b.output, b.intermediate(h)),
    "output.LayerNorm",
)
LLAMA = PreLN(
    lambda b, x, c: b.self_attn(hidden_states=b.input_layernorm(x), **c.stateless)[0],
    lambda b, h, c: b.mlp(b.post_attention_layernorm(h)),
    ("post_attention_layernorm", "input_layernorm"),
)
GEMMA2 = PreLN(
    lambda b, x, c: b.post_attention_layernorm(b.self_attn(hidden_states=b.input_layernorm(x), **c.stateless)[0]),
    lambda b, h, c: b.post_feedforward_layernorm(b.mlp(b.pre_feedforward_layernorm(h))),
)
BLOOM = PreLN(
    lambda b, x, c: b.self_attention(b.input_layernorm(x), torch.zeros_like(x), **c.stateless)[0],
    lambda b, h, c: b.mlp(b.post_attention_layernorm(h), torch.zeros_like(h)),
)
FALCON = Parallel(
    lambda b, x, c: _drop(b.self_attention(b.input_layernorm(x), **c.stateless)[0] + b.mlp(b.input_layernorm(x)),
                          b.hidden_dropout, b),
    lambda b, x, c: torch.zeros_like(x),
)  # fmt: skip


def _t5_self(b, x, c):
    bias = c.kwargs.get("position_bias", c.args[2] if len(c.args) > 2 else None)
    return b.layer[0](x, attention_mask=c.mask, position_bias=bias)[0] - x


def _t5_feed(b, h, c):
    last = b.layer[-1]
    return last.dropout(last.DenseReluDense(last.layer_norm(h)))


def _t5_cross(b, h, c):
    if len(b.layer) == 2:
        return h
    states, mask, bias = c.args[3:6] if len(c.args) > 3 else (None, None, None)
    states = c.kwargs.get("encoder_hidden_states", states)
    mask = c.kwargs.get("encoder_attention_mask", mask)
    bias = c.kwargs.get("encoder_decoder_position_bias", bias)
    return b.layer[1](h, key_value_states=states, attention_mask=mask, position_bias=bias)[0]


BLOCKS = {
    "bert": BERT,
    "roberta": BERT,
    "electra": BERT,
    "deberta_v2": PostLN(_deberta_attend, BERT.first, BERT.feed, BERT.second),
    "distilbert": PostLN(
        lambda b, x, c: b.attention(x, attention_mask=c.mask)[0],
        "sa_layer_norm", lambda b, h, c: b.ffn(h), "output_layer_norm",
    ),
    "albert": PostLN(
        _albert_attend, "attention.LayerNorm",
        lambda b, h, c: b.ffn_output(b.activation(b.ffn(h))), "full_layer_layer_norm",
    ),
    "opt_pre": PreLN(
        lambda b, x, c: _drop(
            b.self_attn(hidden_states=b.self_attn_layer_norm(x), **c.stateless)[0], b.dropout, b
        ),
        lambda b, h, c: _drop(b.fc2(b.activation_fn(b.fc1(b.final_layer_norm(h)))), b.dropout, b),
        ("self_attn_layer_norm", "final_layer_norm"),
    ),
    "opt_post": PostLN(
        lambda b, x, c: _drop(b.self_attn(hidden_states=x, **c.stateless)[0], b.dropout, b),
        "self_attn_layer_norm",
        lambda b, h, c: _drop(b.fc2(b.activation_fn(b.fc1(h))), b.dropout, b),
        "final_layer_norm",
    ),
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "gemma": LLAMA,
    "gemma2": GEMMA2,
    "gemma3_text": GEMMA2,
    "olmo2": PreLN(
        lambda b, x, c: b.post_attention_layernorm(b.self_attn(hidden_states=x, **c.stateless)[0]),
        lambda b, h, c: b.post_feedforward_layernorm(b.mlp(h)),
    ),
    "phi": Parallel(
        lambda b, x, c: b.resid_dropout(b.self_attn(hidden_states=b.input_layernorm(x), **c.stateless)[0]),
        lambda b, x, c: b.resid_dropout(b.mlp(b.input_layernorm(x))),
    ),
    "phi3": PreLN(
        lambda b, x, c: b.resid_attn_dropout(b.self_attn(hidden_states=b.input_layernorm(x), **c.stateless)[0]),
        lambda b, h, c: b.resid_mlp_dropout(b.mlp(b.post_attention_layernorm(h))),
    ),
    "gpt2": PreLN(
        lambda b, x, c: b.attn(b.ln_1(x), attention_mask=c.args[2])[0],
        lambda b, h, c: b.mlp(b.ln_2(h)),
    ),
    "gptj": Parallel(
        lambda b, x, c: b.attn(b.ln_1(x), attention_mask=c.mask, position_ids=c.kwargs["position_ids"])[0],
        lambda b, x, c: b.mlp(b.ln_1(x)),
    ),
    "gpt_neox": Parallel(
        lambda b, x, c: b.post_attention_dropout(b.attention(b.input_layernorm(x), **c.stateless)[0]),
        lambda b, x, c: b.post_mlp_dropout(b.mlp(b.post_attention_layernorm(x))),
    ),
    "gpt_neox_sequential": PreLN(
        lambda b, x, c: b.post_attention_dropout(b.attention(b.input_layernorm(x), **c.stateless)[0]),
        lambda b, h, c: b.post_mlp_dropout(b.mlp(b.post_attention_layernorm(h))),
    ),
    "bloom": BLOOM,
    "bloom_normed": PreLN(
        BLOOM.attend, BLOOM.feed,
        carried=(lambda b, x: b.input_layernorm(x), lambda b, h: b.post_attention_layernorm(h)),
    ),
    "falcon": FALCON,
    "falcon_new": Parallel(
        lambda b, x, c: _drop(
            b.self_attention(b.ln_attn(x), **c.stateless)[0] + b.mlp(b.ln_mlp(x)), b.hidden_dropout, b
        ),
        lambda b, x, c: torch.zeros_like(x),
    ),
    "falcon_sequential": PreLN(
        lambda b, x, c: _drop(
            b.self_attention(b.input_layernorm(x), **c.stateless)[0], b.config.attention_dropout, b
        ),
        lambda b, h, c: _drop(b.mlp(b.post_attention_layernorm(h)), b.hidden_dropout, b),
    ),
    "t5": PreLN(_t5_self, _t5_feed, middle=_t5_cross),
    "t5_gated": PreLN(_t5_self, _t5_feed, middle=_t5_cross),
}  # fmt: skip
BLOCKS["albert_groups"] = BLOCKS["albert"]


def record_calls(model, run: Callable[[], object]) -> dict[str, list[Call]]:
    """What every block was called with in a run of the adapted model, by stream, in order."""
    calls: dict[str, list[Call]] = {stream: [] for stream in model.space.survey.stacks}
    handles = []
    for stream, stack in model.space.survey.stacks.items():
        for path in dict.fromkeys(stack.blocks):

            def keep(module, args, kwargs, stream=stream):
                calls[stream].append(Call(args, kwargs, torch.get_rng_state()))

            block = model.backbone.get_submodule(path)
            handles.append(block.register_forward_pre_hook(keep, with_kwargs=True, prepend=True))
    run()
    for handle in handles:
        handle.remove()
    return calls


def merged_copy(model):
    """The backbone with every LoRA site merged into its weights, and no adapters."""
    twin = copy.deepcopy(model)
    twin.enable({}, seed=0)
    with torch.no_grad():
        for site in model.space.sites:
            if site.kind == "lora":
                adapter = model.adapter(site.name)
                module = twin.backbone.get_submodule(site.source.module)
                delta = adapter.scale * adapter.B @ adapter.A
                module.weight += delta.T if hasattr(module, "nx") else delta  # Conv1D holds [in, out]
    return twin.backbone


def by_hand(model, name: str, run: Callable[[], object]) -> dict[Tap, torch.Tensor]:
    """All taps of a run of the adapted model, computed block by block by the formulas above."""
    calls, backbone = record_calls(model, run), merged_copy(model)
    taps: dict[Tap, torch.Tensor] = {}
    for key, stack in model.space.survey.stacks.items():
        stream = Stream(model, key)
        stream.taps[Tap(0, key)] = calls[key][0].args[0]
        for layer, (path, call) in enumerate(zip(stack.blocks, calls[key], strict=True)):
            torch.set_rng_state(call.random_state)
            BLOCKS[name].run(backbone.get_submodule(path), stream, layer, call)
        taps |= stream.taps
    return taps
