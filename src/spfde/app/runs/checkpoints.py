"""Checkpoints of a run: written whole into a folder of their own, with checksums, before they take their name.

At every moment ``latest`` or ``previous`` is a whole checkpoint, so that a kill loses one epoch at most. Those in
``kept`` hold the model alone and stay.
"""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from spfde.core.errors import RunFolderError
from spfde.core.files import clear_errors, sync_file, sync_folder

MANIFEST = "manifest.json"
_DRAFT = ".writing-"
_KEPT = "epoch-"


class Checkpoints:
    """The checkpoints in a folder: ``latest``, the one before it as ``previous``, and a copy of the ``best``."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.latest, self.previous, self.best = path / "latest", path / "previous", path / "best"

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
                _seal(draft, {"epoch": epoch, "about": about})
                yield draft
        except Exception:
            # On a full disk the unfinished files are in the way of everything else.
            self.remove_drafts()
            raise

    def _copy_best(self, sealed: Path) -> None:
        draft = self.path / f"{_DRAFT}best"
        shutil.rmtree(draft, ignore_errors=True)
        for path in _files(sealed):
            # Not copytree: it collects the system's errors into one of its own, which hides a full disk.
            copy = draft / path.relative_to(sealed)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)
            sync_file(copy)
        shutil.rmtree(self.best, ignore_errors=True)
        draft.rename(self.best)

    def remove_drafts(self) -> None:
        """Take away what a killed process left half-written."""
        for draft in self.path.glob(f"{_DRAFT}*"):
            shutil.rmtree(draft, ignore_errors=True)

    def newest(self) -> Path | None:
        """The checkpoint to go on from, checked; None where none was finished.

        Raises:
            RunFolderError: it is damaged; the one before it is named, if there is one.
        """
        for path in (self.latest, self.previous):
            if path.is_dir():
                damage = _damage(path)
                if damage is None:
                    return path
                remedy = "Restore it from a copy, or start a new run."
                if path == self.latest and self.previous.is_dir() and _damage(self.previous) is None:
                    remedy = f"Remove {path} to go on from {self.previous}, one epoch earlier."
                raise RunFolderError(f"checkpoint {path}: is damaged ({damage}). {remedy}")
        return None


def check_whole(checkpoint: Path) -> None:
    """Raise RunFolderError where a checkpoint is not as it was written."""
    damage = _damage(checkpoint)
    if damage is not None:
        raise RunFolderError(
            f"checkpoint {checkpoint}: is damaged ({damage}). Restore it from a copy, or remove it to go without."
        )


def described(checkpoint: Path) -> dict[str, Any]:
    """What ``save`` was told about a checkpoint."""
    about: dict[str, Any] = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))["about"]
    return about


def epoch_of(checkpoint: Path) -> int:
    """The epoch that a checkpoint ends, from 0."""
    return int(json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))["epoch"]) - 1


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


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _seal(folder: Path, manifest: Mapping[str, Any]) -> None:
    sums = {str(path.relative_to(folder)): _checksum(path) for path in _files(folder)}
    (folder / MANIFEST).write_text(json.dumps({**manifest, "sha256": sums}, indent=2), encoding="utf-8")
    for path in _files(folder):
        sync_file(path)
    sync_folder(folder)


def _damage(folder: Path) -> str | None:
    """What is wrong with a sealed folder; None where it is as it was written."""
    try:
        sums = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["sha256"].items()
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} cannot be read: {error}"
    for name, expected in sums:
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if _checksum(path) != expected:
            return f"{name} has another checksum than when it was written"
    return None


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
