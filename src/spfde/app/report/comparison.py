"""The page of a comparison: its table, what has to be said of it, accuracy over cost, and what was compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from spfde.app.compare.folder import Comparison, read
from spfde.app.compare.table import ComparisonTable, table_of
from spfde.app.compare.writing import cells, legend
from spfde.app.report.canvas import DARK, LIGHT, mark_of
from spfde.app.report.figures import MISSING, NBSP
from spfde.app.report.html import Line, Picture, WideTable, render
from spfde.app.report.scatter import MOST_NAMED, PLOTS, named
from spfde.app.report.tables import VERSUS_DENSE, Heading, named_values
from spfde.app.runs.folder import flat
from spfde.core.say import counted

_AFTER_LAST = "Per cent, after the last epoch: mean ± standard deviation over the seeds"
_AFTER_BEST = "The same after each run's best epoch"
_DIFFERENCE = (
    "Of the last epoch's accuracy from the baseline's, in points, paired by seed, with its confidence interval; "
    "not carried: the interval holds zero, so the seeds do not show a difference"
)
_FEW_NAMED = (
    f"Of more than {MOST_NAMED} candidates only those on a front, and the baseline, have a number in the plots."
)
_FRONT = "Costs for which no candidate is as cheap and as accurate, and better in one of both"
HEADINGS = (
    Heading("Seeds", None, "How many runs are finished"),
    Heading("Test accuracy, last", "measured", _AFTER_LAST),
    Heading("Test accuracy, best", "measured", _AFTER_BEST),
    Heading("Difference", "measured", _DIFFERENCE),
    Heading("Training FLOPs", "modelled", "Over a whole run; a mean, as all that follows"),
    Heading("FLOPs vs dense", "modelled", VERSUS_DENSE),
    Heading("Time", "measured", "Wall clock of training"),
    Heading("Peak memory", "measured", "Of the process, or of the GPU"),
    Heading("Final sparsity", "measured", "Counted; masked tensors only"),
    Heading("Pareto front", None, _FRONT),
)
"""Of the columns after the candidate's name: those of ``table.md``, and the last one."""
_COSTS = {"training_flops": "FLOPs", "seconds": "time"}


def draw_comparison(folder: Path) -> tuple[str, list[Picture]]:
    """The page of a comparison, finished or not, and its plots.

    Raises:
        RunFolderError: it is no comparison's folder, or a file in it is damaged.
    """
    comparison = read(folder)
    table = table_of(comparison, folder)
    pictures: list[Picture] = [(plot, plot.png(table, LIGHT), plot.png(table, DARK)) for plot in PLOTS]
    shared, own = _settings(comparison)
    text = render(
        "comparison.html.j2",
        pictures,
        title=f"spfde: {folder.resolve().name}",
        folder=folder,
        facts=_facts(comparison, table, shared),
        unfinished=f"{table.finished} of {table.wanted} runs finished" if table.finished < table.wanted else "",
        table=_wide(table),
        notes=[*legend(table), *table.notes, *([_FEW_NAMED] if len(table.rows) > MOST_NAMED else [])],
        shared=named_values(shared),
        own=[
            (candidate.name, named_values(values)) for candidate, values in zip(comparison.candidates, own, strict=True)
        ],
        light=LIGHT,
        dark=DARK,
    )
    return text, pictures


def _facts(comparison: Comparison, table: ComparisonTable, shared: Mapping[str, Any]) -> str:
    """In a line what was compared."""
    model, data = (Path(str(shared[name])).name if name in shared else "" for name in ("model", "data"))
    setting = " on ".join(filter(None, (model, data)))
    epochs = shared.get("epochs")
    length = counted(epochs, "epoch") if isinstance(epochs, int) else ""
    size = f"{counted(len(table.rows), 'candidate')} with {counted(len(comparison.seeds), 'seed')} each"
    return "; ".join(filter(None, (size, setting, length, f"baseline: {table.baseline}")))


def _wide(table: ComparisonTable) -> WideTable:
    shown = set(named(table))
    lines = [
        Line(
            row.name,
            (*(cell.replace(" ± ", f"{NBSP}±{NBSP}") for cell in cells(row)[1:]), _front(row.is_cheapest_by)),
            badge="baseline" if row.is_baseline else "",
            mark=mark_of(at) if at in shown else None,
            number=at + 1,
        )
        for at, row in enumerate(table.rows)
    ]
    return WideTable("The candidates side by side", "Candidate", HEADINGS, tuple(lines))


def _front(costs: Sequence[str]) -> str:
    return ", ".join(_COSTS.get(cost, cost) for cost in costs) or MISSING


def _settings(comparison: Comparison) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Options that all candidates have in common, and those of each one that they have not."""
    each = [flat(candidate.options) for candidate in comparison.candidates]
    first, *others = each
    shared = {
        name: value for name, value in first.items() if all(name in other and other[name] == value for other in others)
    }
    return shared, [{name: value for name, value in options.items() if name not in shared} for options in each]
