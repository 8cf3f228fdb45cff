"""What the benchmarks share that train the same nets with several seeds: a comparison, as `spfde compare` makes it.

ResNet-8 on fashion-mini. The runs are kept in the folder of a comparison (``--runs``): what was interrupted goes on,
what is finished is not trained again, and seeds and candidates may be added; `spfde report` draws it.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from _common import BENCHMARKS, Figure, Table, Unit
from spfde.app.compare.command import QUICK, quick_images, run
from spfde.app.compare.folder import Comparison
from spfde.app.compare.spec import Spec
from spfde.app.compare.statistics import Spread
from spfde.app.compare.table import ACCURACY, ComparisonTable, Row
from spfde.app.compare.writing import HEADINGS, cells, legend
from spfde.app.runs.folder import RunFolder

MODEL, DATA = "resnet8", "fashion-mini"
Values = Mapping[str, Any]
"""Options of a candidate, as in a specification."""


def add_run_options(made: argparse.ArgumentParser, name: str) -> None:
    """The options of a benchmark of that name."""
    made.add_argument("--epochs", type=int, default=None, help="length of the runs (20)")
    made.add_argument("--seeds", type=int, nargs="+", default=None, help="seeds, a run of each net for each (0 1 2)")
    kept = BENCHMARKS.parent / "runs" / "benchmarks" / name
    made.add_argument("--runs", type=Path, default=kept, metavar="FOLDER", help=f"where they are kept ({kept})")


@dataclass(frozen=True)
class Runs:
    """Where runs are kept, and what they have in common.

    Attributes:
        epochs: length of those candidates that do not say otherwise.
        options: of all runs, as in a specification.
    """

    folder: Path
    seeds: Sequence[int]
    epochs: int
    options: Values

    def compared(self, candidates: Mapping[str, Values]) -> Compared:
        """Train what is missing of these candidates, by their labels; those with equal options share their runs.

        The baseline is the first dense candidate, or else the first one.
        """
        labels = list(candidates)
        shared = {label: next(each for each in labels if candidates[each] == candidates[label]) for label in labels}
        tables = tuple({"name": name, **candidates[name]} for name in dict.fromkeys(shared.values()))
        options = {"model": MODEL, "epochs": self.epochs, **self.options}
        comparison = Comparison.of(Spec(seeds=tuple(self.seeds), options=options, candidates=tables))
        table = run(comparison, self.folder)
        by_name = {row.name: row for row in table.rows}
        return Compared(self.folder, comparison, table, {label: by_name[name] for label, name in shared.items()})

    @property
    def settings(self) -> dict[str, Any]:
        """What a result says of its runs."""
        data = DATA if self.options["data"] == DATA else f"few images of {DATA}"
        return {"data": data, "model": MODEL, "epochs": self.epochs, "seeds": " ".join(map(str, self.seeds))}


@contextmanager
def opened_runs(options: argparse.Namespace, *, quick_epochs: int) -> Iterator[Runs]:
    """The runs that these options ask for; those of a smoke test are removed again."""
    if not options.quick:
        yield Runs(options.runs, options.seeds or [0, 1, 2], options.epochs or 20, {"data": DATA})
        return
    with tempfile.TemporaryDirectory() as place:
        small = {"data": str(quick_images(Path(place) / QUICK)), "batch_size": 16}
        yield Runs(Path(place) / "runs", options.seeds or [0], options.epochs or quick_epochs, small)


@dataclass(frozen=True)
class Compared:
    """A comparison with all runs finished; ``rows`` has what each candidate came to, by its label."""

    folder: Path
    comparison: Comparison
    whole: ComparisonTable
    rows: Mapping[str, Row]

    def mean(self, label: str, figure: str) -> float:
        """Of a figure of the summaries, over the seeds."""
        return self.rows[label].spreads[figure].mean

    def pairs(self, one: str, other: str, figure: str) -> list[tuple[float, float]]:
        """A figure of two candidates, seed by seed."""
        others = self.rows[other].runs
        return [(found[figure], others[seed][figure]) for seed, found in self.rows[one].runs.items()]

    def curve(self, label: str, *figures: str) -> list[dict[str, float]]:
        """Figures of the metrics after each epoch, means over the seeds."""
        files = [run.path for run in self.comparison.runs(self.folder) if run.candidate.name == self.rows[label].name]
        epochs = zip(*(RunFolder(path).read_metrics().values() for path in files), strict=True)
        return [{figure: sum(row[figure] for row in rows) / len(rows) for figure in figures} for rows in epochs]

    def accuracy_figures(self, *, headline: bool = False) -> list[Figure]:
        """The test accuracy of each candidate."""
        return [
            over_seeds(
                f"test accuracy: {label}", [run[ACCURACY] for run in row.runs.values()], "accuracy", headline=headline
            )
            for label, row in self.rows.items()
        ]

    def table(self, title: str, more: Mapping[str, Callable[[str], str]]) -> Table:
        """The comparison's table, with further columns that are made from a candidate's label."""
        rows = [
            (*cells(replace(row, name=label)), *(text_of(label) for text_of in more.values()))
            for label, row in self.rows.items()
        ]
        return Table(title, (*HEADINGS, *more), tuple(rows))

    @property
    def notes(self) -> tuple[str, ...]:
        """How the table is to be read, and what its seeds do not carry."""
        return *legend(self.whole), *self.whole.notes


def over_seeds(
    what: str, values: Sequence[float], unit: Unit, *, low: float | None = None, high: float | None = None,
    headline: bool = False,
) -> Figure:  # fmt: skip
    """The mean of a value of each seed, with the standard deviation."""
    spread = Spread.of(values)
    assert spread is not None, "a finished comparison has a value of each seed"
    around = None if spread.sd is None else (spread.mean - spread.sd, spread.mean + spread.sd)
    return Figure(
        what, spread.mean, unit, low=low, high=high, n=spread.n, spread=around, spread_is="sd", headline=headline
    )
