"""What a run tells while it trains; whoever shows it overrides what it wants to hear."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from spfde.app.train.profile import Profile
    from spfde.app.train.setup import TrainingRun


class Display:
    """Shows nothing of a run."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """The run is over, however it ended."""

    def started(self, run: TrainingRun) -> None:
        """The run is ready, before its first epoch."""

    def batch_done(self, run: TrainingRun, done: int, total: int, loss: float) -> None:
        """Some batches are through; ``loss`` is the mean of the epoch so far."""

    def profiled(self, run: TrainingRun, found: Profile) -> None:
        """The steps that were to be profiled are through."""

    def epoch_done(self, run: TrainingRun, row: dict[str, Any]) -> None:
        """An epoch is through and safe on disk; ``row`` is its line in ``metrics.jsonl``."""

    def finished(self, run: TrainingRun, summary: dict[str, Any]) -> None:
        """The run is complete, and its summary written."""
