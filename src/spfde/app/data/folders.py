"""Folders of images: ``DIR/train/CLASS/*.png`` and ``DIR/test/CLASS/*`` or ``DIR/val/CLASS/*``.

Classes are numbered in the sorted order of their folders' names, as torchvision's ``ImageFolder`` does. Every image is
turned to RGB, scaled so that it covers the image size, and cut to it at its centre. The random part of augmentation is
not done here but in whole batches (``augment``): what the workers do has no randomness, so a resumed run sees the same
batches whatever the number of workers.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from spfde.app.data.images import DataSpec, ImageArray, ImageData, channel_statistics, data_error
from spfde.core.errors import DataError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
TEST_FOLDERS = ("test", "val")
LARGEST_SIZE = 224
IN_MEMORY_BYTES = 512 * 2**20
STATISTICS_SAMPLES = 512
_LAYOUT = "The layout is DIR/train/CLASS/IMAGE and DIR/test/CLASS/IMAGE (or DIR/val/…)."


@dataclass(frozen=True)
class ImageFolder:
    """The files of one split.

    Attributes:
        classes: names, in the order of their labels.
        paths: of all images.
        labels: one for each path.
    """

    classes: tuple[str, ...]
    paths: tuple[str, ...]
    labels: tuple[int, ...]


class ImageFiles(Dataset[tuple[Tensor, int]]):
    """Images that are decoded when they are asked for.

    Args:
        files: where they are.
        image_size: (height, width) of every image handed out.
    """

    def __init__(self, files: ImageFolder, *, image_size: tuple[int, int]) -> None:
        self.files = files
        self.image_size = image_size

    @property
    def labels(self) -> tuple[int, ...]:
        """The class of each image."""
        return self.files.labels

    def __len__(self) -> int:
        return len(self.files.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """One image ``(3, H, W)`` of uint8 and its label.

        Raises:
            DataError: the file cannot be decoded; the message names it.
        """
        return decode(self.files.paths[index], image_size=self.image_size), self.files.labels[index]


def decode(path: str, *, image_size: tuple[int, int]) -> Tensor:
    """Decode one file to ``(3, height, width)`` of uint8.

    Raises:
        DataError: the file cannot be read as an image.
    """
    image_module = _pillow(path)
    from PIL import ImageOps  # an extra

    height, width = image_size
    try:
        with image_module.open(path) as image:
            image.draft("RGB", (width, height))  # lets JPEG decode at a lower resolution where that is enough
            fitted = ImageOps.fit(image.convert("RGB"), (width, height), image_module.Resampling.BILINEAR)
    except Exception as error:  # decoders raise whatever they like on damaged files
        raise _unreadable(path, error) from error
    return torch.from_numpy(np.array(fitted)).permute(2, 0, 1).contiguous()


def describe_folder(path: str | Path, *, image_size: tuple[int, int] | None = None) -> DataSpec:
    """Count the files; only the first image's header is read, and only when ``image_size`` is None.

    Args:
        path: the folder.
        image_size: (height, width); None takes the first training image's, at most 224 for its shorter side, square
            unless the image is small.

    Raises:
        DataError: the folder is not laid out as the module says.
    """
    train, test = _scan(path)
    return _spec(path, train, test, image_size)


def load_folder(
    path: str | Path, *, image_size: tuple[int, int] | None = None, in_memory_bytes: int = IN_MEMORY_BYTES
) -> ImageData:
    """Open a folder; a set that fits into ``in_memory_bytes`` once decoded is decoded now and kept in memory.

    In memory, an unreadable image is found now. In a larger set a file that is no image is found now, by its header,
    and a damaged one when it is met (512 training images are decoded now, evenly spaced, for mean and deviation).

    Raises:
        DataError: as ``describe_folder``, or an image cannot be decoded.
    """
    folders = _scan(path)
    spec = _spec(path, *folders, image_size)
    sets = [ImageFiles(files, image_size=spec.image_size) for files in folders]
    train, test = sets
    size = (len(train) + len(test)) * 3 * spec.image_size[0] * spec.image_size[1]
    if size <= in_memory_bytes:
        arrays = [ImageArray(_decode_all(files, range(len(files))), torch.tensor(files.files.labels)) for files in sets]
        mean, std = channel_statistics(arrays[0].images)
        return ImageData(spec, arrays[0], arrays[1], mean, std, "crop+flip")
    for files in folders:
        _check_headers(files.paths)
    # The paths are sorted by class, so an even spacing is class-balanced.
    chosen = torch.linspace(0, len(train) - 1, min(len(train), STATISTICS_SAMPLES)).long().tolist()
    mean, std = channel_statistics(_decode_all(train, chosen))
    return ImageData(spec, train, test, mean, std, "crop+flip", in_memory=False)


def _decode_all(files: ImageFiles, indices: Sequence[int]) -> Tensor:
    images = torch.empty((len(indices), 3, *files.image_size), dtype=torch.uint8)

    def place(position: int) -> None:
        images[position] = files[indices[position]][0]

    _in_threads(place, range(len(indices)))  # decoders release the interpreter's lock
    return images


def _check_headers(paths: Sequence[str]) -> None:
    """Raise ``DataError`` for the first file that does not begin as an image does."""
    _in_threads(_size_of, paths)  # which wait for the disk, each at another file


def _in_threads(act: Callable[[Any], object], items: Sequence[Any]) -> None:
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for start in range(0, len(items), 4096):  # a queue of millions of calls would take gigabytes
            for _ in pool.map(act, items[start : start + 4096]):
                pass


def _scan(path: str | Path) -> tuple[ImageFolder, ImageFolder]:
    """Training and test files, with agreeing classes."""
    root = Path(path)
    if not root.is_dir():
        raise data_error(path, "is no folder", _LAYOUT)
    test_name = next((name for name in TEST_FOLDERS if (root / name).is_dir()), None)
    if not (root / "train").is_dir() or test_name is None:
        found = ", ".join(sorted(entry.name for entry in root.iterdir() if entry.is_dir())[:8]) or "no folders"
        raise data_error(path, f"needs a train folder and a test or val folder (it has {found})", _LAYOUT)
    train, test = (_scan_split(root / name, shown=path) for name in ("train", test_name))
    if train.classes != test.classes:
        only_train = sorted(set(train.classes) - set(test.classes))
        only_test = sorted(set(test.classes) - set(train.classes))
        lists = [f"only in train: {', '.join(only_train[:8])}" if only_train else ""]
        lists.append(f"only in {test_name}: {', '.join(only_test[:8])}" if only_test else "")
        rule = f"train and {test_name} must have the same class folders ({'; '.join(filter(None, lists))})"
        raise data_error(path, rule, "Add or remove folders until they agree.")
    if len(train.classes) < 2:
        raise data_error(path, f"has one class ({train.classes[0]}), but there must be 2 at least", _LAYOUT)
    return train, test


def _scan_split(folder: Path, *, shown: object) -> ImageFolder:
    try:
        with os.scandir(folder) as entries:
            classes = sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
        if not classes:
            raise data_error(shown, f"{folder} has no class folders", _LAYOUT)
        paths: list[str] = []
        labels: list[int] = []
        for label, name in enumerate(classes):
            members = sorted(
                os.path.join(parent, file)
                for parent, _, files in os.walk(folder / name, followlinks=True)
                for file in files
                if file.lower().endswith(EXTENSIONS) and not file.startswith(".")
            )
            if not members:
                remedy = f"Add images ({', '.join(EXTENSIONS)}) or remove the folder."
                raise data_error(shown, f"{folder / name} holds no images", remedy)
            paths.extend(members)
            labels.extend([label] * len(members))
    except OSError as error:
        raise data_error(shown, f"cannot be listed: {error}", "Check the permissions.") from error
    return ImageFolder(tuple(classes), tuple(paths), tuple(labels))


def _spec(path: str | Path, train: ImageFolder, test: ImageFolder, image_size: tuple[int, int] | None) -> DataSpec:
    size = image_size if image_size is not None else _natural_size(train.paths[0])
    return DataSpec(str(path), len(train.classes), 3, size, len(train.paths), len(test.paths))


def _natural_size(path: str) -> tuple[int, int]:
    """The first image's own size when that is small, else the square that fits into it, of 224 pixels at most."""
    width, height = _size_of(path)
    if max(width, height) <= 64:
        return height, width
    side = min(width, height, LARGEST_SIZE)
    return side, side


def _size_of(path: str) -> tuple[int, int]:
    """Width and height, by the file's header."""
    try:
        with _pillow(path).open(path) as image:
            width, height = image.size
    except DataError:
        raise
    except Exception as error:
        raise _unreadable(path, error) from error
    return int(width), int(height)


def _pillow(path: object) -> Any:
    try:
        from PIL import Image  # an extra
    except ImportError as error:
        raise data_error(path, "needs the package Pillow", "Install it: pip install 'spfde[vision]'.") from error
    return Image


def _unreadable(path: str, error: Exception) -> DataError:
    return data_error(
        path, f"cannot be read as an image ({type(error).__name__}: {error})", "Repair or remove the file."
    )
