"""Writing to disk so that nothing is half there, and saying clearly why it cannot be done."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from spfde.core.errors import RunFolderError

_FREE = "Free some space and go on with --resume."
_ELSEWHERE = "Choose a folder that can be written."
_REASONS = {
    errno.ENOSPC: ("the disk is full", _FREE),
    errno.EDQUOT: ("the disk quota is used up", _FREE),
    errno.EROFS: ("the file system is read-only", _ELSEWHERE),
    errno.EACCES: ("it cannot be written", _ELSEWHERE),
    errno.EPERM: ("it cannot be written", _ELSEWHERE),
    errno.EIO: ("writing failed", "Check the disk, and go on with --resume."),
}


@contextmanager
def clear_errors(path: Path) -> Iterator[None]:
    """Turn the system's errors into a ``RunFolderError`` that names ``path``, the reason and the remedy."""
    try:
        yield
    except OSError as error:
        reason, remedy = _REASONS.get(error.errno or 0, ("it cannot be used", "Choose another folder."))
        raise RunFolderError(f"{path}: {reason} ({error.strerror or error}). {remedy}") from error


def write_whole(path: Path, text: str, *, draft: Path) -> None:
    """Write a file whole or not at all, by way of ``draft`` in the same folder."""
    try:
        with draft.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_file(path: Path) -> None:
    """Wait until a file is on disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Wait until a folder is on disk: a rename survives a power cut only when the folder that holds the name does."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some file systems know no fsync of folders
            raise
    finally:
        os.close(handle)
