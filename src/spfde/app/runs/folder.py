"""A run folder: what it holds, who may write to it, and how it survives a kill at any moment."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

from spfde.app.runs.checkpoints import Checkpoints
from spfde.app.runs.rows import is_row
from spfde.core import json_text
from spfde.core.errors import RunFolderError
from spfde.core.files import DRAFT, clear_errors, written_whole

CONFIG, METRICS, SUMMARY, RECIPE = "config.json", "metrics.jsonl", "summary.json", "recipe.toml"
_LOCK = ".lock"

_held_locks: set[int] = set()


def _forget_locks() -> None:
    """Loader workers are forks, and would keep the lock alive after this process was killed."""
    for handle in _held_locks:
        os.close(handle)
    _held_locks.clear()


os.register_at_fork(after_in_child=_forget_locks)


class RunFolder:
    """The folder of one run, locked by this process while it is open.

    The lock is an ``flock``: the kernel drops it when the process ends, however it ends, and a second opening is
    refused within one process, too.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = Checkpoints(path / "checkpoints")
        self._lock: int | None = None
        self._made: tuple[Path, ...] = ()

    # --- opening ---------------------------------------------------------------------------------------------------

    @classmethod
    def create(cls, path: Path) -> RunFolder:
        """Make a new folder and lock it.

        Raises:
            RunFolderError: it holds something already, is in use, or cannot be written; nothing was changed.
        """
        _check_text(path)
        folder = cls(path)
        folder._made = tuple(parent for parent in (path, *path.parents) if not parent.exists())
        try:
            with clear_errors(path):
                if path.exists() and not path.is_dir():
                    raise RunFolderError(f"--out={path}: must be a folder, and is a file. Choose another folder.")
                if path.is_dir() and not (path / _LOCK).exists():
                    _check_empty(path)  # not even a lock is left in a folder of somebody else's
                path.mkdir(parents=True, exist_ok=True)
                folder.acquire()
                _check_empty(path)
        except BaseException:
            folder.close()
            folder._remove_made()
            raise
        return folder

    @classmethod
    def existing(cls, path: Path, *, needs: str = CONFIG) -> RunFolder:
        """The folder of an earlier run, to read from.

        Raises:
            RunFolderError: it is no run folder, for it lacks the file that is needed; those inside it are named.
        """
        if (path / needs).is_file():
            return cls(path)
        lacks = f"it has no {needs}" if path.is_dir() else "there is no such folder"
        inside = sorted(found.parent.name for found in path.glob(f"*/{needs}"))[:5]
        remedy = f"a run folder inside it: {', '.join(inside)}" if inside else "the folder that `spfde train` made"
        raise RunFolderError(f"{path}: is no run folder ({lacks}). Pass {remedy}.")

    @classmethod
    def reopen(cls, path: Path) -> RunFolder:
        """Lock the folder of an earlier run, and take away what was half-written.

        Raises:
            RunFolderError: it is no run folder, is in use, cannot be written, or holds a link that leads out of it.
        """
        folder = cls.existing(path)
        _check_text(path)
        _check_links(path)
        with clear_errors(path):
            folder.acquire()
            folder.checkpoints.remove_drafts()
            for leftover in path.glob(f".*{DRAFT}"):
                leftover.unlink()
        return folder

    def acquire(self) -> None:
        """Lock the folder.

        Raises:
            RunFolderError: another process has.
        """
        handle = os.open(self.path / _LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(handle)
            if not isinstance(error, BlockingIOError):
                raise
            raise RunFolderError(
                f"{self.path}: is in use by another process. Wait for it to end, or choose another folder."
            ) from None
        self._lock = handle
        _held_locks.add(handle)

    def close(self) -> None:
        """Give the lock back."""
        if self._lock is not None:
            _held_locks.discard(self._lock)
            os.close(self._lock)
            self._lock = None

    def discard(self) -> None:
        """Take away all that ``create`` and this process made, when a run comes to nothing."""
        assert self._lock is not None, "only the folder's holder may empty it"
        for entry in self.path.iterdir():
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry, ignore_errors=True)
            else:
                entry.unlink(missing_ok=True)
        self.close()
        self._remove_made()

    def _remove_made(self) -> None:
        for made in self._made:
            with suppress(OSError):  # not there, or somebody else is in there
                made.rmdir()

    # --- files -----------------------------------------------------------------------------------------------------

    def write_text(self, name: str, text: str) -> None:
        """Write a file whole or not at all."""
        with clear_errors(self.path), written_whole(self.path / name) as (draft,):
            draft.write_text(text, encoding="utf-8")

    def write_json(self, name: str, content: Mapping[str, Any]) -> None:
        self.write_text(name, json.dumps(content, indent=2, allow_nan=False) + "\n")

    def read_json(self, name: str) -> dict[str, Any]:
        """One JSON object.

        Raises:
            RunFolderError: the file cannot be read, or holds something else.
        """
        path = self.path / name
        remedy = "Restore it from a copy, or start a new run."
        try:
            content = json_text.read(path)
        except (OSError, ValueError) as error:
            raise RunFolderError(f"{path}: is damaged ({error}). {remedy}") from None
        if not isinstance(content, dict):
            raise RunFolderError(f"{path}: is damaged (it holds no JSON object). {remedy}")
        return content

    @property
    def is_finished(self) -> bool:
        return (self.path / SUMMARY).is_file()

    def append_metrics(self, row: Mapping[str, Any]) -> None:
        """Add one epoch's line."""
        with clear_errors(self.path), (self.path / METRICS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def write_metrics(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Write all lines anew: those of epochs that will be trained again are gone, as is a half-written one."""
        self.write_text(METRICS, "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows))

    def read_metrics(self) -> dict[int, dict[str, Any]]:
        """The lines of the finished epochs, by epoch; of two about one epoch the later one, and no half-written one."""
        rows: dict[int, dict[str, Any]] = {}
        if not (self.path / METRICS).is_file():
            return rows
        with suppress(OSError):
            for line in (self.path / METRICS).read_bytes().decode("utf-8", "replace").splitlines():
                with suppress(ValueError):
                    row = json_text.parse(line)
                    if is_row(row):
                        rows[row["epoch"]] = row
        return rows


def free_folder(base: str) -> Path:
    """The first free name under ``runs/``: the base, or with a number behind it."""
    names = (base if number == 1 else f"{base}-{number}" for number in count(1))
    return next(folder for name in names if not (folder := Path("runs") / name).exists())


def flat(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A file's nested tables as one, with dotted names."""
    found: dict[str, Any] = {}
    for name, value in content.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return found


def _check_empty(path: Path) -> None:
    contents = sorted(entry.name for entry in path.iterdir() if not _is_litter(entry.name))
    if CONFIG in contents:
        raise RunFolderError(
            f"--out={path}: holds a run already. Go on with `spfde train --resume {path}`, or choose another folder."
        )
    if contents:
        raise RunFolderError(f"--out={path}: is not empty ({contents[0]}). Choose a new or an empty folder.")


def _check_text(path: Path) -> None:
    try:
        str(path).encode()
    except UnicodeEncodeError:
        shown = str(path).encode(errors="replace").decode()
        rule = "is no text in UTF-8, and the files of weights are written by their names in UTF-8"
        raise RunFolderError(f"{shown}: {rule}. Choose another name.") from None


def _check_links(path: Path) -> None:
    """Refuse a folder in which something would be written or deleted elsewhere, by way of a link.

    Links to files beside the run's own and in its checkpoints do no harm: those are replaced or only read.
    """
    for place, folders, files in os.walk(path):
        inner = Path(place).relative_to(path).parts[:1]
        for name in folders if inner in ((), ("checkpoints",)) else [*folders, *files]:
            check_inside(Path(place, name), path)


def check_inside(place: Path, run: Path) -> None:
    """Refuse to write to a place in a run folder that is elsewhere, by way of a link.

    Raises:
        RunFolderError: it is a link that leads out of the folder.
    """
    if place.is_symlink() and not place.resolve().is_relative_to(run.resolve()):
        raise RunFolderError(
            f"{place}: is a link that leads out of the run folder, and what would be written or deleted there is "
            "somebody else's, maybe. Put a folder in its place; where there is no room, move the run folder as a whole "
            "and link that."
        )


def _is_litter(name: str) -> bool:
    """What a process leaves that was killed while it made the folder: no reason to refuse it."""
    return name == _LOCK or (name.startswith(".") and name.endswith(DRAFT))
