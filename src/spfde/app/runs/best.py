"""Which epoch of a run is its best, among those as sparse as the run came to be.

By validation accuracy where a share of the training set was held out. Or else by test accuracy, which then flatters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

# Densities that differ by less are the same: weights are counted by layer, and some methods move them between layers.
_ALIKE = 1.02


def best_epoch(rows: Sequence[Mapping[str, Any]]) -> int | None:
    """Position of the best epoch; None where there is no row.

    While a run grows sparser each epoch that is sparser than those before it is the best so far, however accurate: a
    dense model is not what the run is for.

    Args:
        rows: of metrics, in order: ``density`` and ``val_accuracy`` or ``test_accuracy`` are read.

    Example:
        >>> from spfde.app.runs.best import best_epoch
        >>> rows = [(1.0, 0.9), (0.5, 0.8), (0.1, 0.6), (0.1, 0.7), (0.1, 0.7)]
        >>> best_epoch([{"density": density, "test_accuracy": accuracy} for density, accuracy in rows])
        3
    """
    best, lowest = 0, 2.0
    for position, row in enumerate(rows):
        lowest = min(lowest, row["density"])
        is_first = not is_sparse(rows[best], lowest)
        if is_first or (is_sparse(row, lowest) and accuracy_in(row) > accuracy_in(rows[best])):
            best = position
    return best if rows else None


def accuracy_in(row: Mapping[str, Any]) -> float:
    """What an epoch is judged by, see ``chosen_by``."""
    return float(row["val_accuracy"] if "val_accuracy" in row else row["test_accuracy"])


def chosen_by(row: Mapping[str, Any]) -> str:
    """What the best epoch is chosen by, told by any row of the run, or by its summary: which accuracy."""
    return "validation" if "val_accuracy" in row else "test"


def is_sparse(row: Mapping[str, Any], lowest: float) -> bool:
    """Whether an epoch's density is the lowest, or about that."""
    return bool(row["density"] <= lowest * _ALIKE)
