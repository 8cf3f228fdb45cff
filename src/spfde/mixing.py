"""Numbers that look random and follow from their arguments alone."""

from __future__ import annotations

from torch import Tensor

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
