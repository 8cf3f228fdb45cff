"""Folders of images: ``DIR/train/CLASS/*.png`` and ``DIR/test/CLASS/*`` or ``DIR/val/CLASS/*``.

The files are found as torchvision's ``ImageFolder`` finds them, but for hidden ones. Every image is turned to RGB,
scaled so that it covers the image size, and cut to it at its centre. The random part of augmentation is not decided
here: crops of whole images are given (``ImageFiles.cropped``), and follow from seeds, so a resumed run sees the same
batches whatever the number of workers.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import is_image_file

from spfde.app.data.images import Box, DataSpec, ImageArray, ImageData, channel_statistics, data_error
from spfde.core.errors import DataError

TEST_FOLDERS = ("test", "val")
LARGEST_SIZE = 224
STATISTICS_SAMPLES = 512
_LAYOUT = "The layout is DIR/train/CLASS/IMAGE and DIR/test/CLASS/IMAGE (or DIR/val/…)."


class ImageFiles(ImageFolder):  # type: ignore[misc]  # torchvision has no types
    """Images that are decoded when they are asked for, as ``(3, H, W)`` of uint8; ``targets`` are their classes."""

    image_size: tuple[int, int] = (LARGEST_SIZE, LARGEST_SIZE)
    """(height, width) of every image that is handed out."""
    crop_share: float = 1.0
    """Of the shorter side of a whole image, the share that is within the cut at its centre."""

    def __init__(self, root: Path) -> None:
        super().__init__(str(root), is_valid_file=_is_shown_image)

    def find_classes(self, directory: str) -> tuple[list[str], dict[str, int]]:
        """Class folders in the order of their names, but for hidden ones.

        Raises:
            DataError: one is a link to nothing.
        """
        for entry in os.scandir(directory):
            _check_link(entry)
        names = [name for name in super().find_classes(directory)[0] if not name.startswith(".")]
        return names, {name: label for label, name in enumerate(names)}

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """One image and its label.

        Raises:
            DataError: the file cannot be decoded; the message names it.
        """
        path, label = self.samples[index]
        height, width = self.image_size
        with _opened(path) as image:
            # Lets JPEG decode at a lower resolution where that is enough.
            image.draft("RGB", (math.ceil(width / self.crop_share), math.ceil(height / self.crop_share)))
            left_out = (1 - self.crop_share) / 2  # on each side
            fitted = ImageOps.fit(_upright(image, path), (width, height), Image.Resampling.BILINEAR, left_out)
        return _as_tensor(fitted), label

    def cropped(self, index: int, box_in: Callable[[int, int], Box]) -> tuple[Tensor, int]:
        """A part of one image, scaled to the image size, and its label.

        Args:
            index: of the image.
            box_in: gives first row, first column, height and width of the part, of the image's height and width.

        Raises:
            DataError: the file cannot be decoded; the message names it.
        """
        path, label = self.samples[index]
        height, width = self.image_size
        with _opened(path) as image:
            whole_width, whole_height = _upright_size(image)
            top, left, rows, columns = box_in(whole_height, whole_width)
            scale = min(rows / height, columns / width)  # a lower resolution must still be enough for the part
            image.draft("RGB", (math.ceil(image.width / scale), math.ceil(image.height / scale)))
            upright = _upright(image, path)
            across, down = upright.width / whole_width, upright.height / whole_height
            right, bottom = min((left + columns) * across, upright.width), min((top + rows) * down, upright.height)
            part = (left * across, top * down, right, bottom)
            return _as_tensor(upright.resize((width, height), Image.Resampling.BILINEAR, part)), label

    @staticmethod
    def make_dataset(
        directory: str, class_to_idx: dict[str, int], extensions: Any = None, is_valid_file: Any = None, **_: Any
    ) -> list[tuple[str, int]]:
        """The images of each class, in the order of their names; a folder that is linked twice counts once.

        Raises:
            DataError: a class has no image.
        """
        samples, root = [], Path(directory)
        # What lies in the tree itself is found there: links to it are left out, upwards or to another class.
        inside = {os.path.realpath(folder) for folder, _, _ in os.walk(root)}
        seen = {os.path.realpath(root), *(str(parent) for parent in Path(os.path.realpath(root)).parents)}
        for name, label in class_to_idx.items():
            found = sorted(path for path in _files_under(root / name, inside, seen) if _is_shown_image(path))
            if not found:
                raise data_error(root / name, "is a class without an image", "Remove the folder, or add images.")
            samples += [(path, label) for path in found]
        return samples


def _files_under(start: Path, inside: set[str], seen: set[str]) -> Iterator[str]:
    """Files in a folder and below it, links outside of the data followed; each real folder once.

    Args:
        start: the folder.
        inside: the real folders of the whole data set; a link to one, or to a file there, is left out, and said.
        seen: real folders and linked files that were met, and folders above the data set; it grows.

    Raises:
        DataError: a link leads to nothing.
    """
    waiting = [str(start)]
    while waiting:
        folder = waiting.pop()
        real = os.path.realpath(folder)
        if real in seen or (os.path.islink(folder) and real in inside):
            warnings.warn(f"{folder} is a link to {real}, which is read already: it is left out.", stacklevel=2)
            continue
        seen.add(real)
        for entry in os.scandir(folder):
            _check_link(entry)
            if entry.is_dir():
                waiting.append(entry.path)
            elif _is_shown_image(entry.path) and not entry.is_file():
                raise data_error(entry.path, "is no plain file, and could be waited for without end", "Remove it.")
            elif entry.is_symlink() and (target := os.path.realpath(entry.path)):
                if target in seen or os.path.dirname(target) in inside:
                    warnings.warn(
                        f"{entry.path} is a link to {target}, which is read already: it is left out.", stacklevel=2
                    )
                    continue
                seen.add(target)
                yield entry.path
            elif entry.is_file():
                yield entry.path


def _check_link(entry: os.DirEntry[str]) -> None:
    if entry.is_symlink() and not entry.name.startswith(".") and not os.path.exists(entry.path):
        raise data_error(entry.path, "is a link to nothing", "Mount what it points at, or remove it.")


# What Pillow turns into 8 bits a channel as it is meant: 0 is black, the largest value white.
_EIGHT_BITS = {"1", "L", "P", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "LA", "PA"}
# By their content, whatever their name: Pillow would start another program for some, such as Ghostscript.
_FORMATS = ("JPEG", "PNG", "BMP", "PPM", "TIFF", "WEBP", "GIF")
_WITH_ALPHA = {"RGBA", "LA", "PA"}
# How a camera held the image, in EXIF, and what puts it upright.
_ORIENTATION, _ON_ITS_SIDE, _Turn = 0x0112, range(5, 9), Image.Transpose
_TURNS = {
    2: _Turn.FLIP_LEFT_RIGHT,
    3: _Turn.ROTATE_180,
    4: _Turn.FLIP_TOP_BOTTOM,
    5: _Turn.TRANSPOSE,
    6: _Turn.ROTATE_270,
    7: _Turn.TRANSVERSE,
    8: _Turn.ROTATE_90,
}


def _as_rgb(image: Any, path: str) -> Any:
    """The image in RGB of 8 bits, on white where it is transparent; 16 bits are scaled.

    Raises:
        DataError: numbers of another range, whose black and white nobody knows.
    """
    mode: str = image.mode
    # Pillow before 11.3 opens grey PNGs of 16 bits as 32.
    if mode.startswith("I;16") or (mode == "I" and image.format == "PNG"):
        return Image.fromarray((np.asarray(image).astype(np.uint32) / 257).round().astype(np.uint8)).convert("RGB")
    if mode not in _EIGHT_BITS:
        rule = f"has pixels of mode {mode} ({image.format}), whose black and white are not known"
        remedy = "Save it with 8 or 16 bits a channel, or put the numbers into an .npz as float32."
        raise data_error(path, rule, remedy)
    if mode in _WITH_ALPHA or "transparency" in image.info:
        above = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", above.size, "white"), above)
    return image.convert("RGB")


def _upright(image: Any, path: str) -> Any:
    """The image in RGB, turned as its camera held it."""
    pixels, turn = _as_rgb(image, path), _TURNS.get(image.getexif().get(_ORIENTATION))
    return pixels if turn is None else pixels.transpose(turn)


def _as_tensor(image: Any) -> Tensor:
    """``(3, H, W)``, uint8."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def _is_shown_image(path: str) -> bool:
    return is_image_file(path) and not os.path.basename(path).startswith(".")


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

    In memory, an unreadable image is found now. In a larger set a file that is no image is found now, by its header,
    and a damaged one when it is met (512 training images are decoded now, evenly spaced, for mean and deviation).

    Raises:
        DataError: as ``describe_folder``, or an image cannot be decoded.
    """
    train, test = _find(path)
    spec = _describe(path, train, test, image_size)
    train.image_size = test.image_size = spec.image_size
    train.crop_share = test.crop_share = crop_share
    size = (len(train) + len(test)) * 3 * spec.image_size[0] * spec.image_size[1]
    if size <= in_memory_bytes:
        arrays = [
            ImageArray(_decode_all(files, range(len(files))), torch.tensor(files.targets), files)
            for files in (train, test)
        ]
        mean, std = channel_statistics(arrays[0].images)
        return ImageData(spec, arrays[0], arrays[1], mean, std, "crop+flip", class_names=tuple(train.classes))
    for files in (train, test):
        _in_threads(_size_of, [name for name, _ in files.samples])  # which wait for the disk, each at another file
    # The paths are sorted by class, so an even spacing is class-balanced.
    chosen = torch.linspace(0, len(train) - 1, min(len(train), STATISTICS_SAMPLES)).long().tolist()
    mean, std = channel_statistics(_decode_all(train, chosen))
    return ImageData(spec, train, test, mean, std, "crop+flip", in_memory=False, class_names=tuple(train.classes))


def _decode_all(files: ImageFiles, indices: Sequence[int]) -> Tensor:
    images = torch.empty((len(indices), 3, *files.image_size), dtype=torch.uint8)

    def place(position: int) -> None:
        images[position] = files[indices[position]][0]

    _in_threads(place, range(len(indices)))  # decoders release the interpreter's lock
    return images


def _in_threads(act: Callable[[Any], object], items: Sequence[Any]) -> None:
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for start in range(0, len(items), 4096):  # a queue of millions of calls would take gigabytes
            for _ in pool.map(act, items[start : start + 4096]):
                pass


def _find(path: str | Path) -> tuple[ImageFiles, ImageFiles]:
    """Training and test files, with agreeing classes."""
    root = Path(path)
    test_name = next((name for name in TEST_FOLDERS if (root / name).is_dir()), None)
    if not (root / "train").is_dir() or test_name is None:
        found = ", ".join(sorted(entry.name for entry in root.iterdir() if entry.is_dir())[:8]) or "no folders"
        raise data_error(path, f"needs a train folder and a test or val folder (it has {found})", _LAYOUT)
    try:
        train, test = (ImageFiles(root / name) for name in ("train", test_name))
    except (OSError, ValueError) as error:
        raise data_error(path, f"cannot be used: {error}", _LAYOUT) from error
    if train.classes != test.classes:
        only = {"train": set(train.classes) - set(test.classes), test_name: set(test.classes) - set(train.classes)}
        lists = "; ".join(f"only in {name}: {', '.join(sorted(names)[:8])}" for name, names in only.items() if names)
        rule = f"train and {test_name} must have the same class folders ({lists})"
        raise data_error(path, rule, "Add or remove folders until they agree.")
    if len(train.classes) < 2:
        raise data_error(path, f"has one class ({train.classes[0]}), but there must be 2 at least", _LAYOUT)
    _keep_apart(train, test)
    return train, test


def _keep_apart(train: ImageFiles, test: ImageFiles) -> None:
    """Leave out images that a link brings into both sets: of the set that has the link, of training where both have.

    Raises:
        DataError: nothing is left of a class.
    """
    real, real_test = _real_paths(train), _real_paths(test)
    shared = set(real) & set(real_test)
    if not shared:
        return
    root = os.path.realpath(train.root) + os.sep
    of_train = {path for path in shared if not path.startswith(root)}
    if root == os.path.realpath(test.root) + os.sep:
        of_train = shared
    for files, found, left_out in ((train, real, of_train), (test, real_test, shared - of_train)):
        if left_out:
            warnings.warn(
                f"{len(left_out)} images of {files.root} are in the other set, by links ({min(left_out)}): they are "
                "left out here.",
                stacklevel=4,
            )
            pairs = zip(files.samples, found, strict=True)
            files.samples = files.imgs = [sample for sample, path in pairs if path not in left_out]
            files.targets = [label for _, label in files.samples]
            empty = set(range(len(files.classes))) - set(files.targets)
            if empty:
                folder, rule = Path(files.root) / files.classes[min(empty)], "has no image that is not in the other set"
                raise data_error(folder, rule, "Give training and test images of their own.")


def _real_paths(files: ImageFiles) -> list[str]:
    """Where each image is, links followed; only of links and folders it costs much to ask."""
    folders: dict[str, str] = {}
    found = []
    for path, _ in files.samples:
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
    width, height = (image_size, image_size) if image_size else _size_of(train.samples[0][0])
    if max(width, height) > 64 and not image_size:
        width = height = min(width, height, LARGEST_SIZE)
    return DataSpec(str(path), len(train.classes), 3, (height, width), len(train), len(test))


def _size_of(path: str) -> tuple[int, int]:
    """Width and height of the upright image, by the file's header."""
    with _opened(path) as image:
        return _upright_size(image)


def _upright_size(image: Any) -> tuple[int, int]:
    width, height = image.size
    on_its_side = image.getexif().get(_ORIENTATION) in _ON_ITS_SIDE
    return (height, width) if on_its_side else (width, height)


@contextmanager
def _opened(path: str) -> Iterator[Any]:
    try:
        with Image.open(path, formats=_FORMATS) as image:
            yield image
    except DataError:
        raise
    except Exception as error:  # decoders raise whatever they like on damaged files
        rule = f"cannot be read as an image ({type(error).__name__}: {error})"
        raise data_error(path, rule, "Repair or remove the file.") from error
