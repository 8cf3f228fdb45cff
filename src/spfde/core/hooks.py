"""Hooks that keep nothing alive."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import Tensor
from torch.utils.hooks import RemovableHandle

from spfde.core.sharding import is_dtensor
from spfde.core.torch_private import after_backward

_MARK = "_of_spfde"
_SILENT: set[int] = set()
Hook = TypeVar("Hook", bound=Callable[..., Any])


def weakly(method: Callable[..., Any], *first: Any) -> Callable[..., None]:
    """A hook that calls a bound method, with ``first`` before its own arguments, as long as its object is there.

    Python's collector does not look into a parameter's hooks: one that held its object would keep it, and with it the
    model, for ever. A copy of a model takes the hook along without a copy of the object.
    """
    # No WeakMethod: it makes a bound method anew in Python at each call, and a step calls hooks by the dozen.
    of_object, function = weakref.ref(method.__self__), method.__func__  # type: ignore[attr-defined]

    def hook(*arguments: Any) -> None:
        alive = of_object()
        if alive is not None and id(alive) not in _SILENT:
            function(alive, *first, *arguments)

    return mark(hook)


def mark(hook: Hook) -> Hook:
    """The same hook, which :func:`is_ours` knows from now on."""
    setattr(hook, _MARK, True)
    return hook


def remove_from_within(handle: RemovableHandle, parameter: Tensor) -> None:
    """Remove a hook on a parameter's gradient while it runs.

    FSDP iterates over the hooks of a sharded parameter itself, and none may go meanwhile: it goes when the pass ends.
    """
    if is_dtensor(parameter):
        after_backward(handle.remove)
    else:
        handle.remove()


def is_ours(hook: object) -> bool:
    """Whether a hook is one of :func:`weakly`, or marked: anybody else's may look at what it is called with."""
    return getattr(hook, _MARK, False)


@contextmanager
def silenced(*owners: object) -> Iterator[None]:
    """A context in which the hooks of these objects do nothing: what runs in it is recorded, and is no step yet."""
    fresh = {id(owner) for owner in owners} - _SILENT
    _SILENT.update(fresh)
    try:
        yield
    finally:
        _SILENT.difference_update(fresh)


def is_silent(owner: object) -> bool:
    """Whether the hooks of an object are to do nothing now: for those that are none of :func:`weakly`."""
    return id(owner) in _SILENT
