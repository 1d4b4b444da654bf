"""GoRA's ranks (He et al., NeurIPS 2025, arXiv 2502.12171)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from heterolora.allocation import Allocation
from heterolora.allocators.base import GainRule, Gains, additive_only, parameters_only
from heterolora.budget import SiteCount
from heterolora.cost import Cost
from heterolora.errors import SettingError


@dataclass(frozen=True)
class Shares:
    """Ranks in proportion to the sites' scores, each rounded and clipped by itself; what clipping cuts off is lost.

    ``rank = clip(round(b a / phi(in + out)), least, most)`` with a the site's share of all scores and ``b = r sum of
    phi``, where r is the rank that the budget pays for everywhere, and least and most are multiples of it. Where the
    rounded ranks cost more than the budget, b is lowered to the largest value at which they do not: the paper lets its
    count differ by a tenth either way.

    Args:
        phi: ``root`` of in + out (the paper), or ``identity`` (the authors' code, which also rounds down).
        rounding: ``nearest`` (the paper) or ``down``, the authors' ``round(b a) // phi``.
        least: smallest rank, as a share of r, rounded down.
        most: largest rank, as a multiple of r, rounded down.
    """

    phi: Literal["root", "identity"]
    rounding: Literal["nearest", "down"]
    least: float
    most: float

    counts_sites = False

    def __post_init__(self) -> None:
        if not 0 <= self.least <= 1:
            raise SettingError("allocator.least", self.least, "a share from 0 to 1")
        if not 1 <= self.most < math.inf:
            raise SettingError("allocator.most", self.most, "a number of at least 1")

    @property
    def gain_rule(self) -> GainRule:
        """One value a site matters, which ``flat`` keeps."""
        return GainRule("flat", 2**31, "none")

    def allocate(self, gains: Gains, cost: Cost, budget: int | SiteCount, groups: Mapping[str, str]) -> Allocation:
        """Ranks by shares.

        Raises:
            SettingError: for scores below 0, or all 0, or an adapter whose sites share factors.
        """
        allowed = parameters_only(budget, "shares")
        units = additive_only(cost, "shares").units
        importance = {name: sum(values) / len(values) if values else 0.0 for name, values in gains.items()}
        whole = math.fsum(importance.values())
        if min(importance.values()) < 0 or not whole > 0:
            raise SettingError("allocator", "shares", "needs scores of at least 0, and not all 0; use greedy")
        widths = {name: math.sqrt(unit) if self.phi == "root" else float(unit) for name, unit in units.items()}
        everywhere = allowed / sum(units[name] for name, values in gains.items() if values)
        wanted = everywhere * sum(widths[name] for name, values in gains.items() if values) / whole
        shares = {name: wanted * value for name, value in importance.items()}
        least, most = math.floor(self.least * everywhere), max(1, math.floor(self.most * everywhere))

        def ranks_at(level: float) -> dict[str, int]:
            found = {}
            for name, share in shares.items():
                nearest = self.rounding == "nearest"
                rank = round(level * share / widths[name]) if nearest else int(round(level * share) // widths[name])
                found[name] = min(max(rank, least), most, len(gains[name]))
            return found

        ranks = ranks_at(1.0)
        if cost(ranks) > allowed:
            ranks = ranks_at(_largest(lambda level: cost(ranks_at(level)) <= allowed))
        return Allocation(ranks, cost(ranks), allowed)


def _largest(holds: object) -> float:
    """The largest level from 0 to 1 at which it holds, to the last bits; it holds at 0, and not at 1."""
    assert callable(holds)
    low, high = 0.0, 1.0
    while (middle := (low + high) / 2) not in (low, high):
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low
