"""Adapters whose factors are shared by many sites: Tied-LoRA and VeRA.

Tied-LoRA: Renduchintala, Konuk, Kuchaiev, NAACL 2024, arXiv 2311.09578. VeRA: Kopiczko, Blankevoort, Asano, ICLR 2024,
arXiv 2310.11454. Both are ``delta(x) = scale * diag(v) B diag(u) A x`` with A and B in common, u and v of each site.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import nn

from heterolora.adapters.base import Surroundings, Switching, Tensors
from heterolora.adapters.factored import Factored
from heterolora.adapters.lora import bound_at, uniform_rows
from heterolora.adapters.scaling import Scaling
from heterolora.cost import CurvedCost, SharedCost
from heterolora.errors import SettingError
from heterolora.seeds import derive
from heterolora.sites import Site


class Pool(nn.Module):
    """What sites share: A ``[largest rank, in]`` and B ``[out, largest rank]``, each trained or frozen.

    Args:
        name: tells it from other pools of the model.
        A: the factor.
        B: likewise.
        train_A: whether it is trained.
        train_B: likewise.
    """

    def __init__(self, name: str, A: torch.Tensor, B: torch.Tensor, train_A: bool, train_B: bool) -> None:  # noqa: N803
        super().__init__()
        self.name = name
        for key, value, train in (("A", A, train_A), ("B", B, train_B)):
            if train:
                self.register_parameter(key, nn.Parameter(value))
            else:
                self.register_buffer(key, value)


class Tied(Factored):
    """The map ``x -> scale * diag(v) B diag(u) A x``, A and B the first units of rank of a pool.

    u and v take no weight decay: it would pull them from 1 to 0.

    Args:
        pool: holds A and B, as wide as the site or wider.
        rank: units of it that are used here.
        widths: in and out of the site.
        u: ``[rank]``; None: ones, not trained.
        v: ``[out]``; likewise.
        scale: factor of the product.
        dropout: probability with which an input feature is dropped in training.
    """

    undecayed: ClassVar = frozenset({"u", "v"})

    def __init__(
        self,
        pool: Pool,
        rank: int,
        widths: tuple[int, int],
        u: torch.Tensor | None,
        v: torch.Tensor | None,
        scale: float,
        dropout: float,
    ) -> None:
        super().__init__(scale, dropout)
        self.shared = pool
        self._rank = rank
        self.widths = widths
        self.u = None if u is None else nn.Parameter(u)
        self.v = None if v is None else nn.Parameter(v)

    @property
    def rank(self) -> int:
        """Units of rank of the pool that are used here."""
        return self._rank

    @property
    def first(self) -> torch.Tensor:
        """The site's part of A."""
        a: torch.Tensor = self.shared.A
        return a[: self._rank, : self.widths[0]]

    @property
    def last(self) -> torch.Tensor:
        """``diag(v) B``, the site's part of it."""
        b: torch.Tensor = self.shared.B[: self.widths[1], : self._rank]
        return b if self.v is None else self.v[:, None] * b

    def middle(self, narrow: torch.Tensor) -> torch.Tensor:
        """u."""
        return narrow if self.u is None else narrow * self.u

    def factors(self, values: Tensors) -> tuple[torch.Tensor, torch.Tensor]:
        """``diag(u) A`` and ``diag(v) B``."""
        a = values.get("shared.A", self.shared.A)[: self._rank, : self.widths[0]]
        b = values.get("shared.B", self.shared.B)[: self.widths[1], : self._rank]
        u, v = values.get("u"), values.get("v")
        return a if u is None else u[:, None] * a, b if v is None else v[:, None] * b


@dataclass(frozen=True)
class TiedLoRA(Scaling):
    """One pair of factors for all sites of the same widths; presets TL1 to TL6 of four switches.

    Args:
        tie: share A and B; false: each site has its own (with all trained but u and v: LoRA).
        train_A: train A; otherwise it stays as it was drawn.
        train_B: likewise.
        train_uv: train a vector u over the units of rank and a vector v over the outputs, of each site.
        initial: what u starts with where B is frozen, so that v starts with 0; otherwise both start with 1.
    """

    tie: bool
    train_A: bool  # noqa: N815 - the factor's name
    train_B: bool  # noqa: N815
    train_uv: bool
    initial: float

    switching: ClassVar[Switching] = "never"
    needs_weights: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.train_A or self.train_B or self.train_uv):
            raise SettingError("train_uv", False, "nothing is left to train: train_A, train_B or train_uv must be true")
        if not math.isfinite(self.initial) or self.initial == 0:
            raise SettingError("initial", self.initial, "a finite number other than 0")

    def build(self, site: Site, rank: int, seed: int, around: Surroundings) -> Tied:
        """A delta of 0 from which something that is trained has a gradient.

        B = 0 where B is trained; else v = 0 where u and v are; else A = 0. What is not 0 is drawn as LoRA's A (B's
        bounds are of its own width), from ``(seed, pool)``; u and v are 1, or u is ``initial`` where v is 0.
        """
        pool = self._pool(site, rank, seed, around)
        u = v = None
        if self.train_uv:
            u, v = torch.ones(rank), torch.ones(site.out_features)
            if not self.train_B:
                u, v = u * self.initial, torch.zeros(site.out_features)
        return self._tied(pool, site, rank, u, v, self.dropout)

    def probe(self, site: Site, rank: int, std: float, seed: int, around: Surroundings) -> Tied:
        """All that is trained from N(0, std^2): of the pool, and of the site."""
        pool = self._pool(site, rank, seed, around)
        key = ("drawn", pool.name)
        if key not in around.made:
            around.made[key] = pool
            for name, value in pool.named_parameters():
                units = value if name == "A" else value.T
                generator = torch.Generator().manual_seed(derive(seed, "probe", pool.name, name))
                units.data.copy_(torch.empty(units.shape).normal_(0, std, generator=generator))
        u = v = None
        if self.train_uv:
            generator = torch.Generator().manual_seed(derive(seed, "probe", site.name))
            v = torch.empty(site.out_features).normal_(0, std, generator=generator)
            u = torch.empty(rank).normal_(0, std, generator=generator)
        return self._tied(pool, site, rank, u, v, 0.0)

    def _tied(
        self, pool: Pool, site: Site, rank: int, u: torch.Tensor | None, v: torch.Tensor | None, dropout: float
    ) -> Tied:
        return Tied(pool, rank, (site.in_features, site.out_features), u, v, self.scale_at(site, rank), dropout)

    def _pool(self, site: Site, rank: int, seed: int, around: Surroundings) -> Pool:
        """The site's pool, made when its first site is."""
        name = self._pool_of(site)
        if name not in around.made:
            largest = max([rank, *(r for other, r in around.ranks.items() if self._pool_of(other) == name)])
            a = uniform_rows(largest, site.in_features, derive(seed, "shared", name, "A"), bound_at(site))
            b = uniform_rows(largest, site.out_features, derive(seed, "shared", name, "B")).T.contiguous()
            if self.train_B:
                b.zero_()
            elif not self.train_uv:
                a.zero_()
            around.made[name] = Pool(name, a, b, self.train_A, self.train_B)
        found = around.made[name]
        assert isinstance(found, Pool)
        return found

    def _pool_of(self, site: Site) -> str:
        return f"{site.in_features}x{site.out_features}" if self.tie else site.name

    def cost(self, sites: Sequence[Site]) -> SharedCost:
        """The largest rank of each pool times the widths that are trained, and ``rank + out`` of each site for u, v."""
        pools = {site.name: self._pool_of(site) for site in sites}
        units = {
            self._pool_of(site): site.in_features * self.train_A + site.out_features * self.train_B for site in sites
        }
        own = {site.name: partial(_vectors, site.out_features if self.train_uv else None) for site in sites}
        return SharedCost(pools, units, CurvedCost(own))


def _vectors(out: int | None, rank: int) -> int:
    """Parameters of u and v."""
    return 0 if out is None else rank + out


@dataclass(frozen=True)
class VeRA(Scaling):
    """One frozen random pair of factors for all sites, as wide as the widest, of which each uses its part.

    As PEFT has it: A from ``U(-sqrt(6 / in), sqrt(6 / in))`` and B from ``U(-sqrt(6 / rank), sqrt(6 / rank))``, in and
    rank the largest; u (``lambda_d``) starts with ``initial``, v (``lambda_b``) with 0.

    Args:
        initial: what u starts with; PEFT's ``d_initial``.
    """

    initial: float

    switching: ClassVar[Switching] = "never"
    needs_weights: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not math.isfinite(self.initial) or self.initial == 0:
            raise SettingError("initial", self.initial, "a finite number other than 0")

    def build(self, site: Site, rank: int, seed: int, around: Surroundings) -> Tied:
        """u constant, v = 0."""
        pool = self._pool(site, rank, seed, around)
        u, v = torch.full((rank,), self.initial), torch.zeros(site.out_features)
        return self._tied(pool, site, rank, u, v, self.dropout)

    def probe(self, site: Site, rank: int, std: float, seed: int, around: Surroundings) -> Tied:
        """u and v from N(0, std^2)."""
        generator = torch.Generator().manual_seed(derive(seed, "probe", site.name))
        v = torch.empty(site.out_features).normal_(0, std, generator=generator)
        u = torch.empty(rank).normal_(0, std, generator=generator)
        return self._tied(self._pool(site, rank, seed, around), site, rank, u, v, 0.0)

    def _tied(self, pool: Pool, site: Site, rank: int, u: torch.Tensor, v: torch.Tensor, dropout: float) -> Tied:
        return Tied(pool, rank, (site.in_features, site.out_features), u, v, self.scale_at(site, rank), dropout)

    def _pool(self, site: Site, rank: int, seed: int, around: Surroundings) -> Pool:
        if "vera" not in around.made:
            wanted = {site: rank, **around.ranks}
            largest = max(wanted.values())
            widest = max(s.in_features for s in wanted), max(s.out_features for s in wanted)
            a = uniform_rows(largest, widest[0], derive(seed, "shared", "vera", "A"), math.sqrt(6 / widest[0]))
            b = uniform_rows(largest, widest[1], derive(seed, "shared", "vera", "B"), math.sqrt(6 / largest))
            around.made["vera"] = Pool("vera", a, b.T.contiguous(), train_A=False, train_B=False)
        found = around.made["vera"]
        assert isinstance(found, Pool)
        return found

    def cost(self, sites: Sequence[Site]) -> CurvedCost:
        """``rank + out`` for each site."""
        return CurvedCost({site.name: partial(_vectors, site.out_features) for site in sites})
