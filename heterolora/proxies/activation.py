"""The control that looks at what a site reads, and at nothing else."""

from dataclasses import dataclass

from heterolora.proxies.evidence import Evidence, Observation, Statistic, Values


@dataclass(frozen=True)
class SquaredInputs(Statistic):
    """``sum ||x||^2`` and the number of real tokens."""

    needs_gradient = False
    by_batch = "exact"

    def observe(self, seen: Observation) -> Values | None:
        """Nothing of rows that are no tokens."""
        if seen.real is None:
            return None
        x = seen.source[seen.real].double()
        return x.square().sum(), x.new_tensor(len(x))


@dataclass(frozen=True)
class Activation:
    """Root mean square of an entry of the source, over real tokens: a cheap control, from forward passes alone."""

    control = False
    local = True
    remedy = "the sources are all zero"

    @property
    def statistics(self) -> tuple[Statistic, ...]:
        """Squared inputs."""
        return (SquaredInputs(),)

    def score(self, evidence: Evidence) -> dict[str, float]:
        """One number for each site."""
        scores = {}
        for site in evidence.sites:
            squares, tokens = evidence.gathered[SquaredInputs()][site.name]
            scores[site.name] = (squares / tokens / site.in_features).sqrt().item()
        return scores
