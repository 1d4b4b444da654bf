"""Adapters and their optimizer state, while an allocation changes in the middle of training.

What stays the same: a site whose rank does not change keeps its very tensors, moments and step count. A site that is
switched on starts with B = 0, or where it was when it was switched off, if that was kept; one that grows or shrinks
keeps its first units of rank. So growing changes no output, and shrinking only what the dropped units gave.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from heterolora.model import AdaptedModel

Off = Literal["keep", "reset", "freeze"]

_MOMENTS = ("exp_avg", "exp_avg_sq")

State = dict[str, torch.Tensor]
"""``A``, ``B`` and, once trained, ``A.exp_avg``, ``A.exp_avg_sq``, ``A.step``, ... of one LoRA; likewise of others."""

Units = Mapping[str, tuple[int, ...]]
"""Trained tensor -> the dimensions that count units of rank (``Adapter.units``)."""


@dataclass(frozen=True)
class Heritage:
    """Where the first units of an adapter come from, with what the optimizer knows of them.

    Attributes:
        site: held until now.
        units: which of its units, in the order in which they are taken over.
    """

    site: str
    units: Sequence[int]


class Switch:
    """Switches the sites of a model on and off, with what its optimizer knows of them.

    Args:
        model: the adapted model.
        seed: of fresh adapters.
        off: what becomes of a unit that is switched off: ``reset`` drops it; ``keep`` holds it as it is until it is
            switched on again; ``freeze`` leaves its site in the function, no longer trained (whole sites alone).
    """

    def __init__(self, model: AdaptedModel, seed: int, off: Off) -> None:
        self.model = model
        self.seed = seed
        self.off = off
        self._kept: dict[str, State] = {}
        self._units: dict[str, Units] = {}
        self._all: int | None = None  # units of each site that are held, on or off

    @property
    def live(self) -> dict[str, int]:
        """Rank that is trained at each site of the space."""
        frozen = self.model.frozen
        return {name: 0 if name in frozen else rank for name, rank in self.model.ranks.items()}

    @property
    def kept_parameters(self) -> int:
        """Adapter parameters in memory beside those of the model."""
        beside = [name for name in self._kept if self.off != "freeze" or name not in self.model.held]
        return sum(value.numel() for name in beside for key, value in self._kept[name].items() if "." not in key)

    def hold_all(self, rank: int) -> None:
        """Hold units of every site from now on, on or off, as the paper's code does; then say what is on: ``take_on``.

        Args:
            rank: units of each site; fewer where ``min(in, out)`` is less.
        """
        self._all = rank
        self._kept = {site.name: self._spare(site.name, rank) for site in self.model.space.sites}

    def take_on(self, ranks: Mapping[str, int]) -> None:
        """These were enabled in the model, and need not be held beside it."""
        for name, rank in ranks.items():
            self._let_go(name, rank)

    def to(
        self,
        ranks: Mapping[str, int],
        optimizer: torch.optim.Optimizer,
        inherits: Mapping[str, Heritage] | None = None,
        seed: int | None = None,
    ) -> None:
        """Give the sites these ranks.

        Args:
            ranks: site -> rank; sites that are not named get none.
            optimizer: trains the adapters, in its group of the name ``adapters``.
            inherits: site -> whose units it begins with, and which; sites that are not named begin with all of their
                own, in order. With ``off="reset"`` alone.
            seed: of fresh units; None: the run's.
        """
        inherits = inherits or {}
        assert not inherits or self.off == "reset"
        live, before = self.live, {name: self.model.adapter(name) for name in self.model.held}
        after: dict[str, nn.Module] = {}
        states: dict[nn.Parameter, State] = {}
        for name, old in live.items():
            new = ranks.get(name, 0)
            if new == old and name not in inherits:
                if name in before:
                    after[name] = before[name]
                continue
            if old and self.off != "reset":  # a frozen one was kept when it was switched off
                self._keep(name, _state(before[name], optimizer))
            elif self._all is not None and not new:
                self._kept[name] = self._spare(name, self._all)
            if self.off == "freeze":
                after[name] = before.get(name) or self._fresh(name, new)
                after[name].requires_grad_(bool(new))
            elif new:
                after[name] = self._fresh(name, new, seed)
            if new and name in inherits:
                states |= _filled(after[name], _picked(before, inherits[name], optimizer))
            elif new:
                known = _state(before[name], optimizer) if old else self._kept.get(name, {})
                if self.off == "keep" and old and new > old:
                    known = _longer(known, self._kept[name], _units(after[name]))
                states |= _filled(after[name], known)
                self._let_go(name, new)
        self.model.install(after)
        self._hand_over(optimizer, states)

    def _let_go(self, name: str, rank: int) -> None:
        """All units of a site are in the model again."""
        if name in self._kept and rank >= self._rank_kept(name):
            del self._kept[name]

    def _rank_kept(self, name: str) -> int:
        key, dims = next((key, dims) for key, dims in self._units[name].items() if dims)
        return self._kept[name][key].shape[dims[0]]

    def _spare(self, name: str, rank: int) -> State:
        """Factors of a fresh adapter."""
        site = self.model.site(name)
        adapter = self._fresh(name, min(rank, site.in_features, site.out_features))
        return {key: getattr(adapter, key).detach() for key in _units(adapter)}

    def _fresh(self, name: str, rank: int, seed: int | None = None) -> nn.Module:
        adapter = self.model.fresh({name: rank}, self.seed if seed is None else seed)[name]
        self._units[name] = _units(adapter)
        return adapter

    def _keep(self, name: str, state: State) -> None:
        """What is known of the site now; units beyond its rank stay as they were kept before."""
        self._units.setdefault(name, _units(self.model.adapter(name)))
        self._kept[name] = _longer(state, self._kept.get(name, {}), self._units[name])

    def _hand_over(self, optimizer: torch.optim.Optimizer, states: Mapping[nn.Parameter, State]) -> None:
        """The optimizer's group holds what is trained now, in the model's order, as after a resume."""
        group = next(group for group in optimizer.param_groups if group.get("name") == "adapters")
        for parameter in group["params"]:
            parameter.grad = None
        trained = trained_parameters(self.model)
        staying = set(trained)
        for parameter in group["params"]:
            if parameter not in staying:
                optimizer.state.pop(parameter, None)
        group["params"] = trained
        for parameter, state in states.items():
            optimizer.state[parameter] = state

    def state_dict(self) -> dict[str, Any]:
        """What is kept, by site."""
        return {"kept": {name: dict(state) for name, state in self._kept.items()}, "all": self._all}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what was kept."""
        device = next(self.model.backbone.parameters()).device
        self._all = state["all"]
        self._kept = {
            name: {key: value.to(device) for key, value in kept.items()} for name, kept in state["kept"].items()
        }
        for name in self._kept:
            self._fresh(name, 1)  # which tells its units


def trained_parameters(model: AdaptedModel) -> list[nn.Parameter]:
    """Factors that are trained, in the model's order."""
    return [parameter for parameter in model.adapters.parameters() if parameter.requires_grad]


def _state(adapter: nn.Module, optimizer: torch.optim.Optimizer) -> State:
    """Copies of an adapter's factors and of what the optimizer knows of them."""
    found: State = {}
    for key in _units(adapter):
        parameter = getattr(adapter, key)
        found[key] = parameter.detach().clone()
        for name, value in optimizer.state.get(parameter, {}).items():
            found[f"{key}.{name}"] = value.detach().clone()
    return found


def _units(adapter: Any) -> Units:
    found: Units = adapter.units
    return found


def _picked(adapters: Mapping[str, nn.Module], heritage: Heritage, optimizer: torch.optim.Optimizer) -> State:
    """What is known of some units of an adapter."""
    adapter = adapters[heritage.site]
    units, state = _units(adapter), _state(adapter, optimizer)
    for key, value in state.items():
        for dim in () if key.endswith(".step") else units[key.partition(".")[0]]:
            value = value.index_select(dim, torch.tensor(heritage.units, device=value.device, dtype=torch.long))
        state[key] = value
    return state


def _longer(first: State, then: State, units: Units) -> State:
    """The units of one state, followed by those that another has beyond them."""
    if not then:
        return first
    joined = {}
    for key, value in (then | first).items():
        tensor = key.partition(".")[0]
        if key.endswith(".step") or not units[tensor]:
            joined[key] = value
            continue
        shape = [max(sizes) for sizes in zip(first[tensor].shape, then[tensor].shape, strict=True)]
        joined[key] = value.new_zeros(shape)
        for state in (then, first):
            part = state.get(key, torch.zeros_like(state[tensor]))
            _leading(joined[key], units[tensor], part.shape).copy_(part)
    return joined


def _leading(value: torch.Tensor, dims: Iterable[int], shape: torch.Size) -> torch.Tensor:
    """The part of a tensor that belongs to the first units of rank, as many as another of this shape has."""
    for dim in dims:
        value = value.narrow(dim, 0, min(value.shape[dim], shape[dim]))
    return value


@torch.no_grad()
def _filled(adapter: Any, known: State) -> dict[nn.Parameter, State]:
    """Fill an adapter's first units with those that are known; parameter -> what its optimizer shall know, if any."""
    states: dict[nn.Parameter, State] = {}
    for key, dims in _units(adapter).items() if known else ():
        parameter = getattr(adapter, key)
        _leading(parameter, dims, known[key].shape).copy_(_leading(known[key], dims, parameter.shape))
        if f"{key}.step" in known:
            states[parameter] = {"step": known[f"{key}.step"].clone()}
            for name in _MOMENTS:
                moment = torch.zeros_like(parameter, memory_format=torch.preserve_format)
                _leading(moment, dims, known[key].shape).copy_(_leading(known[f"{key}.{name}"], dims, parameter.shape))
                states[parameter][name] = moment
    return states


def changes(before: Mapping[str, int], after: Mapping[str, int]) -> tuple[list[str], list[str]]:
    """Sites that gain units, and sites that lose some."""
    names: Iterable[str] = before.keys() | after.keys()
    moved = sorted(name for name in names if before.get(name, 0) != after.get(name, 0))
    gained = [name for name in moved if after.get(name, 0) > before.get(name, 0)]
    return gained, [name for name in moved if name not in gained]
