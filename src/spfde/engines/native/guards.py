"""Has a model changed since it was traced? What a trace has seen, compared by identity."""

from __future__ import annotations

import operator
from collections.abc import Collection, Sequence
from itertools import starmap
from typing import Any

from torch import nn

from spfde.core.torch_private import BUFFERS, HOOKS, MODULES, PARAMETERS

# What the engine itself puts on the model.
FORWARD, HELD = "forward", "_spfde_engine"
_PLAIN = (bool, int, float, str, type(None))


def guards_of(model: nn.Module, opaque: Collection[nn.Module] = ()) -> list[Any]:
    """Everything that a trace of ``model`` depends on: modules, parameters, buffers, hooks, flags, attributes.

    What lies inside a list or behind a global name is not in it.

    Args:
        model: the model. Its own ``forward`` is left out: the engine replaces it.
        opaque: modules that run as they are, whose inside does not matter.
    """
    found: list[Any] = [value for name, value in vars(model).items() if name not in (FORWARD, HELD)]
    waiting, seen = [model], {id(model)}
    while waiting:
        module = waiting.pop()
        if module in opaque:
            continue
        state = vars(module)
        if module is not model:
            found.extend(state.values())
        for name in HOOKS:
            if state[name]:
                found.extend(state[name].values())
        found.extend(state[PARAMETERS].values())
        found.extend(state[BUFFERS].values())
        for child in state[MODULES].values():
            found.append(child)
            if child is not None and id(child) not in seen:
                seen.add(id(child))
                waiting.append(child)
    return found


def is_same(before: Sequence[Any], after: Sequence[Any]) -> bool:
    """Do the guards hold still? The same objects, or equal numbers and strings."""
    if len(before) != len(after):
        return False
    if all(map(operator.is_, before, after)):
        return True
    return all(starmap(_is_alike, zip(before, after, strict=True)))


def _is_alike(one: Any, other: Any) -> bool:
    return one is other or (type(one) is type(other) and isinstance(one, _PLAIN) and one == other)
