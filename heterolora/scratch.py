"""Tensors on disk while they are not needed, in a file that nobody sees and that goes away with the process."""

import os
import tempfile
from collections.abc import Iterator, MutableMapping
from typing import Self

import torch

Values = tuple[torch.Tensor, ...]


class ScratchValues(MutableMapping[str, Values]):
    """Name -> tensors, kept in a file of the system's folder for temporary files (``TMPDIR``), read and written whole.

    It is a context that closes the file. What is written under a name again must have the shapes and dtypes of the
    first time.
    """

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile(prefix="heterolora-")  # noqa: SIM115 - closed by __exit__
        self._places: dict[str, list[tuple[int, torch.Tensor]]] = {}  # offset, and an empty twin without memory
        self._devices: dict[str, torch.device] = {}
        self._end = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def __setitem__(self, name: str, values: Values) -> None:
        if name not in self._places:
            self._places[name] = []
            for value in values:
                self._places[name].append((self._end, torch.empty_like(value, device="meta")))
                self._end += value.nbytes
            self._devices[name] = values[0].device
        for (offset, twin), value in zip(self._places[name], values, strict=True):
            assert (twin.shape, twin.dtype) == (value.shape, value.dtype)
            content = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
            while content:  # the system may take less at once
                written = os.pwrite(self._file.fileno(), content, offset)
                content, offset = content[written:], offset + written

    def __getitem__(self, name: str) -> Values:
        values = []
        for offset, twin in self._places[name]:
            value = torch.empty(twin.shape, dtype=twin.dtype)
            content = value.reshape(-1).view(torch.uint8).numpy().data
            while content:
                read = os.preadv(self._file.fileno(), [content], offset)
                if not read:
                    raise OSError("the scratch file was cut off")
                content, offset = content[read:], offset + read
            values.append(value.to(self._devices[name]))
        return tuple(values)

    def __delitem__(self, name: str) -> None:
        del self._places[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)
