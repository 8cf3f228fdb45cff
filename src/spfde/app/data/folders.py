"""Folders of images: ``DIR/train/CLASS/*.png`` and ``DIR/test/CLASS/*`` or ``DIR/val/CLASS/*``.

Every image is turned to RGB, cut at its centre to the shape of the image size, and scaled to it. The random part of
augmentation is not decided here: parts of whole images are given (``ImageFiles.cropped``), and follow from seeds, so a
resumed run sees the same batches whatever the number of workers.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from spfde.app.data import kept_lists
from spfde.app.data.decoding import check_header, decode, decode_part, fit, size_of
from spfde.app.data.images import Box, DataSpec, ImageArray, ImageData, channel_statistics, data_error
from spfde.app.data.listing import FileList, find_images
from spfde.app.train.augment import AugmentMode

TEST_FOLDERS = ("test", "val")
LARGEST_SIZE = 224
"""What large images are brought to where no size is asked for, in pixels a side."""
STATISTICS_SAMPLES = 512
_LAYOUT = "The layout is DIR/train/CLASS/IMAGE and DIR/test/CLASS/IMAGE (or DIR/val/…)."


@dataclass(frozen=True)
class KnownFolder:
    """An image folder whose counts are known without it.

    Attributes:
        spec: its name, shape and counts.
        statistics: mean and standard deviation of each channel, as shares of 255.
        augmentation: what ``auto`` stands for.
        remedy: how to get it.
    """

    spec: DataSpec
    statistics: tuple[tuple[float, ...], tuple[float, ...]]
    augmentation: AugmentMode
    remedy: str


class ImageFiles(Dataset[tuple[Tensor, int]]):
    """Images that are decoded when they are asked for, as ``(3, H, W)`` of uint8.

    Args:
        files: what is found below the folder.
        is_checked: whether each is known to have the header of an image.
    """

    image_size: tuple[int, int] = (LARGEST_SIZE, LARGEST_SIZE)
    """(height, width) of every image that is handed out."""
    crop_share: float = 1.0
    """Of the shorter side of a whole image, the share that is within the cut at its centre."""

    def __init__(self, files: FileList, *, is_checked: bool = False) -> None:
        self.files, self._is_checked = files, is_checked

    @classmethod
    def below(cls, root: Path) -> ImageFiles:
        """The images below ``root``: as they were found last, where nothing has changed since, or found now.

        Raises:
            DataError: as ``find_images``.
            OSError: likewise.
        """
        if known := kept_lists.recall(root):
            return cls(known[0], is_checked=known[1])
        found = find_images(root)
        kept_lists.keep(found, is_checked=False)
        return cls(found)

    @property
    def classes(self) -> tuple[str, ...]:
        """Their names, in order."""
        return self.files.classes

    @property
    def targets(self) -> Tensor:
        """Class of each image, ``(N,)``, int64."""
        return self.files.targets

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """One image and its label.

        Raises:
            DataError: the file cannot be decoded; the message names it.
        """
        height, width = (math.ceil(side / self.crop_share) for side in self.image_size)
        image = decode(self.files.path(index), at_least=(height, width))
        return fit(image, self.image_size, self.crop_share), int(self.files.targets[index])

    def cropped(self, index: int, box_in: Callable[[int, int], Box]) -> tuple[Tensor, int]:
        """A part of one image, scaled to the image size, and its label.

        Args:
            index: of the image.
            box_in: gives the part, of the image's height and width.

        Raises:
            DataError: the file cannot be decoded; the message names it.
        """
        return decode_part(self.files.path(index), box_in, self.image_size), int(self.files.targets[index])

    def check(self) -> None:
        """Look at the header of each file, unless that has been done.

        Raises:
            DataError: one is no image.
        """
        if not self._is_checked:
            _in_threads(check_header, self.files.paths(), at_once=256)  # threads wait for the disk side by side
            self._is_checked = True
            kept_lists.keep(self.files, is_checked=True)


def describe_folder(path: str | Path, *, image_size: int | None = None) -> DataSpec:
    """Count the files; of the images only the first one's header is read, which decides the size of all.

    Args:
        path: the folder.
        image_size: rows and columns of all images; None: see above.

    Raises:
        DataError: the folder is not laid out as the module says.
    """
    return _describe(path, *_find(path), image_size)


def load_folder(
    path: str | Path, *, image_size: int | None = None, crop_share: float = 1.0, in_memory_bytes: int = 512 * 2**20
) -> ImageData:
    """Open a folder; a set that fits into ``in_memory_bytes`` once decoded is decoded now and kept in memory.

    In memory, an unreadable image is found now. In a larger set a file that is no image is found now, by its header
    (once, where the list of files is kept), and a damaged one when it is met (512 training images are decoded now,
    evenly spaced, for mean and deviation).

    Raises:
        DataError: as ``describe_folder``, or an image cannot be decoded.
    """
    train, test = _find(path)
    spec = _describe(path, train, test, image_size)
    train.image_size = test.image_size = spec.image_size
    train.crop_share = test.crop_share = crop_share
    size = (len(train) + len(test)) * 3 * spec.image_size[0] * spec.image_size[1]
    if size <= in_memory_bytes:
        arrays = [ImageArray(_decode_all(files, range(len(files))), files.targets, files) for files in (train, test)]
        mean, std = channel_statistics(arrays[0].images)
        return ImageData(spec, arrays[0], arrays[1], mean, std, "crop+flip", class_names=train.classes)
    for files in (train, test):
        files.check()
    # The paths are sorted by class, so an even spacing is class-balanced.
    chosen = torch.linspace(0, len(train) - 1, min(len(train), STATISTICS_SAMPLES)).long().tolist()
    mean, std = channel_statistics(_decode_all(train, chosen))
    return ImageData(spec, train, test, mean, std, "crop+flip", in_memory=False, class_names=train.classes)


def load_known(known: KnownFolder, root: Path, image_size: int | None = None, crop_share: float = 1.0) -> ImageData:
    """Open the folder of a set whose counts and statistics are known; its images are decoded when they are asked for.

    Args:
        known: the set.
        root: the folder with ``train`` and ``val``.
        image_size: rows and columns of all images; None: those of ``known``.
        crop_share: as ``load_data``.

    Raises:
        DataError: it is not there, or not whole.
    """
    spec = known.spec
    if not os.path.isdir(root):
        raise data_error(spec.name, f"is looked for in {root}, which is no folder", known.remedy)
    train, test = _find(spec.name, root, test_folders=("val",))
    counts = (len(train.classes), len(train), len(test))
    if counts != (spec.num_classes, spec.train_samples, spec.test_samples):
        found, whole = (
            f"{classes:,} classes, {samples:,} images in train and {tested:,} in val"
            for classes, samples, tested in (counts, (spec.num_classes, spec.train_samples, spec.test_samples))
        )
        remedy = f"Complete it, or train on what is there under its own name: --data {root}."
        raise data_error(spec.name, f"has {found} in {root}, and not {whole}", remedy)
    if image_size:
        spec = replace(spec, image_size=(image_size, image_size))
    for files in (train, test):
        files.image_size, files.crop_share = spec.image_size, crop_share
        files.check()
    mean, std = map(torch.tensor, known.statistics)
    return ImageData(spec, train, test, mean, std, known.augmentation, in_memory=False, class_names=train.classes)


def _decode_all(files: ImageFiles, indices: Sequence[int]) -> Tensor:
    images = torch.empty((len(indices), 3, *files.image_size), dtype=torch.uint8)

    def place(position: int) -> None:
        images[position] = files[indices[position]][0]

    _in_threads(place, range(len(indices)))  # decoders release the interpreter's lock
    return images


def _in_threads(act: Callable[[Any], object], items: Iterable[Any], at_once: int = 1) -> None:
    """Call ``act`` for each item, by one thread for ``at_once`` of them: switching takes longer than a short call."""

    def act_on(some: tuple[Any, ...]) -> None:
        for item in some:
            act(item)

    parts = _batched(items, at_once)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        while some := tuple(islice(parts, 1024)):  # a queue of millions of calls would take gigabytes
            for _ in pool.map(act_on, some):
                pass


def _batched(items: Iterable[Any], size: int) -> Iterator[tuple[Any, ...]]:
    """Items in tuples of ``size``, the last one shorter; ``itertools`` has it from Python 3.12 on."""
    rest = iter(items)
    while some := tuple(islice(rest, size)):
        yield some


def _find(
    data: str | Path, root: Path | None = None, test_folders: Sequence[str] = TEST_FOLDERS
) -> tuple[ImageFiles, ImageFiles]:
    """Training and test files, with agreeing classes.

    Args:
        data: as it was named.
        root: where it is; None: that is its path.
        test_folders: names of the folder with the test files, the first one that is there.
    """
    where, root = ("", Path(data)) if root is None else (f" in {root}", root)
    test_name = next((name for name in test_folders if (root / name).is_dir()), None)
    if not (root / "train").is_dir() or test_name is None:
        found = ", ".join(sorted(entry.name for entry in root.iterdir() if entry.is_dir())[:8]) or "no folders"
        wanted = " or ".join(test_folders)
        raise data_error(data, f"needs a train folder and a {wanted} folder{where} (it has {found})", _LAYOUT)
    try:
        train, test = (ImageFiles.below(root / name) for name in ("train", test_name))
    except OSError as error:
        raise data_error(data, f"cannot be used: {error}", _LAYOUT) from error
    if train.classes != test.classes:
        only = {"train": set(train.classes) - set(test.classes), test_name: set(test.classes) - set(train.classes)}
        lists = "; ".join(f"only in {name}: {', '.join(sorted(names)[:8])}" for name, names in only.items() if names)
        rule = f"train and {test_name} must have the same class folders ({lists})"
        raise data_error(data, rule, "Add or remove folders until they agree.")
    if len(train.classes) < 2:
        raise data_error(data, f"has one class ({train.classes[0]}), but there must be 2 at least", _LAYOUT)
    _keep_apart(train, test)
    return train, test


def _keep_apart(train: ImageFiles, test: ImageFiles) -> None:
    """Leave out images that a link brings into both sets: of the set that has the link, of training where both have.

    Raises:
        DataError: nothing is left of a class.
    """
    roots = [os.path.realpath(each.files.root) + os.sep for each in (train, test)]
    is_apart = not roots[0].startswith(roots[1]) and not roots[1].startswith(roots[0])
    if is_apart and not (train.files.has_links or test.files.has_links):
        return
    real, real_test = _real_paths(train.files), _real_paths(test.files)
    shared = set(real) & set(real_test)
    of_train = shared if roots[0] == roots[1] else {path for path in shared if not path.startswith(roots[0])}
    for each, found, left_out in ((train, real, of_train), (test, real_test, shared - of_train)):
        if left_out:
            files = each.files
            warnings.warn(
                f"{len(left_out)} images of {files.root} are in the other set, by links ({min(left_out)}): they are "
                "left out here.",
                stacklevel=4,
            )
            each.files = files.without(torch.tensor([path in left_out for path in found]))
            empty = set(range(len(files.classes))) - set(each.targets.tolist())
            if empty:
                folder, rule = Path(files.root) / files.classes[min(empty)], "has no image that is not in the other set"
                raise data_error(folder, rule, "Give training and test images of their own.")


def _real_paths(files: FileList) -> list[str]:
    """Where each image is, links followed; only of links and folders it costs much to ask."""
    folders: dict[str, str] = {}
    found = []
    for path in files.paths():
        if os.path.islink(path):
            found.append(os.path.realpath(path))
            continue
        folder, name = os.path.split(path)
        if folder not in folders:
            folders[folder] = os.path.realpath(folder)
        found.append(os.path.join(folders[folder], name))
    return found


def _describe(path: str | Path, train: ImageFiles, test: ImageFiles, image_size: int | None) -> DataSpec:
    """The size that was asked for; or the first image's own where that is small, else the square that fits into it, 224
    pixels at most.
    """
    width, height = (image_size, image_size) if image_size else size_of(train.files.path(0))
    if max(width, height) > 64 and not image_size:
        width = height = min(width, height, LARGEST_SIZE)
    return DataSpec(str(path), len(train.classes), 3, (height, width), len(train), len(test))
