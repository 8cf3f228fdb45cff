"""Lists of images that were found before, in the user's cache folder: no start looks for a million files again.

A list is taken only where its checksum fits and every folder that it was read from is as it was then: the same inode,
modified and changed at the same moment. A file that comes, goes or is renamed changes that of its folder. Lists with
links in them are not kept, as where those lead may change without it; nor is what changed within the last seconds,
since a file system's clock may be too coarse to tell the next change from it. Nothing in a list is code.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from pathlib import Path

import numpy as np
import torch

from spfde.app.data.listing import FileList, Mark, mark
from spfde.core import json_text
from spfde.core.files import written_whole
from spfde.engines.native.build import cache_folder
from spfde.engines.native.library_cache import Unusable, made

FORMAT = 1
KEPT_FROM = 10_000
"""Images; fewer are found in less than a second."""
SETTLED_SECONDS = 3.0
"""A folder that has been left alone for so long is told from itself after the next change, on any file system."""


def recall(root: str | Path) -> tuple[FileList, bool] | None:
    """The list of a folder as it was found last, and whether its images have been looked at.

    Returns:
        None where there is none, or where it is damaged or the folder is no longer as it was.
    """
    try:
        files, is_checked = _read(str(root))
        if all(mark(os.path.join(files.root, below)) == known for below, known in files.marks.items()):
            return files, is_checked
    except (OSError, ValueError, KeyError, TypeError, Unusable):
        pass  # looking anew is never wrong
    return None


def keep(files: FileList, *, is_checked: bool) -> None:
    """Keep a list for the next start, where it is worth it and can be trusted then."""
    newest = max(max(modified, changed) for _, modified, changed in files.marks.values())
    if len(files) < KEPT_FROM or files.has_links or newest > files.began - SETTLED_SECONDS * 1e9:
        return
    try:
        made(cache_folder())
        made(_place(files.root).parent)
        with written_whole(_place(files.root), mode=0o600) as (draft,):
            draft.write_bytes(_packed(files, is_checked))
    except (OSError, Unusable) as error:
        told = f"The list of the images in {files.root} cannot be kept ({error}): every start looks for them anew."
        warnings.warn(told, stacklevel=2)


def _place(root: str) -> Path:
    name = hashlib.sha256(os.fsencode(os.path.realpath(root))).hexdigest()[:32]
    return cache_folder() / "lists" / name


def _packed(files: FileList, is_checked: bool) -> bytes:
    """A checksum, a line of JSON, and the arrays: names, their lengths and their classes."""
    about = {
        "format": FORMAT,
        "root": os.path.realpath(files.root),
        "classes": files.classes,
        "marks": files.marks,
        "images": len(files),
        "began": files.began,
        "is_checked": is_checked,
    }
    lengths = torch.diff(files.ends, prepend=torch.zeros(1, dtype=torch.int64))
    arrays = (part.to(torch.int32).numpy().astype("<i4").tobytes() for part in (lengths, files.targets))
    content = b"".join([json.dumps(about).encode(), b"\n", *arrays, files.names.numpy().tobytes()])
    return hashlib.sha256(content).digest() + content


def _read(root: str) -> tuple[FileList, bool]:
    """What is kept of a folder.

    Raises:
        OSError: nothing.
        ValueError: it is not as it was written, or of another folder or layout; KeyError and TypeError are the same.
    """
    place = _place(root)
    place.stat()  # where there is none, no folder is made for it
    made(place.parent)
    content = memoryview(place.read_bytes())
    if hashlib.sha256(content[32:]).digest() != content[:32]:
        raise ValueError("the checksum does not fit")
    end = content.obj.index(b"\n", 32)  # type: ignore[attr-defined]  # of bytes
    about = json_text.parse(str(content[32:end], "utf-8"))
    if about["format"] != FORMAT or about["root"] != os.path.realpath(root):
        raise ValueError("of another layout, or of another folder")
    n = about["images"]
    lengths, targets = (
        torch.from_numpy(np.frombuffer(content, "<i4", n, end + 1 + 4 * n * part).astype(np.int64)) for part in (0, 1)
    )
    marks: dict[str, Mark] = {below: (ino, at, changed) for below, (ino, at, changed) in about["marks"].items()}
    names = torch.from_numpy(np.frombuffer(content, np.uint8, offset=end + 1 + 8 * n).copy())
    files = FileList(root, tuple(about["classes"]), names, lengths.cumsum(0), targets, marks, False, about["began"])
    if int(files.ends[-1]) != len(names):
        raise ValueError("names and their lengths do not fit")
    return files, bool(about["is_checked"])
