"""Several runs at a time in one process and one thread, a step of each in turn.

A small network leaves most of a GPU idle, and there each run has a stream of its own: what one run's step leaves free,
the others' steps take. Each run is an ordinary one, in a folder of its own, and comes to what it comes to alone.
"""

from __future__ import annotations

import gc
import traceback
from collections import deque
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

from spfde.app.data.datasets import load_data
from spfde.app.terminating import terminable
from spfde.app.train.at_once import Measured
from spfde.app.train.checks import check_device
from spfde.app.train.events import Display
from spfde.app.train.loop import Summary, train_in_steps
from spfde.app.train.machine import pick_device
from spfde.app.train.options import TrainOptions
from spfde.app.train.processes import current
from spfde.app.train.turns import OwnState, Turns
from spfde.core.errors import Problems
from spfde.core.say import n_started


class Job(NamedTuple):
    """A run, as the arguments of ``train``.

    Attributes:
        display: one of its own, or one for several runs: it is entered and left by each of them.
    """

    options: TrainOptions
    out: Path
    display: Display | None = None
    resume: bool = False


@dataclass
class _Run:
    number: int
    steps: Generator[None, None, Summary]
    state: OwnState


def train_side_by_side(
    jobs: Sequence[Job | tuple[TrainOptions, Path]],
    *,
    at_once: int | Measured | None = None,
    ended: Callable[[Job, Summary | Exception], object] = lambda job, outcome: None,
) -> list[Summary | Exception]:
    """Train models side by side on one device, each as ``train`` would, bit for bit on a CPU.

    The runs are made ready, one after another; then each takes a step in turn, until it is over. Equal data are loaded
    once, and are on the device once. A run that fails ends alone, and its display hears of it at once: a mistake in its
    options, a loss that diverged, a device without memory for it. Its folder is what ``train`` would have left.

    A run's seconds go on while others have their turns, and its peak of memory is the whole process's. Dense steps are
    timed before any run begins.

    Args:
        jobs: options and folders of the runs, which may be ``Job``\\ s.
        at_once: how many run at a time, the others when one has ended; None: all of them. ``Measured``: as many as
            make more steps a second together than fewer do.
        ended: called when a run is over, with its summary or the error that ended it.

    Returns:
        For each job its summary, or the error that ended it.

    Raises:
        InvalidArgument: they do not fit side by side; nothing was done.
        KeyboardInterrupt: on Ctrl-C or SIGTERM; each folder can be resumed, side by side or alone.

    Example:
        >>> from pathlib import Path
        >>> from tempfile import TemporaryDirectory
        >>> from spfde.app.train.options import TrainOptions
        >>> from spfde.app.train.side_by_side import train_side_by_side
        >>> dense = TrainOptions(recipe_name="dense", recipe=spfde.presets.dense.to_dict(), model="none", epochs=1)
        >>> with TemporaryDirectory() as folder:
        ...     [error] = train_side_by_side([(dense, Path(folder) / "run")])
        >>> print(error)
        model='none': is no known model. ...
    """
    wanted = [Job(*job) for job in jobs]
    if not wanted:
        return []
    device, load = _checked(wanted), cache(load_data)
    found: dict[int, Summary | Exception] = {}
    to_begin, room = deque(range(len(wanted))), at_once or len(wanted)
    with terminable(), _on(device), Turns(device) as turns, ExitStack() as afterwards:
        live: deque[_Run] = deque()
        while live or to_begin:
            while to_begin and len(live) < (room.runs(len(live)) if isinstance(room, Measured) else room):
                job = wanted[number := to_begin.popleft()]
                steps = train_in_steps(job.options, job.out, job.display, resume=job.resume, load=load)
                live.append(run := _Run(number, steps, OwnState(device)))
                afterwards.callback(_close, run, turns)
            run = live.popleft()
            turns.give_to(run.state)
            try:
                next(run.steps)
            except StopIteration as over:
                found[run.number] = over.value
            except Exception as error:
                run.state.drain()
                found[run.number] = _without_frames(error)
            else:
                live.append(run)
                continue
            gc.collect()  # what a run had in hand holds each other; the other runs may need the memory
            ended(wanted[run.number], found[run.number])
    return [found[number] for number in range(len(wanted))]


def _checked(jobs: Sequence[Job]) -> torch.device:
    """The device of all runs."""
    problems = Problems()
    if (together := max(n_started(), current().size)) > 1:
        rule = "runs side by side take turns in one process"
        problems.add("torchrun", together, rule, "Start one process, or train them one after another.")
    for job in jobs:
        with problems.collecting():
            check_device(job.options.device)
    problems.raise_if_any()
    devices = [pick_device(job.options.device) for job in jobs]
    if other := next((each for each in devices if each != devices[0]), None):
        rule = f"runs side by side are on one device, and another one is on {devices[0]}"
        problems.add("device", str(other), rule, "Give all of them the same.")
    elif devices[0].type not in ("cpu", "cuda"):
        rule = "runs side by side need a CPU or CUDA: elsewhere they cannot have generators of their own"
        problems.add("device", str(devices[0]), rule, "Train them one after another, or on the CPU.")
    for name, why in (("profile", "records all that the process does"), ("track", "has one run in a process")):
        value = next((given for job in jobs if (given := getattr(job.options, name))), None)
        if value is not None and len(jobs) > 1:
            problems.add(name, value, f"{why}: not for runs side by side", "Leave it out, or train that run alone.")
    problems.raise_if_any()
    return devices[0]


def _on(device: torch.device) -> torch.cuda.device | nullcontext[None]:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _close(run: _Run, turns: Turns) -> None:
    """End a run where it stands; one that is over stays as it is."""
    turns.give_to(run.state)
    run.state.drain()
    run.steps.close()


def _without_frames(error: Exception) -> Exception:
    """The error, whose traceback keeps its lines, and no longer what was in hand there."""
    each: BaseException | None = error
    while each is not None:
        traceback.clear_frames(each.__traceback__)
        each = each.__cause__ or each.__context__
    return error
