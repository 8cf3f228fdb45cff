"""Hooks that keep nothing alive."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

_MARK = "_of_spfde"


def weakly(method: Callable[..., Any], *first: Any) -> Callable[..., None]:
    """A hook that calls a bound method, with ``first`` before its own arguments, as long as its object is there.

    Python's collector does not look into a parameter's hooks: one that held its object would keep it, and with it the
    model, for ever. A copy of a model takes the hook along without a copy of the object.
    """
    # No WeakMethod: it makes a bound method anew in Python at each call, and a step calls hooks by the dozen.
    of_object, function = weakref.ref(method.__self__), method.__func__  # type: ignore[attr-defined]

    def hook(*arguments: Any) -> None:
        alive = of_object()
        if alive is not None:
            function(alive, *first, *arguments)

    setattr(hook, _MARK, True)
    return hook


def is_ours(hook: object) -> bool:
    """Whether a hook is one of :func:`weakly`: anybody else's may look at what it is called with."""
    return getattr(hook, _MARK, False)
