"""The one clock of a session, and what it counted since the top of the epoch."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch

from spfde.core.errors import StateMismatch
from spfde.core.state import Kind, check_entries

Phase = Literal["between", "begun", "running", "drained"]
"""Where in an epoch the session stands: before its top, at its top, among its batches, or with all batches drawn."""


@dataclass
class Clock:
    """Epochs, steps and seconds."""

    epoch: int = 0  # the epoch that runs now or comes next, from 0
    step: int = 0  # optimizer steps so far
    phase: Phase = "between"  # where in the epoch it stands
    steps: int = 0  # optimizer steps in this epoch
    samples_drawn: int = 0  # samples handed out by the session's loader in this epoch
    sieve_moved: int = 0  # samples that the sieve moved at the top of this epoch
    overhead_flops: int = 0  # modelled FLOPs of this epoch beside its steps
    seconds: float = 0.0  # wall-clock seconds from the top of this epoch to its last batch, while the stop-watch ran
    is_resumed_at_end: bool = False  # whether a state was loaded that was taken after the last batch of this epoch
    started: float | None = None

    def begin_epoch(self) -> None:
        """Set the counts to zero and start the stop-watch."""
        self.phase = "begun"
        self.steps = self.samples_drawn = self.sieve_moved = self.overhead_flops = 0
        self.seconds, self.started = 0.0, time.perf_counter()

    def stop_watch(self, device: torch.device) -> None:
        """Stop the stop-watch, once the device has done its work."""
        if self.started is not None:
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            self.seconds += time.perf_counter() - self.started
            self.started = None

    def state_dict(self) -> dict[str, Any]:
        """All of it; amid an epoch what the stop-watch shows is added."""
        running = 0.0 if self.started is None or self.phase == "begun" else time.perf_counter() - self.started
        return {**{name: getattr(self, name) for name in _KINDS}, "seconds": self.seconds + running}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state; amid an epoch the stop-watch goes on.

        Raises:
            StateMismatch: it is damaged.
        """
        check_entries(state, "the clock", _KINDS)
        if state["phase"] not in get_args(Phase) or state["epoch"] < 0 or state["step"] < 0:
            raise StateMismatch(f"the state's clock shows what it cannot: {dict(state)}.")
        for name, value in state.items():
            setattr(self, name, value)
        self.started = time.perf_counter() if self.phase in ("begun", "running") else None
        self.is_resumed_at_end = self.phase == "drained"


_COUNTS = ("epoch", "step", "steps", "samples_drawn", "sieve_moved", "overhead_flops")
_KINDS: dict[str, Kind] = {**dict.fromkeys(_COUNTS, int), "phase": str, "seconds": (int, float)}
