"""Writing to disk so that nothing is half there, and saying clearly why it cannot be done."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from spfde.core.errors import RunFolderError, SpfdeError

DRAFT = ".writing"
"""How the name of what is being written ends; it begins with a dot."""

_FULL = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the disk quota is used up"}
_REASONS = _FULL | {errno.EROFS: "the file system is read-only", errno.EIO: "writing failed"}


@contextmanager
def clear_errors(
    path: Path, *, kind: type[SpfdeError] = RunFolderError, again: str = "go on with --resume"
) -> Iterator[None]:
    """Turn the system's errors into one that names ``path``, the reason and the remedy.

    ``again`` is what to do once there is room on the disk.
    """
    try:
        yield
    except OSError as error:
        code = error.errno or 0
        remedy = f"Free some space and {again}." if code in _FULL else "Choose another folder."
        reason = _REASONS.get(code, "it cannot be written")
        raise kind(f"{path}: {reason} ({error.strerror or error}). {remedy}") from error


@contextmanager
def written_whole(*paths: Path, mode: int = 0o666) -> Iterator[tuple[Path, ...]]:
    """Passing names beside ``paths`` to write to: all files are there in the end, or none of them.

    When the block ends, what was written is put on disk and takes its name, the first file last; when it fails, the
    drafts are taken away, and what was there before is as it was. Who may read and write them is ``mode``, less the
    umask.
    """
    drafts = tuple(path.with_name(f".{path.name}.{os.getpid()}{DRAFT}") for path in paths)
    try:
        modes = [_make(draft, mode) for draft in drafts]
        yield drafts
        for draft, given in zip(drafts, modes, strict=True):
            # Some write to a temporary file of their own, which nobody else may read, and rename it.
            draft.chmod(given)
            sync_file(draft)
        for draft, path in zip(reversed(drafts), reversed(paths), strict=True):
            draft.replace(path)
    finally:
        for draft in drafts:
            with suppress(OSError):
                draft.unlink()
    for folder in {path.parent for path in paths}:
        sync_folder(folder)


def _make(path: Path, mode: int) -> int:
    """Make an empty file that was not there before; the mode that the umask gives it."""
    path.unlink(missing_ok=True)
    handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, mode)
    try:
        return stat.S_IMODE(os.fstat(handle).st_mode)
    finally:
        os.close(handle)


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
