"""The table of a comparison: a row for each candidate, from the summaries of its runs alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spfde.app.compare.folder import Comparison
from spfde.app.compare.statistics import CONFIDENCE, Difference, Spread, paired, pareto
from spfde.app.runs.folder import SUMMARY, RunFolder
from spfde.core.say import counted

ACCURACY, BEST = "test_accuracy", "best_test_accuracy"
FIGURES = (
    *(ACCURACY, BEST, "val_accuracy", "best_val_accuracy", "training_flops", "flops_ratio", "seconds"),
    *("peak_memory_bytes", "final_sparsity"),
)
"""What is read of a summary, as numbers."""
CHOSEN_BY = "val_accuracy"
"""A summary that has it chose its best epoch by a validation set."""
_FEW = 3


@dataclass(frozen=True)
class Row:
    """A candidate.

    Attributes:
        runs: of each seed whose run is finished, the figures.
        spreads: mean and standard deviation of each figure that every run has.
        difference: of the test accuracy after the last epoch from the baseline's; None for the baseline itself, and
            where no seed is finished in both.
        is_cheapest_by: costs ("training_flops", "seconds") for which nothing finished is as cheap and more accurate.
    """

    name: str
    is_baseline: bool
    engines: tuple[str, ...]
    runs: Mapping[int, Mapping[str, float]]
    spreads: Mapping[str, Spread]
    difference: Difference | None
    is_cheapest_by: tuple[str, ...] = ()

    @property
    def n(self) -> int:
        return len(self.runs)


@dataclass(frozen=True)
class ComparisonTable:
    """All candidates, and what there is to say of them.

    Attributes:
        wanted: runs that the comparison has.
        confidence: of the intervals.
    """

    baseline: str
    rows: tuple[Row, ...]
    wanted: int
    notes: tuple[str, ...]
    confidence: float = CONFIDENCE

    @property
    def finished(self) -> int:
        return sum(row.n for row in self.rows)


def table_of(comparison: Comparison, folder: Path, known: dict[Path, dict[str, Any]] | None = None) -> ComparisonTable:
    """The table as far as runs are finished.

    Args:
        known: summaries that were read before, by the folders of their runs; what is read is added.

    Raises:
        RunFolderError: a summary is damaged.
    """
    read = {} if known is None else known
    found: dict[str, dict[int, dict[str, Any]]] = {candidate.name: {} for candidate in comparison.candidates}
    for run in comparison.runs(folder):
        if run.path not in read and (run.path / SUMMARY).is_file():
            read[run.path] = RunFolder(run.path).read_json(SUMMARY)
        if run.path in read:
            found[run.candidate.name][run.seed] = read[run.path]
    base = _numbers(found[comparison.baseline])
    rows = [_row(name, summaries, base, comparison.baseline) for name, summaries in found.items()]
    fronts = {cost: pareto([_point(row, cost) for row in rows]) for cost in ("training_flops", "seconds")}
    rows = [
        Row(**(vars(row) | {"is_cheapest_by": tuple(cost for cost, on in fronts.items() if on[at])}))
        for at, row in enumerate(rows)
    ]
    wanted = len(comparison.candidates) * len(comparison.seeds)
    is_validated = all(CHOSEN_BY in each for summaries in found.values() for each in summaries.values())
    notes = tuple(_notes(comparison, rows, wanted, is_validated=is_validated))
    return ComparisonTable(comparison.baseline, tuple(rows), wanted, notes)


def _numbers(summaries: Mapping[int, Mapping[str, Any]]) -> dict[int, dict[str, float]]:
    return {
        seed: {
            name: float(value)
            for name in FIGURES
            if isinstance(value := summary.get(name), int | float) and not isinstance(value, bool) and _is_sound(value)
        }
        for seed, summary in sorted(summaries.items())
    }


def _is_sound(value: float) -> bool:
    return -1e30 < value < 1e30  # also of whole numbers that no float can be


def _row(
    name: str, summaries: Mapping[int, Mapping[str, Any]], base: Mapping[int, Mapping[str, float]], baseline: str
) -> Row:
    runs = _numbers(summaries)
    spreads = {}
    for figure in FIGURES:
        values = [run[figure] for run in runs.values() if figure in run]
        if len(values) == len(runs) and (spread := Spread.of(values)):
            spreads[figure] = spread
    own, others = ({seed: run[ACCURACY] for seed, run in of.items() if ACCURACY in run} for of in (runs, base))
    difference = None if name == baseline else paired(own, others)
    engines = tuple(sorted({str(summary.get("engine", "")) for summary in summaries.values()} - {""}))
    return Row(name, name == baseline, engines, runs, spreads, difference)


def _point(row: Row, cost: str) -> tuple[float, float] | None:
    if cost not in row.spreads or ACCURACY not in row.spreads:
        return None
    return row.spreads[cost].mean, row.spreads[ACCURACY].mean


def _notes(comparison: Comparison, rows: Sequence[Row], wanted: int, *, is_validated: bool) -> list[str]:
    """What a reader has to know before reading something into the figures."""
    notes = []
    if comparison.quick:
        notes.append("The short form, on few images for few epochs: it shows that everything runs, and nothing else.")
    if (finished := sum(row.n for row in rows)) < wanted:
        notes.append(f"{finished} of {counted(wanted, 'run')} are finished.")
    if comparison.failed:
        told = "; ".join(f"{name} ({why})" for name, why in list(comparison.failed.items())[:_FEW])
        more = f"; and {len(comparison.failed) - _FEW} more" if len(comparison.failed) > _FEW else ""
        notes.append(f"In no figure, for they failed: {told}{more}.")
    alone = [row.name for row in rows if row.n == 1]
    if alone:
        notes.append(f"One seed says nothing of the spread: {_listed(alone)}.")
    few = [row.name for row in rows if row.difference and 1 < row.difference.n <= _FEW]
    if few:
        n = min(row.difference.n for row in rows if row.difference and row.difference.n > 1)
        notes.append(
            f"{counted(n, 'seed')} make wide intervals that rest on differences being normally distributed; "
            "five or more are better."
        )
    for row in rows:
        found = row.difference
        if found is None or found.n == 1 or found.is_carried or not found.mean:
            continue
        needed = f"if it stayed so, {found.seeds_needed:,} seeds would show it" if found.seeds_needed else None
        notes.append(
            f"{row.name}: {found.n} seeds do not carry the difference of {100 * found.mean:+.2f} points"
            + (f" ({needed})." if needed else ".")
        )
    if sum(row.difference is not None for row in rows) > 1:
        notes.append(
            f"Each interval holds for itself at {CONFIDENCE:.0%}: of 20 candidates that are as good as the baseline, "
            "one is called different."
        )
    engines = {engine for row in rows for engine in row.engines}
    if len(engines) > 1:
        notes.append(f"Seconds and memory are of engines that differ: {_listed(sorted(engines))}.")
    if finished and is_validated:
        notes.append("The best epoch was chosen by accuracy on the validation share; table.csv and table.json have it.")
    if finished and not is_validated:
        notes.append(
            "The best epoch was chosen by test accuracy, so its accuracy is too high: with --validation-share it is "
            "chosen by images of the training set. Differences are of the last epoch's."
        )
    return notes


def _listed(names: Sequence[str], most: int = 6) -> str:
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
