"""A comparison that a program makes: begun, gone on with, and what it may add."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from spfde.app.compare.command import run
from spfde.app.compare.folder import Comparison, read
from spfde.app.compare.processes import RunFailed
from spfde.app.compare.spec import Spec
from spfde.app.compare.table import ComparisonTable
from spfde.core.errors import DataError, RunFolderError

DENSE, SET, MORE = {"recipe": "dense"}, {"recipe": "set", "sparsity": 0.5}, {"name": "longer", "epochs": 2}


@pytest.fixture
def compared(tiny: Path, tmp_path: Path) -> Any:
    """Compares these candidates in one folder."""

    def compare(*candidates: dict[str, Any], seeds: int = 1, **options: Any) -> ComparisonTable:
        common = {"data": str(tiny), "epochs": 1, "batch_size": 16, "engine": "masked", "lr": 0.05} | options
        wanted = Comparison.of(Spec(seeds=seeds, options=common, candidates=candidates))
        return run(wanted, tmp_path / "table", quiet=True)

    return compare


def stamps(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.glob("table/runs/*/*/summary.json")}


def test_candidates_and_seeds_are_added_and_finished_runs_stay(compared: Any, tmp_path: Path) -> None:
    first = compared(DENSE, SET)
    assert [(row.name, row.n) for row in first.rows] == [("dense", 1), ("set", 1)]
    before = stamps(tmp_path)
    more = compared(DENSE, {**DENSE, **MORE}, SET, seeds=2)
    assert [(row.name, row.n) for row in more.rows] == [("dense", 2), ("longer", 2), ("set", 2)]
    after = stamps(tmp_path)
    assert (len(before), len(after)) == (2, 6)
    assert {path: after[path] for path in before} == before
    assert more.rows[0].runs[0] == first.rows[0].runs[0]
    assert (tmp_path / "table" / "table.md").is_file()


def test_a_folder_keeps_what_it_compares(compared: Any, tmp_path: Path) -> None:
    compared(DENSE, SET, seeds=2)
    kept = read(tmp_path / "table")
    for candidates, seeds, lacking in (
        ([DENSE], 2, "the candidate 'set'"),
        ([DENSE, SET], 1, "seed 1"),
        ([DENSE, {**SET, "sparsity": 0.6}], 2, "the candidate 'set' with its options there"),
    ):
        with pytest.raises(RunFolderError, match=f"holds another comparison: it has {lacking}, and what"):
            compared(*candidates, seeds=seeds)
        assert read(tmp_path / "table") == kept


def test_a_mistake_leaves_no_folder_and_a_failing_run_is_raised(compared: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="gone"):
        compared(DENSE, data="gone.npz")
    assert not (tmp_path / "table").exists()
    with pytest.raises(RunFailed, match=r"1 of 2 runs failed[^$]*\nbad, seed 0: the loss became"):
        compared(DENSE, {**DENSE, "name": "bad", "lr": 1e30}, epochs=2)
    assert len(stamps(tmp_path)) == 1
