"""How long the loop waits for its batches: what says whether the loader is the brake."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


class Waits:
    """Of the newest pass over a loader.

    On a GPU the loop runs ahead of the device: while it waits, the device may still be at work on what it was sent.

    Attributes:
        seconds: that the loop has waited for batches.

    Example:
        >>> from spfde.app.train.waits import Waits
        >>> waits = Waits()
        >>> [batch for batch in waits.over(["one", "two"])]
        ['one', 'two']
        >>> 0 <= waits.seconds, 0 <= waits.share <= 1
        (True, True)
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self._began = self._ended = time.perf_counter()

    def over(self, batches: Iterable[T]) -> Iterator[T]:
        """The batches of a pass, one after the other, timed."""
        self.seconds, self._began = 0.0, time.perf_counter()
        asked = self._began  # what starts a loader's workers is waited for, too
        for batch in batches:
            self._ended = time.perf_counter()
            self.seconds += self._ended - asked
            yield batch
            asked = self._ended = time.perf_counter()

    @property
    def share(self) -> float:
        """Of the pass so far, in [0, 1]; 0 before there is one."""
        passed = self._ended - self._began
        return self.seconds / passed if passed > 0 else 0.0
