"""SIGTERM: a job that is told to leave ends with a line and exit code 143, at the next checkpoint if that is near.

Ctrl-C is Python's own, but for one thing: where Python can only note it, it comes again, as SIGTERM does.

Only the standard library is imported, so that the command line can answer from its first moment on.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from spfde.core.say import tells

EXIT_TERMINATED = 128 + signal.SIGTERM
NEAR = 8.0
"""Seconds for which a checkpoint that is under way is waited for: containers are killed ten seconds after SIGTERM."""
_SWALLOWED = 0.1
"""Seconds until it is raised again where Python could only note it, as in a callback of a weak reference."""


class Terminated(KeyboardInterrupt):
    """SIGTERM came; what was under way is undone as it is by Ctrl-C."""


class Termination:
    """What SIGTERM does while ``terminable`` is open.

    Attributes:
        asked: whether it came. Libraries may swallow the exception, or make another of it.
    """

    def __init__(self) -> None:
        self.asked = False
        self._process, self._held = os.getpid(), 0
        self._usual_hook = sys.unraisablehook
        self._again: threading.Timer | None = None

    @contextmanager
    def held(self) -> Iterator[None]:
        """What is inside ends before the process does, unless that takes longer than ``NEAR``, or SIGTERM comes again.

        Raises:
            Terminated: it came meanwhile.
        """
        self._held += 1  # runs side by side have one each
        try:
            yield
        finally:
            self._held -= 1
        if self.asked:
            raise Terminated

    def __call__(self, number: int, frame: Any) -> None:
        """The handler."""
        if os.getpid() != self._process:  # a fork: it has no run to end well
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        waits, self.asked = bool(self._held) and not self.asked, True
        self._ask_again(NEAR)
        if not waits:
            raise Terminated

    def _ask_again(self, seconds: float, number: int = signal.SIGTERM) -> None:
        if self._again is not None:
            self._again.cancel()
        # The main thread itself is sent the signal, so that it leaves a system call in which it waits.
        main = threading.main_thread().ident or 0
        self._again = threading.Timer(seconds, signal.pthread_kill, (main, number))
        self._again.daemon = True
        self._again.start()

    def _note_unraisable(self, unraisable: Any) -> None:
        if isinstance(unraisable.exc_value, Terminated):
            self._ask_again(_SWALLOWED)
        elif isinstance(unraisable.exc_value, KeyboardInterrupt):
            self._ask_again(_SWALLOWED, signal.SIGINT)
        else:
            self._usual_hook(unraisable)

    @contextmanager
    def installed(self) -> Iterator[None]:
        """It handles SIGTERM while this is open."""
        before = signal.signal(signal.SIGTERM, self)
        sys.unraisablehook = self._note_unraisable
        try:
            yield
        finally:
            if self._again is not None:
                self._again.cancel()
            sys.unraisablehook = self._usual_hook
            if signal.getsignal(signal.SIGTERM) is self:  # it may be ignored by now, for the process ends
                signal.signal(signal.SIGTERM, before)


@contextmanager
def terminable() -> Iterator[Termination]:
    """SIGTERM raises ``Terminated`` while this is open; within another one, and in other threads, nothing changes.

    Nor where it is ignored: a process inherits that from a parent who wants it to go on.
    """
    before = signal.getsignal(signal.SIGTERM)
    if isinstance(before, Termination):
        yield before
        return
    ours = Termination()
    # In other threads signals are somebody else's.
    if before == signal.SIG_IGN or threading.current_thread() is not threading.main_thread():
        yield ours
        return
    with ours.installed():
        yield ours


def from_the_start() -> None:
    """Until a command is under way SIGTERM ends the process at once: there is nothing to undo."""
    if signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _leave)


def _leave(number: int, frame: Any) -> None:
    if tells():
        os.write(2, b"spfde: terminated.\n")
    os._exit(EXIT_TERMINATED)
