"""The search space: which sites of a backbone take part."""

import logging
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from torch import nn

from heterolora.errors import SettingError
from heterolora.layouts import HookPoint, Junction, Layout, Stack, find_layouts, mismatch
from heterolora.linear import features
from heterolora.sites import Port, Site, Tap, site_name

_log = logging.getLogger(__name__)

_KEYS = ("kind", "role", "layer", "span", "stream")


@dataclass(frozen=True)
class Survey:
    """Everything of a backbone that a search space or a budget may refer to.

    Attributes:
        model_type: the backbone's ``config.model_type``.
        lora_sites: every LoRA site of the repeated blocks.
        stacks: the stacks of blocks, by the name of their residual stream.
        widths: width of each residual stream.
        parameters: parameters of the backbone, without the task's head.
        no_shortcuts: why the backbone can have no shortcuts; None: it can.
        embeddings: the word embedding of each stack, LoRA sites beside those; no budget is counted by them.
        tied: path of an output layer that shares its table; None: there is none.
    """

    model_type: str
    lora_sites: tuple[Site, ...]
    stacks: Mapping[str, Stack]
    widths: Mapping[str, int]
    parameters: int
    no_shortcuts: str | None
    embeddings: tuple[Site, ...] = ()
    tied: str | None = None

    def shortcut_sites(self, spans: Sequence[int]) -> tuple[Site, ...]:
        """Every shortcut of the given spans, none of them between two streams; empty where there can be none."""
        if self.no_shortcuts is not None:
            return ()
        return tuple(
            self._shortcut(stack, start, start + span)
            for stack in self.stacks.values()
            for span in spans
            for start in range(stack.num_taps - span)
            if stack.has_tap(start) and stack.has_tap(start + span)
        )

    def _shortcut(self, stack: Stack, start: int, end: int) -> Site:
        span, layer, stream = end - start, (end - 1) // 2, stack.stream
        role = f"{'residual' if span == 1 else 'shortcut'}_{'ffn' if start % 2 else 'attn'}"
        width = self.widths[stream]
        source, sink = Tap(start, stream), Tap(end, stream)
        return Site(site_name(stream, layer, role, span), "shortcut", role, layer, source, sink, width, width, stream)

    def depth(self, stream: str) -> int:
        """Number of layers of a stream."""
        return len(self.stacks[stream].blocks)

    @property
    def deepest(self) -> int:
        """Number of layers of the deepest stream."""
        return max(map(self.depth, self.stacks))

    def read(self, tap: Tap) -> HookPoint:
        """Where a tap's value is seen."""
        return self.stacks[tap.stream].read(tap)

    def write(self, tap: Tap, span: int) -> Junction:
        """Where a delta of this span joins a tap."""
        return self.stacks[tap.stream].write(tap, span)


def survey(backbone: nn.Module, layout: Layout | None = None) -> Survey:
    """Find the blocks, linear layers and taps of a backbone.

    Args:
        backbone: a transformers model, frozen or not; it is only read.
        layout: where things are, for an architecture that the table does not list or to override it.

    Raises:
        SettingError: if the layout names modules that are not there, no repeated blocks are found, or the config makes
            hooks miss linear layers.
    """
    config = getattr(backbone, "config", None)
    model_type = str(getattr(config, "model_type", type(backbone).__name__))
    base = getattr(backbone, "base_model", backbone)
    prefix = next((name for name, module in backbone.named_modules() if module is base), "")
    layouts = find_layouts(config) if layout is None else (layout,)
    for entry in layouts:
        if wrong := mismatch(entry.requires, config):
            raise SettingError("model", f"{model_type} with {wrong}", f"hooks need {dict(entry.requires)}")
    if layouts:
        stacks = [_stack(base, prefix, entry, config) for entry in _present(base, layouts)]
    else:
        path, blocks = _repeated_blocks(base, model_type)
        stacks = [_make_stack(prefix, path, [str(index) for index in range(len(blocks))], None, "")]
    sites = [site for stack in stacks for site in _lora_sites(backbone, stack)]
    for stack in stacks:
        _check_points(backbone, stack)
    return Survey(
        model_type,
        tuple(sites),
        {stack.stream: stack for stack in stacks},
        {stack.stream: _stream_width(sites, stack) for stack in stacks},
        sum(parameter.numel() for parameter in base.parameters()),
        _no_shortcuts(model_type, layouts, config),
        _embeddings(backbone, stacks),
        _tied(backbone),
    )


def _no_shortcuts(model_type: str, layouts: Sequence[Layout], config: Any) -> str | None:
    if not layouts:
        return f"model type {model_type!r} has no layout entry, and shortcuts need one: give model.layout"
    for entry in layouts:
        if wrong := mismatch(entry.shortcuts_require, config):
            return f"with {wrong} this backbone can have no shortcuts, they need {dict(entry.shortcuts_require)}"
    return None


def _embeddings(backbone: Any, stacks: Sequence[Stack]) -> tuple[Site, ...]:
    """The word embedding, if its answer is the rows of its table and nothing else (gemma scales them).

    Where each stack has a module of its own that shares the table (t5), each of them is a site.
    """
    table = getattr(backbone, "get_input_embeddings", lambda: None)()
    if not isinstance(table, nn.Embedding) or type(table).forward is not nn.Embedding.forward or table.max_norm:
        return ()
    paths = [
        path
        for path, module in backbone.named_modules()
        if isinstance(module, nn.Embedding) and module.weight is table.weight
    ]
    widths, sites = (table.num_embeddings, table.embedding_dim), []
    for stack in stacks:
        inside = [path for path in paths if path.startswith(f"{stack.root}.")]
        if path := next(iter(inside or (paths if len(stacks) == 1 else ())), None):
            name = site_name(stack.stream, 0, "embed")
            sites.append(Site(name, "lora", "embed", 0, Port(path, "in"), Port(path, "out"), *widths, stack.stream))
    return tuple(sites)


def _tied(backbone: Any) -> str | None:
    """Path of an output layer that shares its weight with the word embedding."""
    table, last = (getattr(backbone, f"get_{side}_embeddings", lambda: None)() for side in ("input", "output"))
    if table is None or last is None or getattr(last, "weight", None) is not table.weight:
        return None
    return next((name for name, module in backbone.named_modules() if module is last), None)


def _present(base: nn.Module, layouts: Sequence[Layout]) -> list[Layout]:
    """Of several streams, those that this class of model has (an encoder alone, for instance)."""
    modules = dict(base.named_modules())
    return [entry for entry in layouts if entry.blocks in modules] or list(layouts)


def _stack(base: nn.Module, prefix: str, layout: Layout, config: Any) -> Stack:
    blocks = _submodule(base, layout.blocks)
    if not isinstance(blocks, nn.ModuleList | nn.Sequential):
        raise SettingError("model.layout", layout.blocks, "no list of blocks")
    order = [str(index) for index in range(len(blocks))] if layout.order is None else layout.order(config)
    return _make_stack(prefix, layout.blocks, order, layout, layout.stream)


def _make_stack(prefix: str, path: str, order: Sequence[str], layout: Layout | None, stream: str) -> Stack:
    absolute = ".".join(part for part in (prefix, path) if part)
    return Stack(absolute.rpartition(".")[0], tuple(f"{absolute}.{part}" for part in order), layout, stream)


def _lora_sites(backbone: nn.Module, stack: Stack) -> list[Site]:
    roles = None if stack.layout is None else {path: role for role, path in stack.layout.roles.items()}
    sites, seen = [], set()
    for layer, block in enumerate(stack.blocks):
        if block in seen:
            continue
        seen.add(block)
        for role, path, width in _linears(_submodule(backbone, block), block, roles):
            name = site_name(stack.stream, layer, role)
            source, sink = Port(path, "in"), Port(path, "out")
            sites.append(Site(name, "lora", role, layer, source, sink, *width, stack.stream))
    return sites


def _check_points(backbone: nn.Module, stack: Stack) -> None:
    """Refuse a layout whose hook points or norms name no module of the first block."""
    layout, block = stack.layout, stack.blocks[0]
    if layout is None:
        return
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


def _repeated_blocks(base: nn.Module, model_type: str) -> tuple[str, nn.ModuleList]:
    """The one list of modules of one class that hold linear layers; lists inside its blocks do not count."""
    found: dict[str, nn.ModuleList] = {}
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


def _stream_width(sites: Sequence[Site], stack: Stack) -> int:
    """Width of the residual stream: what the attention reads (q, or a fused qkv), in the first block."""
    first = [site for site in sites if site.layer == 0 and site.stream == stack.stream]
    if stack.layout is None:
        return first[0].in_features
    for site in first:
        if "q" in site.roles:
            return site.in_features
    raise SettingError("model.layout", dict(stack.layout.roles), "a role q or qkv is needed to know the stream's width")


@dataclass(frozen=True)
class Space:
    """The sites that compete for a budget, in a fixed order, and the group each belongs to.

    Attributes:
        sites: the candidates.
        groups: site name -> label of its group; the only thing an allocator may know about kinds.
        survey: the backbone they were found in.
        renorm: apply the block's norm again after an add of span 2 or more (the paper's rule, around enabled sites).
    """

    sites: tuple[Site, ...]
    groups: Mapping[str, str]
    survey: Survey
    renorm: bool

    @property
    def families(self) -> dict[str, str]:
        """Site name -> what it has in common with sites of other layers."""
        return {site.name: site.label for site in self.sites}

    def __getitem__(self, name: str) -> Site:
        """The site of this name."""
        return self._by_name[name]

    @cached_property
    def _by_name(self) -> dict[str, Site]:
        return {site.name: site for site in self.sites}


@dataclass(frozen=True)
class SearchSpace:
    """Rules that select sites.

    A rule is a role or a kind (``q``, ``shortcut_attn``, ``lora``, ``shortcut``), or a mapping with some of the keys
    ``kind``, ``role``, ``layer``, ``span``, ``stream``, each one value or a list of values; layers may count from the
    end (-1). A fused layer matches the roles that it plays: ``q`` means ``qkv`` where there is no q of its own. The
    word embedding (``embed``, layer 0) takes part only where a rule of ``include`` names its role.

    Args:
        include: a site takes part if one of these rules matches it.
        exclude: and none of these does.
        layers: layers that take part; null: all.
        spans: lengths of the shortcuts, in sub-layers.
        renorm: apply the block's norm a second time after every add of span 2 or more around an enabled shortcut, as
            the paper does. The adapted model then no longer equals the backbone at step 0.
        group_by: what makes sites one group for allocators that treat groups apart (role and layer: of one stream;
            label: role and span).
    """

    include: Sequence[str | Mapping[str, Any]]
    exclude: Sequence[str | Mapping[str, Any]]
    layers: Sequence[int] | None
    spans: Sequence[int]
    renorm: bool
    group_by: Literal["kind", "role", "layer", "label"]

    def resolve(self, found: Survey) -> Space:
        """The sites of this backbone that take part.

        Raises:
            SettingError: if a rule matches nothing, or the layout does not know what is asked for.
        """
        longest = 2 * found.deepest
        for span in self.spans:
            if not 1 <= span <= longest:
                raise SettingError("search_space.spans", list(self.spans), f"spans from 1 to {longest} exist")
        everything = (*found.embeddings, *found.lora_sites, *found.shortcut_sites(sorted(set(self.spans))))
        in_layers = self._in_layers(everything, found)
        chosen = self._matching("include", self.include, in_layers, found)
        dropped = self._matching("exclude", self.exclude, in_layers, found)
        order = {site.name: number for number, site in enumerate(in_layers)}
        streams = list(found.stacks)
        sites = sorted(
            (in_layers[order[name]] for name in chosen - dropped),
            key=lambda site: (streams.index(site.stream), site.layer, order[site.name]),
        )
        if not sites:
            raise SettingError("search_space.include", list(self.include), "no site is left after exclude")
        if self.renorm:
            self._check_renorm(sites, found)
        if found.tied is not None and (words := [site.name for site in sites if site.lookup]):
            _log.warning(
                "%s is the table of the output layer %s, too: a delta there acts on the inputs alone, and cannot be "
                "merged%s",
                words[0],
                found.tied,
                "; both are candidates" if any(found.tied in str(site.sink) for site in sites) else "",
            )
        groups = {site.name: self._group(site) for site in sites}
        return Space(tuple(sites), groups, found, self.renorm)

    def _group(self, site: Site) -> str:
        label = str(getattr(site, self.group_by))
        return f"{site.stream}.{label}" if site.stream and self.group_by in ("role", "layer") else label

    def _in_layers(self, sites: Sequence[Site], found: Survey) -> list[Site]:
        if self.layers is None:
            return list(sites)
        if not self.layers:
            raise SettingError("search_space.layers", [], "at least one layer, or null for all")
        for layer in self.layers:
            if not -found.deepest <= layer < found.deepest:
                raise SettingError("search_space.layers", self.layers, f"layers 0 to {found.deepest - 1} exist")
        layers = frozenset(self.layers)
        return [site for site in sites if _is_layer(site, layers, found)]

    def _matching(
        self, setting: str, rules: Sequence[str | Mapping[str, Any]], sites: Sequence[Site], found: Survey
    ) -> set[str]:
        names: set[str] = set()
        for rule in rules:
            if unknown := set() if isinstance(rule, str) else set(rule) - set(_KEYS):
                raise SettingError(
                    f"search_space.{setting}", rule, f"unknown keys {sorted(unknown)}, possible: {list(_KEYS)}"
                )
            wanted = rule if isinstance(rule, str) else {key: _values(value) for key, value in rule.items()}
            matched = [site for site in sites if _matches(wanted, site, found)]
            if setting == "include":
                matched = [site for site in matched if not site.lookup or _names_role(wanted, site)]
            if (part := _unmatched(rule, matched, found)) is not None:
                raise SettingError(f"search_space.{setting}", part, f"matches no site; {_existing(sites, found)}")
            names.update(site.name for site in matched)
        return names

    def _check_renorm(self, sites: Sequence[Site], found: Survey) -> None:
        for site in sites:
            if isinstance(site.sink, Tap) and (site.span or 0) > 1 and found.write(site.sink, 2).norm is None:
                raise SettingError(
                    "search_space.renorm", True, f"the layout of {found.model_type} names no norm for it; use false"
                )


def _unmatched(rule: str | Mapping[str, Any], matched: Sequence[Site], found: Survey) -> str | Mapping[str, Any] | None:
    """The rule with the first value of a list of its that none of its sites has, which is a slip; None: there is none.

    Args:
        rule: as the user wrote it.
        matched: its sites.
        found: the backbone.
    """
    lists = {} if isinstance(rule, str) else {k: v for k, v in rule.items() if isinstance(v, (list, tuple))}
    if isinstance(rule, str) or not any(lists.values()):
        return None if matched else rule
    for key, values in lists.items():
        there = {value for site in matched for value in _has(site, key, found)}
        for value in values:
            if not isinstance(value, Hashable) or value not in there:
                return {**rule, key: [value]}
    return None


def _values(wanted: Any) -> frozenset[Any]:
    """The values that a rule names; what cannot be hashed is no value of any site."""
    values = wanted if isinstance(wanted, (list, tuple)) else [wanted]
    return frozenset(value for value in values if isinstance(value, Hashable))


def _has(site: Site, key: str, found: Survey) -> tuple[Any, ...]:
    """Everything that a rule may say of a site under one key; layers count from the end of its own stream, too."""
    if key == "layer":
        return site.layer, site.layer - found.depth(site.stream)
    return site.roles if key == "role" else (getattr(site, key),)


def _matches(rule: str | Mapping[str, frozenset[Any]], site: Site, found: Survey) -> bool:
    if isinstance(rule, str):
        return rule in (*site.roles, site.kind)
    return all(not values.isdisjoint(_has(site, key, found)) for key, values in rule.items())


def _names_role(rule: str | Mapping[str, frozenset[Any]], site: Site) -> bool:
    """Whether a rule that matches says the site's role."""
    return rule == site.role if isinstance(rule, str) else "role" in rule


def _is_layer(site: Site, layers: Collection[int], found: Survey) -> bool:
    """Whether the site is in one of these layers."""
    return any(layer in layers for layer in _has(site, "layer", found))


def _existing(sites: Sequence[Site], found: Survey) -> str:
    in_order = sorted(sites, key=lambda site: site.lookup)  # what takes part only by its name is said last
    roles = {
        kind: list(dict.fromkeys(site.role for site in in_order if site.kind == kind)) for kind in ("lora", "shortcut")
    }
    text = f"roles of kind lora: {roles['lora']}, of kind shortcut: {roles['shortcut']}"
    text += (
        f", layers {sorted({site.layer for site in sites})}, spans {sorted({site.span for site in sites if site.span})}"
    )
    if any(found.stacks):
        text += f", streams {list(found.stacks)}"
    if found.no_shortcuts is not None:
        text += f" ({found.no_shortcuts})"
    return text
