"""What a training step is predicted to take: plain arithmetic on seconds that ``calibration`` measured.

A step runs forward through everything, then backward from the head down to the lowest place where an active adapter
joins: below it nothing requires a gradient. So where ranks go decides what a step costs, more than how many there are.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from heterolora.sites import Site


@dataclass(frozen=True)
class StepTimes:
    """Seconds of the parts of a training step, on one machine, for one backbone and one shape of batch.

    Attributes:
        constant: what every step takes: embeddings, head, loss, the optimizer's own work; forward and backward.
        forward: stream -> seconds of each block's forward; streams in the order in which they run.
        backward: stream -> seconds of each block's backward, recomputation included where there is any.
        adapters: what sites have in common (``kind_of``) -> seconds of one active adapter, all of its calls, forward,
            backward and update: a fixed part, and a part per unit of rank.
        shares: likewise -> share of the block in which it joins that lies before that place: the part of the block's
            backward pass that is left out where the pass ends there.
    """

    constant: float
    forward: Mapping[str, Sequence[float]]
    backward: Mapping[str, Sequence[float]]
    adapters: Mapping[str, tuple[float, float]]
    shares: Mapping[str, float]

    @property
    def blocks(self) -> int:
        """Number of blocks of all streams."""
        return sum(map(len, self.forward.values()))

    def level(self, site: Site) -> float:
        """Blocks, in the order in which they run, that a backward pass for this site alone leaves out."""
        return self._before(site.stream) + site.joins + self.shares[kind_of(site)]

    def start(self, site: Site) -> int:
        """Blocks, in the order in which they run, that are over before the site reads anything."""
        return self._before(site.stream) + site.entry

    def adapter(self, site: Site, rank: int) -> float:
        """Seconds that an adapter of this rank adds."""
        fixed, each = self.adapters[kind_of(site)]
        return fixed + each * rank if rank else 0.0

    def bare(self, lowest: float, first: int = 0) -> float:
        """Seconds without the adapters' own.

        Args:
            lowest: the backward pass leaves out so many blocks, the last of them perhaps in part.
            first: and the forward pass so many, whose outputs are kept.
        """
        forward = [seconds for blocks in self.forward.values() for seconds in blocks]
        backward = [seconds for blocks in self.backward.values() for seconds in blocks]
        whole = int(lowest)
        part = (lowest - whole) * backward[whole] if whole < len(backward) else 0.0
        return self.constant + math.fsum(forward[first:]) + math.fsum(backward[whole:]) - part

    def predict(self, sites: Sequence[Site], ranks: Mapping[str, int], cached: bool = False) -> float:
        """Seconds of a training step with these ranks.

        Args:
            sites: those that may have rank.
            ranks: site name -> rank; sites that are not named have none.
            cached: outputs of the blocks below the lowest active site are kept, and not computed in the step.

        Raises:
            KeyError: for a site with rank of a sort that was not measured.
        """
        active = [site for site in sites if ranks.get(site.name, 0)]
        lowest = min((self.level(site) for site in active), default=self.blocks)
        first = min((self.start(site) for site in active), default=self.blocks) if cached else 0
        return self.bare(lowest, first) + math.fsum(self.adapter(site, ranks[site.name]) for site in active)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    def _before(self, stream: str) -> int:
        """Blocks of the streams that run earlier."""
        names = list(self.forward)
        return sum(len(self.forward[name]) for name in names[: names.index(stream)])


def kind_of(site: Site) -> str:
    """What sites of equal cost have in common: label and widths, e.g. ``q 384x384``."""
    return f"{site.label} {site.in_features}x{site.out_features}"


def times_from(values: Mapping[str, Any]) -> StepTimes:
    """What ``StepTimes.as_dict`` wrote.

    Raises:
        ValueError: if something is missing, or no time.
    """
    try:
        blocks = {
            key: {str(stream): [float(s) for s in seconds] for stream, seconds in values[key].items()}
            for key in ("forward", "backward")
        }
        adapters = {str(kind): (float(fixed), float(each)) for kind, (fixed, each) in values["adapters"].items()}
        shares = {str(kind): float(share) for kind, share in values["shares"].items()}
        times = StepTimes(float(values["constant"]), blocks["forward"], blocks["backward"], adapters, shares)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"no times of a step ({type(error).__name__}: {error})") from error
    everything = [times.constant, *(s for part in blocks.values() for each in part.values() for s in each)]
    everything += [s for pair in adapters.values() for s in pair]
    depths = [{stream: len(each) for stream, each in part.items()} for part in blocks.values()]
    whole = all(0 <= share < 1 for share in shares.values()) and shares.keys() == adapters.keys()
    if not (all(0 <= s < math.inf for s in everything) and depths[0] == depths[1] and whole):
        raise ValueError("no times of a step: seconds below 0 or not finite, or the parts do not fit together")
    return times


@dataclass(frozen=True)
class StepLimit:
    """The most that a training step may be predicted to take.

    Attributes:
        times: of the parts of a step.
        share: of the reference's step.
        reference: predicted seconds of the uniform allocation's step.
        cached: outputs of blocks below the lowest active site are kept, see ``StepTimes.predict``.
    """

    times: StepTimes
    share: float
    reference: float
    cached: bool = False

    @property
    def seconds(self) -> float:
        """The limit; the reference itself keeps to 1.0, however its parts are summed."""
        return self.share * self.reference * (1 + 1e-9)

    def predict(self, sites: Sequence[Site], ranks: Mapping[str, int]) -> float:
        """Seconds of a step with these ranks."""
        return self.times.predict(sites, ranks, self.cached)

    def level(self, site: Site) -> float:
        """What decides how much of a step is left out: where the site joins or, with kept outputs, where it reads."""
        return self.times.start(site) if self.cached else self.times.level(site)

    def least(self, level: float) -> float:
        """Seconds that a step takes at least if some site of this level is active, whatever its adapter takes."""
        return self.times.bare(self.times.blocks, int(level)) if self.cached else self.times.bare(level)

    def record(self, sites: Sequence[Site], ranks: Mapping[str, int]) -> dict[str, Any]:
        """Plain values for whoever wants to know why: shares, seconds, and the times that they follow from."""
        seconds = self.predict(sites, ranks)
        return {
            "limit": self.share,
            "predicted": seconds / self.reference,
            "seconds": seconds,
            "reference_seconds": self.reference,
            "cached": self.cached,
            "times": self.times.as_dict(),
        }


def in_short(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """Of an allocation's provenance, the prediction of a step without what it follows from; empty: there is none."""
    record = provenance.get("step_time")
    return {"step_time": {key: value for key, value in record.items() if key != "times"}} if record else {}


def shown(record: Mapping[str, Any]) -> str:
    """What ``StepLimit.record`` says, in a few words."""
    return f"predicted step {record['predicted']:.2f} of uniform, limit {record['limit']:.2f}"
