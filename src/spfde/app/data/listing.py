"""The images below a folder, found and held so that a million of them take tens of megabytes."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from spfde.app.data.images import data_error

SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
"""How the names of images end, in small letters or capitals: those that torchvision's ``ImageFolder`` takes."""

Mark = tuple[int, int, int]
"""What tells whether a folder's entries have changed: its inode, and when it was modified and changed, in ns."""


@dataclass(frozen=True, eq=False)
class FileList:
    """The images of each class, in the order of the classes and of their paths.

    Tensors and no lists: loader workers that are started by fork would copy a list by looking at it, as that counts
    references, and those that are started by spawn get tensors in shared memory.

    Attributes:
        root: the folder.
        classes: their names in order.
        names: paths below ``root``, one after the other, as the system has them; uint8.
        ends: where each ends in ``names``, ``(N,)``, int64.
        targets: class of each image, ``(N,)``, int64.
        marks: of each folder that was read, by its path below ``root``, taken before it was.
        has_links: whether a link lies in it: what that points at may change, and no mark would tell.
        began: when it was begun to look for them, in ns.
    """

    root: str
    classes: tuple[str, ...]
    names: Tensor
    ends: Tensor
    targets: Tensor
    marks: dict[str, Mark]
    has_links: bool
    began: int

    def __len__(self) -> int:
        return len(self.ends)

    def path(self, index: int) -> str:
        """Where an image lies; ``index`` counts from 0, or from the end where it is negative."""
        index = range(len(self))[index]
        start = int(self.ends[index - 1]) if index else 0
        name = self.names[start : int(self.ends[index])].numpy().tobytes()
        return os.path.join(self.root, os.fsdecode(name))

    def paths(self) -> Iterator[str]:
        """All of them, in order."""
        return map(self.path, range(len(self)))

    def without(self, leave_out: Tensor) -> FileList:
        """The list less those images for which ``leave_out``, ``(N,)`` of bool, holds."""
        lengths = torch.diff(self.ends, prepend=torch.zeros(1, dtype=torch.int64))
        keep = ~leave_out
        names = self.names[torch.repeat_interleave(keep, lengths)]
        return replace(self, names=names, ends=lengths[keep].cumsum(0), targets=self.targets[keep])


def find_images(root: str | Path) -> FileList:
    """Walk through ``root/CLASS/…``; hidden files and folders of classes are passed over.

    A link that leads out of the tree is followed, and a folder or file that is linked twice counts once.

    Raises:
        DataError: there is no class, a class has no image, a link leads to nothing, or an image is no plain file.
        OSError: a folder cannot be read.
    """
    began, walk = time.time_ns(), _Walk(str(root))
    classes = walk.classes()
    names, counts = bytearray(), []
    lengths: list[np.ndarray[tuple[int], np.dtype[np.int64]]] = []
    for name in classes:
        found = sorted(filter(is_shown_image, walk.files_under(os.path.join(root, name))))
        if not found:
            raise data_error(Path(root) / name, "is a class without an image", "Remove the folder, or add images.")
        encoded = [walk.below(path) for path in found]
        names += b"".join(encoded)
        lengths.append(np.fromiter(map(len, encoded), np.int64, len(encoded)))
        counts.append(len(encoded))
    return FileList(
        root=str(root),
        classes=classes,
        names=torch.frombuffer(names, dtype=torch.uint8),
        ends=torch.from_numpy(np.concatenate(lengths).cumsum()),
        targets=torch.repeat_interleave(torch.arange(len(classes)), torch.tensor(counts)),
        marks=walk.marks,
        has_links=walk.has_links,
        began=began,
    )


def is_shown_image(path: str) -> bool:
    """By its name: an image, and not hidden."""
    return path.lower().endswith(SUFFIXES) and not os.path.basename(path).startswith(".")


def mark(folder: str) -> Mark:
    """What a folder is told by.

    Raises:
        OSError: it is not there, or cannot be asked.
    """
    found = os.stat(folder)
    return found.st_ino, found.st_mtime_ns, found.st_ctime_ns


class _Walk:
    """One walk through a tree.

    Attributes:
        marks: of the folders met, see ``FileList``.
        has_links: whether a link was met.
    """

    def __init__(self, root: str) -> None:
        self._root = root
        self.marks: dict[str, Mark] = {}
        self.has_links = False
        real = os.path.realpath(root)
        # Real folders and linked files that were met, and the folders above the tree.
        self._seen = {real, *map(str, Path(real).parents)}

    @cached_property
    def _inside(self) -> set[str]:
        """The real folders of the whole tree: a link to one, or to a file there, is left out, and said."""
        return {os.path.realpath(folder) for folder, _, _ in os.walk(self._root)}

    def below(self, path: str) -> bytes:
        """A path's part below the root."""
        return os.fsencode(path)[len(os.fsencode(self._root)) :].lstrip(os.fsencode(os.sep))

    def classes(self) -> tuple[str, ...]:
        """Names of the folders in the root, in order."""
        names = [entry.name for entry in self._entries(self._root) if entry.is_dir()]
        shown = tuple(sorted(name for name in names if not name.startswith(".")))
        if not shown:
            raise data_error(
                self._root, "has no class folder", "Put the images of each class into a folder of its name."
            )
        return shown

    def _entries(self, folder: str) -> Sequence[os.DirEntry[str]]:
        self.marks[os.fsdecode(self.below(folder))] = mark(folder)
        with os.scandir(folder) as entries:
            found = list(entries)
        for entry in found:
            if entry.is_symlink():
                self.has_links = True
                if not entry.name.startswith(".") and not os.path.exists(entry.path):
                    raise data_error(entry.path, "is a link to nothing", "Mount what it points at, or remove it.")
        return found

    def files_under(self, start: str) -> Iterator[str]:
        """Files in a folder and below it, links outside of the tree followed; each real folder once."""
        waiting = [start]
        while waiting:
            folder = waiting.pop()
            real = os.path.realpath(folder)
            if real in self._seen or (os.path.islink(folder) and real in self._inside):
                _tell_left_out(folder, real)
                continue
            self._seen.add(real)
            for entry in self._entries(folder):
                if entry.is_dir():
                    waiting.append(entry.path)
                elif is_shown_image(entry.path) and not entry.is_file():
                    raise data_error(entry.path, "is no plain file, and could be waited for without end", "Remove it.")
                elif entry.is_symlink() and (target := os.path.realpath(entry.path)):
                    if target in self._seen or os.path.dirname(target) in self._inside:
                        _tell_left_out(entry.path, target)
                        continue
                    self._seen.add(target)
                    yield entry.path
                elif entry.is_file():
                    yield entry.path


def _tell_left_out(link: str, target: str) -> None:
    warnings.warn(f"{link} is a link to {target}, which is read already: it is left out.", stacklevel=2)
