"""The figures of the report as rows of text, each with its origin: measured, modelled, or set by the user."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from spfde.app.report import figures
from spfde.app.report.folders import RecordedRun
from spfde.app.runs.folder import flat

Origin = Literal["measured", "modelled", "set"]
PARTS_OF_DENSE = (
    ("training_flops", "spent"),
    ("saved_by_sparsity", "saved by sparsity"),
    ("saved_by_freezing", "saved by freezing"),
    ("saved_by_sieving", "saved by sieving"),
)
LAST_AND_BEST = (
    "After the last and after the best epoch. Which one is best was chosen by test accuracy, so that the second figure "
    "flatters; or by validation accuracy, where a share of the training set was held out"
)
VALIDATED = "The same on the samples that were held out of the training set"
VERSUS_DENSE = "Share of the dense model's training FLOPs, same epochs, all samples"
TIME_VERSUS_DENSE = (
    "Seconds over those of a dense run in this report with the same machine and settings; "
    "≈: over the time of a dense run as extrapolated from dense steps that were timed before the run"
)


@dataclass(frozen=True)
class Heading:
    """Of a column: its title, where its figures come from (if that is one place), and what they mean."""

    title: str
    origin: Origin | None
    meaning: str


@dataclass(frozen=True)
class Column(Heading):
    """One column of a table of runs."""

    cell: Callable[[RecordedRun], str]


@dataclass(frozen=True)
class Table:
    """A caption, headings, and one row a run: its name, then a cell for each column."""

    caption: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[RecordedRun, tuple[str, ...]], ...]


def shown(words: Callable[[float | None], str], name: str) -> Callable[[RecordedRun], str]:
    """A cell: a figure of a run, put into words."""
    return lambda run: words(figures.figure(run, name))


def set_by(name: str) -> Callable[[RecordedRun], str]:
    """A cell: a setting of a run."""
    return lambda run: figures.setting(run, name)


def comparison(runs: Sequence[RecordedRun]) -> Table:
    """One row a run, everything that matters side by side."""
    validated = (Column("Validation accuracy, last / best", "measured", VALIDATED, figures.validated),)
    columns = (
        Column("Recipe", "set", "Name of the recipe", set_by("recipe")),
        Column("Engine", "set", "masked: dense arithmetic under a mask; native: sparse kernels", set_by("engine")),
        Column("Test accuracy, last / best", "measured", LAST_AND_BEST, figures.accuracies),
        *(validated if any(run.evaluated_on == "val" for run in runs) else ()),
        Column("Training FLOPs", "modelled", "Over the whole run", shown(figures.flops, "training_flops")),
        Column("FLOPs vs dense", "modelled", VERSUS_DENSE, shown(figures.times, "flops_ratio")),
        Column("Time", "measured", "Wall clock of training", shown(figures.duration, "seconds")),
        Column("Time vs dense", "measured", TIME_VERSUS_DENSE, lambda run: figures.time_against_dense(run, runs)),
        Column("Peak memory", "measured", "Of the process, or of the GPU", figures.peak_memory),
        Column("Final sparsity", "measured", "Counted; masked tensors only", shown(figures.percent, "final_sparsity")),
        Column("Frozen blocks", "measured", "Counted; at the end, of all blocks", figures.frozen_blocks),
        Column("Samples seen", "measured", "Counted; repeats too", shown(figures.count, "samples_seen")),
        Column("Seed", "set", "Of all random choices", set_by("seed")),
        Column("Versions", "set", "Of what it was trained with", figures.versions),
    )
    return _table("The runs side by side", columns, runs)


def savings(runs: Sequence[RecordedRun]) -> Table:
    """Where the FLOPs went: shares of the dense model's training FLOPs for the same epochs."""

    def share(name: str) -> Callable[[RecordedRun], str]:
        return lambda run: figures.percent(figures.share_of_dense(run, name))

    columns = tuple(Column(title.capitalize(), "modelled", VERSUS_DENSE, share(name)) for name, title in PARTS_OF_DENSE)
    of_spent = "Part of what was spent: gradients of inactive weights"
    extra = Column("Dense gradients", "modelled", of_spent, share("dense_gradient_flops"))
    beside = Column("Scores and probes", "modelled", "Computed beside the training steps", share("overhead_flops"))
    return _table("Where the training FLOPs went", (*columns, extra, beside), runs)


def memory_table(runs: Sequence[RecordedRun]) -> Table:
    """Memory: what the model of it says, and what was seen."""

    def span(name: str) -> Callable[[RecordedRun], str]:
        def cell(run: RecordedRun) -> str:
            _, values = run.points(name)
            return f"{figures.memory(values[0])} → {figures.memory(values[-1])}" if values else figures.MISSING

        return cell

    columns = (
        Column("Kept for backward", "measured", "By one step; first → last epoch", span("saved_tensor_bytes")),
        Column("Weights, activations, gradients", "modelled", "First → last epoch", span("modelled_memory_bytes")),
        Column("Partial set", "measured", "Share of the samples in use, last epoch", figures.partial_share),
    )
    return _table("Memory and data in use", columns, runs)


def settings(run: RecordedRun) -> list[tuple[str, str]]:
    """Everything in ``config.json``, flattened to names and values."""
    return named_values(flat(run.config))


def named_values(content: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Names and values as text, without those that say nothing."""
    return [
        (name, ", ".join(map(str, value)) if isinstance(value, list) else str(value))
        for name, value in content.items()
        if value is not None
    ]


def uncounted(runs: Sequence[RecordedRun]) -> list[tuple[str, str]]:
    """Names of runs, and the modules that their modelled FLOPs leave out, with their number, as the plan lists them."""
    by_modules: dict[str, list[str]] = {}
    for run in runs:
        found = run.section("plan").get("uncounted")
        if isinstance(found, Mapping) and found:
            by_modules.setdefault(", ".join(f"{name} ({calls})" for name, calls in found.items()), []).append(run.name)
    return [(", ".join(names), modules) for modules, names in by_modules.items()]


def _table(caption: str, columns: tuple[Column, ...], runs: Sequence[RecordedRun]) -> Table:
    return Table(caption, columns, tuple((run, tuple(column.cell(run) for column in columns)) for run in runs))
