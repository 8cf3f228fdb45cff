"""Where built libraries lie: each with its checksum, in a folder that nobody else can write to.

A library is code that runs in this process. So a folder or a file is taken only where it is this user's and no other
user can change it, and a library only where it is, byte for byte, what was built.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from spfde.core.files import written_whole

LOCK_SECONDS = 30.0
"""How long a library is waited for that another process builds; then this one builds its own."""

_WRITABLE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH
_ROOT = 0


class Unusable(Exception):
    """A folder cannot serve as a cache; the message says why, and what can be done."""


def made(folder: Path) -> Path:
    """The folder, made where it is not there, and checked.

    Raises:
        Unusable: others could write to it, or to one that it is in.
        OSError: it cannot be made or looked at.
    """
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    reason = _distrust(folder, folder.stat()) or untrusted_parent(folder)
    if reason is not None:
        raise Unusable(f"{reason}. Set $SPFDE_CACHE_DIR to a folder of your own, or run `chmod go-w` on that one")
    return folder


def untrusted_parent(folder: Path) -> str | None:
    """Why a folder above this one lets others put another in its place; None where none does."""
    trusted = {_ROOT, os.geteuid(), Path("/").stat().st_uid}  # whoever has / has everything
    for parent in folder.resolve().parents:
        found = parent.stat()
        if found.st_uid not in trusted:
            return f"{parent} belongs to another user"
        if found.st_mode & _WRITABLE_BY_OTHERS and not found.st_mode & stat.S_ISVTX:
            return f"{parent} can be written to by others"
    return None


def read_whole(library: Path) -> bytes | None:
    """The library, if it is ours and has the checksum that was written beside it; else None."""
    try:
        content = _read(library)
        return content if _read(_sum_of(library)) == checksum(content).encode() else None
    except (OSError, Unusable):
        return None


def checksum(content: bytes) -> str:
    """What is written beside a library of that content."""
    return hashlib.sha256(content).hexdigest()


def put(library: Path, build: Callable[[Path], None]) -> None:
    """Have a library built, and keep it with its checksum once both are on disk.

    Args:
        library: its place.
        build: writes the library to the path that it is given.
    """
    with written_whole(_sum_of(library), library, mode=0o644) as (sum_draft, draft):
        build(draft)
        sum_draft.write_text(checksum(draft.read_bytes()), encoding="ascii")


@contextlib.contextmanager
def locked(library: Path) -> Iterator[None]:
    """Be the only process that builds this library.

    Raises:
        Unusable: the lock is no plain file of ours, or another process does not give it back.
    """
    path = library.with_name(f"{library.name}.lock")
    # Not through links, which may lead to any file of ours, and not waiting, as the end of a queue does.
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)
    try:
        if reason := _distrust_file(path, os.fstat(handle)):
            raise Unusable(reason)
        _wait(handle, path)
        yield
    finally:
        os.close(handle)


def _wait(handle: int, path: Path) -> None:
    deadline = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise Unusable(f"{path} has been held by another process for {LOCK_SECONDS:g} s") from None
            time.sleep(0.05)


def _sum_of(library: Path) -> Path:
    return library.with_name(f"{library.name}.sha256")


def _read(path: Path) -> bytes:
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    with open(handle, "rb") as file:
        if reason := _distrust_file(path, os.fstat(handle)):
            raise Unusable(reason)
        return file.read()


def _distrust_file(path: Path, found: os.stat_result) -> str | None:
    return _distrust(path, found) if stat.S_ISREG(found.st_mode) else f"{path} is no plain file"


def _distrust(path: Path, found: os.stat_result) -> str | None:
    if found.st_uid != os.geteuid():
        return f"{path} belongs to another user"
    return f"{path} can be written to by others" if found.st_mode & _WRITABLE_BY_OTHERS else None
