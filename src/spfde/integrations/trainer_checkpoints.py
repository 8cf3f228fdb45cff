"""Checkpoints of Hugging Face's Trainer: which of them were saved to their end, and the session's state in them.

The Trainer writes one file after the other into a folder that has its name from the start. The last is its own state.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spfde.core import json_text
from spfde.core.errors import StateMismatch, UsageError
from spfde.core.state import read_saved

STATE_NAME = "spfde.pt"
"""The session's state in each of the Trainer's checkpoint folders."""

_TRAINER_STATE = "trainer_state.json"
_NOT_WHOLE = (
    "the checkpoint was saved without SpfdeCallback, or not to its end. Resume from an earlier one, or start a new run "
    "without resume_from_checkpoint."
)


def checkpoint_name(step: int | str) -> str:
    """The name of the folder."""
    return f"checkpoint-{step}"


def whole_checkpoint(resume_from_checkpoint: Any, output_dir: str) -> str | None:
    """The checkpoint to go on from: of all in a folder the newest that is whole, with a warning for those passed over.

    Args:
        resume_from_checkpoint: what ``Trainer.train`` was given: a checkpoint, True for the newest, or nothing.
        output_dir: the Trainer's.

    Raises:
        StateMismatch: it is not whole, or none is.
        UsageError: there is none.
    """
    if not resume_from_checkpoint:
        return None
    if resume_from_checkpoint is not True:
        check_whole(folder := str(resume_from_checkpoint))
        return folder
    found = sorted(Path(output_dir).glob(checkpoint_name("*")), key=_step, reverse=True)
    troubles: list[StateMismatch] = []
    for path in found:
        try:
            check_whole(str(path))
        except StateMismatch as error:
            troubles.append(error)
        else:
            for trouble in troubles:
                warnings.warn(f"{trouble} It is passed over: the run goes on from {path}.", stacklevel=4)
            return str(path)
    if troubles:
        raise troubles[0]
    raise UsageError(
        f"resume_from_checkpoint=True: there is no checkpoint in {output_dir}. Start a new run without it."
    )


def check_whole(folder: str) -> None:
    """Raise ``StateMismatch`` unless a checkpoint was saved to its end, with the session's state."""
    if not (path := Path(folder, STATE_NAME)).is_file():
        raise StateMismatch(f"{path} is missing: {_NOT_WHOLE}")
    path = Path(folder, _TRAINER_STATE)
    try:
        json_text.read(path)
    except (OSError, ValueError) as error:
        raise StateMismatch(f"{path} cannot be read ({error}): {_NOT_WHOLE}") from None


def session_state(folder: str) -> Mapping[str, Any]:
    """The session's state in a checkpoint.

    Raises:
        StateMismatch: there is none, or it cannot be read.
    """
    path = Path(folder, STATE_NAME)
    if not path.is_file():
        raise StateMismatch(f"{path} is missing: {_NOT_WHOLE}")
    state: Mapping[str, Any] = read_saved(path)
    return state


def _step(folder: Path) -> int:
    number = folder.name.rpartition("-")[2]
    return int(number) if number.isdecimal() else -1
