"""EVA's redistribution of ranks (Paischer et al., NeurIPS 2025, arXiv 2410.07170)."""

from dataclasses import dataclass

import torch

from heterolora.proxies.evidence import Evidence, InputMoments, Statistic


@dataclass(frozen=True)
class Eva:
    """Explained variance of each principal component of what a site reads: one value for each unit of rank.

    ``sigma_j^2 / (M sum of the columns' variances)``, PCA's explained variance ratio, as in the authors' code (the
    printed equation is not invariant to the inputs' scale). Exact, where the paper's is incremental. From forward
    passes, without labels.

    Args:
        center: subtract the mean first, as the algorithm does; false: the uncentred second moment, as its theory has.
    """

    center: bool

    control = False
    local = True
    remedy = "the sources do not vary: check probe.batches"

    @property
    def statistics(self) -> tuple[Statistic, ...]:
        """The inputs' moments."""
        return (InputMoments(),)

    def score(self, evidence: Evidence) -> dict[str, list[float]]:
        """As many values for each site as it has inputs, largest first."""
        gathered = evidence.gathered[InputMoments()]
        return {site.name: self._ratios(*gathered[site.name]) for site in evidence.sites}

    def _ratios(self, squares: torch.Tensor, sums: torch.Tensor, tokens: torch.Tensor) -> list[float]:
        moment = squares / tokens
        if self.center:
            mean = sums / tokens
            moment = moment - torch.outer(mean, mean)
        variance = moment.diagonal().sum()
        if not torch.isfinite(moment).all() or not variance > 0:
            return [0.0 if torch.isfinite(moment).all() else float("nan")] * len(moment)
        ratios: list[float] = (torch.linalg.eigvalsh(moment).flip(0).clamp(min=0) / variance).tolist()
        return ratios
