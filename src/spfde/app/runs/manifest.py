"""What is written beside a checkpoint's files: the epoch, whose run it is, and the checksum of each."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

from annotated_types import Ge
from pydantic import BaseModel, ConfigDict, ValidationError

from spfde.core import json_text
from spfde.core.files import sync_file, sync_folder

MANIFEST = "manifest.json"


class Damaged(Exception):
    """A folder is not as it was sealed; the message says what is wrong."""


class Manifest(BaseModel):
    """What a sealed folder says of itself; ``epoch`` is the one that comes next."""

    model_config = ConfigDict(strict=True)

    epoch: Annotated[int, Ge(0)]
    about: dict[str, Any]
    sha256: dict[str, str]


def seal(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Write the manifest, and wait until all is on disk; every file gets the mode that the umask gives."""
    sums = {str(path.relative_to(folder)): _checksum(path) for path in files_in(folder)}
    written = folder / MANIFEST
    written.write_text(json.dumps({**manifest, "sha256": sums}, indent=2), encoding="utf-8")
    for path in files_in(folder):
        path.chmod(written.stat().st_mode)  # safetensors keeps what it writes to itself
        sync_file(path)
    sync_folder(folder)


def read_manifest(folder: Path) -> Manifest:
    """What was sealed.

    Raises:
        Damaged: it is missing, cannot be read, or says something else.
    """
    try:
        found = Manifest.model_validate(json_text.read(folder / MANIFEST))
    except FileNotFoundError:
        raise Damaged(f"{MANIFEST} is missing") from None
    except ValidationError as error:
        wrong = error.errors(include_url=False)[0]
        place = ".".join(map(str, wrong["loc"])) or "it"
        raise Damaged(f"{MANIFEST} cannot be read: {place}: {wrong['msg']}") from None
    except (OSError, ValueError) as error:
        raise Damaged(f"{MANIFEST} cannot be read: {error}") from None
    for name in map(PurePosixPath, found.sha256):
        if name.is_absolute() or ".." in name.parts:
            raise Damaged(f"{MANIFEST} names {name}, which is outside of the folder")
    return found


def damage(folder: Path) -> str | None:
    """What is wrong with a sealed folder; None where it is as it was written."""
    try:
        sums = read_manifest(folder).sha256
    except Damaged as error:
        return str(error)
    for name, expected in sums.items():
        path = folder / name
        try:
            if not path.is_file():
                return f"{name} is missing"
            if _checksum(path) != expected:
                return f"{name} has another checksum than when it was written"
        except (OSError, ValueError) as error:
            return f"{name} cannot be read: {error}"
    return None


def files_in(folder: Path) -> list[Path]:
    """The files in a folder and below it."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
