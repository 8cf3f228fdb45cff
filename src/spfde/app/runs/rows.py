"""A run's metrics, an epoch a row: what is asked of rows that come from a file."""

from __future__ import annotations

import math
from typing import Any

from spfde.core.errors import StateMismatch

_NUMBERS = ("density", "saved_tensor_bytes")
"""What is read of a row by its name, beside ``epoch`` and one of the accuracies."""


def check_rows(rows: Any) -> None:
    """Raise ``StateMismatch`` unless these are rows of metrics, of the epochs from the first one on.

    Example:
        >>> from spfde.app.runs.rows import check_rows
        >>> check_rows([{"epoch": 0, "density": 0.1, "test_accuracy": 0.9, "saved_tensor_bytes": 0, "lr": None}])
    """
    if not isinstance(rows, list) or not all(map(is_row, rows)):
        raise StateMismatch("the rows of metrics hold something else than finite numbers. They are damaged.")
    if [row["epoch"] for row in rows] != list(range(len(rows))):
        raise StateMismatch("the rows of metrics are not those of the epochs from the first one on. They are damaged.")


def is_row(row: Any) -> bool:
    """Whether this is an epoch's row: numbers by name, None for what was not measured."""
    return (
        isinstance(row, dict)
        and type(row.get("epoch")) is int
        and row["epoch"] >= 0
        and all(_is_number(row.get(name)) for name in _NUMBERS)
        and _is_number(row.get("val_accuracy", row.get("test_accuracy")))
        and all(isinstance(name, str) and (value is None or _is_number(value)) for name, value in row.items())
    )


def _is_number(value: Any) -> bool:
    return type(value) is int or (type(value) is float and math.isfinite(value))
