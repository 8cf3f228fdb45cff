"""A run that a user has stopped: its folder can be resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from spfde import presets
from spfde.app.train.events import Display
from spfde.app.train.loop import train
from spfde.app.train.options import TrainOptions


class Stopping(Display):
    """Ends the run with Ctrl-C after so many epochs."""

    def __init__(self, epochs: int = 1) -> None:
        self.epochs = epochs

    def epoch_done(self, run: Any, row: dict[str, Any]) -> None:
        if row["epoch"] == self.epochs - 1:
            raise KeyboardInterrupt


def stopped_run(data: Path, out: Path, *, after: int, **options: Any) -> Path:
    """A small run in ``out`` that was stopped after so many epochs."""
    given = {"recipe": presets.mest.to_dict(), "batch_size": 32, "dense_timing_steps": 0, "engine": "masked"}
    with pytest.raises(KeyboardInterrupt):
        train(TrainOptions(data=str(data), **(given | options)), out, Stopping(after))
    return out
