"""Hooks that keep nothing alive."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any


def weakly(method: Callable[..., Any], *first: Any) -> Callable[..., None]:
    """A hook that calls a bound method, with ``first`` before its own arguments, as long as its object is there.

    Python's collector does not look into a parameter's hooks: one that held its object would keep it, and with it the
    model, for ever. A copy of a model takes the hook along without a copy of the object.
    """
    of_object = weakref.WeakMethod(method)

    def hook(*arguments: Any) -> None:
        alive = of_object()
        if alive is not None:
            alive(*first, *arguments)

    return hook
