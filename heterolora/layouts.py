"""Where blocks, linear layers and taps of the residual stream are found in each architecture.

``LAYOUTS`` is the table, keyed by ``config.model_type``; the next architecture is one entry of it. A hook point is
written ``module.pre[0]`` (positional input 0 of a module, before it runs), ``module.post`` (its output, a tensor) or
``module.post[0]`` (element 0 of its output, a tuple); the module's path is relative to the block, ``B`` is the block.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from heterolora.errors import SettingError
from heterolora.sites import Tap

_POINT = re.compile(r"(?P<module>\w+(\.\w+)*)\.(?P<side>pre|post)(\[(?P<index>\d+)\])?")


@dataclass(frozen=True)
class HookPoint:
    """A tensor that a forward hook can read and replace.

    ``index`` is the position among the module's positional inputs or in its output tuple; None: the output itself.
    """

    module: str
    side: Literal["pre", "post"]
    index: int | None

    @classmethod
    def parse(cls, text: str, block: str) -> "HookPoint":
        """Read a point of the table; ``block`` is the path of the block it is relative to."""
        match = _POINT.fullmatch(text)
        if match is None or (match["side"] == "pre" and match["index"] is None):
            raise SettingError(
                "model.layout", text, "a hook point is 'module.pre[0]', 'module.post' or 'module.post[0]'"
            )
        path = match["module"]
        absolute = block if path == "B" else f"{block}.{path}"
        side: Literal["pre", "post"] = "pre" if match["side"] == "pre" else "post"
        return cls(absolute, side, None if match["index"] is None else int(match["index"]))


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
    """One architecture.

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
        requires: config attributes and the only value with which the hooks are right.
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

    def __post_init__(self) -> None:
        needed = ["out_add"] + (["middle_sum", "middle_add", "out_sum"] if self.middle is not None else [])
        if missing := [name for name in needed if not getattr(self, name)]:
            raise SettingError("model.layout", missing, "without these points, shortcuts would join nothing")


_OPT = {
    "blocks": "decoder.layers",
    "roles": {
        "q": "self_attn.q_proj",
        "k": "self_attn.k_proj",
        "v": "self_attn.v_proj",
        "o": "self_attn.out_proj",
        "up": "fc1",
        "down": "fc2",
    },
    "middle_norm": "self_attn_layer_norm",
    "out_norm": "final_layer_norm",
    "requires": {"layerdrop": 0.0},
}

LAYOUTS: dict[str, tuple[Layout, ...]] = {
    "bert": (
        Layout(
            blocks="encoder.layer",
            roles={
                "q": "attention.self.query",
                "k": "attention.self.key",
                "v": "attention.self.value",
                "o": "attention.output.dense",
                "up": "intermediate.dense",
                "down": "output.dense",
            },
            middle="attention.output.LayerNorm.post",
            middle_sum=("attention.output.LayerNorm.pre[0]",),
            middle_add=("attention.output.LayerNorm.post",),
            out_sum=("output.LayerNorm.pre[0]",),
            out_add=("B.post",),
            requires={"chunk_size_feed_forward": 0, "add_cross_attention": False},
        ),
    ),
    "opt": (
        Layout(
            **_OPT,  # type: ignore[arg-type]
            middle="self_attn_layer_norm.post",
            middle_sum=("self_attn_layer_norm.pre[0]",),
            middle_add=("self_attn_layer_norm.post",),
            out_sum=("final_layer_norm.pre[0]",),
            out_add=("B.post",),
            when={"do_layer_norm_before": False},
        ),
        Layout(
            **_OPT,  # type: ignore[arg-type]
            # The block's dropout is a function, so no module's output is the finished sum: join the norm's input
            # and, since the residual goes round the norm, the block's output too.
            middle="final_layer_norm.pre[0]",
            middle_sum=("final_layer_norm.pre[0]", "B.post"),
            middle_add=("final_layer_norm.pre[0]", "B.post"),
            out_sum=("B.post",),
            out_add=("B.post",),
            when={"do_layer_norm_before": True},
        ),
    ),
    "llama": (
        Layout(
            blocks="layers",
            roles={
                "q": "self_attn.q_proj",
                "k": "self_attn.k_proj",
                "v": "self_attn.v_proj",
                "o": "self_attn.o_proj",
                "gate": "mlp.gate_proj",
                "up": "mlp.up_proj",
                "down": "mlp.down_proj",
            },
            middle="post_attention_layernorm.pre[0]",
            middle_sum=("post_attention_layernorm.pre[0]", "B.post"),
            middle_add=("post_attention_layernorm.pre[0]", "B.post"),
            out_sum=("B.post",),
            out_add=("B.post",),
            middle_norm="post_attention_layernorm",
            out_norm="input_layernorm",
        ),
    ),
}


def find_layout(config: Any) -> Layout | None:
    """The table's entry for a backbone's config; None when its model type is not listed.

    Raises:
        SettingError: if the type is listed, but not with these config values.
    """
    model_type = getattr(config, "model_type", None)
    entries = LAYOUTS.get(model_type, ()) if isinstance(model_type, str) else ()
    for layout in entries:
        if all(getattr(config, key, None) == value for key, value in layout.when.items()):
            check_layout(layout, config)
            return layout
    if entries:
        known = " or ".join(str(dict(layout.when)) for layout in entries)
        raise SettingError("model", model_type, f"the layout of this type is known for {known} only; give model.layout")
    return None


def check_layout(layout: Layout, config: Any) -> None:
    """Refuse a backbone whose config makes the layout's hooks wrong."""
    for key, value in layout.requires.items():
        given = getattr(config, key, value)
        if given != value:
            raise SettingError(
                "model", f"{getattr(config, 'model_type', '?')} with {key}={given}", f"hooks need {key}={value}"
            )


@dataclass(frozen=True)
class BoundLayout:
    """A layout and the paths of one backbone's blocks: turns taps into hook points.

    Attributes:
        layout: the entry of the table.
        blocks: absolute path of every block.
    """

    layout: Layout
    blocks: tuple[str, ...]

    @property
    def num_taps(self) -> int:
        """Taps t_0 .. t_2L, the middle ones counted even where they do not exist."""
        return 2 * len(self.blocks) + 1

    def has_tap(self, index: int) -> bool:
        """Whether t_index is a point of its own."""
        return 0 <= index < self.num_taps and (index % 2 == 0 or self.layout.middle is not None)

    def read(self, tap: Tap) -> HookPoint:
        """Where the tap's value is seen, after everything that joins it."""
        layer, middle = divmod(tap.index, 2)
        if middle:
            if self.layout.middle is None:
                raise KeyError(f"{tap} does not exist in this layout")
            return HookPoint.parse(self.layout.middle, self.blocks[layer])
        if layer == len(self.blocks):  # there is no next block whose input it would be
            return HookPoint.parse(self.layout.out_add[-1], self.blocks[-1])
        return HookPoint.parse("B.pre[0]", self.blocks[layer])

    def write(self, tap: Tap, span: int) -> Junction:
        """Where a delta of this span joins the tap."""
        layer, is_output = divmod(tap.index - 1, 2)
        block = self.blocks[layer]
        if is_output:
            points, norm = (self.layout.out_sum if span == 1 else self.layout.out_add), self.layout.out_norm
        else:
            points, norm = (self.layout.middle_sum if span == 1 else self.layout.middle_add), self.layout.middle_norm
        parsed = tuple(HookPoint.parse(text, block) for text in points)
        return Junction(parsed, None if norm is None else f"{block}.{norm}")
