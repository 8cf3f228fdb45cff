"""The one clock of a session, and what it counted since the top of the epoch."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch

Phase = Literal["between", "begun", "running", "drained"]
"""Where in an epoch the session stands: before its top, at its top, among its batches, or with all batches drawn."""


@dataclass
class Clock:
    """Epochs, steps and seconds.

    Attributes:
        epoch: the epoch that runs now or comes next, from 0.
        step: optimizer steps so far.
        phase: where in the epoch it stands.
        steps: optimizer steps in this epoch.
        samples_drawn: samples handed out by the session's loader in this epoch.
        samples_observed: samples observed in this epoch; kept here only while it is saved.
        sieve_moved: samples that the sieve moved at the top of this epoch.
        seconds: wall-clock seconds from the top of this epoch to its last batch, while the stop-watch ran.
    """

    epoch: int = 0
    step: int = 0
    phase: Phase = "between"
    steps: int = 0
    samples_drawn: int = 0
    samples_observed: int = 0
    sieve_moved: int = 0
    seconds: float = 0.0
    started: float | None = field(default=None, repr=False, compare=False)

    def begin_epoch(self) -> None:
        """Set the counts to zero and start the stop-watch."""
        self.phase = "begun"
        self.steps = self.samples_drawn = self.samples_observed = self.sieve_moved = 0
        self.seconds, self.started = 0.0, time.perf_counter()

    def stop_watch(self, device: torch.device) -> None:
        """Stop the stop-watch, once the device has done its work."""
        if self.started is not None:
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            self.seconds += time.perf_counter() - self.started
            self.started = None

    def state_dict(self) -> dict[str, Any]:
        """All but the running stop-watch."""
        return {name: value for name, value in asdict(self).items() if name != "started"}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Clock:
        """The clock of a saved session; at the top of an epoch the stop-watch starts anew."""
        clock = cls(**state)
        clock.started = time.perf_counter() if clock.phase == "begun" else None
        return clock
