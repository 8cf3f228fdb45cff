"""Cases of which some stand for all in `make test`."""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from itertools import product
from typing import Any

import pytest
from hypothesis import settings

#: A method of each kind of schedule, and of each way to choose weights.
METHODS = ("set", "mest-ems", "rigl-erk", "gmp", "str", "topkast", "deepr")


def short(values: Iterable[Any], some: Container[Any] = METHODS) -> list[Any]:
    """All as parameters; those that are not among ``some`` are long."""
    return [pytest.param(value, marks=() if value in some else pytest.mark.long) for value in values]


def pairs(left: Sequence[Any], right: Sequence[Any]) -> list[Any]:
    """All pairs as parameters; those are long without which each value of both sides is still in one."""
    return [
        pytest.param(left[row], right[column], marks=() if _is_diagonal(row, column, left, right) else pytest.mark.long)
        for row, column in product(range(len(left)), range(len(right)))
    ]


def _is_diagonal(row: int, column: int, left: Sequence[Any], right: Sequence[Any]) -> bool:
    return row % len(right) == column if len(left) >= len(right) else column % len(left) == row


def by_form(short: Any, long: Any) -> Any:
    """The one in the short form and the other in the long one: how much of a thing is done."""
    return short if settings.default.max_examples < settings.get_profile("default").max_examples else long
