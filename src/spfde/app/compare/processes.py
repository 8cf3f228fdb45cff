"""Runs in processes of their own, several at a time: on CPUs, where one run does not fill the cores."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from typing import Any

from spfde.app.compare.folder import Planned
from spfde.app.ending import EXIT_INTERRUPTED
from spfde.app.runs.folder import METRICS, SUMMARY, RunFolder
from spfde.app.terminating import EXIT_TERMINATED
from spfde.app.train.side_by_side import Job
from spfde.core.errors import SpfdeError

LOOK = 0.5
"""Seconds between two looks at how far runs are."""
_PRELOADED = ["spfde.app.train.loop"]


class RunFailed(SpfdeError):
    """Runs ended before their last epoch; the message says why."""


def train_in_processes(
    wanted: Mapping[Planned, Job],
    n: int,
    *,
    reached: Callable[[Planned, int], object],
    ended: Callable[[Planned, Any], object],
) -> None:
    """Train runs, so many at a time, each in a process that shares the cores evenly with the others.

    A process ends with this one, however that ends.

    Args:
        reached, ended: as in ``train_missing``.

    Raises:
        KeyboardInterrupt: on Ctrl-C or SIGTERM; the processes have ended by then.
    """
    started = multiprocessing.get_context("forkserver")
    started.set_forkserver_preload(_PRELOADED)
    threads = max(1, (os.cpu_count() or 1) // n)
    waiting, live = list(wanted), dict[Planned, tuple[Any, Connection]]()
    try:
        while waiting or live:
            while waiting and len(live) < n:
                run = waiting.pop(0)
                ours, theirs = started.Pipe()
                process = started.Process(target=_train, args=(wanted[run], threads, theirs))
                process.start()
                theirs.close()
                live[run] = process, ours
            wait([process.sentinel for process, _ in live.values()], timeout=LOOK)
            for run, (process, ours) in list(live.items()):
                reached(run, lines_of(run))
                if not process.is_alive():
                    del live[run]
                    ended(run, _outcome(run, process, ours))
    finally:
        for process, _ in live.values():
            process.terminate()
        for process, _ in live.values():
            process.join()


def _outcome(run: Planned, process: Any, ours: Connection) -> dict[str, Any] | Exception:
    process.join()
    said = None
    with suppress(EOFError, OSError):
        said = ours.recv_bytes().decode() if ours.poll() else None
    ours.close()
    if said is None and (run.path / SUMMARY).is_file():
        return RunFolder(run.path).read_json(SUMMARY)
    code = process.exitcode
    return RunFailed(said or f"its process ended with exit code {code}, without a word; was it out of memory?")


def lines_of(run: Planned) -> int:
    """How many epochs the run has put on disk."""
    with suppress(OSError):
        return (run.path / METRICS).read_bytes().count(b"\n")
    return 0


def _train(job: Job, threads: int, word: Connection) -> None:
    """The process of a run."""
    import torch

    from spfde.app.compare.running import outcome_of, words_of
    from spfde.app.plugins import load_plugins
    from spfde.app.terminating import Terminated

    threading.Thread(target=_end_with, args=(word,), daemon=True).start()
    torch.set_num_threads(threads)
    load_plugins(job.options.plugin)  # the process that started this one has them all
    try:
        outcome = outcome_of(job)
    except KeyboardInterrupt as error:
        os._exit(EXIT_TERMINATED if isinstance(error, Terminated) else EXIT_INTERRUPTED)
    if isinstance(outcome, Exception):
        word.send_bytes(words_of(outcome).encode(errors="replace"))


def _end_with(other: Connection) -> None:
    """End when the process that started this one is gone: its end of the connection is closed then."""
    with suppress(OSError):
        other.poll(None)
    os.kill(os.getpid(), signal.SIGTERM)
