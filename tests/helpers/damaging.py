"""A nested state, damaged at each of its places in turn."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


def damaged(state: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Copies of a state in which one key is missing, or one value is of another type, and what was done to each.

    Of the elements of a list, which are alike, only the first is damaged.
    """
    if isinstance(state, Mapping):
        for key, value in state.items():
            place = f"{path}[{key!r}]"
            yield f"{place} deleted", {name: other for name, other in state.items() if name != key}
            yield f"{place} of another type", {**state, key: _of_another_type(value)}
            for what, inner in damaged(value, place):
                yield what, {**state, key: inner}
    elif isinstance(state, (list, tuple)) and state:
        rest = list(state[1:])
        yield f"{path}[0] of another type", [_of_another_type(state[0]), *rest]
        for what, inner in damaged(state[0], f"{path}[0]"):
            yield what, [inner, *rest]


def _of_another_type(value: Any) -> Any:
    return 7.5 if isinstance(value, str) else "of another type"
