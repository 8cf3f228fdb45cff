"""What a search keeps in its folder: ``search.json``, version 1, see ``docs/search.md``, and each trial's run."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from annotated_types import Ge
from pydantic import BaseModel, ConfigDict, Field, model_validator

from spfde.app.compare.folder import RUNS, check_is_of
from spfde.app.compare.search_budget import Budget
from spfde.app.compare.spec import DEFAULTS, Values
from spfde.app.declaring import names_of
from spfde.app.options import RecipeOptions
from spfde.app.runs.folder import RunFolder, check_inside
from spfde.app.train.options import TrainOptions, options_from
from spfde.core.errors import InvalidArgument, RunFolderError
from spfde.core.technique import Technique

SEARCH, VERSION = "search.json", 1
DENSE = ("dense, shorter", "dense, narrower")
"""The first two trials, which are trained to their ends."""
_RESULT = "result"
"""A key that is written and not read: it follows from the others."""


class Trial(BaseModel):
    """A candidate, and what came of it.

    Attributes:
        name: "dense, shorter", "dense, narrower", or "trial" with its number.
        values: what is its own about its options; of those that are proposed, the searched ones.
        state: "running" also where a search was stopped; "unfit": it was not trained.
        epochs: that the run is planned for; 0 where it is unfit.
        val_accuracy: after each epoch that was trained.
        training_flops, seconds: of the epochs that were trained; FLOPs modelled, seconds measured.
        planned_flops, planned_bytes: training FLOPs of the whole run, and bytes of a step, modelled.
        timing_flops, timing_seconds: of the epochs that were trained to estimate how long an epoch takes.
        test_accuracy: of a finished run.
        why: it is unfit, or has failed.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: Annotated[str, Field(pattern=r"^[a-z0-9]+(,? [a-z0-9]+)*$")]  # it names a folder, too
    values: Values
    state: Literal["running", "finished", "pruned", "failed", "unfit"] = "running"
    epochs: Annotated[int, Ge(0)] = 0
    val_accuracy: tuple[float, ...] = ()
    training_flops: int = 0
    seconds: float = 0.0
    planned_flops: int = 0
    planned_bytes: int = 0
    timing_flops: int = 0
    timing_seconds: float = 0.0
    test_accuracy: float | None = None
    why: str = ""

    @property
    def folder(self) -> str:
        """Name of its run's folder."""
        return self.name.replace(", ", "-").replace(" ", "-")

    def changed(self, **changes: Any) -> Trial:
        return self.model_copy(update=changes)


class Search(Technique):
    """What is searched, and what was tried.

    Attributes:
        budget: as it was asked for, see ``Budget``.
        wanted: trials that are to be trained.
        options: of all trials, where they are not the defaults; ``epochs`` is the longest a run may be.
        space: values of the options that are searched.
    """

    version: Literal[1] = 1
    budget: str
    wanted: Annotated[int, Ge(1)]
    options: Values
    space: dict[str, Annotated[tuple[Any, ...], Field(min_length=1)]]
    trials: tuple[Trial, ...] = ()

    @model_validator(mode="after")
    def _of_the_space(self) -> Self:
        if [trial.name for trial in self.trials[: len(DENSE)]] != list(DENSE[: len(self.trials)]):
            raise ValueError("the first trials are not the dense ones")
        if not all(isinstance(trial.values.get("width"), float) for trial in self.trials[: len(DENSE)]):
            raise ValueError("the dense trials lack a width")
        if len({trial.name for trial in self.trials}) < len(self.trials):
            raise ValueError("two trials have one name")
        if not all(
            trial.val_accuracy and trial.training_flops > 0 for trial in self.trials if trial.state == "finished"
        ):
            raise ValueError("a finished trial has no figures")
        for trial in self.trials[len(DENSE) :]:
            if trial.values.keys() != self.space.keys():
                raise ValueError(f"{trial.name} has other options than are searched")
            if wrong := next((name for name, value in trial.values.items() if value not in self.space[name]), None):
                raise ValueError(f"{trial.name} has a value of {wrong} that is none of those that are searched")
        return self

    def of(self, values: Mapping[str, Any]) -> TrainOptions:
        """The options of a trial whose own values these are, at the full length.

        Raises:
            InvalidArgument: they are not valid.
        """
        return options_from(DEFAULTS | self.options | dict(values))

    def options_of(self, trial: Trial) -> TrainOptions:
        """The options of a trial's run."""
        if trial.name in DENSE:
            return self._dense(width=trial.values["width"], epochs=trial.epochs)
        return self.of(trial.values | {"epochs": trial.epochs})

    @property
    def dense(self) -> TrainOptions:
        """The dense run at the full length: the others' costs are shares of its own.

        What is searched is as by default in it, or has its first value where the default is none of them.
        """
        return self._dense(width=self.options.get("width", DEFAULTS["width"]))

    def _dense(self, **own: Any) -> TrainOptions:
        searched = {name: DEFAULTS[name] if DEFAULTS[name] in found else found[0] for name, found in self.space.items()}
        plain = {name: DEFAULTS[name] for name in names_of(RecipeOptions)}
        return self.of(searched | plain | {"recipe": "dense"} | own)

    def with_trial(self, number: int, trial: Trial) -> Search:
        """With a trial in its place, the last one or a new one."""
        return self.model_copy(update={"trials": (*self.trials[:number], trial, *self.trials[number + 1 :])})


def write(folder: RunFolder, search: Search, result: Mapping[str, Any]) -> None:
    """Keep what was tried; from here on a kill loses nothing of it."""
    folder.write_json(SEARCH, search.model_dump(mode="json") | {_RESULT: dict(result)})


@contextmanager
def reopened(path: Path) -> Iterator[tuple[RunFolder, Search]]:
    """The folder of an earlier search, locked while this is open.

    Raises:
        RunFolderError: it is no search's folder, or its file is damaged.
    """
    check_is_of(path, SEARCH)
    folder = RunFolder(path)
    check_inside(path / RUNS, path)
    folder.acquire()
    try:
        written = folder.read_json(SEARCH)
        plugins = written["options"].get("plugin", ()) if isinstance(written.get("options"), dict) else ()
        if missing := [name for name in plugins if name not in sys.modules]:
            again = " ".join(f"--plugin {name}" for name in missing)
            raise RunFolderError(f"{path}: the search was begun with {again}. Pass that again.")
        try:
            search = Search(**{name: value for name, value in written.items() if name != _RESULT})
            Budget.read(search.budget)
            own = [name for name in search.options if name in TrainOptions.model_fields and name != "recipe"]
            TrainOptions(**{name: search.options[name] for name in own})
            search.dense  # noqa: B018  # its options are checked
        except InvalidArgument as error:
            raise RunFolderError(f"{path / SEARCH}: is damaged: {error} Restore it from a copy.") from None
        yield folder, search
    finally:
        folder.close()
