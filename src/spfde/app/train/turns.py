"""What a process has once and each of its runs must have to itself, handed from run to run.

These are the global generators of Python, NumPy and PyTorch; on CUDA, too, the current stream and the switches of
TF32. A run in its turn finds them as it left them, so that it does what it does alone. Nothing here waits for a device.

Why the streams are right. All work of a run is issued in its turns, so on its stream: what it allocates comes from
memory that PyTorch's allocator keeps for this stream, and goes back to it, in order. What several runs read is complete
before the second one sees it (``ImageArray.on``) and outlives them all. An engine that captures on another stream waits
both ways itself. No other run issues work meanwhile, for there is one thread. A run's memory is given back when its
stream is idle (``OwnState.drain``).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Self

import torch

from spfde.app.train.machine import set_switches, switches
from spfde.core.generators import keep_numpy, keep_python
from spfde.core.streams import own_stream


class OwnState:
    """The state of one run, or of the caller of all of them: at first as the process has it.

    Args:
        device: a CPU or a GPU.
        is_callers: stream and generator of the device are the current ones; otherwise they are new.
    """

    def __init__(self, device: torch.device, *, is_callers: bool = False) -> None:
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            caller = torch.cuda.current_stream(device)
            # A captured graph reads seed and offset from memory that belongs to the generator's state. So the states
            # themselves change places: with one, and its numbers exchanged, two graphs in flight would share them.
            self._shared = torch.cuda.default_generators[device.index]
            if is_callers:
                self._stream, self._generator = caller, self._shared.graphsafe_get_state()
            else:
                self._stream, self._generator = own_stream(device), torch.Generator(device)
                self._stream.wait_stream(caller)
        self.keep()

    def keep(self) -> None:
        """Remember what the process has now."""
        of_torch = partial(torch.set_rng_state, torch.get_rng_state())
        self._generators: tuple[Callable[[], object], ...] = keep_python(), keep_numpy(), of_torch
        self._switches = switches()

    def put_back(self) -> None:
        """Let the process have it."""
        for generator in self._generators:
            generator()
        if self._stream is not None:
            self._shared.graphsafe_set_state(self._generator)
            torch.cuda.set_stream(self._stream)
            if switches() != self._switches:
                set_switches(self._switches)

    def drain(self) -> None:
        """Wait until the device has done the run's work."""
        if self._stream is not None:
            # After some errors a device does nothing any more, and whatever it is asked for fails with the same one.
            with suppress(RuntimeError):
                self._stream.synchronize()


class Turns:
    """A context in which runs take turns; afterwards the process is as it was.

    Args:
        device: of all runs.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def __enter__(self) -> Self:
        self._now = self._callers = OwnState(self._device, is_callers=True)
        return self

    def __exit__(self, *_: object) -> None:
        self.give_to(self._callers)

    def give_to(self, state: OwnState) -> None:
        """The turn is that of the run with this state."""
        if state is not self._now:
            self._now.keep()
            self._now = state
            state.put_back()
