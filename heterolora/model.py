"""The adapted model: a frozen backbone, its sites, and the adapters that live at some of them.

Adapters are attached by forward hooks. The backbone's modules, names and ``state_dict`` are never touched, whatever
computes a sink's value (``nn.Linear``, ``Conv1D``, a quantised layer) is not asked, and a site without an adapter costs
nothing, not even a hook.
"""

import gc
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional

from heterolora.adapters.base import AdapterFamily, Surroundings, TwoPartAdapter, tensors_once
from heterolora.errors import SettingError
from heterolora.layouts import HookPoint, Junction
from heterolora.linear import frozen_weight, output_is_free, shared_product
from heterolora.sites import Port, Site, Tap
from heterolora.space import Space

Observer = Callable[[Site, torch.Tensor, torch.Tensor | None], None]
"""Called with a site, what its source holds ``[..., in]`` and the loss gradient at its sink ``[..., out]``, if any."""


@contextmanager
def _all_kept() -> Iterator[None]:
    """No garbage collection for a while in which thousands of objects are made that all stay.

    They would start several, each of which walks through the whole model: a third of the time at 10,000 sites.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class _Run:
    """What one forward call has seen so far; never copied, so that a copied model starts clean."""

    def __init__(self) -> None:
        self.taps: dict[Tap, torch.Tensor] = {}
        self.shifts: dict[Junction, torch.Tensor] = {}
        self.calls: dict[HookPoint, int] = {}
        self.narrow: dict[tuple[str, ...], tuple[torch.Tensor, dict[str, torch.Tensor], int]] = {}

    def copied(self) -> "_Run":
        """The same tensors, to go on from more than once."""
        run = _Run()
        run.taps, run.shifts, run.calls = dict(self.taps), dict(self.shifts), dict(self.calls)
        run.narrow = {names: (source, dict(parts), seen) for names, (source, parts, seen) in self.narrow.items()}
        return run

    def count(self, point: HookPoint) -> int:
        """How often this was asked before."""
        self.calls[point] = self.calls.get(point, -1) + 1
        return self.calls[point]

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Run":
        return _Run()


@dataclass
class _Probing:
    """An open observation: whom to tell, which sites, and the zero through which gradients arrive."""

    observer: Observer
    names: frozenset[str]
    backward: bool
    zero: torch.Tensor


@dataclass
class _Join:
    """The sites that meet at one junction.

    ``plain``: nothing but their deltas is added there. ``free``: nobody needs the value that they join.
    """

    junction: Junction
    plain: bool
    free: bool
    sites: list[Site] = field(default_factory=list)


@dataclass
class _Hook:
    """Everything that happens at one place of one module: writes first, then reads.

    Each comes with its own point, which may mean one of the module's calls alone; then calls are counted.
    """

    model: "AdaptedModel"
    point: HookPoint
    writes: list[tuple[HookPoint, _Join]] = field(default_factory=list)
    reads: list[tuple[HookPoint, Tap]] = field(default_factory=list)
    counts: bool = False

    def before(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if self.model._paused:
            return None
        index = self.point.index or 0
        if len(args) <= index:
            raise RuntimeError(f"{self.point.module} was called without positional input {index}; its layout is wrong")
        value = self._value(args[index], None)
        return (*args[:index], value, *args[index + 1 :]) if self.writes else None

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if self.model._paused:
            return None
        index = self.point.index
        own_input = args[0] if args else None
        if index is None:
            return self._value(output, own_input, _alone(module))
        if isinstance(output, torch.Tensor):
            raise RuntimeError(f"{self.point.module} gives a tensor and no tuple; its layout is wrong")
        value = self._value(output[index], own_input)
        return (*output[:index], value, *output[index + 1 :]) if self.writes else None

    def _value(self, value: torch.Tensor, own_input: torch.Tensor | None, alone: bool = False) -> torch.Tensor:
        run = self.model._run
        call = run.count(self.point) if self.counts else None
        for point, join in self.writes:
            if point.call in (None, call):
                value = self.model._join(join, point, value, own_input, alone)
        for point, tap in self.reads:
            if point.call in (None, call):
                run.taps[tap] = value
        return value


class AdaptedModel(nn.Module):
    """A backbone with low-rank maps at the sites of a search space.

    Attaching freezes the backbone except for ``head``, and adds nothing: every site starts without an adapter.

    Args:
        backbone: the pretrained model; used as it is, not copied.
        space: the candidate sites.
        family: makes the adapters and says what they cost.
        head: names of the backbone's parameters that are trained (the task's head).
    """

    def __init__(self, backbone: nn.Module, space: Space, family: AdapterFamily, head: Iterable[str] = ()) -> None:
        super().__init__()
        _refuse_compiled(backbone)
        self.backbone = backbone
        self.adapters = nn.ModuleDict()
        self.space = space
        self.family = family
        if family.needs_weights and (without := [s.name for s in space.sites if not isinstance(s.sink, Port)]):
            raise SettingError(
                "adapter",
                type(family).__name__,
                f"is made from frozen weights, and none acts at {without[:3]}; use search_space=lora_all",
            )
        self.head = frozenset(head)
        self._sites = {site.name: site for site in space.sites}
        self._off: frozenset[str] = frozenset()
        self._run = _Run()
        self._sharing: dict[str, tuple[str, ...]] = {}  # site -> those that may read the same tensor, it among them
        self._probing: _Probing | None = None
        self._handles: list[Any] = []
        self._paused = False
        self._hooked = 1  # how often hooks were put on
        parameters = dict(backbone.named_parameters())
        if missing := self.head - parameters.keys():
            raise KeyError(f"no such parameters in the backbone: {sorted(missing)}")
        for name, parameter in parameters.items():
            parameter.requires_grad_(name in self.head)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The backbone's forward, with every adapter that is on."""
        if self._hooked == 0:  # never so; but a compiled forward that has read the number is made anew when it changes
            raise RuntimeError("not attached")
        return self.backbone(*args, **kwargs)

    # -- adapters ---------------------------------------------------------------------------------------------------

    def adapter(self, name: str) -> nn.Module:
        """The adapter at a site.

        Raises:
            KeyError: if the site holds none.
        """
        return self.adapters[_key(name)]

    def active_adapter(self, name: str) -> nn.Module | None:
        """The adapter that takes part in the forward at a site, if any."""
        return self.adapter(name) if _key(name) in self.adapters and name not in self._off else None

    def site(self, name: str) -> Site:
        """A site of the space.

        Raises:
            KeyError: if the space has none of this name.
        """
        return self._sites[name]

    @property
    def held(self) -> list[str]:
        """Names of the sites that hold an adapter, in the space's order."""
        return [name for name in self._sites if _key(name) in self.adapters]

    @property
    def ranks(self) -> dict[str, int]:
        """Rank held by each site of the space; 0: no adapter."""
        held = {name: self.adapter(name).rank for name in self.held}
        return {name: int(held.get(name, 0)) for name in self._sites}  # type: ignore[arg-type]

    @_all_kept()
    def enable(self, ranks: Mapping[str, int], seed: int) -> None:
        """Give each site a fresh adapter of this rank; sites of rank 0, or not named, hold nothing afterwards.

        Args:
            ranks: site name -> rank.
            seed: adapters are drawn from ``(seed, site name)``.
        """
        self.install(self.fresh(ranks, seed))

    def fresh(self, ranks: Mapping[str, int], seed: int) -> dict[str, nn.Module]:
        """New adapters of the family, where the backbone is and as precise as they are to be on it; none is installed.

        Args:
            ranks: site name -> rank; those of rank 0 get none. What sites share, these share among themselves.
            seed: adapters are drawn from ``(seed, site name)``.

        Raises:
            KeyError: for a site that the space has not.
            SettingError: if the family needs a frozen weight where there is none.
        """
        around = self._around(ranks)
        return self._placed({s.name: self.family.build(s, r, seed, around) for s, r in around.ranks.items()})

    def probes(self, rank: int, std: float, seed: int) -> dict[str, nn.Module]:
        """Adapters for scoring at every site; see ``AdapterFamily.probe``."""
        around = self._around(dict.fromkeys(self._sites, rank))
        return self._placed({s.name: self.family.probe(s, r, std, seed, around) for s, r in around.ranks.items()})

    def _around(self, ranks: Mapping[str, int]) -> Surroundings:
        if unknown := ranks.keys() - self._sites.keys():
            raise KeyError(f"not in the search space: {sorted(unknown)}")
        wanted = {site: ranks[name] for name, site in self._sites.items() if ranks.get(name, 0) > 0}
        return Surroundings(self.frozen_weight, wanted)

    def _placed(self, adapters: dict[str, nn.Module]) -> dict[str, nn.Module]:
        device, dtype = next(self.backbone.parameters()).device, adapter_dtype(self.backbone)
        if (device, dtype) != (torch.device("cpu"), torch.float32):  # as a family builds them
            for adapter in adapters.values():
                adapter.to(device=device, dtype=dtype)
        return adapters

    def install(self, adapters: Mapping[str, nn.Module]) -> None:
        """Let these adapters be all that is held, each at its site, and on."""
        self.adapters.clear()
        self.adapters.update({_key(name): adapters[name] for name in self._sites if name in adapters})
        self.adapters.train(self.training)
        self._off = frozenset()
        self._rehook()

    @contextmanager
    def swapped(self, adapters: Mapping[str, nn.Module]) -> Iterator[None]:
        """Other adapters for a while; those held before come back on exit, untouched."""
        before, off = {name: self.adapter(name) for name in self.held}, self._off
        self.install(adapters)
        try:
            yield
        finally:
            self.install(before)
            self.switch_off(off)

    def switch_off(self, names: Iterable[str]) -> None:
        """Keep these adapters but skip them; all others that are held are on."""
        names = frozenset(names)
        if unknown := names - set(self.held):
            raise KeyError(f"no adapter is held at: {sorted(unknown)}")
        self._off = names
        self._rehook()

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The backbone's own function for a while."""
        off = self._off
        self.switch_off(self.held)
        try:
            yield
        finally:
            self.switch_off(off)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """As ``disabled``, with the hooks left in place: cheaper, for whoever does it at every step."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    def moment(self) -> _Run:
        """What the running forward has seen so far, for another one to go on from."""
        return self._run.copied()

    def go_on(self, moment: _Run) -> None:
        """From here on, the running forward is the one that ``moment`` was taken of; hooks act again if paused."""
        self._run = moment.copied()
        self._paused = False

    @property
    def frozen(self) -> frozenset[str]:
        """Sites that hold an adapter which is not trained."""
        return frozenset(
            name for name in self.held if not any(p.requires_grad for p in self.adapter(name).parameters())
        )

    def freeze(self, names: Iterable[str]) -> None:
        """Train the adapters of these sites no longer; they stay in the function."""
        for name in names:
            self.adapter(name).requires_grad_(False)

    @property
    def held_parameters(self) -> int:
        """Adapter parameters in memory."""
        return sum(p.numel() for p in self.adapters.parameters())

    @property
    def active_parameters(self) -> int:
        """Adapter parameters of the sites that are switched on."""
        on = {p for name in self.held if name not in self._off for p in self.adapter(name).parameters()}
        return sum(p.numel() for p in on)

    @property
    def undecayed(self) -> set[nn.Parameter]:
        """Trained tensors of adapters that weight decay would pull away from 1, or from a length that is not 0."""
        held: list[Any] = [self.adapter(name) for name in self.held]
        return {value for a in held for key, value in a.named_parameters() if key in a.undecayed}

    @property
    def frozen_factors(self) -> int:
        """Numbers in adapters that are never trained, and in no budget: factors drawn, or taken from weights."""
        return sum({id(value): value.numel() for value in self.adapters.buffers()}.values())

    @property
    def head_parameters(self) -> dict[str, nn.Parameter]:
        """The backbone's parameters that are trained, by their own names."""
        return {name: p for name, p in self.backbone.named_parameters() if name in self.head}

    def head_state_dict(self) -> dict[str, torch.Tensor]:
        """The trained parameters of the backbone's head, by their own names."""
        return {name: p.detach() for name, p in self.head_parameters.items()}

    def adapter_state_dict(self) -> dict[str, torch.Tensor]:
        """``<site>.A`` ``[rank, in]`` and ``<site>.B`` ``[out, rank]`` of every site that holds a LoRA.

        Other families have other tensors; what sites share is there once, as ``shared.<name>.<tensor>``.
        """
        adapters = {name: self.adapter(name) for name in self.held}
        return {name: value.detach() for name, value in tensors_once(adapters)}

    def load_adapter_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Fill the held adapters.

        Raises:
            KeyError: if the names are not exactly those of the held adapters.
            RuntimeError: if a shape differs.
        """
        held = self.adapter_state_dict()
        if state.keys() != held.keys():
            raise KeyError(
                f"adapter tensors differ: missing {sorted(held.keys() - state.keys())}, "
                f"unexpected {sorted(state.keys() - held.keys())}"
            )
        if wrong := [name for name, value in held.items() if value.shape != state[name].shape]:
            shapes = [tuple(tensors[wrong[0]].shape) for tensors in (state, held)]
            raise RuntimeError(f"size mismatch for {wrong[0]}: {shapes[0]} is given, {shapes[1]} is held")
        for name, value in held.items():
            value.copy_(state[name])

    def frozen_weight(self, name: str) -> torch.Tensor | None:
        """The frozen weight ``[out, in]`` that acts between a site's source and sink; None where nothing does."""
        site = self._sites[name]
        if not isinstance(site.sink, Port):
            return None
        return frozen_weight(self.backbone.get_submodule(site.sink.module))

    def trained_state_dict(self) -> dict[str, torch.Tensor]:
        """``adapter.<site>.<tensor>`` and ``head.<parameter>``: what is trained, and nothing else."""
        adapters = {f"adapter.{name}": value for name, value in self.adapter_state_dict().items()}
        return adapters | {f"head.{name}": value for name, value in self.head_state_dict().items()}

    def load_trained_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Fill the enabled adapters and the head; every name must fit.

        Raises:
            KeyError: if tensors are missing or unknown.
        """
        split: dict[str, dict[str, torch.Tensor]] = {"adapter": {}, "head": {}}
        for key, value in state.items():
            family, _, name = key.partition(".")
            if family not in split:
                raise KeyError(f"unknown tensor in the checkpoint: {key}")
            split[family][name] = value
        head = self.head_parameters
        if split["head"].keys() != head.keys():
            raise KeyError(f"head tensors differ: {sorted(split['head'].keys() ^ head.keys())}")
        self.load_adapter_state_dict(split["adapter"])
        with torch.no_grad():
            for name, value in split["head"].items():
                head[name].copy_(value)

    # -- observation ------------------------------------------------------------------------------------------------

    @contextmanager
    def probing(self, observer: Observer, names: Iterable[str], backward: bool = True) -> Iterator[torch.Tensor]:
        """Report source values and sink gradients of sites, whether they hold an adapter or not.

        Yields a zero that takes part in the forward: ``torch.autograd.grad(loss, zero)`` runs the backward pass that
        reaches the observer, and leaves no gradient on any parameter.

        Args:
            observer: called for each observed site in each backward pass, as often as its sink was computed.
            names: the sites to observe.
            backward: tell in the backward pass, with gradients; otherwise in the forward pass, without.
        """
        if self._probing is not None:
            raise RuntimeError("the model is observed already; end that first")
        parameter = next(self.backbone.parameters())
        zero = torch.zeros((), device=parameter.device, dtype=adapter_dtype(self.backbone), requires_grad=True)
        self._probing = _Probing(observer, frozenset(names), backward, zero)
        self._rehook()
        try:
            yield zero
        finally:
            self._probing = None
            self._run = _Run()
            self._rehook()

    def gradient_checkpointing(self) -> None:
        """Recompute activations in the backward pass; right with shortcuts, and with several forwards before it.

        Raises:
            SettingError: if the backbone's class cannot.
        """
        kwargs = {"use_reentrant": False, "context_fn": self._checkpoint_contexts}
        enable = getattr(self.backbone, "activation_checkpointing_enable", None)
        if enable is None or not getattr(self.backbone, "supports_gradient_checkpointing", False):
            raise SettingError(
                "model.gradient_checkpointing", True, f"{type(self.backbone).__name__} cannot; use false"
            )
        enable(activation_checkpointing_kwargs=kwargs)

    def _checkpoint_contexts(self) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        """For torch's checkpoint: a recomputed block must see the taps of its own forward, not of a later one."""
        return nullcontext(), self._reinstated(self._run)

    @contextmanager
    def _reinstated(self, run: _Run) -> Iterator[None]:
        current, self._run = self._run, run
        try:
            yield
        finally:
            self._run = current

    # -- hooks ------------------------------------------------------------------------------------------------------

    @_all_kept()
    def _rehook(self) -> None:
        """Put hooks where adapters are on or observed, and nowhere else."""
        self._hooked += 1
        for handle in self._handles:
            handle.remove()
        self._handles = []
        observed = self._probing.names if self._probing else frozenset()
        live = [s for n, s in self._sites.items() if n in observed or (_key(n) in self.adapters and n not in self._off)]
        hooks: dict[tuple[str, str, int | None], _Hook] = {}

        def hook_at(point: HookPoint) -> _Hook:
            place = (point.module, point.side, point.index)
            hook = hooks.setdefault(place, _Hook(self, HookPoint(*place)))
            hook.counts |= point.call is not None
            return hook

        joins: dict[Junction, _Join] = {}
        for site in live:
            junction = self._junction(site)
            if junction not in joins:
                joins[junction] = self._new_join(junction, site)
            joins[junction].sites.append(site)
            joins[junction].plain &= site.name not in observed
        self._sharing = _sharing([site for site in live if self.active_adapter(site.name) is not None])
        # A longer delta joins after the span-1 deltas where both meet at one point (renorm acts on their sum).
        for join in sorted(joins.values(), key=lambda join: any((site.span or 0) > 1 for site in join.sites)):
            for point in join.junction.points:
                hook_at(point).writes.append((point, join))
        survey = self.space.survey
        for tap in dict.fromkeys(site.source for site in live if isinstance(site.source, Tap)):
            point = survey.read(tap)
            hook_at(point).reads.append((point, tap))
        modules = dict(self.backbone.named_modules(remove_duplicate=False))
        for hook in hooks.values():
            module = modules[hook.point.module]
            if hook.point.side == "pre":
                self._handles.append(module.register_forward_pre_hook(hook.before))
            else:  # before transformers' own capturing hooks, whenever those came
                self._handles.append(module.register_forward_hook(hook.after, prepend=True))
        tapped = {site.source.stream for site in live if isinstance(site.source, Tap)}
        shared = {site.stream for site in live if site.name in self._sharing}  # parts that nobody fetched must go, too
        for stream in [stream for stream in survey.stacks if stream in tapped | shared]:
            parent = self.backbone.get_submodule(survey.stacks[stream].root)
            if stream in tapped:
                self._handles.append(parent.register_forward_pre_hook(self._begin))
            self._handles.append(parent.register_forward_hook(self._end))

    def _junction(self, site: Site) -> Junction:
        if isinstance(site.sink, Port):
            return Junction((HookPoint(site.sink.module, "post", None),))
        span = site.span or 0
        junction = self.space.survey.write(site.sink, span)
        return junction if self.space.renorm and span > 1 else Junction(junction.points)

    def _new_join(self, junction: Junction, site: Site) -> _Join:
        plain = len(junction.points) == 1 and junction.norm is None
        free = isinstance(site.sink, Port) and output_is_free(self.backbone.get_submodule(site.sink.module))
        return _Join(junction, plain, free)

    def _begin(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._run = _Run()
        if not (self.training and torch.is_grad_enabled()):
            return
        for block in self.backbone.modules():
            if getattr(block, "gradient_checkpointing", False):
                options = getattr(getattr(block, "_gradient_checkpointing_func", None), "keywords", {})
                if options.get("context_fn") != self._checkpoint_contexts:
                    raise RuntimeError(
                        "gradient checkpointing was switched on from outside; with shortcuts, recomputed blocks would "
                        "see the taps of another forward: call AdaptedModel.gradient_checkpointing() instead"
                    )

    def _end(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._run = _Run()  # autograd and checkpointing keep what they need; nothing else should

    def _join(
        self, join: _Join, point: HookPoint, value: torch.Tensor, own_input: torch.Tensor | None, alone: bool
    ) -> torch.Tensor:
        points = join.junction.points
        if point != points[0]:
            return value + self._run.shifts.pop(join.junction).reshape(value.shape)
        if join.plain and (joined := self._added(join, value, own_input, alone)) is not None:
            return joined
        delta: torch.Tensor | None = None
        for site in join.sites:
            if (adapter := self.active_adapter(site.name)) is not None:
                part: torch.Tensor = adapter(self._source(site, own_input)).reshape(value.shape)
                delta = part if delta is None else delta + part
        renorm = join.junction.norm is not None and delta is not None
        shift = None if delta is None else delta.to(value.dtype)
        if self._probing is not None and (observed := [s for s in join.sites if s.name in self._probing.names]):
            zero = self._observe(observed, value, own_input)
            shift = zero if shift is None else shift + zero
        assert shift is not None  # a join without adapters or observers gets no hook
        joined = value + shift
        if renorm:
            norm = self.backbone.get_submodule(join.junction.norm or "")
            joined = cast(torch.Tensor, norm.forward(joined))  # not called: the norm's own hooks must not run again
            shift = joined - value
        if len(points) > 1:
            self._run.shifts[join.junction] = shift
        return joined

    def _added(
        self, join: _Join, value: torch.Tensor, own_input: torch.Tensor | None, alone: bool
    ) -> torch.Tensor | None:
        """The value with all deltas, each added as one product; None where they must be computed apart.

        Without gradients they are: then the bits are those that PEFT computes from an export.
        """
        apart = not torch.is_grad_enabled() or torch.compiler.is_compiling() or type(value) is not torch.Tensor
        if apart or torch.is_autocast_enabled(value.device.type):
            return None
        sources = {site: self._source(site, own_input) for site in join.sites}
        for site, source in sources.items():
            down = _down(self.adapter(site.name))
            if down is None or not value.dtype == source.dtype == down.dtype:
                return None
        for site, source in sources.items():
            adapter = cast(TwoPartAdapter, self.adapter(site.name))
            value = adapter.add(value, self._narrow(site, source), join.free and alone)
        return value

    def _narrow(self, site: Site, source: torch.Tensor) -> torch.Tensor:
        """The source times the site's ``down``: one product for all sites that read the same tensor, as q, k and v do.

        Whoever comes first computes it for the others, which take their parts; a part that is not there, or of another
        tensor, is computed (blocks may call a layer twice, or give layers of one kind other inputs).
        """
        names = self._sharing.get(site.name, (site.name,))
        held = self._run.narrow.get(names)
        if held is None or held[0] is not source or held[2] != source._version or site.name not in held[1]:
            downs = {name: down for name in names if (down := _down(self.adapter(name))) is not None}
            if len(downs) == 1:
                return functional.linear(source, downs[site.name])
            parts = shared_product(source, list(downs.values()))
            held = self._run.narrow[names] = source, dict(zip(downs, parts, strict=True)), source._version
        part = held[1].pop(site.name)
        if not held[1]:
            del self._run.narrow[names]
        return part

    def _source(self, site: Site, own_input: torch.Tensor | None) -> torch.Tensor:
        if isinstance(site.source, Tap):
            return self._run.taps[site.source]
        if own_input is None:
            raise RuntimeError(f"{site.source.module} was called without a positional input")
        return own_input

    def _observe(self, sites: Sequence[Site], value: torch.Tensor, own_input: torch.Tensor | None) -> torch.Tensor:
        """A zero of the sink's shape whose gradient is the sink's, summed over all points of the junction."""
        assert self._probing is not None
        observer = self._probing.observer
        zero = self._probing.zero.to(value.dtype).expand(value.shape)
        sources = [(site, self._source(site, own_input).detach()) for site in sites]
        if not self._probing.backward:
            for site, source in sources:
                observer(site, source, None)
            return zero.detach()

        def tell(gradient: torch.Tensor) -> None:
            for site, source in sources:
                observer(site, source, gradient)
            sources.clear()  # this closure lives as long as the graph, which outlives what the graph itself has saved

        if zero.requires_grad:  # not under no_grad
            zero.register_hook(tell)  # type: ignore[no-untyped-call]
        return zero


def _refuse_compiled(backbone: nn.Module) -> None:
    """Hooks that are put on after a compilation are ignored without a word."""
    compiled = [name for name, module in backbone.named_modules() if module._compiled_call_impl is not None]
    if compiled or isinstance(backbone, torch._dynamo.OptimizedModule):
        raise SettingError(
            "model",
            type(backbone).__name__,
            "is compiled, and would ignore hooks; attach first, then compile the result",
        )


def carries_adapters(backbone: nn.Module) -> bool:
    """Whether an adapted model has hooks on this backbone, so that it computes something else than its own function."""
    hooks = [
        hook
        for module in backbone.modules()
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    ]
    return any(isinstance(getattr(hook, "__self__", None), (_Hook, AdaptedModel)) for hook in hooks)


def _sharing(sites: Sequence[Site]) -> dict[str, tuple[str, ...]]:
    """Site -> all that may read the same tensor as it does, where there are others."""
    groups: dict[Hashable, list[str]] = {}
    for site in sites:
        groups.setdefault(site.reads, []).append(site.name)
    return {name: tuple(names) for names in groups.values() if len(names) > 1 for name in names}


def _down(adapter: nn.Module) -> torch.Tensor | None:
    """``TwoPartAdapter.down`` of an adapter that has it."""
    down: torch.Tensor | None = getattr(adapter, "down", None)
    return down


def _alone(module: nn.Module) -> bool:
    """Whether our hook alone sees what a module's own forward gives: no other hook may have kept or replaced it."""
    others = len(module._forward_hooks) > 1 or nn.modules.module._global_forward_hooks
    return not others and "forward" not in module.__dict__


def _key(name: str) -> str:
    """A site's name as a module name, which may hold no dot."""
    return name.replace(".", "/")


def adapter_dtype(backbone: nn.Module) -> torch.dtype:
    """Adapters are float32 on a half-precision backbone, and as precise as the backbone otherwise."""
    dtype = next(backbone.parameters()).dtype
    return dtype if dtype in (torch.float32, torch.float64) else torch.float32
