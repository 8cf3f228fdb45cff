"""Schedules: pure functions of the run's progress. They know no clock; time is an argument."""

from __future__ import annotations

import math
from collections.abc import Sequence


def cosine(progress: float, start: float, end: float = 0.0) -> float:
    """Half a cosine from ``start`` at progress 0 to ``end`` at progress 1; constant outside [0, 1]."""
    progress = min(max(progress, 0.0), 1.0)
    return end + 0.5 * (start - end) * (1.0 + math.cos(math.pi * progress))


def steps(progress: float, values: Sequence[float], boundaries: Sequence[float]) -> float:
    """A staircase: ``values[i]`` until progress reaches ``boundaries[i]``, the last value from then on.

    A boundary belongs to the step that it starts. ``len(values) == len(boundaries) + 1``.
    """
    passed = sum(progress >= boundary - 1e-9 for boundary in boundaries)
    return values[passed]


def latest_beat(epoch: int, interval: int) -> int:
    """The latest multiple of ``interval`` that is not after ``epoch``."""
    return epoch - epoch % interval
