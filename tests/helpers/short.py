"""Cases of which some stand for all in `make test`."""

from __future__ import annotations

from collections.abc import Container, Iterable
from typing import Any

import pytest

#: A method of each kind of schedule, and of each way to choose weights.
METHODS = ("set", "mest-ems", "rigl-erk", "gmp", "str", "topkast", "deepr")


def short(values: Iterable[Any], some: Container[Any] = METHODS) -> list[Any]:
    """All as parameters; those that are not among ``some`` are long."""
    return [pytest.param(value, marks=() if value in some else pytest.mark.long) for value in values]
