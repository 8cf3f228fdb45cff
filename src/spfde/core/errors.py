"""Errors of the library: each names the argument, the value, the rule and the remedy.

Problems with arguments are collected and raised together, so that one run of a script shows all of them.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

__all__ = [
    "DataError",
    "InvalidArgument",
    "Problem",
    "RunFolderError",
    "SpfdeError",
    "StateMismatch",
    "TrainingDiverged",
    "UsageError",
    "WeightsFileError",
]


class SpfdeError(Exception):
    """Base of every error that this package raises on purpose.

    Example:
        >>> try:
        ...     spfde.MEST(sparsity=1.5)
        ... except spfde.SpfdeError as error:
        ...     print(error)
        sparsity=1.5: input should be less than 1...
    """


@dataclass(frozen=True)
class Problem:
    """One thing wrong with one argument.

    Attributes:
        argument: name of the argument, as the caller writes it.
        value: the offending value.
        rule: what it breaks, as a clause ("must be in [0, 1)").
        remedy: what to do instead, as a sentence.

    Example:
        >>> print(spfde.errors.Problem("epochs", 0, "must be at least 1", "Pass the length of the run."))
        epochs=0: must be at least 1. Pass the length of the run.
    """

    argument: str
    value: object
    rule: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.argument}={shortened(self.value)}: {self.rule}. {self.remedy}"


class InvalidArgument(SpfdeError, ValueError):
    """One or more arguments break a rule; ``problems`` lists them.

    Example:
        >>> try:
        ...     spfde.MEST(sparsity=1.5, softbound=True)
        ... except spfde.InvalidArgument as error:
        ...     [problem.argument for problem in error.problems]
        ['sparsity', 'softbound']
    """

    def __init__(self, *problems: Problem) -> None:
        self.problems = problems
        super().__init__("\n".join(str(problem) for problem in problems))


class StateMismatch(SpfdeError, ValueError):
    """A saved state does not fit the model, recipe or version that it is loaded into.

    Example:
        >>> session = spfde.attach(model, optimizer, loader, spfde.presets.static, epochs=2)
        >>> try:
        ...     session.load_state_dict({"format": 0})
        ... except spfde.StateMismatch:
        ...     print("not a state of this session")
        not a state of this session
    """


class UsageError(SpfdeError, RuntimeError):
    """A call at the wrong time: ``observe`` twice, a state taken between two batches, and the like.

    Example:
        >>> session = spfde.attach(model, optimizer, loader, spfde.presets.static, epochs=2)
        >>> try:
        ...     session.end_epoch()
        ... except spfde.UsageError:
        ...     print("no epoch has begun")
        no epoch has begun
    """


class TrainingDiverged(SpfdeError, RuntimeError):
    """The loss became NaN or infinite.

    Example:
        >>> issubclass(spfde.TrainingDiverged, RuntimeError)  # raised by the command line
        True
    """


class DataError(SpfdeError, ValueError):
    """A data set is missing, empty, damaged or does not hold what it should.

    Example:
        >>> issubclass(spfde.DataError, ValueError)  # raised by the command line
        True
    """


class RunFolderError(SpfdeError, RuntimeError):
    """A run folder or a checkpoint is in use, damaged, read-only or not what it should be.

    Example:
        >>> issubclass(spfde.RunFolderError, RuntimeError)  # raised by the command line
        True
    """


class WeightsFileError(SpfdeError, RuntimeError):
    """A file of exported weights is missing, damaged or cannot be written.

    Example:
        >>> try:
        ...     spfde.export.load("gone.safetensors")
        ... except spfde.WeightsFileError:
        ...     print("there is no such file")
        there is no such file
    """


@dataclass
class Problems:
    """Collects problems so that they are raised together."""

    found: list[Problem] = field(default_factory=list)

    def add(self, argument: str, value: object, rule: str, remedy: str) -> None:
        self.found.append(Problem(argument, value, rule, remedy))

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Keep the problems of an ``InvalidArgument`` that is raised in the block, instead of letting it through."""
        try:
            yield
        except InvalidArgument as error:
            self.found.extend(error.problems)

    def raise_if_any(self) -> None:
        """Raise ``InvalidArgument`` with all problems found so far, if there are any."""
        if self.found:
            raise InvalidArgument(*self.found)


def nearest(name: str, known: Iterable[str]) -> str:
    """A remedy for an unknown name: the nearest match if there is one, and the known names."""
    names = sorted(known)
    matches = difflib.get_close_matches(name.lower(), names, n=1, cutoff=0.5)
    hint = f"Did you mean '{matches[0]}'? " if matches else ""
    return f"{hint}Known names: {', '.join(names)}."


def shortened(value: object, limit: int = 120) -> str:
    """How a value is written in an error: cut where it is long."""
    text = repr(value)
    return text if len(text) <= limit else f"{text[: limit - 1]}…"
