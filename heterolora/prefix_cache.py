"""What the frozen prefix computes, kept for each example, so that later epochs start there."""

import logging
import math
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from heterolora.errors import SettingError
from heterolora.model import AdaptedModel
from heterolora.prefix import Prefix, evaluating, frozen_blocks, no_prefix
from heterolora.tasks.base import model_inputs

_log = logging.getLogger(__name__)

Batch = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class PrefixSettings:
    """How the frozen layers below the lowest adapter are computed.

    Args:
        cache: compute them once for each example, and start there in later epochs.
        dropout: the backbone's dropout acts in them, as elsewhere; false: it does not, whether they are kept or not.
            What is kept cannot have dropout.
        limit_mib: largest size of what is kept; examples that have no room are computed every time.
        dtype: what it is kept in; null: as computed, or ``float16`` or ``bfloat16``, half the size and no longer exact.
        folder: where; null: the system's folder for temporary files. The file has no name and goes with the process.
    """

    cache: bool
    dropout: bool
    limit_mib: float
    dtype: Literal["float16", "bfloat16"] | None
    folder: str | None

    def __post_init__(self) -> None:
        if not 0 < self.limit_mib < math.inf:
            raise SettingError("limit_mib", self.limit_mib, "a number above 0")
        if self.folder is not None and not os.access(Path(self.folder).expanduser(), os.W_OK | os.X_OK):
            raise SettingError("folder", self.folder, "no folder to write to; null: the system's for temporary files")

    def check(self, model: AdaptedModel) -> None:
        """Refuse what cannot be right with this backbone.

        Args:
            model: the adapted model.

        Raises:
            SettingError: if it can have no prefix, or outputs shall be kept that dropout changes every time.
        """
        config: Any = model.backbone.config
        if (self.cache or not self.dropout) and (reason := no_prefix(model)) is not None:
            given = ("prefix.cache", True) if self.cache else ("prefix.dropout", False)
            raise SettingError(*given, f"{type(model.backbone).__name__} has no frozen prefix: {reason}")
        if self.cache and self.dropout and (key := _dropout_of(config)) is not None:
            raise SettingError(
                "prefix.cache",
                True,
                f"what dropout changes every time cannot be kept ({key}={getattr(config, key)}): prefix.dropout=false "
                "switches it off below the lowest adapter, model.dropout=0 everywhere",
            )


def _dropout_of(config: Any) -> str | None:
    """A setting of the backbone by which its blocks drop something."""
    for key, value in config.to_dict().items():
        named = "drop" in key and not any(word in key for word in ("classifier", "summary"))
        if named and isinstance(value, int | float) and not isinstance(value, bool) and value > 0:
            return str(key)
    return None


class FrozenPrefix:
    """Starts a model's forwards above its frozen prefix.

    Where the prefix shrinks because lower sites became active, what was kept is forgotten; where it grows, the blocks
    that became frozen are computed as before.

    Args:
        settings: whether outputs are kept, and where.
        lengths: split -> tokens of each input, an example's alternatives one after the other; of these splits outputs
            are kept.
        alternatives: inputs of an example.
    """

    def __init__(self, settings: PrefixSettings, lengths: Mapping[str, Sequence[int]], alternatives: int) -> None:
        self.settings = settings
        self.lengths = lengths
        self.alternatives = alternatives
        self._prefix: Prefix | None = None
        self._stores: dict[str, HiddenStore] = {}
        self._checked = False
        self._hits = self._asked = 0
        self.difference: float | None = None
        """Largest difference between what was kept and what its new batch would give; None: not compared yet."""

    @property
    def blocks(self) -> int:
        """How many blocks are skipped; 0 before the first batch."""
        return self._prefix.blocks if self._prefix else 0

    @contextmanager
    def entered(self, model: AdaptedModel, batch: Batch, split: str) -> Iterator[None]:
        """Forwards of this batch inside start above the prefix.

        Raises:
            SettingError: if the backbone's blocks need more than the hidden state.
        """
        prefix = self._current(model)
        if prefix is None:
            yield
            return
        if not self._checked:
            self._check(prefix, batch)
        hidden = self._hidden(prefix, batch, split)
        with prefix.entered(hidden):
            yield

    def report(self) -> dict[str, Any]:
        """For the summary: blocks skipped, what is kept, and how exact it was found to be."""
        kept = sum(store.mib for store in self._stores.values())
        inputs = sum(int(store.filled.sum()) for store in self._stores.values())
        share = self._hits / self._asked if self._asked else None
        return {"blocks": self.blocks, "inputs": inputs, "mib": kept, "reused": share, "difference": self.difference}

    def _current(self, model: AdaptedModel) -> Prefix | None:
        blocks = frozen_blocks(model)
        if self._prefix is not None and (self._prefix.model is not model or blocks < self._prefix.blocks):
            _log.info("the frozen prefix shrank from %d to %d blocks; what was kept is forgotten", self.blocks, blocks)
            self._prefix, self._checked = None, False
            self._stores = {}
        if self._prefix is None and blocks:
            self._prefix = Prefix(model, blocks)
        return self._prefix

    def _hidden(self, prefix: Prefix, batch: Batch, split: str) -> torch.Tensor:
        """What the prefix gives for the batch, as much of it as possible from what was kept."""
        inputs = model_inputs(batch)
        if not self.settings.cache or split not in self.lengths:
            return _computed(prefix, inputs)
        rows = [at * self.alternatives + place for at in batch["index"].tolist() for place in range(self.alternatives)]
        store = self._stores.get(split)
        missing = [at for at, row in enumerate(rows) if store is None or not store.filled[row]]
        self._asked += len(rows)
        self._hits += len(rows) - len(missing)
        if store is None or len(missing) == len(rows):
            hidden = _computed(prefix, inputs)
            if store is None:
                store = self._stores[split] = self._new_store(split, hidden)
            store.put(rows, hidden)
            return store.rounded(hidden)
        hidden = store.get(rows, inputs["input_ids"].shape[1]).to(inputs["input_ids"].device)
        if missing:
            new = _computed(prefix, {key: value[missing] for key, value in inputs.items()})
            store.put([rows[at] for at in missing], new)
            hidden[missing] = store.rounded(new)
        elif self.difference is None:
            self._compare(prefix, inputs, hidden, store, rows)
        return hidden

    def _new_store(self, split: str, hidden: torch.Tensor) -> "HiddenStore":
        dtype = hidden.dtype if self.settings.dtype is None else getattr(torch, self.settings.dtype)
        held = sum(store.mib for store in self._stores.values())
        room = max(self.settings.limit_mib - held, 0.0)
        with torch.inference_mode(False):  # Lightning validates in it, and what is made there can be filled only there
            return HiddenStore(self.lengths[split], hidden, dtype, room, self.settings.folder)

    @torch.no_grad()
    def _check(self, prefix: Prefix, batch: Batch) -> None:
        """Entering above the prefix must give the logits of the whole model, to the bit; once for each prefix."""
        self._checked = True
        model, inputs = prefix.model, model_inputs(batch)
        hidden = _computed(prefix, inputs)
        with evaluating(model):
            expected = model(**inputs).logits
            with prefix.entered(hidden):
                found = model(**inputs).logits
        if not torch.equal(found, expected):
            raise SettingError(
                "prefix",
                f"{prefix.blocks} blocks",
                f"{type(model.backbone).__name__} gives other logits when its first blocks are skipped: they hand on "
                "more than the hidden state; use prefix.cache=false prefix.dropout=true",
            )

    def _compare(
        self, prefix: Prefix, inputs: Batch, hidden: torch.Tensor, store: "HiddenStore", rows: Sequence[int]
    ) -> None:
        """Once: is what was kept what this batch, with its own padding and company, would give?"""
        new = store.rounded(_computed(prefix, inputs)).cpu()
        kept = hidden.cpu()
        self.difference = max(
            (kept[at, : store.lengths[row]] - new[at, : store.lengths[row]]).abs().max().item()
            for at, row in enumerate(rows)
        )
        if self.difference == 0:
            _log.info("the frozen prefix (%d blocks) is kept: bit for bit what is computed anew", prefix.blocks)
        else:
            _log.warning(
                "the frozen prefix (%d blocks) is kept: up to %.1e from what is computed anew in another batch; where "
                "sums depend on a batch's length, data.pad_to_multiple_of=8 can make them equal",
                prefix.blocks,
                self.difference,
            )


def _computed(prefix: Prefix, inputs: Batch) -> torch.Tensor:
    return prefix.run(lambda: prefix.model(**inputs))


class HiddenStore:
    """Hidden states of a split's inputs, without padding, in a memory-mapped file that has no name.

    Args:
        lengths: tokens of each input.
        like: hidden states, ``[inputs, tokens, width]``, of the width and dtype that are to come.
        dtype: what they are kept in.
        limit_mib: largest size; the inputs that come first have room.
        folder: of the file; None: the system's for temporary files.

    Raises:
        SettingError: if the file system has less room.
    """

    def __init__(
        self, lengths: Sequence[int], like: torch.Tensor, dtype: torch.dtype, limit_mib: float, folder: str | None
    ) -> None:
        self._width, self._given = like.shape[-1], like.dtype
        ends = torch.tensor(list(lengths)).cumsum(0)
        fitting = ends * self._width * dtype.itemsize <= limit_mib * 2**20
        self.lengths = list(lengths)
        self._starts = (ends - torch.tensor(self.lengths)).tolist()
        self._fits = fitting.tolist()
        self.filled = torch.zeros(len(self.lengths), dtype=torch.bool)
        tokens = int(ends[fitting][-1]) if fitting.any() else 0
        self.mib = tokens * self._width * dtype.itemsize / 2**20
        if not fitting.all():
            _log.warning(
                "prefix.limit_mib leaves room for %d of %d inputs; the others are computed every time",
                int(fitting.sum()),
                len(fitting),
            )
        self._values = _mapped(tokens * self._width, dtype, folder).view(tokens, self._width)

    def put(self, rows: Sequence[int], hidden: torch.Tensor) -> None:
        """Keep what these inputs gave, as far as there is room."""
        for row, values in zip(rows, hidden, strict=True):
            if self._fits[row]:
                start, length = self._starts[row], self.lengths[row]
                self._values[start : start + length].copy_(values[:length])
                self.filled[row] = True

    def get(self, rows: Sequence[int], tokens: int) -> torch.Tensor:
        """``[rows, tokens, width]``, zero in the padding and for inputs that are not kept."""
        hidden = torch.zeros(len(rows), tokens, self._width, dtype=self._given)
        for at, row in enumerate(rows):
            if self.filled[row]:
                start, length = self._starts[row], self.lengths[row]
                hidden[at, :length] = self._values[start : start + length]
        return hidden

    def rounded(self, hidden: torch.Tensor) -> torch.Tensor:
        """As it would come back: the first use of an input must not differ from later ones."""
        return hidden.to(self._values.dtype).to(self._given)


def _mapped(numbers: int, dtype: torch.dtype, folder: str | None) -> torch.Tensor:
    """Memory behind which there is a file; its name is gone at once, so that nothing stays behind a killed process."""
    if not numbers:
        return torch.empty(0, dtype=dtype)
    place = tempfile.gettempdir() if folder is None else str(Path(folder).expanduser())
    needed = numbers * dtype.itemsize
    try:
        descriptor, name = tempfile.mkstemp(prefix="heterolora-", dir=place)
        try:
            os.posix_fallocate(descriptor, 0, needed)  # a file that finds no room later would end the process
            return torch.from_file(name, shared=True, size=numbers, dtype=dtype)
        finally:
            os.close(descriptor)
            os.unlink(name)
    except OSError as error:
        room = (
            f"{needed / 2**20:.0f} MiB find no room there ({error.strerror}); name another, or lower prefix.limit_mib"
        )
        raise SettingError("prefix.folder", place, room) from error
