"""Progress of many runs: a line for each one that ends, and live bars over all of them and for those under way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from spfde.app.compare.folder import Planned
from spfde.app.report import figures
from spfde.app.train.events import Display
from spfde.app.train.setup import TrainingRun
from spfde.core.say import counted


class Board:
    """Shows a comparison on a rich console; with live bars if that is a terminal.

    Args:
        runs: all runs of the comparison.
        done: epochs of each that are trained already; all of them for a finished one.
    """

    def __init__(self, console: Console, runs: Sequence[Planned], done: Mapping[Planned, int]) -> None:
        self._console, self._runs = console, runs
        self._epochs = {run: run.candidate.options["epochs"] for run in runs}
        self._done = dict(done)
        self._ended = sum(self._done[run] == self._epochs[run] for run in runs)
        self._bars: dict[Planned, TaskID] = {}
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("epochs"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal or console.quiet,
        )

    def __enter__(self) -> Self:
        self._line(f"spfde compare · {counted(len(self._runs), 'run')}, {self._ended} of them finished")
        total = sum(self._epochs.values())
        self._all = self._progress.add_task(self._heading, total=total, completed=sum(self._done.values()))
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def of(self, run: Planned) -> Display:
        """What one run tells."""
        return _OneOfMany(self, run)

    def reached(self, run: Planned, epochs: int) -> None:
        """So many epochs of it are trained."""
        if run not in self._bars:
            self._bars[run] = self._progress.add_task(run.name, total=self._epochs[run])
        self._done[run] = epochs
        self._progress.update(self._bars[run], completed=epochs)
        self._progress.update(self._all, completed=sum(self._done.values()))

    def ended(self, run: Planned, summary: Mapping[str, Any] | None, error: str = "") -> None:
        """It is over."""
        self._ended += 1
        if run in self._bars:
            self._progress.remove_task(self._bars.pop(run))
        self._progress.update(self._all, description=self._heading)
        place = f"{self._ended:>{len(str(len(self._runs)))}}/{len(self._runs)}"
        if summary is None:
            self._line(f"{place}  {run.name}: failed. {error}")
            return
        accuracy, seconds = summary["test_accuracy"], figures.duration(summary["seconds"])
        self._line(
            f"{place}  {run.name}: test accuracy {accuracy:.4f}, {summary['flops_ratio']:.1%} of dense, {seconds}"
        )

    @property
    def _heading(self) -> str:
        return f"{self._ended} of {counted(len(self._runs), 'run')}"

    def _line(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)


class _OneOfMany(Display):
    def __init__(self, board: Board, run: Planned) -> None:
        self._board, self._run = board, run

    def started(self, run: TrainingRun) -> None:
        self._board.reached(self._run, run.session.epoch)

    def epoch_done(self, run: TrainingRun, row: dict[str, Any]) -> None:
        self._board.reached(self._run, row["epoch"] + 1)
