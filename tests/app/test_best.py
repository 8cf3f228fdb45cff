"""Which epoch is a run's best."""

from __future__ import annotations

import pytest

from spfde.app.runs.best import best_epoch, chosen_by


@pytest.mark.parametrize(
    ("rows", "best"),
    [
        ([(0.2, 0.5), (0.2, 0.7), (0.2, 0.6)], 1),
        ([(0.2, 0.7), (0.2, 0.7)], 0),
        ([(1.0, 0.9), (0.5, 0.8), (0.1, 0.6), (0.1, 0.7), (0.1, 0.65)], 3),
        ([(0.25, 0.9), (0.25, 0.95), (0.2, 0.6)], 2),
        ([(0.201, 0.6), (0.2, 0.5)], 0),
        ([(1.0, 0.6), (1.0, 0.5)], 0),
        ([(0.2, 0.5), (0.5, 0.9)], 0),
    ],
    ids=["constant", "first of equals", "falls", "soft bound", "alike", "dense", "rises"],
)
def test_the_most_accurate_of_the_sparsest_epochs_is_the_best(rows: list[tuple[float, float]], best: int) -> None:
    found = [{"density": density, "test_accuracy": accuracy} for density, accuracy in rows]
    assert best_epoch(found) == best
    # The trainer keeps an epoch when it is the best so far: the one kept last is the best of all.
    kept = [n for n in range(len(found)) if best_epoch(found[: n + 1]) == n]
    assert kept[-1] == best


def test_where_a_share_is_held_out_the_test_set_has_no_say() -> None:
    rows = [{"density": 0.1, "val_accuracy": val, "test_accuracy": 1 - val} for val in (0.5, 0.7, 0.6)]
    assert best_epoch(rows) == 1
    assert (chosen_by(rows[0]), chosen_by({"test_accuracy": 0.5})) == ("validation", "test")


def test_without_an_epoch_there_is_none() -> None:
    assert best_epoch([]) is None
