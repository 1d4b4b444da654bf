"""Several adapters on one backbone: switched by name, or named by each sample of a batch.

Nothing is ever merged. To switch takes the hooks of one adapter off and puts another's on, and puts the other's own
head parameters in place, so that going there and back gives the same bits. In a batch whose samples name their adapters
the factors of all are padded to one rank and picked for each sample (Fomenko et al. 2024, arXiv 2404.05086).
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from heterolora.adapters.base import plain_factors
from heterolora.adapters.factored import Factored
from heterolora.adapters.lora import LoRA
from heterolora.backbone import Backbone, fingerprint, outside_base
from heterolora.errors import SettingError
from heterolora.export import head_modules
from heterolora.layouts import Layout
from heterolora.linear import reads
from heterolora.loading import run_files
from heterolora.model import AdaptedModel, carries_adapters
from heterolora.peft_config import CONFIG, NOTES
from heterolora.peft_in import export_backbone, from_peft, saved_head
from heterolora.sites import Site
from heterolora.space import Space, Survey, survey


class Several(nn.Module):
    """A backbone and adapters for it, each with a name and a head of its own; none is in use at first.

    Args:
        model: the backbone, a transformers model; it is frozen, and used as it is, not copied.
        head: names of the parameters that each adapter has its own of; None: all outside ``base_model`` of a model with
            a task's head, none of a language model.
        layout: where its blocks and taps are, for an architecture that nobody listed.

    Raises:
        SettingError: if the model has adapters on it.
    """

    def __init__(self, model: nn.Module, head: Iterable[str] | None = None, layout: Layout | None = None) -> None:
        super().__init__()
        if isinstance(model, AdaptedModel) or carries_adapters(model):
            raise SettingError("model", type(model).__name__, "has adapters attached; give a backbone without")
        if any(parameter.is_meta for parameter in model.parameters()):
            raise SettingError("model", "on the meta device", "has no weights to adapt")
        self.backbone = model
        self._head = tuple(_own_head(model) if head is None else head)
        if unknown := sorted(set(self._head) - dict(model.named_parameters()).keys()):
            raise SettingError("head", unknown[:3], "no such parameters in the model")
        model.requires_grad_(False)
        known = fingerprint(model, list(self._head))
        self._known = Backbone(model, None, self._head, known, layout, False, ())
        self._own = nn.ParameterList(self._parameters_in_place())
        self._entries = nn.ModuleList()
        self._names: list[str] = []
        self._used: str | None = None
        self._mix: _Mix | None = None
        self.training = model.training

    @classmethod
    def load(cls, folders: Mapping[str, str | Path], device: str = "cpu") -> "Several":
        """The backbone of the first folder, and the adapters of all; none is in use.

        Args:
            folders: name -> folder of a finished run, or of an export that names its backbone.
            device: where they shall be.

        Raises:
            SettingError: if there is no folder, or one cannot be read, or is for another backbone than the first.
        """
        if not folders:
            raise SettingError("folders", dict(folders), "at least one")
        first = Path(next(iter(folders.values()))).expanduser()
        backbone = export_backbone(first) if (first / NOTES).is_file() else run_files(first).load_backbone()
        several = cls(backbone.model.to(device), backbone.head, backbone.layout).eval()
        for name, folder in folders.items():
            several.add(name, folder)
        return several

    @property
    def names(self) -> list[str]:
        """Of the adapters, in the order in which they came."""
        return list(self._names)

    @property
    def used(self) -> str | None:
        """Name of the adapter in use; None: the backbone answers alone."""
        return self._used

    def add(self, name: str, source: AdaptedModel | str | Path) -> None:
        """Take up an adapter; it is not used yet.

        Args:
            name: for it.
            source: folder of a finished run; folder that PEFT wrote, or that was exported from here; or an adapted
                model on another copy of the backbone, of which adapters and head are copied.

        Raises:
            SettingError: if there is one of this name, it belongs to other backbone weights, or it cannot be read.
        """
        if not name or name in self._names:
            raise SettingError("name", name, "is empty" if not name else "is taken; remove it first")
        before, mode = self._parameters_in_place(), self.training
        try:
            model = self._taken(source)
            entry = _Entry(model, self._parameters_in_place())
        finally:
            self._put(before)
        entry.off()
        self._entries.append(entry)
        self._names.append(name)
        self.train(mode)

    def use(self, name: str | None) -> None:
        """Let one adapter and its head answer; None: the backbone alone, with the head that it came with.

        Raises:
            SettingError: if there is none of this name.
        """
        entry = None if name is None else self._entry(name)
        if self._used is not None:
            self._entry(self._used).off()
        self._forget_mix()
        self._used = name
        self._put(self._own if entry is None else entry.head)
        if entry is not None:
            entry.on()

    def remove(self, name: str) -> None:
        """Forget an adapter; if it is in use, the backbone answers alone from then on.

        Raises:
            SettingError: if there is none of this name.
        """
        self._entry(name)
        if name == self._used:
            self.use(None)
        self._forget_mix()
        at = self._names.index(name)
        del self._names[at], self._entries[at]

    def forward(self, *args: Any, adapters: Sequence[str | None] | None = None, **kwargs: Any) -> Any:
        """The backbone's forward.

        Args:
            args: for it.
            adapters: one name for each sample of the batch, None: the backbone alone with the head that it came with.
                Not given: all samples go through the adapter in use.
            kwargs: for it.

        Raises:
            SettingError: for ``adapters`` in training mode, unknown names, another number of names than samples, heads
                of unequal shapes, a space with renorm, or a backbone that sends through an adapted layer what the
                samples share.
        """
        if adapters is not None:
            return self._mixed(list(adapters), args, kwargs)
        model = self.backbone if self._used is None else self._entry(self._used).model
        return model(*args, **kwargs)

    def train(self, mode: bool = True) -> "Several":
        """Training mode, or evaluation mode, of everything."""
        super().train(mode)
        for entry in self._all():
            entry.model.train(mode)
        return self

    # -- adapters and heads -----------------------------------------------------------------------------------------

    def _entry(self, name: str) -> "_Entry":
        if name not in self._names:
            raise SettingError("adapter", name, f"no adapter of this name; there are {self._names}")
        return self._all()[self._names.index(name)]

    def _all(self) -> list["_Entry"]:
        return [entry for entry in self._entries if isinstance(entry, _Entry)]

    def _parameters_in_place(self) -> list[nn.Parameter]:
        return [self.backbone.get_parameter(name) for name in self._head]

    def _put(self, parameters: Iterable[nn.Parameter]) -> None:
        """Let these be the head's; the tensors themselves are never written to."""
        for name, parameter in zip(self._head, parameters, strict=True):
            owner, _, leaf = name.rpartition(".")
            self.backbone.get_submodule(owner)._parameters[leaf] = parameter

    def _put_fresh(self, like: Mapping[str, torch.Tensor]) -> None:
        """A head that a source can be read into: the backbone's own, in the shapes of what will come."""
        fresh = []
        for name, own in zip(self._head, self._own, strict=True):
            value = own.detach()
            same = name not in like or like[name].shape == value.shape
            fresh.append(nn.Parameter(value.clone() if same else value.new_zeros(like[name].shape)))
        self._put(fresh)

    def _taken(self, source: AdaptedModel | str | Path) -> AdaptedModel:
        """The source's adapters on our backbone, whose head is then the source's."""
        if isinstance(source, AdaptedModel):
            return self._copied(source)
        folder = Path(source).expanduser()
        if (folder / "adapter.safetensors").is_file():
            files = run_files(folder)
            head = {key.removeprefix("head."): value for key, value in files.state.items() if key.startswith("head.")}
            self._check_head(head, folder)
            self._put_fresh(head)
            return files.adapted(self._known)
        if not any((folder / name).is_file() for name in (CONFIG, NOTES)):
            raise SettingError("source", folder, "is no folder of a finished run, and none that PEFT wrote")
        self._put_fresh(saved_head(self._known, folder, "source"))
        return from_peft(self._known, folder, None, "source")

    def _copied(self, source: AdaptedModel) -> AdaptedModel:
        if source.backbone is self.backbone:
            raise SettingError("source", "a model on this very backbone", "give one on a copy of it, or its run folder")
        head = source.head_state_dict()
        self._check_head(head, type(source.backbone).__name__)
        if fingerprint(source.backbone, list(head)) != self._known.fingerprint:
            raise SettingError("source", type(source.backbone).__name__, "is on other backbone weights than these")
        self._put_fresh(head)
        space = replace(source.space, survey=self._survey())
        model = AdaptedModel(self.backbone, space, source.family, self._head)
        model.enable(source.ranks, seed=0)
        model.load_trained_state_dict(source.trained_state_dict())
        model.switch_off(name for name in source.held if source.active_adapter(name) is None)
        return model

    def _check_head(self, head: Mapping[str, torch.Tensor], source: Any) -> None:
        if differ := sorted(head.keys() ^ set(self._head)):
            raise SettingError("source", source, f"has another head than this model: {differ[:3]} is in one of them")

    def _survey(self) -> Survey:
        return survey(self.backbone, self._known.layout)

    # -- a batch in which each sample names its adapter ---------------------------------------------------------------

    def _mixed(self, names: list[str | None], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if any(module.training for module in self.modules()):
            raise SettingError("adapters", "in training mode", "samples may name theirs in evaluation alone: eval()")
        samples, tokens = _size(args, kwargs)
        if len(names) != samples:
            raise SettingError("adapters", f"{len(names)} names", f"the batch has {samples} samples: one name for each")
        entries = {name: self._entry(name) for name in dict.fromkeys(names) if name is not None}
        mix = self._mix_of(entries)
        call = _Call(samples, tokens)
        for name in dict.fromkeys(names):
            call.rows[name] = torch.tensor([row for row, one in enumerate(names) if one == name])
        mix.site.call = call
        handles = [
            self.backbone.get_submodule(path).register_forward_hook(self._heads_of(entries, call))
            for path in (head_modules(self.backbone, frozenset(self._head)) if self._head else ())
        ]
        try:
            with self._paused(), _acting(mix.model):
                return self.backbone(*args, **kwargs)
        finally:
            mix.site.call = None
            for handle in handles:
                handle.remove()

    @contextmanager
    def _paused(self) -> Iterator[None]:
        """The adapter in use does nothing for a while."""
        if self._used is None:
            yield
            return
        with self._entry(self._used).model.paused():
            yield

    def _mix_of(self, entries: Mapping[str, "_Entry"]) -> "_Mix":
        """Hooks at the sites of all these adapters, which do nothing but in a call of ours."""
        if self._mix is not None and self._mix.names == tuple(sorted(entries)):
            return self._mix
        self._forget_mix()
        if wrong := [name for name, entry in entries.items() if entry.model.space.renorm]:
            raise SettingError("adapters", wrong, "with search_space.renorm, samples of one batch share their adapter")
        shapes = {name: [tuple(p.shape) for p in entry.head] for name, entry in entries.items()}
        if len({tuple(shape) for shape in shapes.values()}) > 1:
            raise SettingError("adapters", sorted(shapes), "have heads of unequal shapes; give each a batch of its own")
        sites: dict[str, Site] = {}
        for entry in entries.values():
            sites |= {name: entry.model.site(name) for name in entry.active}
        space = Space(tuple(sites.values()), dict.fromkeys(sites, "all"), self._survey(), renorm=False)
        model = AdaptedModel(self.backbone, space, LoRA("constant", 1.0, 0.0), self._head).eval()
        model._paused = True
        shared = _Shared()
        model.install(
            {
                name: _PerSample(name, {key: e.active[name] for key, e in entries.items() if name in e.active}, shared)
                for name in sites
            }
        )
        self._mix = _Mix(tuple(sorted(entries)), model, shared)
        return self._mix

    def _forget_mix(self) -> None:
        if self._mix is not None:
            self._mix.model.install({})
        self._mix = None

    def _heads_of(self, entries: Mapping[str, "_Entry"], call: "_Call") -> Any:
        """A hook that answers again, for the samples of each adapter with its head."""

        def answer(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            if not args or any(not isinstance(a, torch.Tensor) or len(a) != call.samples for a in args):
                raise SettingError(
                    "adapters", type(module).__name__, "a head that is not given one row for each sample"
                )
            before, parts = self._parameters_in_place(), []
            try:
                for name, rows in call.rows.items():
                    self._put(self._own if name is None else entries[name].head)
                    parts.append(module.forward(*(value[rows.to(value.device)] for value in args)))
            finally:
                self._put(before)
            if len({part.shape[1:] for part in parts}) > 1:
                raise SettingError("adapters", list(call.rows), "have heads of unequal shapes; give each its own batch")
            joined = torch.cat(parts)
            return joined[torch.cat(list(call.rows.values())).argsort().to(joined.device)]

        return answer


def _own_head(model: Any) -> Sequence[str]:
    output = getattr(model, "get_output_embeddings", lambda: None)()
    return () if output is not None or not hasattr(model, "base_model") else outside_base(model)


def _size(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[int, int]:
    """Samples of a batch, and tokens of each."""
    given = [kwargs.get(key) for key in ("input_ids", "inputs_embeds")] + list(args[:1])
    for value in given:
        if isinstance(value, torch.Tensor) and value.dim() > 1:
            return value.shape[0], value.shape[1]
    raise SettingError("adapters", "a batch without input_ids", "give input_ids or inputs_embeds, one row a sample")


@contextmanager
def _acting(model: AdaptedModel) -> Iterator[None]:
    model._paused = False
    try:
        yield
    finally:
        model._paused = True


class _Entry(nn.Module):
    """One adapter: its adapted model, which shares our backbone, and its head."""

    def __init__(self, model: AdaptedModel, head: Iterable[nn.Parameter]) -> None:
        super().__init__()
        self.adapters = model.adapters
        self.head = nn.ParameterList(head)
        self.__dict__["model"] = model  # no child: the backbone is there once
        self._off = frozenset(name for name in model.held if model.active_adapter(name) is None)

    model: AdaptedModel

    @property
    def active(self) -> dict[str, Any]:
        """Site name -> adapter, where one takes part."""
        return {name: self.model.adapter(name) for name in self.model.held if name not in self._off}

    def on(self) -> None:
        """Put its hooks on."""
        self.model.switch_off(self._off)

    def off(self) -> None:
        """Take them away."""
        self.model.switch_off(self.model.held)


@dataclass
class _Call:
    """One mixed batch: its samples, tokens of each, and adapter -> its rows."""

    samples: int
    tokens: int
    rows: dict[str | None, torch.Tensor] = field(default_factory=dict)


@dataclass
class _Shared:
    """The call that is running."""

    call: _Call | None = None


@dataclass
class _Mix:
    """Hooks for some adapters at once, kept for the next batch of the same."""

    names: tuple[str, ...]
    model: AdaptedModel
    site: _Shared


class _PerSample(nn.Module):
    """What stands at one site in a mixed batch: each sample's delta is that of its own adapter, or zero."""

    _adapters: dict[str, Any]

    def __init__(self, site: str, adapters: Mapping[str, Any], shared: _Shared) -> None:
        super().__init__()
        self._site, self._shared = site, shared
        self.__dict__["_adapters"] = dict(adapters)  # no children: they belong to their entries

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The deltas, ``[..., in] -> [..., out]``, samples in the first dimension, or its tokens flattened into it."""
        call = self._shared.call
        assert call is not None  # paused otherwise
        samples = self._by_sample(x, call)
        plain = {name: one for name, one in self._adapters.items() if type(one).forward is Factored.forward}
        out = self._padded(samples, plain, call) if plain else None
        for name, adapter in self._adapters.items():
            if name in plain or name not in call.rows:
                continue  # a map that is no product of two factors makes its own way
            rows = call.rows[name].to(x.device)
            part = adapter(samples[rows])
            if out is None:
                out = part.new_zeros(len(samples), *part.shape[1:])
            out = out.index_add(0, rows, part)
        assert out is not None
        return out.flatten(0, 1) if samples.dim() > x.dim() else out

    def _by_sample(self, x: torch.Tensor, call: _Call) -> torch.Tensor:
        """``[samples, tokens, in]``."""
        if len(x) == call.samples and (x.dim() > 2 or not x.is_floating_point()):
            return x
        if x.dim() == 2 and len(x) == call.samples * call.tokens:
            return x.reshape(call.samples, call.tokens, -1)
        raise SettingError(
            "adapters",
            f"{call.samples} samples",
            f"{self._site} is given {tuple(x.shape)}, which is no row for each sample; give each adapter its own batch",
        )

    def _padded(self, x: torch.Tensor, adapters: Mapping[str, Any], call: _Call) -> torch.Tensor:
        """Factors of all, with zeros up to the highest rank and for who has none here, picked for each sample."""
        pairs = [plain_factors(adapter) for adapter in adapters.values()]
        rank = max(len(down) for down, _ in pairs)
        down, up = pairs[0]
        downs, ups = down.new_zeros(len(pairs) + 1, rank, down.shape[1]), up.new_zeros(len(pairs) + 1, len(up), rank)
        which = torch.zeros(call.samples, dtype=torch.long)
        for place, (name, adapter, pair) in enumerate(zip(adapters, adapters.values(), pairs, strict=True), start=1):
            downs[place, : len(pair[0])], ups[place, :, : len(pair[0])] = pair[0], pair[1] * adapter.scale
            which[call.rows.get(name, [])] = place
        which = which.to(x.device)
        if x.is_floating_point():
            narrow = torch.bmm(x.to(downs.dtype).flatten(1, -2), downs[which].mT)
        else:  # ids; a factor is as long as the vocabulary, and is not copied for each sample
            narrow = torch.stack([reads(ids, downs[place]) for ids, place in zip(x, which.tolist(), strict=True)])
            x = x.unsqueeze(-1)
        return torch.bmm(narrow, ups[which].mT).reshape(*x.shape[:-1], -1)
