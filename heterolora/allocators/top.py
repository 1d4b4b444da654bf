"""The paper's allocator: one rank for the best sites."""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from heterolora.allocation import Allocation
from heterolora.allocators.base import GainRule, Gains, Normalise, tie_order
from heterolora.budget import SiteCount
from heterolora.cost import Cost
from heterolora.errors import SettingError


@dataclass(frozen=True)
class Top:
    """A fixed rank for the sites with the largest gain, nothing for the others (HeteroLoRA, arXiv 2406.14956).

    The best sites are taken in order until the next one does not fit; what is left is reported as unspent.

    Args:
        mode: ``combined`` ranks all sites in one list; ``separate`` gives each group its own list and its share of the
            budget (in proportion to what the whole group would cost).
        rank: rank of each chosen site.
        normalise: how scores of different sites are made comparable.
        seed: order of ties.
    """

    mode: Literal["combined", "separate"]
    rank: int
    normalise: Normalise
    seed: int

    counts_sites = True

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise SettingError("rank", self.rank, "a whole number of at least 1")

    @property
    def gain_rule(self) -> GainRule:
        """One value a site matters; ``flat`` keeps its order."""
        return GainRule("flat", self.rank, self.normalise)

    def allocate(self, gains: Gains, cost: Cost, budget: int | SiteCount, groups: Mapping[str, str]) -> Allocation:
        """Ranks ``rank`` or 0."""
        gains, everyone = {name: values for name, values in gains.items() if values}, gains
        if small := [name for name, values in gains.items() if len(values) < self.rank]:
            raise SettingError("allocator.rank", self.rank, f"more than min(in, out) at {small[:3]}")
        if isinstance(budget, SiteCount) and budget.rank != self.rank:
            raise SettingError("allocator.rank", self.rank, f"must equal budget.rank={budget.rank}")
        order = sorted(gains, key=lambda name: (-sum(gains[name][: self.rank]), tie_order(self.seed, name)))
        lists: dict[str, list[str]] = {}
        for name in order:
            lists.setdefault(groups[name] if self.mode == "separate" else "", []).append(name)
        whole = cost(dict.fromkeys(gains, self.rank))
        chosen = {name for group, names in lists.items() for name in self._best(names, group, cost, budget, whole)}
        ranks = {name: self.rank if name in chosen else 0 for name in everyone}
        return Allocation(ranks, cost(ranks), budget if isinstance(budget, int) else None)

    def _best(self, names: Sequence[str], group: str, cost: Cost, budget: int | SiteCount, whole: int) -> Sequence[str]:
        """The first names of one list that its share of the budget pays for; ``whole`` is what all sites would cost."""
        if isinstance(budget, SiteCount):
            return names[: budget.total if self.mode == "combined" else budget.counts[group]]

        def price(count: int) -> int:
            return cost(dict.fromkeys(names[:count], self.rank))

        if self.mode == "separate":
            budget = budget * price(len(names)) // whole
        # One more site never makes a list cheaper, so a few of its lengths need be priced.
        return names[: bisect_right(range(1, len(names) + 1), budget, key=price)]
