"""The table of a comparison, from summaries alone."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest

from spfde.app.compare.folder import Candidate, Comparison
from spfde.app.compare.table import ComparisonTable, table_of
from spfde.app.compare.writing import as_csv, as_json, as_latex, as_markdown
from spfde.core.errors import RunFolderError

SUMMARY = {
    "test_accuracy": 0.5,
    "best_test_accuracy": 0.6,
    "training_flops": 1e12,
    "flops_ratio": 1.0,
    "seconds": 10.0,
    "peak_memory_bytes": 2**20,
    "final_sparsity": 0.0,
    "engine": "masked",
}


def comparison(*names: str, seeds: tuple[int, ...] = (0, 1, 2)) -> Comparison:
    candidates = tuple(Candidate(name=name, folder=f"c{at}", options={"epochs": 1}) for at, name in enumerate(names))
    return Comparison(baseline=names[0], seeds=seeds, candidates=candidates)


def finish(folder: Path, of: Comparison, name: str, accuracies: list[float], **figures: Any) -> None:
    for run in of.runs(folder):
        if run.candidate.name == name and run.seed < len(accuracies):
            run.path.mkdir(parents=True)
            summary = SUMMARY | {"test_accuracy": accuracies[run.seed]} | figures
            (run.path / "summary.json").write_text(json.dumps(summary))


@pytest.fixture
def made(tmp_path: Path) -> tuple[Comparison, ComparisonTable]:
    of = comparison("dense", "mest", "a | b_%")
    finish(tmp_path, of, "dense", [0.50, 0.52, 0.53])
    finish(
        tmp_path, of, "mest", [0.52, 0.55, 0.54], training_flops=1e11, flops_ratio=0.1, seconds=20.0, engine="native"
    )
    finish(tmp_path, of, "a | b_%", [0.4], training_flops=2e11)
    return of, table_of(of, tmp_path)


def test_a_row_by_hand(made: tuple[Comparison, ComparisonTable]) -> None:
    dense, mest, other = made[1].rows
    assert (dense.n, dense.is_baseline, dense.difference) == (3, True, None)
    assert mest.spreads["test_accuracy"].mean == pytest.approx(0.53666667)
    assert mest.difference is not None
    assert (mest.difference.mean, mest.difference.seeds_needed) == (pytest.approx(0.02), 4)
    assert other.difference is not None
    assert (other.n, other.difference.n) == (1, 1)
    assert (made[1].wanted, made[1].finished) == (9, 7)
    assert mest.is_cheapest_by == ("training_flops", "seconds")
    assert dense.is_cheapest_by == ("seconds",)


def test_what_the_figures_cannot_show_is_said(made: tuple[Comparison, ComparisonTable]) -> None:
    notes = "\n".join(made[1].notes)
    for told in (
        "7 of 9 runs are finished",
        "One seed says nothing of the spread: a | b_%",
        "mest: 3 seeds do not carry the difference of +2.00 points (if it stayed so, 4 seeds would show it)",
        "engines that differ: masked, native",
        "was chosen by test accuracy",
    ):
        assert told in notes


def test_best_epochs_that_were_chosen_by_a_validation_set_are_not_complained_of(tmp_path: Path) -> None:
    of = comparison("dense", "mest", seeds=(0,))
    for name in ("dense", "mest"):
        finish(tmp_path, of, name, [0.5], val_accuracy=0.5)
    assert "chosen by test accuracy" not in "\n".join(table_of(of, tmp_path).notes)


def test_the_forms_hold_the_same_figures(made: tuple[Comparison, ComparisonTable]) -> None:
    table = made[1]
    read = json.loads(as_json(table))
    assert (read["version"], read["baseline"], read["runs"]) == (1, "dense", {"wanted": 9, "finished": 7})
    mest = read["candidates"][1]
    assert mest["difference"]["mean"] == pytest.approx(0.02)
    assert [run["seed"] for run in mest["runs"]] == [0, 1, 2]
    lines = list(csv.DictReader(io.StringIO(as_csv(table))))
    assert [line["candidate"] for line in lines] == ["dense", "mest", "a | b_%"]
    assert float(lines[1]["difference_low"]) == mest["difference"]["low"]
    assert (lines[0]["difference_mean"], lines[1]["difference_carried"], lines[2]["test_accuracy_sd"]) == ("", "0", "")
    assert "| mest | 3 | 53.67 ± 1.53 |" in as_markdown(table)
    assert r"| a \| b_% | 1 | 40.00 |" in as_markdown(table)
    latex = as_latex(table)
    assert r"mest & 3 & 53.67 $\pm$ 1.53 &" in latex
    assert r"$\times$~10$^{11}$" in latex
    assert r"a | b\_\% & 1 & 40.00" in latex


def test_a_summary_that_is_none_is_named(tmp_path: Path) -> None:
    of = comparison("dense", seeds=(0,))
    finish(tmp_path, of, "dense", [0.5])
    path = of.runs(tmp_path)[0].path / "summary.json"
    path.write_text("[1]")
    with pytest.raises(RunFolderError, match=str(path)):
        table_of(of, tmp_path)
    path.write_text(
        '{"best_test_accuracy": 1'
        + "0" * 400
        + ', "test_accuracy": "high", "seconds": 1e99, "training_flops": true, "engine": null}'
    )
    [row] = table_of(of, tmp_path).rows
    assert row.spreads == {}
    assert "| dense | 1 | – | – | baseline | – |" in as_markdown(table_of(of, tmp_path))


def test_a_table_of_no_run_can_be_written(tmp_path: Path) -> None:
    table = table_of(comparison("dense", "mest"), tmp_path)
    assert all(write(table) for write in (as_json, as_csv, as_markdown, as_latex))
    assert table.finished == 0
