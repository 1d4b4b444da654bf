"""An allocation made elsewhere."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from heterolora.allocation import Allocation, check_ranks, read_ranks
from heterolora.allocators.base import Gains
from heterolora.budget import SiteCount
from heterolora.cost import Cost
from heterolora.errors import SettingError
from heterolora.peft_config import CONFIG, NOTES, read_config


@dataclass(frozen=True)
class Fixed:
    """Ranks from a file, or given outright.

    Args:
        path: an ``allocation.json`` of an earlier run, a JSON object of site -> rank, or an adapter of PEFT's (its
            folder, or its ``adapter_config.json``); null: ``ranks`` are given.
        ranks: site -> rank; null: ``path`` is given. Sites that neither names get no rank.
    """

    path: str | None
    ranks: Mapping[str, int] | None

    counts_sites = True

    def __post_init__(self) -> None:
        if (self.path is None) == (self.ranks is None):
            raise SettingError(
                "path",
                self.path,
                "allocator=fixed needs one of two: the file to read, e.g. allocator.path=RUN/allocation.json, or "
                "allocator.ranks={0.q: 4, ...}",
            )
        if self.path is not None and not self._file.is_file():
            raise SettingError("path", self.path, "no such file, and no folder of an adapter")

    @property
    def _given(self) -> tuple[str, object]:
        """Which setting gave the ranks, for messages."""
        return ("allocator.path", self.path) if self.ranks is None else ("allocator.ranks", dict(self.ranks))

    def _read(self) -> Mapping[str, int]:
        if self.path is None:
            return check_ranks(self.ranks)
        if self._file.name == CONFIG:
            raise SettingError(*self._given, "names modules of a backbone; placed() finds their sites")
        return read_ranks(self._file)

    @property
    def _file(self) -> Path:
        """What to read; of a folder, what we or PEFT put there."""
        path = Path(self.path or "").expanduser()
        return next((path / name for name in (NOTES, CONFIG) if (path / name).is_file()), path)

    def at_modules(self, sites: Mapping[str, str]) -> "Fixed":
        """With ranks of sites in place of an adapter's ranks of modules.

        Args:
            sites: path of a linear layer -> name of the site at it.

        Raises:
            SettingError: if the adapter cannot be read, or names a module that is no site.
        """
        if self.path is None or self._file.name not in (NOTES, CONFIG):
            return self
        if self._file.name == NOTES:
            return replace(self, path=None, ranks=self._exported())
        config = read_config(self._file, "allocator.path")
        found = config.among(sites)
        if isinstance(config.targets, list) and (
            unknown := [t for t in config.targets if not any(m == t or m.endswith(f".{t}") for m in sites)]
        ):
            raise SettingError(*self._given, f"its modules {unknown[:3]} are no sites of this search space")
        return replace(self, path=None, ranks={sites[module]: config.rank_of(module) for module in found})

    def _exported(self) -> dict[str, int]:
        """Ranks of an export of ours, shortcuts included."""
        try:
            content = json.loads(self._file.read_text(encoding="utf-8"))
            return check_ranks({**content["in_peft"], **content["not_in_peft"]})
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise SettingError(*self._given, f"{NOTES} cannot be read ({type(error).__name__}: {error})") from error

    @property
    def gain_rule(self) -> None:
        """It looks at no scores."""
        return None

    def allocate(self, gains: Gains, cost: Cost, budget: int | SiteCount, groups: Mapping[str, str]) -> Allocation:
        """The file's ranks, if they fit this space and this budget."""
        try:
            read = self._read()
        except ValueError as error:
            raise SettingError(*self._given, str(error)) from error
        if unknown := sorted(name for name, rank in read.items() if rank and name not in groups):
            raise SettingError(*self._given, f"sites {unknown[:5]} are not in this search space")
        if large := [name for name, rank in read.items() if rank and rank > len(gains[name])]:
            raise SettingError(*self._given, f"more rank than min(in, out) at {large[:5]}")
        ranks = {name: read.get(name, 0) for name in groups}
        if not any(ranks.values()):
            raise SettingError(*self._given, "gives no site any rank")
        spent, active = cost(ranks), [rank for rank in ranks.values() if rank]
        if isinstance(budget, SiteCount):
            if len(active) > budget.total or set(active) != {budget.rank}:
                raise SettingError(
                    *self._given, f"the budget is {budget.total} sites of rank {budget.rank}, not {active}"
                )
            return Allocation(ranks, spent, None)
        if spent > budget:
            raise SettingError(*self._given, f"costs {spent} parameters, the budget is {budget}")
        return Allocation(ranks, spent, budget)
