"""A search's trials, one after another: each is trained epoch by epoch, and paused where others do better."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from spfde.app.compare.folder import RUNS
from spfde.app.compare.running import outcome_of, words_of
from spfde.app.compare.search_budget import Budget, Cost, longest, planned, widest
from spfde.app.compare.search_display import TrialBoard
from spfde.app.compare.search_state import DENSE, Search, Trial
from spfde.app.compare.search_study import Study, rungs_after
from spfde.app.compare.spec import DEFAULTS
from spfde.app.data.datasets import load_data
from spfde.app.runs.folder import CONFIG, SUMMARY, RunFolder, check_inside
from spfde.app.train.events import Display
from spfde.app.train.options import TrainOptions
from spfde.app.train.setup import TrainingRun
from spfde.app.train.side_by_side import Job
from spfde.core.errors import InvalidArgument, RunFolderError, TrainingDiverged, UsageError

_SPENT = ("training_flops", "seconds")
_TIMING = "timing"
_TIMED = 2
"""Epochs that are trained to know how long one takes; the last one's seconds count, for the first one warms up."""


class _Paused(Exception):
    """A run has been paused between two epochs; its folder can be resumed."""


class _Follower(Display):
    """Hands on the row of each new epoch of a run, and pauses it where that says so."""

    def __init__(self, epochs: int, goes_on: Callable[[dict[str, Any]], bool], board: TrialBoard) -> None:
        self.rows: list[dict[str, Any]] = []
        self._goes_on, self._board, self._epochs = goes_on, board, epochs

    def epoch_done(self, run: TrainingRun, row: dict[str, Any]) -> None:
        if not self.takes(row):
            raise _Paused

    def takes(self, row: dict[str, Any]) -> bool:
        """Whether it goes on behind this epoch; one that is known already is one that was trained again."""
        if row["epoch"] < len(self.rows):
            return True
        self.rows.append(row)
        self._board.reached(len(self.rows), self._epochs)
        return self._goes_on(row)


class Searcher:
    """Trains what is missing of a search.

    Args:
        search: with the trials so far.
        folder: of the search.
        keep: called with the search whenever something of it is new.
    """

    def __init__(self, search: Search, folder: RunFolder, board: TrialBoard, keep: Callable[[Search], object]) -> None:
        self.search = search
        self._folder, self._board, self._keep = folder, board, keep
        self._budget = Budget.read(search.budget)
        self._dense_flops = dense_flops(search)
        self._load = lru_cache(maxsize=1)(load_data)
        self._study = Study(search.space, search.options.get("seed", DEFAULTS["seed"]))

    def run(self) -> bool:
        """Train trials until they are as many as are wanted; whether something was left to try.

        Raises:
            SpfdeError, OSError: what would end each other trial as well.
            KeyboardInterrupt: on Ctrl-C or SIGTERM; the search can go on.
        """
        number = 0
        while sum(trial.state != "unfit" for trial in self.search.trials[:number]) < self.search.wanted:
            found = self._begun(number)
            if found is None:
                return False
            proposal, trial = found
            if trial.state == "running":
                trial = self._trained(number, trial if trial.epochs else self._sized(trial), proposal)
                self._set(number, trial)
                self._board.ended(trial, self._dense_flops)
            else:
                for epoch, accuracy in enumerate(trial.val_accuracy):
                    self._goes_on(trial, proposal, epoch, accuracy)
            if proposal is not None:
                self._study.tell(proposal, trial.val_accuracy[-1] if trial.state == "finished" else None)
            number += 1
        return True

    def _set(self, number: int, trial: Trial) -> None:
        self.search = self.search.with_trial(number, trial)
        self._keep(self.search)

    def _begun(self, number: int) -> tuple[Any, Trial] | None:
        """The trial of that number, from before or new, behind what Optuna has of it: nothing of the dense ones."""
        known = self.search.trials[number] if number < len(self.search.trials) else None
        if number < len(DENSE):
            values = {"recipe": "dense", "width": self.search.dense.width}
            return None, known or Trial(name=DENSE[number], values=values)
        if known is not None:
            return self._study.again(known.values), known
        proposed = self._study.new([trial.values for trial in self.search.trials[len(DENSE) :]])
        return proposed and (proposed[0], Trial(name=f"trial {number + 1}", values=proposed[1]))

    # --- how long ----------------------------------------------------------------------------------------------------

    def _sized(self, trial: Trial) -> Trial:
        """With the epochs, and of the narrower dense net the width, that the budget allows."""
        found: TrainOptions | str = self.search.dense if trial.name in DENSE else self.search.of(trial.values)
        rate, is_timed = 0.0, self._budget.kind == "seconds"
        if trial.name == DENSE[1]:
            found = self._narrowed(is_timed=is_timed)
        if is_timed and isinstance(found, TrainOptions) and isinstance(whole := planned(found), InvalidArgument):
            found = str(whole)
        if is_timed and not isinstance(found, str):
            trial, rate = self._timed(trial, found)
            found = found if rate else trial.why
        if not isinstance(found, str):
            if trial.name == DENSE[1]:
                trial = trial.changed(values=trial.values | {"width": found.width})
            found = longest(found, self._budget.fits(dense_flops=self._dense_flops, seconds_per_flop=rate))
        if isinstance(found, str):
            return trial.changed(state="unfit", why=found)
        cost = planned(found)
        assert isinstance(cost, Cost), "its length is one that can be planned"
        return trial.changed(epochs=found.epochs, planned_flops=cost.flops, planned_bytes=cost.step_bytes)

    def _narrowed(self, *, is_timed: bool) -> TrainOptions | str:
        first = self.search.trials[0]
        flops, seconds = first.timing_flops + first.training_flops, first.timing_seconds + first.seconds
        if is_timed and not flops:
            return "the dense net was not timed"
        rate = seconds / flops if is_timed else 0.0
        return widest(self.search.dense, self._budget.fits(dense_flops=self._dense_flops, seconds_per_flop=rate))

    def _timed(self, trial: Trial, options: TrainOptions) -> tuple[Trial, float]:
        """With what timing an epoch has cost, and the seconds of a modelled FLOP; 0 where no epoch came to its end."""
        place = self._folder.path / _TIMING
        check_inside(place, self._folder.path)
        shutil.rmtree(place, ignore_errors=True)
        follower = _Follower(_TIMED, lambda row: row["epoch"] + 1 < _TIMED, self._board)
        self._board.begins(f"{trial.name}, timed")
        error = self._outcome(Job(options.model_copy(update={"dense_timing_steps": 0}), place, follower))
        shutil.rmtree(place, ignore_errors=True)
        spent = _spent(follower.rows)
        why = words_of(error) if error else ""
        trial = trial.changed(timing_flops=spent["training_flops"], timing_seconds=spent["seconds"], why=why)
        last = follower.rows[-1] if follower.rows else {"seconds": 0.0, "training_flops": 1}
        return trial, 0.0 if error else last["seconds"] / last["training_flops"]

    # --- training ----------------------------------------------------------------------------------------------------

    def _trained(self, number: int, trial: Trial, proposal: Any) -> Trial:
        """A trial that is over: finished, pruned or failed."""
        self._set(number, trial)
        if trial.state == "unfit":
            return trial
        folder = RunFolder(self._folder.path / RUNS / trial.folder)
        check_inside(folder.path, self._folder.path)
        follower = _Follower(
            trial.epochs, lambda row: self._goes_on(trial, proposal, row["epoch"], row["val_accuracy"]), self._board
        )
        self._board.begins(trial.name)
        is_begun, error = (folder.path / CONFIG).is_file(), None
        if all(follower.takes(row) for row in _rows(folder)) and not folder.is_finished:
            error = self._outcome(Job(self.search.options_of(trial), folder.path, follower, resume=is_begun))
        summary = folder.read_json(SUMMARY) if folder.is_finished else {}
        return trial.changed(
            state="failed" if error else "finished" if summary else "pruned",
            val_accuracy=tuple(row["val_accuracy"] for row in follower.rows),
            test_accuracy=summary.get("test_accuracy"),
            why=words_of(error) if error else "",
            **_spent(follower.rows),
        )

    def _goes_on(self, trial: Trial, proposal: Any, epoch: int, accuracy: float) -> bool:
        """Whether a trial goes on behind an epoch. The dense ones do, and take no other one's place."""
        rungs = [] if proposal is None else rungs_after(epoch + 1, trial.epochs)
        return all(self._study.goes_on(proposal, rung, accuracy) for rung in rungs)

    def _outcome(self, job: Job) -> Exception | None:
        """Train a run until it is over or paused; what ended it, where the others would not end by that."""
        try:
            outcome = outcome_of(job, load=self._load)
        except _Paused:
            return None
        finally:
            gc.collect()  # what a run had in hand holds each other
        if isinstance(outcome, Exception) and not isinstance(outcome, TrainingDiverged | UsageError):
            raise outcome
        return outcome if isinstance(outcome, Exception) else None


def _rows(folder: RunFolder) -> list[dict[str, Any]]:
    """The epochs that a run has trained before."""
    rows = list(folder.read_metrics().values())
    if not all(isinstance(row.get(name), int | float) for row in rows for name in ("val_accuracy", *_SPENT)):
        remedy = "Take the folder away: the trial is trained anew."
        raise RunFolderError(f"{folder.path}: holds another run, or one that is damaged. {remedy}")
    return rows


def dense_flops(search: Search) -> int:
    """Training FLOPs of the dense run at its full length, as planned."""
    cost = planned(search.dense)
    if isinstance(cost, InvalidArgument):
        raise cost
    return cost.flops


def _spent(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {name: sum(row[name] for row in rows) for name in _SPENT}
