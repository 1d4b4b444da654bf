"""What every case is given."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.speed.subjects import Shelf


@dataclass(frozen=True)
class Bench:
    """How to measure.

    Attributes:
        short: tiny models and as few repetitions as can be, to see whether results are right.
        repeats: repetitions of what takes seconds at most.
        threads: of torch.
        seed: of models, batches and runs.
        seeds: of runs from beginning to end.
        out: folder for results; cases may keep scratch files in folders of it.
        data_root: as ``data.root``; None: cases that need local data say so.
        shelf: loaded backbones.
    """

    short: bool
    repeats: int
    threads: int
    seed: int
    seeds: tuple[int, ...]
    out: Path
    data_root: str | None
    shelf: Shelf

    @property
    def mrpc(self) -> Path | None:
        """The folder of MRPC's files, if there is one."""
        folder = None if self.data_root is None else Path(self.data_root) / "glue" / "MRPC"
        return folder if folder is not None and folder.is_dir() else None

    @property
    def encoder(self) -> str:
        """The encoder's name among models."""
        return "tiny_bert" if self.short else "minilm"

    @property
    def decoder(self) -> str:
        """The decoder's name among models."""
        return "tiny_llama" if self.short else "smollm2_135m"

    def size(self, rows: int, tokens: int) -> tuple[int, int]:
        """Examples and tokens of a batch."""
        return (min(rows, 3), min(tokens, 12)) if self.short else (rows, tokens)

    @property
    def settings(self) -> dict[str, Any]:
        """On what results depend, beside the code; seeds and data only where a case looks at them."""
        return {"short": self.short, "repeats": self.repeats, "threads": self.threads, "seed": self.seed}
