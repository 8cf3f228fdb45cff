"""JSON from files that anybody may have written: what is no JSON, or nests without end, is one kind of error."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

MOST_NESTED = 64
"""Tables and lists inside each other; ours have eight. Python's own bound depends on what has been called before."""


def parse(text: str) -> Any:
    """What a JSON text says.

    Raises:
        ValueError: it is no JSON, or nests deeper than ``MOST_NESTED``.

    Example:
        >>> from spfde.core import json_text
        >>> json_text.parse('{"epochs": [1, 2]}')
        {'epochs': [1, 2]}
    """
    try:
        found = json.loads(text)
    except RecursionError:
        raise ValueError(f"it nests deeper than {MOST_NESTED} times") from None
    level, depth = [found], 0
    while level := [inner for outer in level for inner in _inside(outer)]:
        depth += 1
        if depth > MOST_NESTED:
            raise ValueError(f"it nests deeper than {MOST_NESTED} times")
    return found


def read(path: Path) -> Any:
    """What a JSON file says.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no plain file, no text in UTF-8, no JSON, or nests too deep.
    """
    if not stat.S_ISREG(path.stat().st_mode):  # a queue would be waited for
        raise ValueError("it is no plain file")
    return parse(path.read_text(encoding="utf-8"))


def _inside(value: Any) -> list[Any]:
    inside = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []
    return [each for each in inside if isinstance(each, dict | list)]
