"""The search as a call, for a model and a training loop of one's own: no Hydra, no Lightning, no files."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import nn

from heterolora import peft_in
from heterolora.adapters.base import AdapterFamily
from heterolora.allocation import Allocation, read_ranks
from heterolora.allocators.base import Allocator, placed
from heterolora.backbone import Backbone, fingerprint, outside_base
from heterolora.budget import Budget, Params
from heterolora.build import build
from heterolora.calibration import calibrate, step_limit
from heterolora.errors import SettingError
from heterolora.export import config_to_train
from heterolora.model import AdaptedModel, carries_adapters
from heterolora.provenance import provenance
from heterolora.proxies.base import Proxy, Score, check_scores, looks_at_batches
from heterolora.report.files import read_json, write_json
from heterolora.report.picture import allocation_figure
from heterolora.scoring import Probe, allocate, batch_size, check_budget, check_trained, rehearse, score
from heterolora.shipped import default, option, options
from heterolora.space import SearchSpace, Space, survey
from heterolora.step_time import StepTimes

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from peft import LoraConfig

_DOES = {
    "search_space": "resolve",
    "proxy": "score",
    "allocator": "allocate",
    "budget": "resolve",
    "adapter": "build",
}
"""What an object that stands for an option can be asked for."""

LossFn: TypeAlias = Callable[[Any, Mapping[str, Any]], torch.Tensor]
"""A scalar loss of a model on a batch of its dataloader."""


@dataclass(frozen=True)
class FoundAllocation:
    """An allocation for one model, and what can be made of it.

    Attributes:
        allocation: ranks, cost, and what they were computed from.
        scores: site -> score; None if the allocator looks at none.
        space: the candidates.
        family: the adapters that were counted on.
        backbone: the model.
        head: names of its parameters that are trained with the task.
    """

    allocation: Allocation
    scores: Mapping[str, Score] | None
    space: Space
    family: AdapterFamily
    backbone: nn.Module
    head: tuple[str, ...]

    @property
    def ranks(self) -> dict[str, int]:
        """Site name -> rank, for every candidate; 0: no adapter."""
        return dict(self.allocation.ranks)

    @property
    def spent(self) -> int:
        """Trainable adapter parameters that these ranks cost."""
        return self.allocation.spent

    @property
    def budget(self) -> int | None:
        """Parameters that were allowed; None when the budget was a number of sites."""
        return self.allocation.budget

    def peft_config(self, **changes: Any) -> "LoraConfig":
        """For ``peft.get_peft_model``: LoRA with these ranks, at the scale that was counted on, and the head.

        Args:
            changes: other arguments of ``peft.LoraConfig``, or other values.

        Raises:
            SettingError: if shortcut sites have rank, which PEFT cannot hold: ``heterolora.attach`` can.
        """
        from peft import LoraConfig  # takes seconds

        if left := [name for name in self.allocation.active if self.space[name].span is not None]:
            raise SettingError(
                "search_space",
                f"{len(left)} shortcut sites with rank, e.g. {left[0]}",
                "PEFT cannot hold them: use heterolora.attach, or search_space='lora_all'",
            )
        config = config_to_train(self.backbone, self.head, self.space, self.ranks, self.family)
        return LoraConfig(**{key: value for key, value in config.items() if key != "peft_type"} | changes)

    def plot(self, title: str = "") -> "Figure":
        """Layers across, roles down, ranks as colour and number; in a notebook it shows itself."""
        return allocation_figure(self.space, self.allocation, title)

    def save(self, path: str | Path) -> None:
        """Write ``allocation.json``, which ``attach`` and ``train.py allocator=fixed allocator.path=...`` read.

        Raises:
            SettingError: if there is no such folder.
        """
        if not (place := Path(path).expanduser()).parent.is_dir():
            raise SettingError("path", path, f"there is no folder {place.parent}")
        write_json(place, self.allocation.as_dict())


def search(
    model: nn.Module,
    dataloader: Iterable[Mapping[str, Any]] | None,
    loss_fn: LossFn | None = None,
    search_space: str | SearchSpace | None = None,
    proxy: str | Proxy | None = None,
    allocator: str | Allocator | None = None,
    budget: str | int | Budget | None = None,
    *,
    adapter: str | AdapterFamily | None = None,
    probe: Probe | None = None,
    head: Iterable[str] | None = None,
    scores: Mapping[str, Score] | None = None,
    seed: int = 0,
) -> FoundAllocation:
    """Where LoRA should go in a model, and how large; the model is as before afterwards.

    A name means the option of that name of the project's config files; None means the project's default.

    Args:
        model: a transformers model, or an adapted one (see ``from_peft``), whose adapters then take part.
        dataloader: batches of training examples as the model takes them, and what ``loss_fn`` needs. The first
            ``probe.batches`` are scored (with the default probe: as many as there are, if fewer), the next ones warm
            up the head, and then the adapters of a proxy that needs trained ones. None: nothing looks at data.
        loss_fn: of the model and a batch; None: the loss that the model gives itself for a batch with ``labels``.
        search_space: which sites compete.
        proxy: scores them.
        allocator: makes ranks of scores.
        budget: trainable adapter parameters; or a name, or anything with ``resolve``. For its ``step_time``, steps are
            timed anew on a batch of median size among the first ones, so that two calls may decide otherwise.
        adapter: what the adapters will be.
        probe: how the proxy looks.
        head: names of the parameters that are trained with the task, and warmed up before scoring; None: those outside
            the base model, or none if they are a language model's.
        scores: site -> score, to allocate from in place of scoring; a model on the meta device will do. Scores of sites
            that are no candidates are left alone.
        seed: for what is drawn.

    Raises:
        SettingError: for anything that cannot be used, or cannot go together.
        DegenerateScores: if the scores rank nothing.
    """
    adapted = model if isinstance(model, AdaptedModel) else None
    backbone = _plain(model) if adapted is None else adapted.backbone
    if probe is not None and not isinstance(probe, Probe):
        raise SettingError("probe", probe, "a heterolora.scoring.Probe, or None")
    if type(budget) is int and budget < 1:
        raise SettingError("budget", budget, "at least 1 parameter")
    rule = _object("allocator", allocator, seed)
    scorer = _object("proxy", proxy, seed)
    family = _object("adapter", adapter, seed) if adapted is None or adapter is not None else adapted.family
    if adapted is not None and search_space is None:
        space = adapted.space
    else:
        space = _object("search_space", search_space, seed).resolve(survey(backbone))
    names = tuple(adapted.head if adapted is not None and head is None else _head(backbone, head))
    count = (
        Params(budget, None)
        if isinstance(budget, int) and not isinstance(budget, bool)
        else _object("budget", budget, seed)
    )
    rule = placed(rule, space.sites)
    allowed = count.resolve(space)
    check_budget(rule, allowed, space, family)
    rehearse(rule, allowed, space, family)
    limit = None
    if getattr(count, "step_time", None) is not None:
        with _required_as_before(backbone):
            attached = AdaptedModel(backbone, space, family, names) if adapted is None else adapted
            limit = step_limit(count, space.survey, lambda: _times(attached, dataloader, loss_fn))
        rehearse(rule, allowed, space, family, limit)
    found = None
    sites = [site.name for site in space.sites]
    if scores is not None:
        if missing := [name for name in sites if name not in scores]:
            raise SettingError("scores", f"{len(scores)} sites", f"lacks {missing[:3]} ({len(missing)} in all)")
        found = {name: _number(name, scores[name]) for name in sites}
        check_scores("given", _GIVEN, found, sites)
    elif rule.gain_rule is not None:
        with _required_as_before(backbone):
            attached = adapted or AdaptedModel(backbone, space, family, names)
            found = dict(_score(attached, dataloader, loss_fn, scorer, probe, _name(proxy, scorer), seed))
    given = {"search_space": search_space, "proxy": proxy, "allocator": allocator, "adapter": adapter, "budget": budget}
    allocation = allocate(rule, found, allowed, space, family, limit)
    objects = {"search_space": None, "proxy": scorer, "allocator": rule, "adapter": family, "budget": count}
    nodes = {group: _node(group, given[group], objects[group], seed) for group in given}
    origin = provenance(
        {**nodes, "seed": seed},
        _fingerprint(backbone, names),
        None,  # whose batches have no numbers here
        proxy=nodes["proxy"] if found is not None and scores is None else None,
        probe=_node("probe", probe, probe, seed) if found is not None and scores is None else None,
        scores=None if scores is None else "given",
        **({} if limit is None else {"step_time": limit.record(space.sites, allocation.ranks)}),
    )
    complete = Allocation(allocation.ranks, allocation.spent, allocation.budget, origin)
    return FoundAllocation(complete, found, space, family, backbone, names)


def attach(
    model: nn.Module, allocation: FoundAllocation | str | Path, *, seed: int = 0, head: Iterable[str] | None = None
) -> AdaptedModel:
    """The model with fresh adapters at every site that has rank, shortcuts included; at first it answers as before.

    Everything but adapters and head is frozen, so that ``filter(lambda p: p.requires_grad, model.parameters())`` are
    what an optimizer needs.

    Args:
        model: the model that was searched, or one with the same weights; it is used as it is, not copied.
        allocation: what ``search`` gave, or an ``allocation.json``, or the folder of a run or a search with one.
        seed: adapters are drawn from it.
        head: as in ``search``; None: as it was there.

    Raises:
        SettingError: if the allocation was made for another model, or the file cannot be read.
    """
    model = _plain(model)
    if isinstance(allocation, FoundAllocation):
        ranks, origin = allocation.ranks, allocation.allocation.provenance
        family, names = allocation.family, allocation.head if head is None else tuple(head)
        space = allocation.space
        if model is not allocation.backbone:
            space = dataclasses.replace(space, survey=survey(model))
    else:
        path = Path(allocation).expanduser()
        path = path / "allocation.json" if path.is_dir() else path
        origin = read_json(path, "allocation").get("provenance", {})
        try:
            ranks = read_ranks(path)
        except ValueError as error:
            raise SettingError("allocation", path, str(error)) from error
        if not isinstance(origin, Mapping) or not {"search_space", "adapter"} <= origin.keys():
            raise SettingError("allocation", path, "does not say what search space and adapter it is for")
        family, names = build(origin["adapter"], "adapter"), tuple(_head(model, head))
        space = build(origin["search_space"], "search_space").resolve(survey(model))
    made_for, same = origin.get("backbone"), model is getattr(allocation, "backbone", None)
    if made_for is not None and not same and _fingerprint(model, names) != made_for:
        raise SettingError("allocation", "its backbone", "has other weights than this model (or another head)")
    if unknown := sorted(name for name, rank in ranks.items() if rank and name not in space.groups):
        raise SettingError("allocation", unknown[:3], "no such sites in this model")
    adapted = AdaptedModel(model, space, family, names)
    adapted.enable(ranks, seed)
    return adapted


def from_peft(
    model: nn.Module,
    folder: str | Path,
    *,
    search_space: str | SearchSpace | None = None,
    head: Iterable[str] | None = None,
) -> AdaptedModel:
    """The model with an adapter that PEFT trained, or that was exported from here, in evaluation mode.

    It answers as PEFT's would; ``search`` scores its sites at that point of training, and an optimizer over
    ``(p for p in adapted.parameters() if p.requires_grad)`` trains on.

    Args:
        model: what the adapter belongs to; it is used as it is, not copied.
        folder: with ``adapter_config.json`` and ``adapter_model.safetensors``.
        search_space: the candidates; None: every LoRA site, and where the folder has shortcuts, those of their spans.
        head: as in ``search``.

    Raises:
        SettingError: if the adapter is for another model, or is none that a LoRA can hold.
    """
    model = _plain(model)
    names = tuple(_head(model, head))
    known = _fingerprint(model, names)
    if known is None:
        raise SettingError("model", "on the meta device", "has no weights to adapt")
    backbone = Backbone(model, None, names, known, None, False, ())
    space = None if search_space is None else _object("search_space", search_space, 0).resolve(survey(model))
    return peft_in.from_peft(backbone, folder, space)


def _score(
    model: AdaptedModel,
    dataloader: Iterable[Mapping[str, Any]] | None,
    loss_fn: LossFn | None,
    proxy: Proxy,
    probe: Probe | None,
    name: str,
    seed: int,
) -> Mapping[str, Score]:
    settings = probe or _default_probe()
    device = next(model.backbone.parameters()).device
    if device.type == "meta":
        raise SettingError("model", "on the meta device", "has no weights to score; give scores")
    check_trained({name: proxy}, settings, model)
    looks, wanted = looks_at_batches(proxy), 0
    if looks:
        wanted = settings.batches + settings.head_warmup_steps
        wanted += settings.adapter_warmup_steps if settings.trains_adapters([proxy]) else 0
    with torch.random.fork_rng():  # a dataloader draws from the global generator
        batches = [_moved(batch, device) for batch in islice(dataloader or (), wanted)]
    if wanted and not batches:
        raise SettingError("dataloader", dataloader, "gives no batches to score")
    if probe is not None and len(batches) < settings.batches and looks:
        raise SettingError("probe.batches", probe.batches, f"the dataloader gives {len(batches)} batches")
    scored = batches[: settings.batches]
    loss = loss_fn or _own_loss
    return score(
        model,
        lambda adapted, batch: _checked(loss, adapted.backbone, batch),
        scored,
        batches[settings.batches :] or scored,
        proxy=proxy,
        probe=settings,
        seed=seed,
        proxy_name=name,
    )


_TIMED = 16
"""Batches that are looked at for one of median size."""


def _times(model: AdaptedModel, dataloader: Iterable[Mapping[str, Any]] | None, loss_fn: LossFn | None) -> StepTimes:
    """What a training step takes on this machine now; there is no folder here to keep it in."""
    device = next(model.backbone.parameters()).device
    if device.type == "meta":
        raise SettingError("budget.step_time", "a limit", "is timed on the model, and this one has no weights")
    with torch.random.fork_rng():  # a dataloader draws from the global generator
        batches = [_moved(batch, device) for batch in islice(dataloader or (), _TIMED)]
    if not batches:
        raise SettingError("dataloader", dataloader, "gives no batches to time a step on")
    loss = loss_fn or _own_loss
    typical = sorted(batches, key=batch_size)[len(batches) // 2]
    return calibrate(model, lambda adapted, batch: _checked(loss, adapted.backbone, batch), typical)


def _plain(model: Any) -> nn.Module:
    """A model that nothing is attached to.

    Raises:
        SettingError: if it is none.
    """
    if not isinstance(model, nn.Module):
        raise SettingError("model", model, "a torch.nn.Module of transformers is needed")
    if isinstance(model, AdaptedModel):
        raise SettingError("model", type(model).__name__, "is adapted already; give its .backbone after enable({}, 0)")
    if hasattr(model, "peft_config") and hasattr(model, "base_model"):
        raise SettingError(
            "model",
            type(model).__name__,
            "is wrapped by PEFT: give model.unload(), or load what PEFT saved with heterolora.from_peft",
        )
    if carries_adapters(model):
        raise SettingError(
            "model",
            type(model).__name__,
            "has adapters attached: give the adapted model, or take them off with its enable({}, seed=0)",
        )
    return model


class _Given:
    """Stands for whatever made given scores."""

    control = True  # equal ones are the user's own choice
    remedy = "give finite scores"
    statistics = ()


_GIVEN: Any = _Given()


def _number(name: str, score: Any) -> Score:
    """A score as it should be.

    Raises:
        SettingError: if it is no number, and no list of numbers.
    """
    try:
        return [float(unit) for unit in score] if isinstance(score, (list, tuple)) else float(score)
    except (TypeError, ValueError) as error:
        raise SettingError("scores", {name: score}, "a number, or one for each unit of rank") from error


def _checked(loss_fn: LossFn, model: nn.Module, batch: Mapping[str, Any]) -> torch.Tensor:
    """A loss that can be differentiated.

    Raises:
        SettingError: if it is none.
    """
    loss = loss_fn(model, batch)
    if not isinstance(loss, torch.Tensor) or loss.numel() != 1 or (torch.is_grad_enabled() and not loss.requires_grad):
        shown = f"shape {tuple(loss.shape)}" if isinstance(loss, torch.Tensor) else type(loss).__name__
        raise SettingError("loss_fn", shown, "it must return one number that depends on the model, with its graph")
    return loss.reshape(())


def _own_loss(model: Any, batch: Mapping[str, Any]) -> torch.Tensor:
    """What a transformers model computes of labels."""
    loss: torch.Tensor | None = getattr(model(**batch), "loss", None)
    if loss is None:
        raise SettingError("loss_fn", None, f"the model gave no loss for {sorted(batch)}: give labels, or a loss_fn")
    return loss


def _moved(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    if not hasattr(batch, "items"):
        raise SettingError("dataloader", type(batch).__name__, "batches must be mappings of names to tensors")
    if wrong := [key for key, value in batch.items() if isinstance(value, (list, str))]:
        raise SettingError("dataloader", f"a batch with {wrong[0]}", "is no tensor: give batches of tensors (collated)")
    if flat := [key for key, value in batch.items() if key == "input_ids" and value.dim() < 2]:
        raise SettingError("dataloader", f"{flat[0]} of one dimension", "is a single example: give batches")
    return {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in batch.items()}


@contextmanager
def _required_as_before(backbone: nn.Module) -> Iterator[None]:
    """Whatever is frozen for scoring requires gradients again afterwards."""
    required = [(parameter, parameter.requires_grad) for parameter in backbone.parameters()]
    try:
        yield
    finally:
        for parameter, requires_grad in required:
            parameter.requires_grad_(requires_grad)


def _head(model: Any, given: Iterable[str] | None) -> Sequence[str]:
    if given is not None:
        known = dict(model.named_parameters()).keys()
        names = (given,) if isinstance(given, str) else tuple(given)
        if unknown := [name for name in names if name not in known]:
            raise SettingError("head", unknown, f"no such parameters; the last ones of this model: {list(known)[-2:]}")
        return names
    output = getattr(model, "get_output_embeddings", lambda: None)()
    return () if output is not None or not hasattr(model, "base_model") else outside_base(model)


def _fingerprint(model: nn.Module, head: Sequence[str]) -> str | None:
    if any(parameter.is_meta for parameter in model.parameters()):
        return None
    return fingerprint(model, list(head))


def _object(group: str, given: Any, seed: int) -> Any:
    """What a name stands for; an object stands for itself."""
    if given is None:
        return build(default(group, seed), group)
    if isinstance(given, str):
        return build(option(group, given, seed=seed), group)
    if not hasattr(given, _DOES[group]) or (group == "proxy" and not hasattr(given, "statistics")):
        raise SettingError(group, given, f"a name, one of {options(group)}, or an object with {_DOES[group]}()")
    return given


def _default_probe() -> Probe:
    probe: Probe = build(default("probe"), "probe")
    return probe


def _name(given: Any, made: object) -> str:
    return given if isinstance(given, str) else type(made).__name__.lower()


def _node(group: str, given: Any, made: Any, seed: int) -> Any:
    """What a config would say: the option's node, or the object's class and arguments."""
    if given is None:
        return default(group, seed)
    if isinstance(given, str):
        return option(group, given, seed=seed)
    thing = given if made is None else made
    if thing is None or not dataclasses.is_dataclass(thing):
        return None if thing is None else {"_target_": f"{type(thing).__module__}.{type(thing).__qualname__}"}
    values = {field.name: getattr(thing, field.name) for field in dataclasses.fields(thing)}
    return {"_target_": f"{type(thing).__module__}.{type(thing).__qualname__}", **values}
