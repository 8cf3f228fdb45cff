"""Checkpoints of a run: written whole into a folder of their own, with checksums, before they take their name.

At every moment ``latest`` or ``previous`` is a whole checkpoint, so that a kill loses one epoch at most. Those in
``kept`` hold the model alone and stay.
"""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from spfde.app.runs.manifest import Damaged, Manifest, damage, files_in, read_manifest, seal
from spfde.core.errors import RunFolderError
from spfde.core.files import clear_errors, sync_file, sync_folder

_DRAFT = ".writing-"
_KEPT = "epoch-"
_ATTEMPTS = 10

Result = TypeVar("Result")


class Checkpoints:
    """The checkpoints in a folder: ``latest``, the one before it as ``previous``, and a copy of the ``best``."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.latest, self.previous, self.best = path / "latest", path / "previous", path / "best"
        self.best_before = path / ".best-before"

    @property
    def exist(self) -> bool:
        """True when some epoch was finished and kept."""
        return self.latest.is_dir() or self.previous.is_dir()

    def save(self, write: Callable[[Path], None], *, epoch: int, best: bool, about: Mapping[str, Any]) -> None:
        """Write a checkpoint.

        Args:
            write: writes files into the folder that it is given.
            epoch: the epoch that comes next.
            best: keep a copy as ``best``.
            about: what ``described`` will tell of it.

        Raises:
            RunFolderError: it could not be written; the checkpoint before it is still there.
        """
        with self._sealed(write, epoch=epoch, about=about) as draft:
            if best:
                # Before ``latest`` takes its name: a kill between the two only trains this epoch again.
                self._copy_best(draft)
            if self.latest.exists():
                shutil.rmtree(self.previous, ignore_errors=True)
                self.latest.rename(self.previous)
            draft.rename(self.latest)
            sync_folder(self.path)

    def keep(self, write: Callable[[Path], None], *, epoch: int, about: Mapping[str, Any]) -> None:
        """Write a checkpoint that stays, ``kept/epoch-0005`` after five epochs; one of the same name is replaced.

        Args, Raises: as ``save``.
        """
        place = self.path / "kept" / f"{_KEPT}{epoch:04d}"
        with self._sealed(write, epoch=epoch, about=about) as draft:
            place.parent.mkdir(exist_ok=True)
            shutil.rmtree(place, ignore_errors=True)
            draft.rename(place)
            sync_folder(place.parent)

    def kept(self) -> dict[int, Path]:
        """The checkpoints that stayed, by the number of epochs before them, in order."""
        found = ((path.name.removeprefix(_KEPT), path) for path in self.path.glob(f"kept/{_KEPT}*"))
        return dict(sorted((int(number), path) for number, path in found if number.isdecimal() and path.is_dir()))

    @contextmanager
    def _sealed(self, write: Callable[[Path], None], *, epoch: int, about: Mapping[str, Any]) -> Iterator[Path]:
        """A whole checkpoint that has no name yet; it is taken away when writing or naming it fails."""
        draft = self.path / f"{_DRAFT}latest"
        try:
            with clear_errors(self.path):
                shutil.rmtree(draft, ignore_errors=True)
                draft.mkdir(parents=True)
                _write(write, draft)
                seal(draft, {"epoch": epoch, "about": about})
                yield draft
        except Exception:
            # On a full disk the unfinished files are in the way of everything else.
            self.remove_drafts()
            raise

    def _copy_best(self, sealed: Path) -> None:
        draft = self.path / f"{_DRAFT}best"
        shutil.rmtree(draft, ignore_errors=True)
        for path in files_in(sealed):
            # Not copytree: it collects the system's errors into one of its own, which hides a full disk.
            copy = draft / path.relative_to(sealed)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)
            sync_file(copy)
        # ``best`` may be read meanwhile: at each moment it is there, or the one before it.
        shutil.rmtree(self.best_before, ignore_errors=True)
        if self.best.exists():
            self.best.rename(self.best_before)
        draft.rename(self.best)
        shutil.rmtree(self.best_before, ignore_errors=True)

    def read(self, find: Callable[[], Path], read: Callable[[Path], Result]) -> Result:
        """Read a checkpoint of a run that may go on meanwhile: what is replaced as it is read is looked for again.

        Args:
            find: the checkpoint to read, checked.
            read: reads it.
        """
        for _ in range(_ATTEMPTS):
            before = self._standing()
            try:
                found = read(find())
            except (OSError, RunFolderError):
                if self._standing() == before:
                    raise
            else:
                if self._standing() == before:
                    return found
        raise RunFolderError(
            f"{self.path}: its checkpoints are replaced faster than they can be read. Try again later."
        )

    def _standing(self) -> list[tuple[int, int] | None]:
        return [_identity(path) for path in (self.latest, self.previous, self.best, self.best_before)]

    def remove_drafts(self) -> None:
        """Take away what a killed process left half-written, and put back a best one that was about to be replaced."""
        if not self.best.exists() and self.best_before.is_dir():
            self.best_before.rename(self.best)
        shutil.rmtree(self.best_before, ignore_errors=True)
        for draft in self.path.glob(f"{_DRAFT}*"):
            shutil.rmtree(draft, ignore_errors=True)

    def newest(self) -> Path | None:
        """The checkpoint to go on from, checked; None where none was finished.

        Raises:
            RunFolderError: it is damaged; the one before it is named, if there is one.
        """
        for path in (self.latest, self.previous):
            if path.is_dir():
                found = damage(path)
                if found is None:
                    return path
                remedy = "Restore it from a copy, or start a new run."
                if path == self.latest and self.previous.is_dir() and damage(self.previous) is None:
                    remedy = f"Remove {path} to go on from {self.previous}, one epoch earlier."
                raise RunFolderError(f"checkpoint {path}: is damaged ({found}). {remedy}")
        return None


def check_whole(checkpoint: Path) -> None:
    """Raise RunFolderError where a checkpoint is not as it was written."""
    found = damage(checkpoint)
    if found is not None:
        raise _error(checkpoint, found)


def described(checkpoint: Path) -> dict[str, Any]:
    """What ``save`` was told about a checkpoint."""
    return _manifest(checkpoint).about


def epoch_of(checkpoint: Path) -> int:
    """The epoch that a checkpoint ends, from 0."""
    return _manifest(checkpoint).epoch - 1


def _manifest(checkpoint: Path) -> Manifest:
    try:
        return read_manifest(checkpoint)
    except Damaged as damage:
        raise _error(checkpoint, damage) from None


def _error(checkpoint: Path, damage: object) -> RunFolderError:
    remedy = "Restore it from a copy, or remove it to go without."
    return RunFolderError(f"checkpoint {checkpoint}: is damaged ({damage}). {remedy}")


def _write(write: Callable[[Path], None], draft: Path) -> None:
    """Serialisers wrap the system's error in their own: find a full disk behind it."""
    try:
        write(draft)
    except OSError:
        raise
    except Exception as error:
        text = str(error)
        is_full = "No space left" in text or "os error 28" in text or shutil.disk_usage(draft).free < 2**20
        raise OSError(errno.ENOSPC if is_full else errno.EIO, text) from error


def _identity(folder: Path) -> tuple[int, int] | None:
    try:
        found = folder.stat()
    except OSError:
        return None
    return found.st_ino, found.st_ctime_ns
