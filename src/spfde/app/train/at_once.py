"""How many runs a GPU trains fastest side by side: found by measuring, as the runs are trained."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

LEAST_GAIN = 1.1
"""Times as many steps a second, from which on more runs at a time are worth their memory."""
SECONDS, STEPS = 4.0, 200
"""A rate is that of so many seconds and so many steps, whichever takes longer, and as many before are not counted: in
them runs are made ready, and graphs captured."""
LEAST_FREE = 0.25
"""Share of the device's memory that is to stay free."""


class Measured:
    """The number of runs at a time: doubled as long as that makes more steps a second, of all runs together.

    Args:
        clock: gives seconds.
        free: gives the share of the device's memory that is free.

    Example:
        >>> from spfde.app.train.at_once import Measured
        >>> seconds = iter(range(10_000))
        >>> number = Measured(lambda: float(next(seconds)), free=lambda: 0.9)
        >>> number.runs(0)
        1
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic, free: Callable[[], float] | None = None) -> None:
        self._clock, self._free = clock, free or _free
        self._wanted, self._best = 1, 0.0
        self._settles, self._is_found = True, False
        self._begin(1)

    def runs(self, live: int) -> int:
        """How many are to run; asked before each step, with how many do."""
        if self._is_found or live < self._wanted:
            return self._wanted
        if live != self._live:  # they are as many as were wanted, at last
            self._begin(live)
        self._steps += 1
        if self._steps < STEPS or (seconds := self._clock() - self._start) < SECONDS:
            return self._wanted
        if self._settles:
            self._begin(live, settles=False)
            return self._wanted
        self._judge(self._steps / seconds)
        return self._wanted

    def _begin(self, live: int, *, settles: bool = True) -> None:
        self._live, self._steps, self._start, self._settles = live, 0, self._clock(), settles

    def _judge(self, rate: float) -> None:
        if rate < LEAST_GAIN * self._best:
            # Those that are under way stay; the number falls as they end.
            self._wanted, self._is_found = max(1, self._wanted // 2), True
        elif self._free() < LEAST_FREE + (1 - LEAST_FREE) / 2:  # twice as many may take twice the memory
            self._is_found = True
        else:
            self._best, self._wanted = rate, 2 * self._wanted


def _free() -> float:
    free, total = torch.cuda.mem_get_info()
    return free / total
