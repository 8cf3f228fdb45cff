"""A comparison's folder: what is compared, and in ``runs/`` the folder of each run.

``comparison.json``, version 1: ``baseline`` (a candidate's name), ``seeds``, ``quick``, and ``candidates``, each with
its ``name``, its ``folder`` under ``runs/`` and its ``options``, which are those of a run's ``config.json``, all of
them. So the folder goes on by itself: neither the specification nor a recipe's file is read again.

Reading it loads no PyTorch, so that a report can be made where nothing can be trained.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, Self

from annotated_types import MinLen
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from spfde.app.compare.spec import DEFAULTS, Seed, Spec, Values
from spfde.app.runs.folder import CONFIG, RunFolder, check_inside
from spfde.core.errors import InvalidArgument, Problem, Problems, RunFolderError, nearest
from spfde.core.numbers import MOST_EPOCHS
from spfde.core.technique import Technique

if TYPE_CHECKING:
    from spfde.app.train.options import TrainOptions

COMPARISON, RUNS = "comparison.json", "runs"


class Candidate(BaseModel):
    """What is trained once with each seed."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    folder: str
    options: Values

    @field_validator("name")
    @classmethod
    def _a_line(cls, name: str) -> str:
        if not name.isprintable():
            raise ValueError("must be one line of letters that can be printed")
        return name

    @field_validator("options")
    @classmethod
    def _with_a_length(cls, options: Values) -> Values:
        epochs = options.get("epochs")
        if not isinstance(epochs, int) or not 1 <= epochs <= MOST_EPOCHS:
            raise ValueError("lack a number of epochs")
        return options

    def __hash__(self) -> int:
        return hash(self.folder)

    @field_validator("folder")
    @classmethod
    def _inside(cls, folder: str) -> str:
        if folder != slug(folder):
            raise ValueError("is no plain name of a folder")
        return folder

    def with_seed(self, seed: int) -> TrainOptions:
        """The options of a run."""
        from spfde.app.train.options import TrainOptions

        return TrainOptions(**(self.options | {"seed": seed}))


class Planned(NamedTuple):
    """A run that is to be there."""

    candidate: Candidate
    seed: int
    path: Path

    @property
    def name(self) -> str:
        return f"{self.candidate.name}, seed {self.seed}"


class Comparison(Technique):
    """What is compared, with nothing left to look up.

    Attributes:
        baseline: name of the candidate that the others are compared with.
        quick: it is a specification's short form, whose figures say nothing.
        failed: why runs failed when they were last tried, by their names.
    """

    version: Literal[1] = 1
    baseline: str
    seeds: Annotated[tuple[Seed, ...], MinLen(1)]
    quick: bool = False
    candidates: Annotated[tuple[Candidate, ...], MinLen(1)]
    failed: dict[str, str] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _told_apart(self) -> Self:
        for told in ("name", "folder"):
            known = [getattr(candidate, told) for candidate in self.candidates]
            if len(set(known)) < len(known):
                raise ValueError(f"two candidates have one {told}")
        check_baseline(self.baseline, self.candidates)
        return self

    @classmethod
    def of(cls, spec: Spec, *, quick: bool = False) -> Self:
        """What a specification comes to.

        Raises:
            InvalidArgument: options that are not valid, or a baseline that is no candidate; all are told together.
        """
        from spfde.app.train.options import options_from

        problems, candidates = Problems(), list[Candidate]()
        for name, values in spec.expanded():
            with problems.collecting():
                options = options_from(DEFAULTS | _typed(values)).model_dump(mode="json", exclude={"seed"})
                if not any(_are_equal(options, other.options) for other in candidates):
                    candidates.append(Candidate(name=name, folder=_free(slug(name), candidates), options=options))
        problems.found = [each for at, each in enumerate(problems.found) if each not in problems.found[:at]]
        problems.raise_if_any()
        baseline = _baseline(spec.baseline, candidates)
        return cls(baseline=baseline, seeds=spec.seeds, quick=quick, candidates=tuple(candidates))

    def runs(self, folder: Path) -> list[Planned]:
        """All runs, seed by seed, so that early on there is something of each candidate."""
        return [
            Planned(candidate, seed, folder / RUNS / candidate.folder / f"seed-{seed}")
            for seed in self.seeds
            for candidate in self.candidates
        ]


@contextmanager
def created(path: Path, kept: str = COMPARISON) -> Iterator[RunFolder]:
    """A new folder, locked while this is open; of one in which that file was not kept nothing is left."""
    if (path / kept).is_file():
        remedy = f"Go on with `spfde {_command(kept)} --resume {path}`, or choose another folder."
        raise RunFolderError(f"--out={path}: holds one already. {remedy}")
    folder = RunFolder.create(path)
    try:
        yield folder
    finally:
        if (path / kept).is_file():
            folder.close()
        else:
            folder.discard()


@contextmanager
def reopened(path: Path) -> Iterator[tuple[RunFolder, Comparison]]:
    """The folder of an earlier comparison, locked while this is open."""
    comparison = read(path)
    folder = RunFolder(path)
    check_inside(path / RUNS, path)
    folder.acquire()
    try:
        yield folder, comparison
    finally:
        folder.close()


def read(path: Path) -> Comparison:
    """What a folder says is compared.

    Raises:
        RunFolderError: it is no comparison's folder, or its file is damaged.
    """
    check_is_of(path, COMPARISON)
    written = RunFolder(path).read_json(COMPARISON)
    try:
        return Comparison(**written)
    except InvalidArgument as error:
        raise RunFolderError(f"{path / COMPARISON}: is damaged: {error}. Restore it from a copy.") from None


def check_is_of(path: Path, kept: str) -> None:
    """Raise ``RunFolderError`` for a folder that lacks the file that a comparison or a search keeps."""
    if not (path / kept).is_file():
        lacks = f"it has no {kept}" if path.is_dir() else "there is no such folder"
        remedy = "It is a run: go on with `spfde train --resume`." if (path / CONFIG).is_file() else "Pass one that is."
        raise RunFolderError(f"{path}: is no folder of `spfde {_command(kept)}` ({lacks}). {remedy}")


def _command(kept: str) -> str:
    """The command that keeps a file of that name."""
    return "compare" if kept == COMPARISON else "search"


def write(folder: RunFolder, comparison: Comparison) -> None:
    """Keep what is compared; from here on a kill loses nothing."""
    folder.write_text(COMPARISON, json.dumps(comparison.model_dump(mode="json"), indent=2, allow_nan=False) + "\n")


def check_holds(comparison: Comparison, kept: Comparison, path: Path) -> None:
    """Raise ``RunFolderError`` where a comparison lacks a seed or a candidate of the one that a folder has."""
    wanted = {candidate.folder: candidate for candidate in comparison.candidates}
    lacking = [f"seed {seed}" for seed in kept.seeds if seed not in comparison.seeds]
    for candidate in kept.candidates:
        other = wanted.get(candidate.folder)
        if other is None or other.name != candidate.name:
            lacking.append(f"the candidate {candidate.name!r}")
        elif not _are_equal(other.with_seed(0).model_dump(), candidate.with_seed(0).model_dump()):
            lacking.append(f"the candidate {candidate.name!r} with its options there")
    if lacking:
        raise RunFolderError(
            f"{path}: holds another comparison: it has {lacking[0]}, and what is to be compared here has not. "
            "Compare in another folder."
        )


def slug(name: str) -> str:
    """A name as that of a folder, anywhere."""
    return re.sub(r"[^A-Za-z0-9.=+_-]+", "-", name).strip("-.")[:100] or "candidate"


def _free(name: str, taken: list[Candidate]) -> str:
    others = {candidate.folder.lower() for candidate in taken}  # some file systems do not tell capitals apart
    names = [name, *(f"{name}-{number}" for number in range(2, len(others) + 3))]
    return next(each for each in names if each.lower() not in others)


def _baseline(wanted: str | None, candidates: list[Candidate]) -> str:
    from spfde.app.train.options import TrainOptions

    if wanted is None:
        dense = (each.name for each in candidates if TrainOptions(**each.options).load_recipe().is_neutral)
        return next(dense, candidates[0].name)
    check_baseline(wanted, candidates)
    return wanted


def check_baseline(name: str, candidates: Sequence[Candidate]) -> None:
    """Raise ``InvalidArgument`` where no candidate is called so."""
    names = [candidate.name for candidate in candidates]
    if name not in names:
        alike = next((f"Did you mean '{each}'? " for each in names if each.startswith(name)), "")
        raise InvalidArgument(Problem("baseline", name, "is no candidate", alike + nearest(name, names)))


def _are_equal(options: Values, others: Values) -> bool:
    """Whether runs would be the same, by whatever name their recipe was asked for."""
    return {**options, "recipe_name": ""} == {**others, "recipe_name": ""}


def _typed(values: dict[str, Any]) -> dict[str, Any]:
    """Options of a recipe as the command line would hand them over."""
    return {name: str(value) if name == "interval" else value for name, value in values.items()}
