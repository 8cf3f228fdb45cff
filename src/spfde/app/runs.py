"""A run folder: what it holds, who may write to it, and how it survives a kill at any moment.

A checkpoint is written whole into a folder of its own, with the checksum of every file, and only then takes its name.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from spfde.errors import RunFolderError

CONFIG, METRICS, SUMMARY, RECIPE = "config.json", "metrics.jsonl", "summary.json", "recipe.toml"
MANIFEST = "manifest.json"
_LOCK = ".lock"


class RunFolder:
    """The folder of one run, locked by this process while it is open.

    The lock is an ``flock``: the kernel drops it when the process ends, however it ends.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: int | None = None

    # --- opening ---------------------------------------------------------------------------------------------------

    @classmethod
    def create(cls, path: Path) -> RunFolder:
        """Make a new folder and lock it.

        Raises:
            RunFolderError: it holds something already, is in use, or cannot be written.
        """
        if path.exists() and not path.is_dir():
            raise RunFolderError(f"--out={path}: must be a folder, and is a file. Choose another folder.")
        folder = cls(path)
        if path.is_dir():
            with folder._locked_for_a_look():
                contents = sorted(entry.name for entry in path.iterdir() if entry.name != _LOCK)
            if CONFIG in contents:
                raise RunFolderError(
                    f"--out={path}: holds a run already. Go on with `spfde train --resume {path}`, "
                    "or choose another folder."
                )
            if contents:
                raise RunFolderError(f"--out={path}: is not empty ({contents[0]}). Choose a new or an empty folder.")
        with _clear_errors(path):
            path.mkdir(parents=True, exist_ok=True)
            folder._acquire()
        return folder

    @classmethod
    def reopen(cls, path: Path) -> RunFolder:
        """Lock the folder of an earlier run.

        Raises:
            RunFolderError: it is no run folder, is in use, or cannot be written.
        """
        if not (path / CONFIG).is_file():
            raise RunFolderError(f"--resume={path}: is no run folder (no {CONFIG}). Pass the folder of an earlier run.")
        folder = cls(path)
        with _clear_errors(path):
            folder._acquire()
            for leftover in (path / "checkpoints").glob(".writing-*"):
                shutil.rmtree(leftover)
        return folder

    def _acquire(self) -> None:
        handle = os.open(self.path / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            raise RunFolderError(
                f"{self.path}: is in use by another process. Wait for it to end, or choose another folder."
            ) from None
        self._lock = handle

    @contextmanager
    def _locked_for_a_look(self) -> Iterator[None]:
        """Fail if another process holds the folder; create nothing."""
        if (self.path / _LOCK).exists():
            with _clear_errors(self.path):
                self._acquire()
        try:
            yield
        finally:
            self.close()

    def close(self) -> None:
        """Give the lock back."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def discard(self) -> None:
        """Remove the folder again, after a mistake that was found before any work was done."""
        self.close()
        shutil.rmtree(self.path, ignore_errors=True)

    # --- small files -----------------------------------------------------------------------------------------------

    def write_text(self, name: str, text: str) -> None:
        """Write a file whole or not at all."""
        with _clear_errors(self.path):
            draft = self.path / f".{name}.writing"
            with draft.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            draft.replace(self.path / name)

    def write_json(self, name: str, content: Any) -> None:
        self.write_text(name, json.dumps(content, indent=2, allow_nan=False) + "\n")

    def read_json(self, name: str) -> Any:
        try:
            return json.loads((self.path / name).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise RunFolderError(
                f"{self.path / name}: cannot be read ({error}). Restore it, or start a new run."
            ) from None

    @property
    def is_finished(self) -> bool:
        return (self.path / SUMMARY).is_file()

    def append_metrics(self, row: dict[str, Any]) -> None:
        """Add one epoch's line."""
        with _clear_errors(self.path), (self.path / METRICS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def metrics(self) -> list[dict[str, Any]]:
        """The epochs written so far; a half-written last line does not count."""
        path = self.path / METRICS
        if not path.exists():
            return []
        rows = []
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except ValueError:
                break
        return rows

    def keep_metrics_before(self, epoch: int) -> None:
        """Drop the lines of epochs that will be trained again."""
        rows = [row for row in self.metrics() if row["epoch"] < epoch]
        self.write_text(METRICS, "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows))

    # --- checkpoints -----------------------------------------------------------------------------------------------

    def checkpoint_path(self, name: str = "latest") -> Path:
        return self.path / "checkpoints" / name

    def save_checkpoint(self, write: Callable[[Path], None], *, epoch: int, best: bool) -> Path:
        """Write a checkpoint with ``write(folder)``; keep the one before it as ``previous``."""
        with _clear_errors(self.path):
            latest, previous = self.checkpoint_path("latest"), self.checkpoint_path("previous")
            draft = self.checkpoint_path(".writing-latest")
            shutil.rmtree(draft, ignore_errors=True)
            draft.mkdir(parents=True)
            write(draft)
            _seal(draft, epoch)
            if latest.exists():
                shutil.rmtree(previous, ignore_errors=True)
                latest.rename(previous)
            draft.rename(latest)
            if best:
                self._copy_best(latest)
        return latest

    def _copy_best(self, latest: Path) -> None:
        best, draft = self.checkpoint_path("best"), self.checkpoint_path(".writing-best")
        shutil.rmtree(draft, ignore_errors=True)
        shutil.copytree(latest, draft)
        shutil.rmtree(best, ignore_errors=True)
        draft.rename(best)

    def newest_checkpoint(self) -> Path | None:
        """The checkpoint to go on from, checked; None where none was finished.

        Raises:
            RunFolderError: it is damaged; the one before it is named, if there is one.
        """
        for name in ("latest", "previous"):
            path = self.checkpoint_path(name)
            if path.is_dir():
                damage = _damage(path)
                if damage is None:
                    return path
                spare = self.checkpoint_path("previous")
                remedy = (
                    f"Remove {path} to go on from {spare}, one epoch earlier."
                    if name == "latest" and spare.is_dir() and _damage(spare) is None
                    else "Restore it from a copy, or start a new run."
                )
                raise RunFolderError(f"checkpoint {path}: is damaged ({damage}). {remedy}")
        return None


def _seal(folder: Path, epoch: int) -> None:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    sums = {str(path.relative_to(folder)): _checksum(path) for path in files}
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())
    with (folder / MANIFEST).open("w", encoding="utf-8") as file:
        json.dump({"epoch": epoch, "sha256": sums}, file, indent=2)
        file.flush()
        os.fsync(file.fileno())


def _damage(folder: Path) -> str | None:
    try:
        sums = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["sha256"]
    except (OSError, ValueError, KeyError) as error:
        return f"{MANIFEST}: {error}"
    for name, expected in sums.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if _checksum(path) != expected:
            return f"{name} has another checksum than when it was written"
    return None


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


_REASONS = {
    errno.ENOSPC: ("the disk is full", "Free some space and go on with --resume."),
    errno.EDQUOT: ("the disk quota is used up", "Free some space and go on with --resume."),
    errno.EROFS: ("the file system is read-only", "Choose a folder that can be written."),
    errno.EACCES: ("it cannot be written", "Choose a folder that can be written."),
    errno.EPERM: ("it cannot be written", "Choose a folder that can be written."),
}


@contextmanager
def _clear_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in _REASONS:
            raise
        reason, remedy = _REASONS[error.errno]
        raise RunFolderError(f"{path}: {reason} ({error.strerror}). {remedy}") from error
