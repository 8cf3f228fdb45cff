"""The one place where shares become counts."""

from __future__ import annotations

import math


def round_half_up(value: float) -> int:
    """The nearest integer, halves upwards; noise below 1e-6, as in ``(1 - 0.9) * 5``, does not decide."""
    return math.floor(round(value, 6) + 0.5)
