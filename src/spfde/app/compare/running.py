"""The runs of a comparison that are not finished: one after another, in several processes, or side by side on a GPU."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from spfde.app.compare.folder import Comparison, Planned
from spfde.app.compare.processes import lines_of, train_in_processes
from spfde.app.data.datasets import load_data
from spfde.app.data.images import DataSpec
from spfde.app.data.validation import trained_on
from spfde.app.machine_errors import machine_error
from spfde.app.runs.folder import CONFIG, SUMMARY, RunFolder, check_inside, flat
from spfde.app.train.at_once import Measured
from spfde.app.train.checks import check_named
from spfde.app.train.events import Display
from spfde.app.train.loop import Summary, train
from spfde.app.train.machine import pick_device
from spfde.app.train.models import build_for
from spfde.app.train.options import TrainOptions, check_full_batch
from spfde.app.train.side_by_side import Job, train_side_by_side
from spfde.core.errors import InvalidArgument, Problem, Problems, RunFolderError, SpfdeError
from spfde.model.trace import traced_once
from spfde.planning import plan

Ended = Callable[[Planned, Summary | Exception], None]
"""Called when a run is over, with its summary or with what ended it."""


def check(comparison: Comparison) -> None:
    """Find what is wrong before anything is trained; what is planned for each candidate among it.

    Raises:
        InvalidArgument: data, a model, an engine or a device that is not there, or a recipe that cannot be followed
            with them; a problem that several candidates have is told once.
    """
    problems, ready = Problems(), dict[tuple[Any, ...], tuple[DataSpec, nn.Module] | None]()
    with traced_once():
        for candidate in comparison.candidates:
            options = candidate.with_seed(comparison.seeds[0])
            key = tuple(getattr(options, name) for name in _NAMED)
            with problems.collecting():
                if key not in ready:
                    ready[key] = None
                    spec = check_named(options.model_dump())
                    ready[key] = spec, build_for(options.model, spec, width=options.width)
                if (found := ready[key]) is not None:
                    _check_plan(options, *found)
    problems.found = [each for at, each in enumerate(problems.found) if each not in problems.found[:at]]
    problems.raise_if_any()


_NAMED = ("track", "engine", "device", "model", "precision", "data", "image_size", "width")


def _check_plan(options: TrainOptions, whole: DataSpec, model: nn.Module) -> None:
    spec = trained_on(whole, options.validation_share, options.batch_size)
    recipe, sample = options.load_recipe(), torch.zeros(1, *spec.sample_shape)
    check_full_batch(recipe, samples=spec.train_samples, batch_size=options.batch_size, epochs=options.epochs)
    plan(model, sample, recipe, options.epochs, spec.train_samples, batch_size=options.batch_size)


def epochs_done(run: Planned) -> int:
    """How many epochs of a run are trained."""
    if (run.path / SUMMARY).is_file():
        return int(run.candidate.options["epochs"])
    return lines_of(run)


def train_missing(
    runs: Sequence[Planned], *, jobs: int | None, display_of: Callable[[Planned], Display], reached: Any, ended: Ended
) -> None:
    """Train those runs that are not finished.

    Args:
        runs: in their order.
        jobs: how many at a time; None: one on a CPU, and on a GPU as many as a measurement finds best.
        display_of: gives what shows a run of this process.
        reached: called with a run of another process, and how many of its epochs are trained.
        ended: called when a run is over. What ends one run ends no other.

    Raises:
        RunFolderError: a run's folder holds another run; nothing is trained then.
        KeyboardInterrupt: on Ctrl-C or SIGTERM; whatever ran can go on.
    """
    todo = [run for run in runs if not (run.path / SUMMARY).is_file()]
    for run in runs:
        _check_place(run)
    if not todo:
        return
    wanted = {run: _job(run) for run in todo}
    kinds = {pick_device(job.options.device).type for job in wanted.values()}
    if kinds == {"cuda"}:
        by_path = {run.path: run for run in todo}
        shown = [job._replace(display=display_of(run)) for run, job in wanted.items()]
        train_side_by_side(
            shown, at_once=jobs or Measured(), ended=lambda job, outcome: ended(by_path[job.out], outcome)
        )
    elif jobs is not None and jobs > 1:
        train_in_processes(wanted, jobs, reached=reached, ended=ended)
    else:
        _one_after_another(wanted, display_of, ended)


def _one_after_another(wanted: dict[Planned, Job], display_of: Callable[[Planned], Display], ended: Ended) -> None:
    load = lru_cache(maxsize=1)(load_data)
    gc.freeze()  # what is there already need not be looked through again and again
    try:
        for run, job in wanted.items():
            ended(run, outcome_of(job._replace(display=display_of(run)), load=load))
            gc.collect()  # what a run had in hand holds each other
    finally:
        gc.unfreeze()


def outcome_of(job: Job, **settings: Any) -> Summary | Exception:
    """Train a run; its summary, or the error that ended it."""
    try:
        return train(job.options, job.out, job.display, resume=job.resume, **settings)
    except (SpfdeError, OSError, MemoryError, RuntimeError) as error:
        if not isinstance(error, SpfdeError) and machine_error(error) is None:
            raise
        return error


def words_of(error: BaseException) -> str:
    """Why a run ended, in a line."""
    return " ".join(str(error if isinstance(error, SpfdeError) else machine_error(error) or error).split())


def _check_place(run: Planned) -> None:
    """Refuse a run's folder that is elsewhere, by way of a link, and a finished run that is another one."""
    root = run.path.parents[2]
    for place in (run.path.parent, run.path):
        check_inside(place, root)
    if (run.path / SUMMARY).is_file() and (run.path / CONFIG).is_file():
        theirs = RunFolder(run.path).read_json(CONFIG).get("command")
        ours = run.candidate.options | {"seed": run.seed}
        chosen = {name: value for name, value in ours.items() if value not in ("auto", None)}
        _check_equal(run, chosen, theirs if isinstance(theirs, dict) else {})


def _check_equal(run: Planned, ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
    for name, value in flat({name: ours[name] for name in ours if name not in TrainOptions.MOVABLE}).items():
        if (found := flat(theirs).get(name, value)) != value:
            raise RunFolderError(
                f"{run.path}: holds another run: there {name} is {found!r}, and here {value!r}. "
                "Compare in another folder."
            )


def _job(run: Planned) -> Job:
    """The run as it begins, or goes on.

    Raises:
        RunFolderError: its folder holds another run.
    """
    options = run.candidate.with_seed(run.seed)
    if missing := [name for name in options.plugin if name not in sys.modules]:
        raise RunFolderError(f"{run.path}: needs {' '.join(f'--plugin {name}' for name in missing)}. Pass that again.")
    if not (run.path / CONFIG).is_file():
        return Job(options, run.path)
    before = TrainOptions.from_config(RunFolder(run.path).read_json(CONFIG), run.path / CONFIG)
    _check_equal(run, options.as_chosen(before).identity(), before.identity())
    return Job(options, run.path, resume=True)


def check_jobs(jobs: int | None) -> None:
    """Raise ``InvalidArgument`` for a number of runs at a time that makes no sense here."""
    if jobs is not None and jobs < 1:
        raise InvalidArgument(Problem("jobs", jobs, "must be 1 or more", f"This machine has {os.cpu_count()} cores."))
