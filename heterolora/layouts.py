"""Where blocks, linear layers and taps of the residual stream are found in each architecture.

``LAYOUTS`` is the table, keyed by ``config.model_type``; the next architecture is one entry of it. A hook point is
written ``module.pre[0]`` (positional input 0 of a module, before it runs), ``module.post`` (its output, a tensor) or
``module.post[0]`` (element 0 of its output, a tuple); the module's path is relative to the block, ``B`` is the block.
"""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from heterolora.errors import SettingError
from heterolora.sites import Tap

_POINT = re.compile(r"(?P<module>\w+(\.\w+)*)\.(?P<side>pre|post)(\[(?P<index>\d+)\])?")


@dataclass(frozen=True)
class HookPoint:
    """A tensor that a forward hook can read and replace.

    ``index`` is the position among the module's positional inputs or in its output tuple; None: the output itself.
    ``call`` is which of the module's calls in one forward is meant, where blocks share their modules; None: every one.
    """

    module: str
    side: Literal["pre", "post"]
    index: int | None
    call: int | None = None

    @classmethod
    def parse(cls, text: str, block: str, call: int | None = None) -> "HookPoint":
        """Read a point of the table; ``block`` is the path of the block it is relative to."""
        match = _POINT.fullmatch(text)
        if match is None or (match["side"] == "pre" and match["index"] is None):
            raise SettingError(
                "model.layout", text, "a hook point is 'module.pre[0]', 'module.post' or 'module.post[0]'"
            )
        path = match["module"]
        absolute = block if path == "B" else f"{block}.{path}"
        side: Literal["pre", "post"] = "pre" if match["side"] == "pre" else "post"
        return cls(absolute, side, None if match["index"] is None else int(match["index"]), call)

    def __str__(self) -> str:
        index = "" if self.index is None else f"[{self.index}]"
        return f"{self.module}.{self.side}{index}" + ("" if self.call is None else f" (call {self.call})")


@dataclass(frozen=True)
class Junction:
    """Where a delta joins the residual stream.

    Attributes:
        points: the delta is computed at the first point; the same shift is added at the others (a residual stream that
            a norm and a later sum both read needs two).
        norm: path of the norm that ``renorm`` applies after an add of span 2 or more; None: none is known.
    """

    points: tuple[HookPoint, ...]
    norm: str | None = None


@dataclass(frozen=True)
class Layout:
    """One stack of blocks of one architecture.

    Attributes:
        blocks: path of the list of blocks, relative to ``base_model``.
        roles: role -> path of its linear layer inside the block.
        middle: point where t_2l+1 (the feed-forward's input) is read; None: no such tap (parallel residual).
        middle_sum: points where a span-1 delta joins t_2l+1 (in post-LN before the norm).
        middle_add: points where a longer delta joins t_2l+1.
        out_sum: points where a span-1 delta joins t_2l+2.
        out_add: points where a longer delta joins t_2l+2.
        middle_norm: norm that ``renorm`` applies after a longer add into t_2l+1.
        out_norm: the same for t_2l+2.
        when: config attributes that select this entry among those of its model type.
        requires: config attributes and the only value with which hooks see every linear layer.
        shortcuts_require: config attributes and the only value with which the taps are where this entry says.
        stream: name of the residual stream, where a model has several.
        order: from the config to the paths of the blocks in the order in which they run, relative to ``blocks``, where
            that is not the list's own order (shared blocks run more than once).
    """

    blocks: str
    roles: Mapping[str, str]
    middle: str | None = None
    middle_sum: Sequence[str] = ()
    middle_add: Sequence[str] = ()
    out_sum: Sequence[str] = ()
    out_add: Sequence[str] = ("B.post",)
    middle_norm: str | None = None
    out_norm: str | None = None
    when: Mapping[str, Any] = field(default_factory=dict)
    requires: Mapping[str, Any] = field(default_factory=dict)
    shortcuts_require: Mapping[str, Any] = field(default_factory=dict)
    stream: str = ""
    order: Callable[[Any], Sequence[str]] | None = None

    def __post_init__(self) -> None:
        needed = ["out_add"] + (["middle_sum", "middle_add", "out_sum"] if self.middle is not None else [])
        if missing := [name for name in needed if not getattr(self, name)]:
            raise SettingError("model.layout", missing, "without these points, shortcuts would join nothing")
        if self.order is not None and not callable(self.order):
            raise SettingError("model.layout", self.order, "an order of blocks is a function; leave it away here")


def _post_ln(
    blocks: str, roles: Mapping[str, str], first: str, second: str, out: str = "B.post", **more: Any
) -> Layout:
    """``h = first(x + Attn(x))``, ``y = second(h + FFN(h))``: span-1 deltas join before the norms, free of dropout."""
    return Layout(
        blocks,
        roles,
        middle=f"{first}.post",
        middle_sum=(f"{first}.pre[0]",),
        middle_add=(f"{first}.post",),
        out_sum=(f"{second}.pre[0]",),
        out_add=(out,),
        **more,
    )


def _pre_ln(blocks: str, roles: Mapping[str, str], feed_forward: str, out: str = "B.post", **more: Any) -> Layout:
    """``h = x + Attn(...)``, ``y = h + FFN(...)``, where ``feed_forward`` is the first module that reads h.

    No module's output is h itself, free of dropout, in all of these types. So a delta joins the input of the first
    module that reads h and, since the residual goes round that module, the block's output too: it is exact, because
    ``y = (h + d) + FFN(h + d)``.
    """
    middle = f"{feed_forward}.pre[0]"
    return Layout(
        blocks,
        roles,
        middle=middle,
        middle_sum=(middle, out),
        middle_add=(middle, out),
        out_sum=(out,),
        out_add=(out,),
        **more,
    )


def _one_place(blocks: str, roles: Mapping[str, str], read: str, write: str, out: str, **more: Any) -> Layout:
    """As ``_pre_ln``, where one point is h itself, seen by the norm and by the residual alike."""
    return Layout(
        blocks, roles, middle=read, middle_sum=(write,), middle_add=(write,), out_sum=(out,), out_add=(out,), **more
    )


def _parallel(blocks: str, roles: Mapping[str, str], out: str = "B.post", **more: Any) -> Layout:
    """``y = x + Attn(norm x) + FFN(norm x)``: the feed-forward has no tap of its own."""
    return Layout(blocks, roles, out_add=(out,), **more)


def _shared_blocks(config: Any) -> list[str]:
    """albert: depth l runs group ``int(l / (layers / groups))``, and in it every inner layer in turn."""
    share = config.num_hidden_layers / config.num_hidden_groups
    return [
        f"{int(depth / share)}.albert_layers.{inner}"
        for depth in range(config.num_hidden_layers)
        for inner in range(config.inner_group_num)
    ]


def _roles(**paths: str) -> dict[str, str]:
    return paths


_BERT_REST = {"o": "attention.output.dense", "up": "intermediate.dense", "down": "output.dense"}
_BERT_ROLES = _roles(q="attention.self.query", k="attention.self.key", v="attention.self.value") | _BERT_REST
_BERT_NORMS = ("attention.output.LayerNorm", "output.LayerNorm")
# In chunks, the sum before the second norm has another length; with cross-attention, the feed-forward reads another
# tensor than the self-attention's norm gives.
_BERT = _post_ln(
    "encoder.layer",
    _BERT_ROLES,
    *_BERT_NORMS,
    shortcuts_require={"chunk_size_feed_forward": 0, "add_cross_attention": False},
)
_DEBERTA = _post_ln(
    "encoder.layer",
    _roles(q="attention.self.query_proj", k="attention.self.key_proj", v="attention.self.value_proj") | _BERT_REST,
    *_BERT_NORMS,
    out="B.post[0]",
    # With a convolution between the first two blocks, t_2 is no block's output.
    shortcuts_require={"conv_kernel_size": 0},
)
_DISTILBERT = _post_ln(
    "transformer.layer",
    _roles(q="attention.q_lin", k="attention.k_lin", v="attention.v_lin", o="attention.out_lin")
    | _roles(up="ffn.lin1", down="ffn.lin2"),
    "sa_layer_norm",
    "output_layer_norm",
)
_ALBERT = _post_ln(
    "encoder.albert_layer_groups",
    _roles(q="attention.query", k="attention.key", v="attention.value", o="attention.dense")
    | _roles(up="ffn", down="ffn_output"),
    "attention.LayerNorm",
    "full_layer_layer_norm",
    order=_shared_blocks,
)

_SELF_ATTN = _roles(q="self_attn.q_proj", k="self_attn.k_proj", v="self_attn.v_proj")
_OPT: dict[str, Any] = {
    "blocks": "decoder.layers",
    "roles": _SELF_ATTN | _roles(o="self_attn.out_proj", up="fc1", down="fc2"),
    "middle_norm": "self_attn_layer_norm",
    "out_norm": "final_layer_norm",
    "shortcuts_require": {"layerdrop": 0.0},  # a dropped block leaves no taps
}
_OPT_POST = _post_ln(
    first="self_attn_layer_norm", second="final_layer_norm", when={"do_layer_norm_before": False}, **_OPT
)
_OPT_PRE = _pre_ln(feed_forward="final_layer_norm", when={"do_layer_norm_before": True}, **_OPT)

_GATED_MLP = _roles(gate="mlp.gate_proj", up="mlp.up_proj", down="mlp.down_proj")
_LLAMA_ROLES = _SELF_ATTN | _roles(o="self_attn.o_proj") | _GATED_MLP
_LLAMA = _pre_ln(
    "layers",
    _LLAMA_ROLES,
    "post_attention_layernorm",
    middle_norm="post_attention_layernorm",
    out_norm="input_layernorm",
)
# Here post_attention_layernorm acts on the attention's output; the feed-forward's norm has another name, or is missing.
_GEMMA2 = _pre_ln("layers", _LLAMA_ROLES, "pre_feedforward_layernorm")
_OLMO2 = _pre_ln("layers", _LLAMA_ROLES, "mlp")
_PHI3 = _pre_ln(
    "layers",
    _roles(qkv="self_attn.qkv_proj", o="self_attn.o_proj", gate_up="mlp.gate_up_proj", down="mlp.down_proj"),
    "post_attention_layernorm",
)
_PHI = _parallel("layers", _SELF_ATTN | _roles(o="self_attn.dense", up="mlp.fc1", down="mlp.fc2"))

_GPT2 = _pre_ln(
    "h",
    _roles(qkv="attn.c_attn", o="attn.c_proj", up="mlp.c_fc", down="mlp.c_proj"),
    "ln_2",
    shortcuts_require={"add_cross_attention": False},
)
_GPTJ = _parallel(
    "h",
    _roles(q="attn.q_proj", k="attn.k_proj", v="attn.v_proj", o="attn.out_proj", up="mlp.fc_in", down="mlp.fc_out"),
    "B.post[0]",
)
_MLP_4H = _roles(up="mlp.dense_h_to_4h", down="mlp.dense_4h_to_h")
_NEOX_ROLES = _roles(qkv="attention.query_key_value", o="attention.dense") | _MLP_4H
_FALCON_ROLES = _roles(qkv="self_attention.query_key_value", o="self_attention.dense") | _MLP_4H

_T5_SELF = {role: f"layer.0.SelfAttention.{role}" for role in "qkvo"}
_T5_CROSS = {f"cross_{role}": f"layer.1.EncDecAttention.{role}" for role in "qkvo"}


def _t5(stream: Literal["encoder", "decoder"], gated: bool) -> Layout:
    """The feed-forward sub-layer adds its own residual, so its input is h itself, after cross-attention too."""
    last = 1 if stream == "encoder" else 2
    dense = f"layer.{last}.DenseReluDense"
    inner = _roles(gate=f"{dense}.wi_0", up=f"{dense}.wi_1") if gated else _roles(up=f"{dense}.wi")
    return _one_place(
        f"{stream}.block",
        _T5_SELF | (_T5_CROSS if stream == "decoder" else {}) | inner | _roles(down=f"{dense}.wo"),
        f"layer.{last}.pre[0]",
        f"layer.{last}.pre[0]",
        "B.post[0]",
        when={"is_gated_act": gated},
        stream=stream,
    )


LAYOUTS: dict[str, tuple[Layout, ...]] = {
    "bert": (_BERT,),
    "roberta": (_BERT,),
    "electra": (_BERT,),
    "deberta-v2": (_DEBERTA,),
    "distilbert": (_DISTILBERT,),
    "albert": (_ALBERT,),
    "opt": (_OPT_POST, _OPT_PRE),
    "llama": (_LLAMA,),
    "mistral": (_LLAMA,),
    "qwen2": (_LLAMA,),
    "qwen3": (_LLAMA,),
    "gemma": (_LLAMA,),
    "gemma2": (_GEMMA2,),
    "gemma3_text": (_GEMMA2,),
    "olmo2": (_OLMO2,),
    "phi": (_PHI,),
    "phi3": (_PHI3,),
    "gpt2": (_GPT2,),
    "gptj": (_GPTJ,),
    "gpt_neox": (
        _parallel("layers", _NEOX_ROLES, when={"use_parallel_residual": True}),
        _pre_ln("layers", _NEOX_ROLES, "post_attention_layernorm", when={"use_parallel_residual": False}),
    ),
    "bloom": (
        _one_place(
            "h",
            _FALCON_ROLES,
            "post_attention_layernorm.pre[0]",
            "self_attention.post[0]",  # the attention adds the residual itself
            "B.post[0]",
            requires={"slow_but_exact": False},  # else weights are used without calling their modules
        ),
    ),
    "falcon": (
        _parallel("h", _FALCON_ROLES, "B.post[0]", when={"parallel_attn": True}),
        _pre_ln(
            "h",
            _FALCON_ROLES,
            "post_attention_layernorm",
            out="B.post[0]",
            when={"parallel_attn": False, "new_decoder_architecture": False},
        ),
    ),
    "t5": (_t5("encoder", True), _t5("encoder", False), _t5("decoder", True), _t5("decoder", False)),
}


def find_layouts(config: Any) -> tuple[Layout, ...]:
    """The table's entries for a backbone's config, one for each stream; empty when its model type is not listed.

    Raises:
        SettingError: if the type is listed, but not with these config values.
    """
    model_type = getattr(config, "model_type", None)
    entries = LAYOUTS.get(model_type, ()) if isinstance(model_type, str) else ()
    found: dict[str, Layout] = {}
    for layout in entries:
        if not mismatch(layout.when, config):
            found.setdefault(layout.stream, layout)
    if entries and not found:
        known = " or ".join(str(dict(layout.when)) for layout in entries)
        raise SettingError("model", model_type, f"the layout of this type is known for {known} only; give model.layout")
    return tuple(found.values())


def mismatch(wanted: Mapping[str, Any], config: Any) -> str | None:
    """The first attribute of a config that has another value, as ``key=value``; an attribute that is not there fits."""
    for key, value in wanted.items():
        if (given := getattr(config, key, value)) != value:
            return f"{key}={given}"
    return None


@dataclass(frozen=True)
class Stack:
    """The blocks of one residual stream of one backbone: turns taps into hook points.

    Attributes:
        root: path of the module that holds the blocks and calls them.
        blocks: path of the block that runs at each depth; shared blocks come several times.
        layout: the entry of the table; None: the taps are not known.
        stream: name of the stream; empty where there is one.
    """

    root: str
    blocks: tuple[str, ...]
    layout: Layout | None
    stream: str

    @property
    def num_taps(self) -> int:
        """Taps t_0 .. t_2L, the middle ones counted even where they do not exist."""
        return 2 * len(self.blocks) + 1

    def has_tap(self, index: int) -> bool:
        """Whether t_index is a point of its own."""
        known = self.layout is not None and 0 <= index < self.num_taps
        return known and (index % 2 == 0 or self._known.middle is not None)

    def read(self, tap: Tap) -> HookPoint:
        """Where the tap's value is seen, after everything that joins it."""
        layer, middle = divmod(tap.index, 2)
        if middle:
            if self._known.middle is None:
                raise KeyError(f"{tap} does not exist in this layout")
            return self._point(self._known.middle, layer)
        if layer == len(self.blocks):  # there is no next block whose input it would be
            return self._point(self._known.out_add[-1], layer - 1)
        return self._point("B.pre[0]", layer)

    def write(self, tap: Tap, span: int) -> Junction:
        """Where a delta of this span joins the tap."""
        layout = self._known
        layer, is_output = divmod(tap.index - 1, 2)
        if is_output:
            points, norm = (layout.out_sum if span == 1 else layout.out_add), layout.out_norm
        else:
            points, norm = (layout.middle_sum if span == 1 else layout.middle_add), layout.middle_norm
        parsed = tuple(self._point(text, layer) for text in points)
        return Junction(parsed, None if norm is None else f"{self.blocks[layer]}.{norm}")

    @property
    def _known(self) -> Layout:
        if self.layout is None:
            raise KeyError("the taps of this backbone are not known")
        return self.layout

    def _point(self, text: str, layer: int) -> HookPoint:
        return HookPoint.parse(text, self.blocks[layer], self._calls[layer])

    @cached_property
    def _calls(self) -> list[int | None]:
        """At each depth, how often its block has run before; None for a block that runs once."""
        times, before = Counter(self.blocks), Counter[str]()
        calls: list[int | None] = []
        for path in self.blocks:
            calls.append(before[path] if times[path] > 1 else None)
            before[path] += 1
        return calls
