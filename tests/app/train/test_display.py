"""Progress and what came out: 80 columns, each figure with its kind."""

from __future__ import annotations

import io
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from spfde.app.train.display import CELLS, ConsoleDisplay, epoch_line, frozen_bar, header, results
from spfde.app.train.loop import train
from spfde.app.train.options import TrainOptions

ROW = {
    "epoch": 0,
    "test_accuracy": 0.25,
    "train_accuracy": 0.5,
    "density": 0.1,
    "frozen_blocks": 1,
    "total_blocks": 3,
    "partial_samples": 8000,
    "seconds": 1.26,
}
SUMMARY = {
    "test_accuracy": 0.9,
    "best_test_accuracy": 0.95,
    "final_sparsity": 0.9,
    "frozen_blocks": 2,
    "total_blocks": 3,
}


def test_blocks_fill_from_the_front() -> None:
    assert frozen_bar(0, 3) == "□□□ 0/3"
    assert frozen_bar(2, 3) == "■■□ 2/3"
    assert frozen_bar(0, 0) == "–"


@given(st.integers(1, 200), st.data())
def test_a_bar_is_short_and_full_only_when_all_blocks_are_frozen(total: int, data: st.DataObject) -> None:
    frozen = data.draw(st.integers(0, total))
    bar = frozen_bar(frozen, total)
    assert len(bar.split()[0]) == min(total, CELLS)
    assert ("■" in bar) == (frozen > 0)
    assert ("□" not in bar) == (frozen == total)


def test_a_line_tells_an_epoch() -> None:
    line = epoch_line(ROW, epochs=20, of_dense=0.129)
    assert line.split() == ["1/20", "0.2500", "0.5000", "0.100", "■□□", "1/3", "8,000", "12.9%", "1.3", "s"]


@given(st.integers(0, 998), st.integers(0, 99), st.integers(0, 9_999_999), st.floats(0, 99_999), st.floats(0, 1))
def test_a_line_fits_into_eighty_columns(epoch: int, frozen: int, samples: int, seconds: float, share: float) -> None:
    row = ROW | {"epoch": epoch, "frozen_blocks": frozen, "total_blocks": 99, "partial_samples": samples}
    assert len(epoch_line(row | {"seconds": seconds}, epochs=999, of_dense=share)) <= 80


def test_results_say_of_each_figure_what_it_is() -> None:
    assert results(SUMMARY) == [
        "test accuracy 0.9000, in the best epoch, chosen by it, 0.9500 (measured)",
        "sparsity of masked layers 90.0% (counted)",
        "frozen blocks 2 of 3 (counted)",
    ]


def test_with_a_validation_set_the_best_epoch_is_said_to_be_chosen_by_it() -> None:
    validated = SUMMARY | {"val_accuracy": 0.8, "best_val_accuracy": 0.85, "best_epoch": 3}
    assert results(validated)[:2] == [
        "test accuracy 0.9000, in the best epoch 0.9500 (measured)",
        "validation accuracy 0.8000, in the best epoch, chosen by it, 0.8500 (measured)",
    ]
    row = {name: value for name, value in ROW.items() if name != "test_accuracy"} | {"val_accuracy": 0.75}
    assert epoch_line(row, epochs=20, of_dense=0.129).split()[1] == "0.7500"
    assert len(header("val")) == len(header("test"))


def test_what_there_is_none_of_is_not_shown() -> None:
    assert len(results(SUMMARY | {"final_sparsity": 0.0, "total_blocks": 0})) == 1


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_terminal_gets_a_live_bar_and_every_epoch_s_line(is_terminal: bool, tiny: Any, tmp_path: Any) -> None:
    stream = io.StringIO()
    display = ConsoleDisplay(Console(file=stream, force_terminal=is_terminal, width=80))
    options = TrainOptions(data=str(tiny), recipe={}, epochs=2, dense_timing_steps=0)
    train(options, tmp_path / "run", display)
    printed = stream.getvalue()
    assert ("\x1b[" in printed) == is_terminal
    assert ("loss" in printed) == is_terminal
    assert all(f"  {epoch}/2  " in printed for epoch in (1, 2))
