"""How much scores depend on which batches were looked at: scores again from batches drawn with replacement.

The values of each single batch are kept while the pass goes on, and scores are computed again from sums over resampled
batches, without another pass. Where a statistic holds matrices, they would be too many: its sources and gradients are
projected first, to ``DIMENSIONS`` random directions (Gaussian, drawn from the seed and the width alone), which keeps
the sizes of matrices of any low rank in expectation (Johnson and Lindenstrauss). What is compared with such a resample
is then the projected score of all batches, not the exact one.
"""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch

from heterolora.linear import reads
from heterolora.proxies.base import Proxy, leading
from heterolora.proxies.evidence import Bench, Evidence, Observation, Statistic, Values, add
from heterolora.seeds import derive
from heterolora.sites import Site

DIMENSIONS = 32
"""Of the projections."""

Resampled = npt.NDArray[np.float64]
"""``[1 + resamples, sites]``: the score of all batches, then that of each resample."""


@dataclass(frozen=True)
class Resampling:
    """What to do beside a pass.

    Attributes:
        count: how many resamples.
        units: of a score that has a value for each unit of rank, so many are summed.
        seed: for the draws and for the projections.
    """

    count: int
    units: int
    seed: int

    def weights(self, batches: int) -> torch.Tensor:
        """How often each batch counts, ``[1 + count, batches]``: once each, then as it was drawn."""
        rng = np.random.default_rng(derive(self.seed, "resampled batches"))
        drawn = rng.multinomial(batches, np.full(batches, 1 / batches), self.count)
        return torch.from_numpy(np.concatenate([np.ones((1, batches)), drawn]))


def can_be_resampled(proxy: Proxy) -> bool:
    """Whether a proxy's scores vary with the batches, and can be had again without another pass."""
    ways = {statistic.by_batch for statistic in proxy.statistics}
    if not ways or "never" in ways or not getattr(proxy, "local", False):
        return False
    return not ("projected" in ways and getattr(proxy, "needs_weights", False))  # a weight is not projected


class BatchValues:
    """A collector that keeps the values of every batch, in a scratch file: they are needed only after the pass.

    It is a context that closes the file.

    Args:
        statistics: what to keep.
        seed: for the projections.
    """

    def __init__(self, statistics: Sequence[Statistic], seed: int) -> None:
        self.statistics = tuple(statistics)
        self.seed = seed
        self.batches = 0
        self._file = tempfile.TemporaryFile(prefix="heterolora-")  # noqa: SIM115 - closed by __exit__
        self._now: dict[Statistic, dict[str, Values]] = {statistic: {} for statistic in self.statistics}
        self._shapes: dict[tuple[str, Statistic], list[torch.Size]] = {}
        self._projections: dict[int, torch.Tensor] = {}

    def observe(self, site: Site, seen: Observation) -> None:
        """Add one call to the batch's values."""
        projected: Observation | None = None
        for statistic in self.statistics:
            if statistic.by_batch == "projected":
                projected = projected or self._projected(seen)
            values = statistic.observe(seen if statistic.by_batch == "exact" or projected is None else projected)
            if values is not None:
                add(self._now[statistic], site.name, values)

    def end_batch(self) -> None:
        """Write the batch down."""
        settled = {
            (name, statistic): statistic.settle(values)
            for statistic, found in self._now.items()
            for name, values in found.items()
        }
        shapes = {key: [part.shape for part in values] for key, values in settled.items()}
        self._shapes = self._shapes or shapes
        if shapes != self._shapes:
            raise RuntimeError("a layer was called for some batches and not for others; score without resampling")
        row = [part.reshape(-1) for key in self._shapes for part in settled[key]]
        if row:
            self._file.write(torch.cat([part.to("cpu", torch.float32) for part in row]).numpy().tobytes())
        self.batches += 1
        for found in self._now.values():
            found.clear()

    def sums(self, weights: torch.Tensor) -> Iterator[tuple[str, dict[Statistic, Values]]]:
        """Weighted sums over batches, site after site.

        Args:
            weights: ``[resamples, batches]``.

        Yields:
            Site name, and statistic -> values with a leading dimension ``resamples``.
        """
        if not self._shapes:
            return
        self._file.flush()
        sizes = [sum(shape.numel() for shape in shapes) for shapes in self._shapes.values()]
        rows = np.memmap(self._file, dtype=np.float32, mode="r", shape=(self.batches, sum(sizes)))
        starts = np.cumsum([0, *sizes])
        places = {key: (start, shapes) for (key, shapes), start in zip(self._shapes.items(), starts, strict=False)}
        for name in dict.fromkeys(name for name, _ in places):
            found: dict[Statistic, Values] = {}
            for statistic in self.statistics:
                start, shapes = places[name, statistic]
                parts = []
                for shape in shapes:
                    values = torch.from_numpy(np.array(rows[:, start : start + shape.numel()])).double()
                    parts.append((weights @ values).reshape(len(weights), *shape))
                    start += shape.numel()
                found[statistic] = tuple(parts)
            yield name, found

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def _projected(self, seen: Observation) -> Observation:
        gradient = (
            None if seen.gradient is None else seen.gradient @ self._projection(seen.gradient, seen.gradient.shape[-1])
        )
        like = seen.source if seen.gradient is None else seen.gradient
        source = reads(seen.source, self._projection(like, seen.width or seen.source.shape[-1]).T)
        return replace(seen, source=source, gradient=gradient, width=source.shape[-1])

    def _projection(self, like: torch.Tensor, width: int) -> torch.Tensor:
        """``[width, dimensions]``; none where the width is small anyway."""
        if width not in self._projections:
            generator = torch.Generator().manual_seed(derive(self.seed, "projection", width))
            drawn = torch.randn(width, DIMENSIONS, generator=generator, dtype=torch.float64) / DIMENSIONS**0.5
            drawn = torch.eye(width, dtype=torch.float64) if width <= DIMENSIONS else drawn
            self._projections[width] = drawn.to(like.device, like.dtype)
        return self._projections[width]


def resampled_scores(
    values: BatchValues,
    proxies: Mapping[str, Proxy],
    sites: Sequence[Site],
    adapters: Mapping[str, Any],
    families: Mapping[str, str],
    bench: Bench,
    resampling: Resampling,
) -> dict[str, Resampled]:
    """Scores of these sites by each proxy, of all batches and of each resample.

    Args:
        values: what the pass collected at these sites.
        proxies: those that ``can_be_resampled``.
        sites: those of the pass.
        adapters: the probe's factors, by site name.
        families: as in ``Evidence``.
        bench: the pass.
        resampling: how.
    """
    by_name = {site.name: (column, site) for column, site in enumerate(sites)}
    weights = resampling.weights(values.batches) * bench.share
    found = {name: np.full((len(weights), len(sites)), np.nan) for name in proxies}
    for name, sums in values.sums(weights):
        column, site = by_name[name]
        for draw in range(len(weights)):
            gathered = {s: {name: tuple(part[draw] for part in parts)} for s, parts in sums.items()}
            evidence = Evidence((site,), adapters, gathered, families, bench, resampling.seed)
            for proxy_name, proxy in proxies.items():
                found[proxy_name][draw, column] = leading(proxy.score(evidence)[name], resampling.units)
    return found
