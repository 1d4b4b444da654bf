"""PLoP, precise LoRA placement (Hayou, Ghosh, Yu 2025, arXiv 2506.20629)."""

from dataclasses import dataclass
from typing import Literal

from heterolora.proxies.base import weights_of
from heterolora.proxies.evidence import Evidence, Observation, Statistic, Values


@dataclass(frozen=True)
class FeatureNorms(Statistic):
    """``sum ||W z||`` over real tokens, z the input scaled to norm 1, and their number."""

    needs_gradient = False
    by_batch = "exact"

    def observe(self, seen: Observation) -> Values | None:
        """Nothing of rows that are no tokens, and nothing where no frozen weight acts."""
        weight = seen.find_weight()
        if seen.real is None or weight is None:
            return None
        x = seen.source[seen.real].double()
        x = x / x.norm(dim=1, keepdim=True).clamp(min=1e-30)
        return (x @ weight.to(x).T).norm(dim=1).sum(), x.new_tensor(len(x))


@dataclass(frozen=True)
class Plop:
    """The normalised feature norm of a linear layer: how well its weight is aligned with the inputs it sees.

    ``mean over tokens of ||W z|| / (||W||_F / sqrt(in))`` with z of norm 1. The denominator is the root mean square of
    ``||W z||`` over all directions (the paper's code draws Gaussian z, whose mean norm is a little smaller); 1 means
    that W treats its inputs like any others. From forward passes, without labels.

    Args:
        prefer: ``small``: the inverse is the score, since the paper puts LoRA where the alignment is smallest;
            ``large``: the feature norm itself.
        average: over all layers of a family, as the paper does (LoRA goes to types of layers); false: for each site.
    """

    prefer: Literal["small", "large"]
    average: bool

    control = False
    remedy = (
        "with one family of sites an average tells nothing apart (proxy.average=false); where a weight or its inputs "
        "are all 0 there is no score (search_space.exclude)"
    )
    needs_weights = True

    @property
    def local(self) -> bool:
        """An average is not."""
        return not self.average

    @property
    def statistics(self) -> tuple[Statistic, ...]:
        """Feature norms."""
        return (FeatureNorms(),)

    def score(self, evidence: Evidence) -> dict[str, float]:
        """One number for each site.

        Raises:
            SettingError: if there are sites without a frozen weight.
        """
        norms = {}
        for name, weight in weights_of(evidence, "plop").items():
            found, tokens = evidence.gathered[FeatureNorms()][name]
            isotropic = weight.double().square().sum().sqrt() / weight.shape[1] ** 0.5
            norms[name] = (found / tokens / isotropic).item() or float("nan")  # 0 is no norm to divide by
        if self.average:
            families: dict[str, list[float]] = {}
            for name, norm in norms.items():
                families.setdefault(evidence.families[name], []).append(norm)
            norms = {n: sum(families[evidence.families[n]]) / len(families[evidence.families[n]]) for n in norms}
        return norms if self.prefer == "large" else {name: 1 / norm for name, norm in norms.items()}
