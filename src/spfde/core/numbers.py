"""Numbers that everybody computes in one way: shares to counts, schedules of progress, and mixing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

MOST_EPOCHS = 100_000
"""How long a run may be: a row of its timeline is worked out for each epoch before it starts."""
MOST_WIDTH = 32.0
"""Factor on a model's channels: far beyond what fits anywhere, and below where sizes of tensors overflow."""


def round_half_up(value: float) -> int:
    """The nearest integer, halves upwards; noise below 1e-6, as in ``(1 - 0.9) * 5``, does not decide."""
    return math.floor(round(value, 6) + 0.5)


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


def latest_update_epoch(epoch: int, interval: int) -> int:
    """The latest multiple of ``interval`` that is not after ``epoch``."""
    return epoch - epoch % interval


_MASKS = {27: (1 << 37) - 1, 30: (1 << 34) - 1, 31: (1 << 33) - 1}


def mix(numbers: Tensor, *more: int) -> Tensor:
    """One non-negative number below 2**62 for each of ``numbers`` (int64), which depends on all of ``more`` as well.

    Source: the finaliser of SplitMix64 (Steele, Lea, Flood 2014), once for each argument; int64 wraps as it should.
    """
    state = _scramble(numbers)
    for number in more:
        state = _scramble(state ^ ((number * 0x9E3779B97F4A7C15 + 0x632BE59BD9B4E019) % 2**64 - 2**63))
    return state & (2**62 - 1)


def _scramble(state: Tensor) -> Tensor:
    state = state + (0x9E3779B97F4A7C15 - 2**64)
    state = (state ^ _shift(state, 30)) * (0xBF58476D1CE4E5B9 - 2**64)
    state = (state ^ _shift(state, 27)) * (0x94D049BB133111EB - 2**64)
    return state ^ _shift(state, 31)


def _shift(state: Tensor, by: int) -> Tensor:
    """Logical: int64 would shift its sign in."""
    return (state >> by) & _MASKS[by]
