"""How a command ends: its exit codes, and the line that says why. Several processes end with one code and one line.

The launcher's processes leave word for each other in its store. Nobody waits there for one that is dead: what has no
answer within some seconds is decided alone.
"""

from __future__ import annotations

import hashlib
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum, auto
from typing import Any, NamedTuple, NoReturn

import typer

from spfde.app.terminating import EXIT_TERMINATED, Terminated
from spfde.core.errors import SpfdeError
from spfde.core.say import n_started, tells

EXIT_ERROR = 2
EXIT_INTERRUPTED = 130
_SIGNALS = {EXIT_TERMINATED: "terminated", EXIT_INTERRUPTED: "interrupted"}

_CODE, _SAID, _WORDS = "code", "said", "words"
_FIRST_SPEAKS, _WORD_IS_LEFT = 3.0, 1.0
"""Seconds for which a process waits: for the first one to say the same; and for one that ends to leave word, which it
does before its connections break."""
_LOOK = 0.02


class Cause(Enum):
    """Why a process ends."""

    OWN = auto()
    """It has found something wrong."""
    SIGNAL = auto()
    """It was told to."""
    ELSEWHERE = auto()
    """Another one has ended, or says that it does."""


class End(NamedTuple):
    """The exit code, and whether this process says why."""

    code: int
    speaks: bool


def fail(message: str, *, cause: Cause = Cause.OWN) -> NoReturn:
    """End with what is wrong."""
    leave(EXIT_ERROR, cause, message)


def end(error: KeyboardInterrupt, hint: str = "") -> NoReturn:
    """End a command that was told to stop."""
    leave(EXIT_TERMINATED if isinstance(error, Terminated) else EXIT_INTERRUPTED, Cause.SIGNAL, "", hint)


def leave(code: int, cause: Cause, message: str, hint: str = "") -> NoReturn:
    """End with the code that all processes end with; one of them says the message, or that a signal came."""
    code, speaks = agreed(code, cause) if n_started() > 1 else End(code, speaks=True)
    words = f"{_SIGNALS[code]}.{hint}" if code in _SIGNALS else message
    if speaks:
        typer.echo("\n".join(f"spfde: {line}" for line in words.splitlines()), err=True)
    raise typer.Exit(code) from None


@contextmanager
def usage_errors_once() -> Iterator[None]:
    """Let one process of several say what is wrong with the words of a command, which are the same for all."""
    try:
        yield
    except typer.Exit:
        raise
    except Exception:
        if n_started() > 1:
            from spfde.app.train.processes import joined

            try:
                with joined():
                    speaks = agreed(EXIT_ERROR, Cause.OWN).speaks
            except (SpfdeError, RuntimeError):  # they cannot meet
                speaks = tells()
            if not speaks:
                raise typer.Exit(EXIT_ERROR) from None
        raise


def cause_of(error: Exception) -> Cause:
    """Whether it is another process's error that this one has come to hear of."""
    from spfde.app.machine_errors import is_lost_process
    from spfde.session.distributed import OtherRankFailed

    return Cause.ELSEWHERE if isinstance(error, OtherRankFailed) or is_lost_process(error) else Cause.OWN


def agreed(code: int, cause: Cause) -> End:
    """How this process of several is to end, by what the others have said; the first word holds for all.

    Args:
        code: the exit code that it would have alone.
        cause: why it ends.
    """
    from spfde.app.train.processes import current

    processes = current()
    if processes.store is None:  # they have not met
        return End(code, cause is not Cause.SIGNAL or tells())
    try:
        return _agreed(processes.store, processes.rank, code, cause)
    except RuntimeError:  # the store is gone with the process that held it
        return End(code, processes.is_first or cause is Cause.OWN)


def is_first_to_say(words: str) -> bool:
    """Whether no other process has said this yet; asked before it is said. The first process has the first say."""
    module = sys.modules.get("spfde.app.train.processes")
    processes = module and module.current()
    if processes is None or processes.store is None:
        return tells()
    key = f"{_WORDS}/{hashlib.sha256(words.encode()).hexdigest()}"
    try:
        if processes.rank and _waited(processes.store, key, _FIRST_SPEAKS):
            return False
        return bool(processes.store.add(key, 1) == 1)
    except RuntimeError:
        return tells()


def _agreed(store: Any, rank: int, code: int, cause: Cause) -> End:
    if cause is Cause.ELSEWHERE:
        try:
            _waited(store, _CODE, _WORD_IS_LEFT)
        except Terminated:  # the launcher has noticed it as well
            code = EXIT_TERMINATED
    # The launcher stops those that are left as soon as one has ended, and this one ends by itself.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    code, speaker = map(int, store.compare_set(_CODE, "", f"{code} {rank}").decode().split())
    if cause is not Cause.OWN and speaker != rank and code not in _SIGNALS:
        _waited(store, _SAID, _FIRST_SPEAKS + _WORD_IS_LEFT)  # it must be there until that one has spoken
        return End(code, speaks=False)
    if rank and (cause is Cause.SIGNAL or _waited(store, _SAID, _FIRST_SPEAKS)):
        return End(code, speaks=False)  # the launcher passes signals to all, and the first one speaks of them
    return End(code, speaks=store.add(_SAID, 1) == 1)


def _waited(store: Any, key: str, seconds: float) -> bool:
    """Whether there is such a word, or comes within so many seconds."""
    until = time.monotonic() + seconds
    while not store.check([key]):
        if time.monotonic() > until:
            return False
        time.sleep(_LOOK)
    return True
