"""What runs over several seeds say: spread, paired differences with their interval, and the Pareto front."""

from __future__ import annotations

import bisect
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95
_MOST_SEEDS = 1000
_EQUAL = 1e-12
"""What differs by less is equal: accuracies are counts over the number of images, and rounded."""


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation (None for one value) of n values."""

    n: int
    mean: float
    sd: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread | None:
        """Of no values None."""
        if not values:
            return None
        return cls(len(values), statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)


@dataclass(frozen=True)
class Difference:
    """The mean of paired differences, and what its confidence interval says, by Student's t.

    Attributes:
        n: seeds that both have.
        low, high: the interval of the mean; None for one seed.
        p: two-sided p-value of the paired t-test; None for one seed, or where all differences are equal.
        seeds_needed: least number of seeds whose interval would leave zero out if mean and standard deviation stayed as
            they are; None where it leaves zero out already, where there is one seed, where all differences are equal,
            or where 1,000 would not do.
    """

    n: int
    mean: float
    low: float | None
    high: float | None
    p: float | None
    seeds_needed: int | None

    @property
    def is_carried(self) -> bool:
        """Whether the interval leaves zero out; of differences that are all equal it is not known."""
        return self.low is not None and self.high is not None and self.low < self.high and self.low * self.high > 0


def paired(
    own: Mapping[int, float], other: Mapping[int, float], *, confidence: float = CONFIDENCE
) -> Difference | None:
    """How much more one has than the other, seed by seed.

    Args:
        own, other: a figure of each seed; seeds that one of them lacks do not count.
        confidence: that of the interval.

    Returns:
        None where they have no seed in common.

    Example:
        >>> from spfde.app.compare.statistics import paired
        >>> found = paired({0: 0.52, 1: 0.55, 2: 0.54}, {0: 0.50, 1: 0.52, 2: 0.53})
        >>> round(found.mean, 3), round(found.low, 3), round(found.high, 3), found.is_carried, found.seeds_needed
        (0.02, -0.005, 0.045, False, 4)
    """
    differences = [own[seed] - other[seed] for seed in own if seed in other]
    if not differences:
        return None
    n, mean = len(differences), statistics.fmean(differences)
    if n == 1:
        return Difference(1, mean, None, None, None, None)
    sd = statistics.stdev(differences) if max(differences) - min(differences) > _EQUAL else 0.0
    half = _half(sd, n, confidence)
    found = Difference(n, mean, mean - half, mean + half, _p(mean, sd, n), None)
    if found.is_carried or not mean or not sd:
        return found
    # The more seeds the narrower: the first number that does is found by bisection.
    sizes = range(n + 1, _MOST_SEEDS + 1)
    at = bisect.bisect_left(sizes, True, key=lambda size: _half(sd, size, confidence) < abs(mean))
    return Difference(n, mean, found.low, found.high, found.p, sizes[at] if at < len(sizes) else None)


def pareto(points: Sequence[tuple[float, float] | None]) -> list[bool]:
    """Which points (cost, accuracy) no other one beats: none is as cheap and as accurate, and better in one of both.

    None is no point, and not on the front.

    Example:
        >>> from spfde.app.compare.statistics import pareto
        >>> pareto([(1.0, 0.8), (2.0, 0.9), (3.0, 0.9), (0.5, 0.1), None])
        [True, True, False, True, False]
    """
    known = [point for point in points if point is not None]
    return [
        point is not None
        and not any(cost <= point[0] and accuracy >= point[1] and (cost, accuracy) != point for cost, accuracy in known)
        for point in points
    ]


def _half(sd: float, n: int, confidence: float) -> float:
    """Half of the width of the interval of a mean."""
    from scipy.special import stdtrit

    return float(stdtrit(n - 1, (1 + confidence) / 2)) * sd / math.sqrt(n)


def _p(mean: float, sd: float, n: int) -> float | None:
    from scipy.special import stdtr

    return float(2 * stdtr(n - 1, -abs(mean) / (sd / math.sqrt(n)))) if sd else None
