"""Which allocations are trained: ranks by site name, from the sites and what a unit of rank costs at each."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from heterolora.seeds import derive
from heterolora.sites import Site

ALONE = 3_840
"""Parameters of an allocation to one site: what both a width of 384 to 384 (rank 5) and one of 384 to 1,536 (rank 2)
can hold to the parameter."""

BUDGETS = (2_304, 9_216, 27_648, 82_944, 331_776)
"""From three units of rank to rank 8 on all linear layers (rank 2: 82,944)."""

RANDOM = (9_216, 82_944)
"""Budgets of the random allocations."""

PLACEMENTS: Mapping[str, tuple[str, ...]] = {
    "q,v": ("q", "v"),
    "v,o": ("v", "o"),
    "attention": ("q", "k", "v", "o"),
    "all linears": ("q", "k", "v", "o", "up", "down"),
    "shortcuts": ("residual_attn", "residual_ffn", "shortcut_attn", "shortcut_ffn"),
}
"""Roles that get equal rank."""


@dataclass(frozen=True)
class Entry:
    """One allocation of the table.

    Attributes:
        family: ``alone``, ``uniform``, ``random`` or ``proxy``.
        name: what it is within the family.
        budget: parameters that it may hold.
        overrides: what makes it, for train.py.
        seed: of the training.
    """

    family: str
    name: str
    budget: int
    overrides: tuple[str, ...]
    seed: int

    @property
    def key(self) -> str:
        """Names it in files."""
        return f"{self.family}-{self.name}-{self.budget}-s{self.seed}".replace(" ", "_").replace(",", "")


def price(site: Site) -> int:
    """Parameters of one unit of rank."""
    return site.in_features + site.out_features


def fixed(ranks: Mapping[str, int]) -> tuple[str, ...]:
    """Overrides that make exactly these ranks."""
    inner = ", ".join(f"{name}: {rank}" for name, rank in ranks.items())
    return ("allocator=fixed", f"allocator.ranks={{{inner}}}")


def alone(sites: Sequence[Site], seed: int) -> Iterator[Entry]:
    """Each site alone, all holding the same number of parameters."""
    for site in sites:
        rank, rest = divmod(ALONE, price(site))
        if rest:
            raise ValueError(f"{site.name}: {ALONE} parameters are no whole rank of {price(site)}")
        yield Entry("alone", site.name, ALONE, fixed({site.name: rank}), seed)


def evenly(sites: Sequence[Site], roles: Sequence[str], budget: int) -> dict[str, int]:
    """Equal rank in the sites of these roles, and what is left to the last layers.

    Units are given out in rounds, in each of which every site gets one: the last layer's first, in the order of
    ``roles``. Below one unit everywhere that means the last layers, or some roles of the last. The result spends the
    budget but for less than the cheapest unit.
    """
    chosen = sorted((s for s in sites if s.role in roles), key=lambda site: (-site.layer, roles.index(site.role)))
    ranks, left = {site.name: 0 for site in chosen}, budget
    limit = {site.name: min(site.in_features, site.out_features) for site in chosen}
    granted = True
    while granted:
        granted = False
        for site in chosen:
            if price(site) <= left and ranks[site.name] < limit[site.name]:
                ranks[site.name] += 1
                left -= price(site)
                granted = True
    return {name: rank for name, rank in ranks.items() if rank}


def uniform(sites: Sequence[Site], seed: int) -> Iterator[Entry]:
    """Every placement at every budget."""
    for budget in BUDGETS:
        for name, roles in PLACEMENTS.items():
            yield Entry("uniform", name, budget, fixed(evenly(sites, roles, budget)), seed)


def randomly(sites: Sequence[Site], budget: int, number: int) -> dict[str, int]:
    """A random set of sites with random ranks, that spends the budget to the parameter.

    How many sites take part is drawn first, on a logarithmic scale, so that narrow and wide allocations are in the
    table. Units then go to random ones of them; a draw that cannot spend the last parameters is drawn again.

    Raises:
        ValueError: if no draw spends the budget.
    """
    generator = np.random.default_rng(derive(number, "random allocation", budget))
    cheapest = min(map(price, sites))
    most = min(len(sites), budget // cheapest)
    for _ in range(10_000):
        count = round(float(np.exp(generator.uniform(np.log(min(3, most)), np.log(most)))))
        chosen = [sites[index] for index in generator.choice(len(sites), count, replace=False)]
        weights = generator.dirichlet(np.ones(count))
        ranks, left = dict.fromkeys((site.name for site in chosen), 0), budget
        while affordable := [i for i, site in enumerate(chosen) if price(site) <= left and ranks[site.name] < 384]:
            share = weights[affordable] / weights[affordable].sum()
            site = chosen[int(generator.choice(affordable, p=share))]
            ranks[site.name] += 1
            left -= price(site)
        if not left:
            return {site.name: ranks[site.name] for site in sites if ranks.get(site.name)}
    raise ValueError(f"no random allocation spends {budget} parameters")


def random(sites: Sequence[Site], budget: int, numbers: Sequence[int], seed: int) -> Iterator[Entry]:
    """Random allocations over LoRA and shortcut sites."""
    for number in numbers:
        yield Entry("random", f"{number:03d}", budget, fixed(randomly(sites, budget, number)), seed)


def by_proxies(proxies: Mapping[str, bool], allocator: str, budget: int, seed: int) -> Iterator[Entry]:
    """What the project itself would do over all sites, or over all linear layers.

    Args:
        proxies: name -> whether it reads frozen weights, which shortcuts have none of.
        allocator: what makes ranks of the scores.
        budget: parameters.
        seed: of the scores and of the training.
    """
    for proxy, reads_weights in proxies.items():
        overrides = [f"proxy={proxy}", f"allocator={allocator}", *(["search_space=lora_all"] if reads_weights else [])]
        yield Entry("proxy", f"{proxy}_{allocator}", budget, tuple(overrides), seed)
