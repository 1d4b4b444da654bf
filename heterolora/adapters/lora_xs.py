"""LoRA-XS (Balazy, Banaei, Aberer, Tabor, ECAI 2025, arXiv 2405.17604): ``delta(x) = scale * U R (S V^T) x``."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import nn
from torch.nn import functional

from heterolora.adapters.base import Surroundings, Switching, Tensors
from heterolora.adapters.factored import Factored
from heterolora.adapters.lora import uniform_rows
from heterolora.adapters.scaling import Scaling
from heterolora.cost import CurvedCost
from heterolora.errors import SettingError
from heterolora.linear import row_signs
from heterolora.seeds import derive
from heterolora.sites import Site


class Core(Factored):
    """The map ``x -> scale * B R A x`` of which R alone is trained.

    Args:
        A: ``[rank, in]``, frozen.
        R: ``[rank, rank]``.
        B: ``[out, rank]``, frozen.
        scale: factor of the product.
        dropout: probability with which an input feature is dropped in training.
    """

    units: ClassVar = {"R": (0, 1)}

    def __init__(
        self,
        A: torch.Tensor,  # noqa: N803
        R: torch.Tensor,  # noqa: N803
        B: torch.Tensor,  # noqa: N803
        scale: float,
        dropout: float,
    ) -> None:
        super().__init__(scale, dropout)
        self.register_buffer("A", A)
        self.R = nn.Parameter(R)
        self.register_buffer("B", B)

    @property
    def first(self) -> torch.Tensor:
        """A."""
        return self.get_buffer("A")

    @property
    def last(self) -> torch.Tensor:
        """B."""
        return self.get_buffer("B")

    def middle(self, narrow: torch.Tensor) -> torch.Tensor:
        """R."""
        return functional.linear(narrow, self.R)

    def factors(self, values: Tensors) -> tuple[torch.Tensor, torch.Tensor]:
        """A and ``B R``."""
        return self.first, self.last @ values["R"]


@dataclass(frozen=True)
class LoRAXS(Scaling):
    """A trained core between two frozen factors: ``rank^2`` parameters a site, whatever its widths.

    Args:
        core_std: R is drawn from N(0, core_std^2); 0: R = 0, and the model is the backbone to the bit. The authors'
            code has 1e-5; nothing is lost with 0, for R's gradient does not vanish there.
        frozen: ``svd``: B = U and A = S V^T of the frozen weight's largest singular values, where a weight acts, signs
            fixed so that the largest entry of each column of U is positive; ``random``: both as LoRA draws A, at any
            site (the authors' ablation).
    """

    core_std: float
    frozen: Literal["svd", "random"]

    switching: ClassVar[Switching] = "ranks"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.core_std < 1:
            raise SettingError("core_std", self.core_std, "a number from 0 up to, not including, 1")

    @property
    def needs_weights(self) -> bool:
        """To take their singular vectors."""
        return self.frozen == "svd"

    def build(self, site: Site, rank: int, seed: int, around: Surroundings) -> Core:
        """R from N(0, core_std^2) between frozen factors, nested in the rank."""
        core = _normal_square(rank, self.core_std, derive(seed, "adapter", site.name))
        return self._between(site, rank, seed, around, core, self.dropout)

    def probe(self, site: Site, rank: int, std: float, seed: int, around: Surroundings) -> Core:
        """R from N(0, std^2)."""
        core = _normal_square(rank, std, derive(seed, "probe", site.name))
        return self._between(site, rank, seed, around, core, 0.0)

    def _between(
        self, site: Site, rank: int, seed: int, around: Surroundings, core: torch.Tensor, dropout: float
    ) -> Core:
        if self.frozen == "random":
            a = uniform_rows(rank, site.in_features, derive(seed, "frozen", "A", site.name))
            b = uniform_rows(rank, site.out_features, derive(seed, "frozen", "B", site.name)).T.contiguous()
        else:
            a, b = truncated(_weight_at(site, around), rank)
        return Core(a, core, b, self.scale_at(site, rank), dropout)

    def cost(self, sites: Sequence[Site]) -> CurvedCost:
        """``rank^2`` for each site."""
        return CurvedCost({site.name: _square for site in sites})


def _square(rank: int) -> int:
    return rank**2


def _weight_at(site: Site, around: Surroundings) -> torch.Tensor:
    weight = around.weight(site.name)
    if weight is None:
        raise SettingError(
            "adapter.frozen", "svd", f"no frozen weight acts at {site.name}: frozen=random, or search_space=lora_all"
        )
    return weight


def truncated(weight: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """``S V^T`` ``[rank, in]`` and ``U`` ``[out, rank]`` of a weight, float32 on the CPU, signs fixed.

    The whole decomposition, not a randomised one: nested in the rank, and the same whenever it is computed.
    """
    u, s, vh = torch.linalg.svd(weight.detach().to("cpu", torch.float64), full_matrices=False)
    u, s, vh = u[:, :rank], s[:rank], vh[:rank]
    signs = row_signs(u.T)
    return (s[:, None] * vh * signs).float(), (u * signs.T).float()


def _normal_square(rank: int, std: float, seed: int) -> torch.Tensor:
    """``[rank, rank]`` from N(0, std^2), of which the first rows and columns are those of a lower rank."""
    generator = torch.Generator().manual_seed(seed)
    core = torch.zeros(rank, rank)
    if std:
        for k in range(rank):
            border = torch.empty(2 * k + 1).normal_(0, std, generator=generator)
            core[k, : k + 1], core[:k, k] = border[: k + 1], border[k + 1 :]
    return core
