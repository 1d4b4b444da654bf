"""EVA's initialisation (Paischer et al., NeurIPS 2025, arXiv 2410.07170)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from heterolora.adapters.lora import LowRank
from heterolora.errors import SettingError
from heterolora.linear import row_signs
from heterolora.proxies.evidence import InputMoments, Statistic, Values
from heterolora.sites import Site


@dataclass(frozen=True)
class EvaInit:
    """A's rows are the first principal components of what the site reads, orthonormal; B = 0.

    Exact, where the paper's are incremental and therefore approximate. Signs are fixed: the largest entry of each row
    is positive.

    Args:
        center: subtract the mean first, as the algorithm does; false: the uncentred second moment, as its theory has.
        whiten: divide row i by the square root of singular value i, as PEFT does; the rows have other norms then.
    """

    center: bool
    whiten: bool

    keeps_function = True

    @property
    def statistics(self) -> tuple[Statistic, ...]:
        """The inputs' moments."""
        return (InputMoments(),)

    @torch.no_grad()
    def fill(self, site: Site, adapter: LowRank, values: Sequence[Values]) -> None:
        """A, from an eigendecomposition; B stays 0.

        Raises:
            SettingError: if the inputs have fewer components than the adapter has units of rank.
        """
        ((squares, sums, tokens),) = values
        moment = squares / tokens
        if self.center:
            moment = moment - torch.outer(sums, sums) / tokens**2
        variances, vectors = torch.linalg.eigh(moment)
        variances, rows = variances.flip(0)[: adapter.rank], vectors.flip(1).T[: adapter.rank]
        if not variances[-1] > variances[0].clamp(min=0) * 1e-12:
            raise SettingError(
                "init", "eva", f"{site.name} reads fewer than {adapter.rank} components; more probe.batches, less rank"
            )
        signs = row_signs(rows)
        if self.whiten:
            count = tokens.item()
            signs = signs / (variances * count).sqrt().sqrt()[:, None]
        adapter.A.copy_(rows * signs)
