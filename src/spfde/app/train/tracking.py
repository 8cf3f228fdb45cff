"""Experiment trackers (``--track``), by way of Accelerate: nothing else of the trainer needs it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any


class Trackers:
    """The trackers of a run; without names there are none, and Accelerate is not imported.

    Args:
        names: as Accelerate knows them.
        folder: the run's, where those that can write to; a resumed run adds to what is there.
    """

    def __init__(self, names: tuple[str, ...], folder: Path) -> None:
        self._names, self._folder = names, folder
        self._accelerator: Any = None

    def start(self, config: Mapping[str, Any]) -> None:
        """Begin, with the run's options."""
        if not self._names:
            return
        from accelerate import Accelerator

        self._accelerator = Accelerator(cpu=True, log_with=list(self._names), project_dir=str(self._folder))
        flat = {name: value for name, value in config.items() if isinstance(value, (str, int, float, bool))}
        places = {"wandb": {"dir": str(self._folder), "resume": "allow"}}
        self._accelerator.init_trackers("spfde", config=flat, init_kwargs=places)

    def log(self, row: Mapping[str, Any], *, step: int) -> None:
        """Tell them the numbers in a row."""
        if self._accelerator is not None:
            numbers = {name: value for name, value in row.items() if isinstance(value, (int, float))}
            self._accelerator.log(numbers, step=step)

    def finish(self) -> None:
        """The run has come to its end."""
        if self._accelerator is not None:
            for tracker in self._accelerator.trackers:  # end_training() would end the group of processes as well
                tracker.finish()

    def close(self) -> None:
        """Forget Accelerate's state, which it keeps for the whole process: a second run may have other settings."""
        if self._accelerator is not None:
            from accelerate.state import AcceleratorState

            AcceleratorState._reset_state(reset_partial_state=True)
