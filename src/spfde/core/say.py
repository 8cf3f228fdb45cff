"""Lines that tell a user what was chosen for them, and what takes a while."""

from __future__ import annotations

import logging
import os
import sys


def counted(count: int, noun: str, plural: str | None = None) -> str:
    """A number with its noun: 1 epoch, 2 epochs; by default the plural ends in s."""
    return f"{count:,} {noun if count == 1 else plural or f'{noun}s'}"


def n_started() -> int:
    """How many processes a launcher such as ``torchrun`` has started, of which this is one; 1 without a launcher."""
    size = os.environ.get("WORLD_SIZE", "1")
    return int(size) if size.isascii() and size.isdigit() else 1


def is_by_launcher() -> bool:
    """Whether it is a launcher that gave this process its rank, and not the container that every command runs in."""
    return "LOCAL_RANK" in os.environ


def tells() -> bool:
    """Whether it is this process that tells what all of them know: the first one of those that were started."""
    return n_started() == 1 or os.environ.get("RANK", "0") == "0"


def say_on_stderr(line: str) -> None:
    """Tell the user what takes a while."""
    if tells():
        print(f"spfde: {line}", file=sys.stderr, flush=True)


def say(line: str) -> None:
    """Tell the user what was chosen and why; silent where the logger "spfde" is set to WARNING or above."""
    if logging.getLogger("spfde").level <= logging.INFO:
        say_on_stderr(line)
