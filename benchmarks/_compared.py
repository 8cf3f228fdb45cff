"""What the benchmarks share that train the same nets with several seeds: a comparison, as `spfde compare` makes it.

ResNet-8 on fashion-mini. The runs are kept in the folder of a comparison (``--runs``): what was interrupted goes on,
what is finished is not trained again, and seeds and candidates may be added; `spfde report` draws it.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from _common import BENCHMARKS, Figure, Result, Table, Unit, begin, parser
from spfde.app.compare.command import QUICK, quick_images, run
from spfde.app.compare.folder import Comparison
from spfde.app.compare.spec import Spec
from spfde.app.compare.statistics import Spread
from spfde.app.compare.table import ACCURACY, ComparisonTable, Row
from spfde.app.compare.writing import HEADINGS, cells, legend
from spfde.app.runs.folder import RunFolder
from spfde.app.train.models import build_model
from spfde.core.errors import SpfdeError

MODEL, DATA = "resnet8", "fashion-mini"
Values = Mapping[str, Any]
"""Options of a candidate, as in a specification."""


SAMPLE = torch.zeros(1, 1, 28, 28)


def network(width: float = 1.0) -> nn.Module:
    """The net that is trained, with so many times its channels."""
    return build_model(MODEL, num_classes=10, in_channels=1, image_size=28, width=width)


def run_parser(doc: str | None, name: str) -> argparse.ArgumentParser:
    """The options that a benchmark of that name has."""
    made, kept = parser(doc), BENCHMARKS.parent / "runs" / "benchmarks" / name
    made.add_argument("--epochs", type=int, default=None, help="length of the runs (20)")
    made.add_argument("--seeds", type=int, nargs="+", default=None, help="seeds, one run each (0 1 2)")
    made.add_argument("--runs", type=Path, default=kept, metavar="FOLDER", help=f"where they are kept ({kept})")
    made.add_argument("--jobs", type=int, default=None, help="runs at a time, where seconds do not matter (1)")
    made.set_defaults(name=name)
    return made


@dataclass(frozen=True)
class Runs:
    """Where runs are kept, and what they have in common.

    Attributes:
        name: of the benchmark.
        epochs: length of those candidates that do not say otherwise.
        options: of all runs, as in a specification.
    """

    name: str
    folder: Path
    seeds: Sequence[int]
    epochs: int
    options: Values
    stamp: Mapping[str, Any]
    jobs: int | None = None

    def compared(self, candidates: Mapping[str, Values]) -> Compared:
        """Train what is missing of these candidates, by their labels; those with equal options share their runs.

        The baseline is the first dense candidate, or else the first one.
        """
        labels = list(candidates)
        shared = {label: next(each for each in labels if candidates[each] == candidates[label]) for label in labels}
        tables = tuple({"name": name, **candidates[name]} for name in dict.fromkeys(shared.values()))
        options = {"model": MODEL, "epochs": self.epochs, **self.options}
        comparison = Comparison.of(Spec(seeds=tuple(self.seeds), options=options, candidates=tables))
        table = run(comparison, self.folder, jobs=self.jobs)
        rows = {row.name: row for row in table.rows}
        return Compared(self, comparison, table, {label: rows[name] for label, name in shared.items()})


@contextmanager
def opened_runs(asked: argparse.Namespace, *, quick_epochs: int, data: str | Path = DATA) -> Iterator[Runs]:
    """The runs that these options ask for; those of a smoke test are removed again. A mistake ends the benchmark."""
    stamp, seeds, epochs = begin(asked), asked.seeds, asked.epochs
    try:
        if not asked.quick:
            yield Runs(asked.name, asked.runs, seeds or [0, 1, 2], epochs or 20, {"data": str(data)}, stamp, asked.jobs)
            return
        with tempfile.TemporaryDirectory() as place:
            small = {"data": str(quick_images(Path(place) / QUICK)), "batch_size": 16}
            yield Runs(asked.name, Path(place) / "runs", seeds or [0], epochs or quick_epochs, small, stamp)
    except SpfdeError as error:
        raise SystemExit(str(error)) from None


@dataclass(frozen=True)
class Compared:
    """A comparison with all runs finished; ``rows`` has what each candidate came to, by its label."""

    of: Runs
    comparison: Comparison
    whole: ComparisonTable
    rows: Mapping[str, Row]

    def mean(self, label: str, figure: str) -> float:
        """Of a figure of the summaries, over the seeds."""
        return self.rows[label].spreads[figure].mean

    def options(self, label: str) -> Values:
        """Of its runs, all of them."""
        return next(each.options for each in self.comparison.candidates if each.name == self.rows[label].name)

    def pairs(self, one: str, other: str, figure: str) -> list[tuple[float, float]]:
        """A figure of two candidates, seed by seed."""
        others = self.rows[other].runs
        return [(found[figure], others[seed][figure]) for seed, found in self.rows[one].runs.items()]

    def curve(self, label: str, *figures: str) -> list[dict[str, float]]:
        """Figures of the metrics after each epoch, means over the seeds."""
        files = [
            run.path for run in self.comparison.runs(self.of.folder) if run.candidate.name == self.rows[label].name
        ]
        epochs = zip(*(RunFolder(path).read_metrics().values() for path in files), strict=True)
        return [{figure: statistics.fmean(row[figure] for row in rows) for figure in figures} for rows in epochs]

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

    def result(
        self,
        title: str,
        question: str,
        figures: Sequence[Figure],
        tables: Sequence[Table],
        notes: Sequence[str],
        *,
        settings: Mapping[str, Any] | None = None,
        data: Mapping[str, Any] | None = None,
        arguments: str = "",
    ) -> Result:
        """What is published; its notes begin with how the table is read, and what its seeds do not carry."""
        runs = self.of
        trained = DATA if runs.options["data"] == DATA else f"few images of {DATA}"
        common = {"data": trained, "model": MODEL, "epochs": runs.epochs, "seeds": " ".join(map(str, runs.seeds))}
        return Result(
            runs.name,
            title,
            question,
            f"python benchmarks/{runs.name}.py{arguments}",
            tuple(figures),
            tuple(tables),
            settings=common | dict(settings or {}),
            notes=(*legend(self.whole), *self.whole.notes, *notes),
            stamp=runs.stamp,
            data=data or {},
        )


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
