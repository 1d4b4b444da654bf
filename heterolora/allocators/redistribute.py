"""EVA's redistribution of ranks (Paischer et al., NeurIPS 2025, arXiv 2410.07170)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from heterolora.allocation import Allocation
from heterolora.allocators.base import GainRule, Gains, additive_only, parameters_only, tie_order
from heterolora.allocators.limits import Bounds
from heterolora.budget import SiteCount
from heterolora.cost import Cost
from heterolora.errors import SettingError


@dataclass(frozen=True)
class Redistribute:
    """The units of rank with the largest gains of all sites together, whatever a unit costs.

    The paper counts its budget in ranks; here it counts in parameters, so that the same number of them is held as by
    any other allocation: where all sites have the same widths, both are the same. A unit that does not fit is passed
    over, until none fits.

    Args:
        rho: no site gets more than rho times the whole rank that the budget pays for everywhere (at least 1).
        seed: order of ties.
    """

    rho: float
    seed: int

    counts_sites = False

    def __post_init__(self) -> None:
        if not 1 <= self.rho < math.inf:
            raise SettingError("allocator.rho", self.rho, "a number of at least 1")

    @property
    def gain_rule(self) -> GainRule:
        """One value a unit; s/k where the proxy gives one number."""
        return GainRule("harmonic", 2**31, "none")

    def allocate(self, gains: Gains, cost: Cost, budget: int | SiteCount, groups: Mapping[str, str]) -> Allocation:
        """Ranks by one list of all units, best first."""
        allowed = parameters_only(budget, "redistribute")
        units = additive_only(cost, "redistribute").units
        everywhere = max(1, allowed // sum(units[name] for name in gains))
        most = round(self.rho * everywhere)
        order = [
            (-value, tie_order(self.seed, name), k, name)
            for name, values in gains.items()
            for k, value in enumerate(values[:most])
        ]
        caps = {name: min(most, len(values)) for name, values in gains.items()}
        bounds = Bounds(dict.fromkeys(gains, 0), caps, allowed, groups, {}, {})
        ranks = dict.fromkeys(gains, 0)
        bounds.grant([name for *_, name in sorted(order)], units, ranks)
        return Allocation(ranks, cost(ranks), allowed)
