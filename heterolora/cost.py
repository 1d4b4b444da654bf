"""What an allocation costs in trainable parameters."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol


class Cost(Protocol):
    """Trainable parameters of an allocation; joint where factors are shared between sites."""

    def __call__(self, ranks: Mapping[str, int]) -> int:
        """Parameters that these ranks hold."""

    def marginal(self, ranks: Mapping[str, int], name: str) -> int:
        """Parameters that one more unit of rank at ``name`` would add."""


@dataclass(frozen=True)
class AdditiveCost:
    """Every unit of rank at a site costs the same, whatever the others have.

    Attributes:
        units: site name -> parameters of one unit of rank.
    """

    units: Mapping[str, int]

    def __call__(self, ranks: Mapping[str, int]) -> int:
        """Parameters that these ranks hold."""
        return sum(rank * self.units[name] for name, rank in ranks.items())

    def marginal(self, ranks: Mapping[str, int], name: str) -> int:
        """Parameters of one unit of rank at the site."""
        return self.units[name]


@dataclass(frozen=True)
class CurvedCost:
    """Every site has a price of its own, which is no multiple of its rank.

    Attributes:
        prices: site name -> what gives the parameters of a rank of at least 1.
    """

    prices: Mapping[str, Callable[[int], int]]

    def __call__(self, ranks: Mapping[str, int]) -> int:
        """Parameters that these ranks hold."""
        return sum(self._price(name, rank) for name, rank in ranks.items())

    def marginal(self, ranks: Mapping[str, int], name: str) -> int:
        """The difference that one unit makes."""
        rank = ranks.get(name, 0)
        return self._price(name, rank + 1) - self._price(name, rank)

    def _price(self, name: str, rank: int) -> int:
        return self.prices[name](rank) if rank else 0


@dataclass(frozen=True)
class SharedCost:
    """Sites of a pool share what is as large as the largest rank among them; the rest is each site's own.

    Attributes:
        pools: site name -> its pool.
        units: pool -> parameters of one unit of the largest rank.
        own: what each site's own part costs.
    """

    pools: Mapping[str, str]
    units: Mapping[str, int]
    own: Cost

    def __call__(self, ranks: Mapping[str, int]) -> int:
        """Parameters that these ranks hold, shared ones once."""
        largest: dict[str, int] = {}
        for name, rank in ranks.items():
            pool = self.pools[name]
            largest[pool] = max(largest.get(pool, 0), rank)
        return self.own(ranks) + sum(rank * self.units[pool] for pool, rank in largest.items())

    def marginal(self, ranks: Mapping[str, int], name: str) -> int:
        """The site's own part, and the pool's next unit if no other site has paid for it."""
        pool, rank = self.pools[name], ranks.get(name, 0)
        paid = any(other > rank for site, other in ranks.items() if self.pools[site] == pool)
        return self.own.marginal(ranks, name) + (0 if paid else self.units[pool])
