"""Names of techniques: what a recipe, a TOML file or the command line may ask for.

A class is registered under a kind, by its ``name``; those of this package register themselves, those of others are
registered by whoever imports them. Reading a name never imports anything.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, TypeVar

from spfde.core.errors import InvalidArgument, Problem, nearest

KINDS: Mapping[str, str] = {
    "method": "a sparse training method",
    "drop": "a criterion by which active weights are kept or dropped",
    "grow": "a criterion by which inactive weights grow",
    "structure": "what of a weight exists or not as a whole",
    "freezing-scheme": "when blocks are frozen",
    "sieving-criterion": "which samples are easy",
    "sieving-method": "how many samples leave, and when",
    "engine": "how a model is computed",
}
"""Kinds of techniques, each with what it says."""

_NAME = re.compile(r"[a-z0-9]+(?:[-.:][a-z0-9]+)*")
_CLASSES: dict[str, dict[str, type]] = {kind: {} for kind in KINDS}
C = TypeVar("C", bound=type)


def register(kind: str) -> Callable[[C], C]:
    """Make a class known by its ``name``: a decorator.

    Args:
        kind: one of :data:`KINDS`.

    Raises:
        InvalidArgument: an unknown kind, a class without a name in small letters, or a name that another class has.

    Example:
        >>> @spfde.register("drop")
        ... class LargestFirst(spfde.sparsity.Criterion):
        ...     name = "largest-first"
        ...     summary = "The smallest weights stay."
        ...
        ...     def score(self, weight, gradient):
        ...         return -weight.abs()
        >>> spfde.sparsity.DropGrow(sparsity=0.9, drop="largest-first").drop
        LargestFirst()
    """
    if kind not in KINDS:
        raise InvalidArgument(Problem("kind", kind, "is no kind of technique", nearest(kind, KINDS)))

    def note(cls: C) -> C:
        name = getattr(cls, "name", None)
        if not isinstance(name, str) or _NAME.fullmatch(name) is None:
            remedy = 'Give it one in small letters, such as name: ClassVar[str] = "my-own".'
            raise InvalidArgument(Problem(f"{cls.__name__}.name", name, "is no name for a technique", remedy))
        known = _CLASSES[kind].get(name)
        # The same class once more (a module that is loaded again, a notebook's cell) takes its own place.
        if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            rule = f"is the name of {known.__module__}.{known.__qualname__} already"
            raise InvalidArgument(Problem(f"{cls.__name__}.name", name, rule, "Take another one."))
        _CLASSES[kind][name] = cls
        return cls

    return note


def registered(kind: str) -> Mapping[str, type[Any]]:
    """The classes of a kind by name, in the order in which they were registered; a view that follows."""
    return MappingProxyType(_CLASSES[kind])


def find(kind: str, name: object, *, argument: str) -> type[Any]:
    """The class of that name.

    Raises:
        InvalidArgument: there is none; the nearest name is given.
    """
    classes = _CLASSES[kind]
    if not isinstance(name, str) or name not in classes:
        rule = f"names no {kind.replace('-', ' ')} that is known"
        raise InvalidArgument(Problem(argument, name, rule, nearest(str(name), classes)))
    return classes[name]
