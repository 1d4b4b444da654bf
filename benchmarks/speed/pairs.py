"""Things done in turn, so that whatever else the machine does meets all of them alike."""

import gc
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from heterolora.errors import SettingError
from heterolora.statistics import CONFIDENCE, Estimate

RESAMPLES = 9_999
"""Of the paired ratios, for an interval."""

_PROGRESS_SECONDS = 30

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Times:
    """What alternating gave.

    Attributes:
        seconds: name -> seconds of each repetition; the i-th of all names are a pair.
        order: the names in the order in which they were done, warm-up apart.
    """

    seconds: dict[str, list[float]]
    order: list[str]

    def median(self, name: str) -> float:
        """Median seconds."""
        return float(np.median(self.seconds[name]))


def alternate(
    things: Mapping[str, Callable[[], object]],
    repeats: int,
    *,
    warmup: int = 2,
    calls: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> Times:
    """Do all things once a repetition: A B, then B A, then A B, ...

    So each is first as often as last, and a drift of the machine cancels (ABBA). Python's collector of garbage runs
    between what is timed, not in it.

    Args:
        things: name -> what is timed.
        repeats: repetitions.
        warmup: rounds before, which are not timed.
        calls: times that a thing is done in one repetition; seconds are those of one.
        clock: gives seconds.

    Raises:
        SettingError: if there are no repetitions.
    """
    if repeats < 1:
        raise SettingError("--repeats", repeats, "a whole number of at least 1")
    for _ in range(warmup):
        for thing in things.values():
            thing()
    names, last = list(things), time.monotonic()
    times = Times({name: [] for name in names}, [])
    with _collecting_by_hand():
        for repetition in range(repeats):
            gc.collect()
            for name in names if repetition % 2 == 0 else reversed(names):
                times.order.append(name)
                times.seconds[name].append(_timed(things[name], calls, clock))
            if time.monotonic() - last > _PROGRESS_SECONDS:
                last = time.monotonic()
                _log.info("  repetition %d of %d", repetition + 1, repeats)
    return times


@contextmanager
def _collecting_by_hand() -> Iterator[None]:
    """No garbage is collected by itself; what is there already is not looked at, which would take half a second."""
    collects = gc.isenabled()
    gc.disable()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
        if collects:
            gc.enable()


def _timed(thing: Callable[[], object], calls: int, clock: Callable[[], float]) -> float:
    start = clock()
    for _ in range(calls):
        thing()
    return (clock() - start) / calls


def calls_for(thing: Callable[[], object], seconds: float, clock: Callable[[], float] = time.perf_counter) -> int:
    """How often a thing must be done to take so many seconds, after one call to warm up."""
    thing()
    start = clock()
    thing()
    return max(1, math.ceil(seconds / max(clock() - start, 1e-6)))


def paired_ratio(ours: Sequence[float], peer: Sequence[float], seed: int = 0) -> Estimate:
    """Median of ours / peer over pairs, with the percentiles of the medians of resampled ratios (95 %).

    Args:
        ours: positive numbers.
        peer: as many; the i-th of both are a pair.
        seed: of the resampling.

    Raises:
        SettingError: if they are no pairs of positive numbers.
    """
    if len(ours) != len(peer) or not ours or min(*ours, *peer) <= 0:
        raise SettingError("pairs", f"{len(ours)} and {len(peer)} numbers", "as many of both, all above 0")
    ratios = np.asarray(ours, dtype=float) / np.asarray(peer, dtype=float)
    n = len(ratios)
    if n < 2:
        return Estimate(float(ratios[0]), math.nan, math.nan, n)
    drawn = np.random.default_rng(seed).choice(ratios, (RESAMPLES, n))
    tail = (1 - CONFIDENCE) / 2 * 100
    low, high = np.percentile(np.median(drawn, axis=1), [tail, 100 - tail])
    return Estimate(float(np.median(ratios)), float(low), float(high), n)
