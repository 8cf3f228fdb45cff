"""The ``spfde`` command in processes of its own, which can be stopped at a chosen moment and killed there.

``start`` forks from a server that has imported torch once, and so does ``start_code``, which runs any code; ``run``
starts ``python -m spfde`` as a person would.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from helpers.processes import FORKS

TIMEOUT = 120.0


@dataclass
class Outcome:
    code: int | None
    out: str
    err: str


Spfde = Callable[..., Outcome]
"""The fixture that runs the command line in the test's own process."""


class Command:
    """A running ``spfde`` command."""

    def __init__(self, process: BaseProcess, log: Path) -> None:
        self._process, self._log = process, log

    def reach(self) -> None:
        """Wait until the command stands at the moment where it was told to wait."""
        deadline = time.monotonic() + TIMEOUT
        while not _flag(self._log).exists():
            assert self._process.is_alive(), f"it ended before the moment came: {self.end()}"
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def send(self, signal: int) -> None:
        assert self._process.pid is not None
        os.kill(self._process.pid, signal)

    def kill(self, signal: int) -> Outcome:
        """Send a signal, and wait for the end of the process and of those that it has started."""
        self.send(signal)
        return self.end()

    def end(self) -> Outcome:
        self._process.join(TIMEOUT)
        out, err = (self._log.with_suffix(suffix).read_text() for suffix in (".out", ".err"))
        return Outcome(self._process.exitcode, out, err)


def start(
    argv: Sequence[str],
    *,
    log: Path,
    cwd: Path,
    wait_at: str | None = None,
    environment: Mapping[str, str] | None = None,
) -> Command:
    """Start ``spfde`` with these arguments.

    Args:
        argv: arguments.
        log: its outputs go to ``log.out`` and ``log.err``.
        cwd: working folder.
        wait_at: one of ``MOMENTS``; there it waits to be killed.
        environment: variables to set.
    """
    process = FORKS.Process(target=_main, args=(list(argv), log, cwd, wait_at, dict(environment or {})))
    process.start()
    return Command(process, log)


def start_together(
    argv: Sequence[str], *, log: Path, cwd: Path, ranks: int = 2, wait_at: Mapping[int, str] | None = None
) -> list[Command]:
    """Start processes that train together, with what ``torchrun`` tells them; nobody stops them when one has ended.

    Args:
        argv, log, cwd: as ``start`` has them; each process's log is named by its rank.
        ranks: how many.
        wait_at: where to wait, by rank.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    meeting = {
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo",
    }
    return [
        start(
            argv,
            log=log.with_name(f"{log.name}-{rank}"),
            cwd=cwd,
            wait_at=(wait_at or {}).get(rank),
            environment=meeting | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(ranks)
    ]


def run(*argv: str, cwd: Path, **environment: str) -> Outcome:
    """Run ``python -m spfde`` to its end."""
    ended = subprocess.run(
        [sys.executable, "-m", "spfde", *argv],
        cwd=cwd,
        env={**os.environ, "COLUMNS": "80", **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=TIMEOUT,
    )
    return Outcome(ended.returncode, ended.stdout, ended.stderr)


def _flag(log: Path) -> Path:
    return log.with_suffix(".waits")


def _main(argv: list[str], log: Path, cwd: Path, wait_at: str | None, environment: dict[str, str]) -> None:
    # A child of a fork server would start its loader's workers by a fork server as well, which takes seconds.
    multiprocessing.set_start_method("fork", force=True)
    # Whoever runs the tests in the background of a shell ignores Ctrl-C, and their children would too.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # As in the tests' own process.
    os.fsync = lambda descriptor: None
    gc.freeze()
    os.chdir(cwd)
    os.environ |= {"COLUMNS": "80"} | environment
    _write_to(log)
    if wait_at is not None:
        MOMENTS[wait_at](_flag(log))
    from spfde.app.cli import main

    main(argv)


def start_code(code: str, *words: str, folder: Path) -> Command:
    """Start ``code`` with these words in ``sys.argv``; its outputs go to a new folder in ``folder``."""
    log = Path(tempfile.mkdtemp(dir=folder)) / "log"
    process = FORKS.Process(target=_run_code, args=(code, words, log, dict(os.environ)))
    process.start()
    return Command(process, log)


def _run_code(code: str, words: Sequence[str], log: Path, environment: Mapping[str, str]) -> None:
    os.environ.clear()  # what the fork inherited is not what the test has now
    os.environ.update(environment)
    _write_to(log)
    sys.argv = ["-c", *words]
    exec(code, {"__name__": "__main__"})


def _write_to(log: Path) -> None:
    for number, suffix in ((1, ".out"), (2, ".err")):
        handle = os.open(log.with_suffix(suffix), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(handle, number)
        os.close(handle)


def _wait(flag: Path) -> None:
    flag.touch()
    time.sleep(TIMEOUT)


# --- moments: each replaces one function by one that waits, at its n-th call, before it does its work ----------------


def _wait_before(owner: Any, name: str, call: int, flag: Path) -> None:
    usual, calls = getattr(owner, name), 0

    def waiting(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            _wait(flag)
        return usual(*arguments, **options)

    setattr(owner, name, waiting)


def _among_the_first_batches(flag: Path) -> None:
    from spfde.session.session import Session

    _wait_before(Session, "observe", 3, flag)


def _among_later_batches(flag: Path) -> None:
    from spfde.session.session import Session

    _wait_before(Session, "observe", 18, flag)  # five batches an epoch: the third of the fourth epoch


def _in_the_third_of_shared_epochs(flag: Path) -> None:
    from spfde.session.session import Session

    _wait_before(Session, "observe", 8, flag)  # three batches an epoch for each of two processes


def _slowly_before_the_checkpoint(flag: Path) -> None:
    from spfde.app.runs.checkpoints import Checkpoints

    usual, calls = Checkpoints.save, 0

    def slow(*arguments: Any, **options: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            flag.touch()
            time.sleep(1.0)
        usual(*arguments, **options)

    Checkpoints.save = slow  # type: ignore[method-assign]


def _after_an_epoch(flag: Path) -> None:
    from spfde.app.train import loop

    _wait_before(loop, "train_epoch", 2, flag)


def _no_data(flag: Path) -> None:
    from spfde.app.train import setup
    from spfde.core.errors import DataError

    def gone(*_: Any, **__: Any) -> Any:
        raise DataError("the disk of this host is gone")

    setup.load_data = gone


def _before_the_checkpoint(flag: Path) -> None:
    from spfde.app.runs.checkpoints import Checkpoints

    _wait_before(Checkpoints, "save", 3, flag)  # the epoch's line is in metrics.jsonl already


def _in_a_checkpoint(flag: Path) -> None:
    from spfde.app.runs import checkpoints

    _wait_before(checkpoints, "seal", 3, flag)


def _before_the_checkpoint_is_named(flag: Path) -> None:
    usual, calls = Path.rename, 0

    def waiting(self: Path, target: Path) -> Path:
        nonlocal calls
        calls += Path(target).name == "latest"
        if calls == 3:
            _wait(flag)
        return usual(self, target)

    Path.rename = waiting  # type: ignore[method-assign]


def _before_the_summary(flag: Path) -> None:
    from spfde.app.train import loop

    _wait_before(loop, "_summary", 1, flag)


MOMENTS = {
    "among the first batches": _among_the_first_batches,
    "among later batches": _among_later_batches,
    "in the third of shared epochs": _in_the_third_of_shared_epochs,
    "slowly before a checkpoint": _slowly_before_the_checkpoint,
    "after an epoch": _after_an_epoch,
    "no data": _no_data,
    "before a checkpoint": _before_the_checkpoint,
    "in a checkpoint": _in_a_checkpoint,
    "before a checkpoint is named": _before_the_checkpoint_is_named,
    "before the summary": _before_the_summary,
}
