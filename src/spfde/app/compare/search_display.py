"""Progress of a search: a line for each trial that ends, and a live bar over the one under way."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from spfde.app.compare.search_state import Trial
from spfde.app.report import figures
from spfde.core.say import counted


class TrialBoard:
    """Shows a search on a rich console; with a live bar if that is a terminal."""

    def __init__(self, console: Console) -> None:
        self._console = console
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("epochs")
        is_shown = console.is_terminal and not console.quiet
        self._progress = Progress(*columns, TimeElapsedColumn(), console=console, transient=True, disable=not is_shown)
        self._bar = self._progress.add_task("", total=None)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def line(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def begins(self, name: str) -> None:
        """A run begins, or goes on."""
        self._progress.reset(self._bar, description=name)

    def reached(self, epochs: int, of: int) -> None:
        """So many of its epochs are trained."""
        self._progress.update(self._bar, completed=epochs, total=of)

    def ended(self, trial: Trial, dense_flops: int) -> None:
        """A trial is over."""
        self.line(f"{trial.name} ({values_text(trial.values)}): {outcome_text(trial)}{cost_text(trial, dense_flops)}")


def values_text(values: Mapping[str, Any]) -> str:
    """Options in a line."""
    return ", ".join(
        f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}" for name, value in values.items()
    )


def outcome_text(trial: Trial, *, with_accuracy: bool = True) -> str:
    """What came of a trial, in a line."""
    if trial.state == "unfit":
        return f"not trained: {trial.why}"
    done = f"{len(trial.val_accuracy)} of {counted(trial.epochs, 'epoch')}"
    if trial.state == "failed":
        return f"failed after {done}: {trial.why}"
    accuracy = f", validation accuracy {trial.val_accuracy[-1]:.4f}" if trial.val_accuracy and with_accuracy else ""
    return f"{trial.state}, {done}{accuracy}"


def cost_text(trial: Trial, dense_flops: int) -> str:
    """What it cost, as the end of a line."""
    if not trial.training_flops:
        return ""
    return (
        f", {figures.percent(trial.training_flops / dense_flops)} of the dense run, {figures.duration(trial.seconds)}"
    )
