"""The search space: which sites of a backbone take part."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from heterolora.errors import SettingError
from heterolora.layouts import BoundLayout, HookPoint, Layout, check_layout, find_layout
from heterolora.sites import Port, Site, Tap

_KEYS = ("kind", "role", "layer", "span")


def features(module: nn.Module) -> tuple[int, int] | None:
    """Input and output width of a linear layer of any make; None if the module is no linear layer.

    Read from the module, not from the config: widths differ by layer in some models. ``nx`` and ``nf`` are the names
    that ``Conv1D`` uses.
    """
    for names in (("in_features", "out_features"), ("nx", "nf")):
        width = tuple(getattr(module, name, None) for name in names)
        if isinstance(width[0], int) and isinstance(width[1], int):
            return width[0], width[1]
    return None


@dataclass(frozen=True)
class Survey:
    """Everything of a backbone that a search space or a budget may refer to.

    Attributes:
        model_type: the backbone's ``config.model_type``.
        lora_sites: every LoRA site of the repeated blocks.
        layout: taps and blocks; None for a type that the layout table does not list.
        width: width of the residual stream.
        parameters: parameters of the backbone.
    """

    model_type: str
    lora_sites: tuple[Site, ...]
    layout: BoundLayout | None
    width: int
    parameters: int

    def shortcut_sites(self, spans: Sequence[int]) -> tuple[Site, ...]:
        """Every shortcut of the given spans; empty where the layout is not known."""
        if self.layout is None:
            return ()
        taps = self.layout.num_taps
        sites = []
        for span in spans:
            for start in range(taps - span):
                end = start + span
                if self.layout.has_tap(start) and self.layout.has_tap(end):
                    stem = "residual" if span == 1 else "shortcut"
                    role = f"{stem}_{'ffn' if start % 2 else 'attn'}"
                    layer = (end - 1) // 2
                    name = f"{layer}.{role}" + (f"_s{span}" if span > 2 else "")
                    sites.append(Site(name, "shortcut", role, layer, Tap(start), Tap(end), self.width, self.width))
        return tuple(sites)


def survey(backbone: nn.Module, layout: Layout | None = None) -> Survey:
    """Find the blocks, linear layers and taps of a backbone.

    Args:
        backbone: a transformers model, frozen or not; it is only read.
        layout: where things are, for an architecture that the table does not list or to override it.

    Raises:
        SettingError: if the layout names modules that are not there, or no repeated blocks are found.
    """
    config = getattr(backbone, "config", None)
    model_type = str(getattr(config, "model_type", type(backbone).__name__))
    base = getattr(backbone, "base_model", backbone)
    prefix = next((name for name, module in backbone.named_modules() if module is base), "")
    if layout is None:
        layout = find_layout(config)
    else:
        check_layout(layout, config)
    if layout is None:
        blocks_path, blocks = _repeated_blocks(base, model_type)
        roles = None
    else:
        blocks_path, blocks = layout.blocks, _submodule(base, layout.blocks)
        roles = {path: role for role, path in layout.roles.items()}
    if not isinstance(blocks, nn.ModuleList | nn.Sequential):
        raise SettingError("model.layout", blocks_path, "no list of blocks")
    root = ".".join(part for part in (prefix, blocks_path) if part)
    paths = tuple(f"{root}.{index}" for index in range(len(blocks)))
    sites = [
        Site(f"{layer}.{role}", "lora", role, layer, Port(path, "in"), Port(path, "out"), *width)
        for layer, block in enumerate(blocks.children())
        for role, path, width in _linears(block, paths[layer], roles)
    ]
    bound = None if layout is None else BoundLayout(layout, paths)
    if bound is not None:
        _check_points(backbone, bound)
    width = sites[0].in_features if bound is None else _stream_width(sites, bound)
    return Survey(model_type, tuple(sites), bound, width, sum(p.numel() for p in backbone.parameters()))


def _check_points(backbone: nn.Module, bound: BoundLayout) -> None:
    """Refuse a layout whose hook points or norms name no module of the first block."""
    layout, block = bound.layout, bound.blocks[0]
    texts = (layout.middle, *layout.middle_sum, *layout.middle_add, *layout.out_sum, *layout.out_add)
    paths = [HookPoint.parse(text, block).module for text in texts if text is not None]
    paths += [f"{block}.{norm}" for norm in (layout.middle_norm, layout.out_norm) if norm is not None]
    for path in paths:
        _submodule(backbone, path)


def _submodule(base: nn.Module, path: str) -> nn.Module:
    try:
        return base.get_submodule(path)
    except AttributeError as error:
        raise SettingError("model.layout", path, f"no such module in {type(base).__name__} ({error})") from error


def _linears(block: nn.Module, path: str, roles: Mapping[str, str] | None) -> list[tuple[str, str, tuple[int, int]]]:
    """(role, absolute path, widths) of each linear layer in a block; without roles, the path is the role."""
    if roles is None:
        found = [(name, f"{path}.{name}", features(module)) for name, module in block.named_modules() if name]
        return [(role, absolute, width) for role, absolute, width in found if width is not None]
    linears = []
    for inner, role in roles.items():
        width = features(_submodule(block, inner))
        if width is None:
            raise SettingError("model.layout", inner, f"role {role} must name a linear layer, {path}.{inner} is none")
        linears.append((role, f"{path}.{inner}", width))
    return linears


def _repeated_blocks(base: nn.Module, model_type: str) -> tuple[str, nn.Module]:
    """The one list of modules of one class that hold linear layers; lists inside its blocks do not count."""
    found: dict[str, nn.Module] = {}
    for name, module in base.named_modules():
        if not isinstance(module, nn.ModuleList) or any(name.startswith(f"{other}.") for other in found):
            continue
        if len({type(child) for child in module}) == 1 and _linears(module[0], "", None):
            found[name] = module
    if len(found) != 1:
        which = f"these have: {sorted(found)}" if found else "there is none"
        raise SettingError(
            "model", model_type, f"one list of repeated blocks with linear layers is needed, {which}; give model.layout"
        )
    return next(iter(found.items()))


def _stream_width(sites: Sequence[Site], layout: BoundLayout) -> int:
    """Width of the residual stream: what the attention reads (q, or a fused qkv), in the first block."""
    first = {site.role: site for site in sites if site.layer == 0}
    for role in ("q", "qkv"):
        if role in first:
            return first[role].in_features
    raise SettingError(
        "model.layout", dict(layout.layout.roles), "a role q or qkv is needed to know the stream's width"
    )


@dataclass(frozen=True)
class Space:
    """The sites that compete for a budget, in a fixed order, and the family each belongs to.

    Attributes:
        sites: the candidates.
        groups: site name -> label of its family; the only thing an allocator may know about kinds.
        survey: the backbone they were found in.
        renorm: apply the block's norm again after an add of span 2 or more (the paper's rule, around enabled sites).
    """

    sites: tuple[Site, ...]
    groups: Mapping[str, str]
    survey: Survey
    renorm: bool

    def __getitem__(self, name: str) -> Site:
        """The site of this name."""
        found = next((site for site in self.sites if site.name == name), None)
        if found is None:
            raise KeyError(name)
        return found


@dataclass(frozen=True)
class SearchSpace:
    """Rules that select sites.

    A rule is a role or a kind (``q``, ``shortcut_attn``, ``lora``, ``shortcut``), or a mapping with some of the keys
    ``kind``, ``role``, ``layer``, ``span``, each one value or a list of values; layers may count from the end (-1).

    Args:
        include: a site takes part if one of these rules matches it.
        exclude: and none of these does.
        layers: layers that take part; null: all.
        spans: lengths of the shortcuts, in sub-layers.
        renorm: apply the block's norm a second time after every add of span 2 or more around an enabled shortcut, as
            the paper does. The adapted model then no longer equals the backbone at step 0.
    """

    include: Sequence[str | Mapping[str, Any]]
    exclude: Sequence[str | Mapping[str, Any]]
    layers: Sequence[int] | None
    spans: Sequence[int]
    renorm: bool

    def resolve(self, found: Survey) -> Space:
        """The sites of this backbone that take part.

        Raises:
            SettingError: if a rule matches nothing, or the layout does not know what is asked for.
        """
        depth = 1 + max(site.layer for site in found.lora_sites)
        longest = 2 * depth
        for span in self.spans:
            if not 1 <= span <= longest:
                raise SettingError("search_space.spans", list(self.spans), f"spans from 1 to {longest} exist")
        everything = (*found.lora_sites, *found.shortcut_sites(sorted(set(self.spans))))
        if self.layers is not None and not self.layers:
            raise SettingError("search_space.layers", [], "at least one layer, or null for all")
        layers = None if self.layers is None else {self._layer(layer, depth) for layer in self.layers}
        in_layers = [site for site in everything if layers is None or site.layer in layers]
        chosen = self._matching("include", self.include, in_layers, found, depth)
        dropped = self._matching("exclude", self.exclude, in_layers, found, depth)
        order = {site.name: number for number, site in enumerate(in_layers)}
        sites = sorted((in_layers[order[name]] for name in chosen - dropped), key=lambda s: (s.layer, order[s.name]))
        if not sites:
            raise SettingError("search_space.include", list(self.include), "no site is left after exclude")
        if self.renorm:
            self._check_renorm(sites, found)
        return Space(tuple(sites), {site.name: site.kind for site in sites}, found, self.renorm)

    def _layer(self, layer: int, depth: int) -> int:
        if not -depth <= layer < depth:
            raise SettingError("search_space.layers", self.layers, f"layers 0 to {depth - 1} exist")
        return layer % depth

    def _matching(
        self, setting: str, rules: Sequence[str | Mapping[str, Any]], sites: Sequence[Site], found: Survey, depth: int
    ) -> set[str]:
        names: set[str] = set()
        for rule in rules:
            if unknown := set() if isinstance(rule, str) else set(rule) - set(_KEYS):
                raise SettingError(
                    f"search_space.{setting}", rule, f"unknown keys {sorted(unknown)}, possible: {list(_KEYS)}"
                )
            for part in _parts(rule):
                matched = {site.name for site in sites if _matches(part, site, depth)}
                if not matched:
                    raise SettingError(f"search_space.{setting}", part, f"matches no site; {_existing(sites, found)}")
                names |= matched & {site.name for site in sites if _matches(rule, site, depth)}
        return names

    def _check_renorm(self, sites: Sequence[Site], found: Survey) -> None:
        layout = found.layout
        for site in sites:
            if layout is None or not isinstance(site.sink, Tap) or (site.span or 0) < 2:
                continue
            if layout.write(site.sink, site.span or 0).norm is None:
                raise SettingError(
                    "search_space.renorm", True, f"the layout of {found.model_type} names no norm for it; use false"
                )


def _parts(rule: str | Mapping[str, Any]) -> list[str | Mapping[str, Any]]:
    """The rule with each value of each list alone: every one must match something, or it is a slip."""
    if isinstance(rule, str):
        return [rule]
    lists = {key: value for key, value in rule.items() if isinstance(value, (list, tuple))}
    return [{**rule, key: [value]} for key, values in lists.items() for value in values] or [rule]


def _matches(rule: str | Mapping[str, Any], site: Site, depth: int) -> bool:
    if isinstance(rule, str):
        return rule in (site.role, site.kind)
    for key, wanted in rule.items():
        values = list(wanted) if isinstance(wanted, (list, tuple)) else [wanted]
        if key == "layer":
            values = [value + depth if isinstance(value, int) and value < 0 else value for value in values]
        if getattr(site, key) not in values:
            return False
    return True


def _existing(sites: Sequence[Site], found: Survey) -> str:
    roles = {
        kind: list(dict.fromkeys(site.role for site in sites if site.kind == kind)) for kind in ("lora", "shortcut")
    }
    text = f"roles of kind lora: {roles['lora']}, of kind shortcut: {roles['shortcut']}"
    text += (
        f", layers {sorted({site.layer for site in sites})}, spans {sorted({site.span for site in sites if site.span})}"
    )
    if found.layout is None:
        text += f" (model type {found.model_type!r} has no layout entry, and shortcuts need one: give model.layout)"
    return text
