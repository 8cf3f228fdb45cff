"""What a stranger may put into a file: a pickle that runs code when it is read without care."""

from __future__ import annotations

from pathlib import Path
from typing import Any


class RunsCode:
    """Pickled, it is a call: reading it touches a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)
