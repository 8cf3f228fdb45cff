"""Data sets in one ``.npz``: read, and checked before anything is done with them.

The archive holds x_train, y_train, x_test and y_test. Images are uint8 or floating, as (N, H, W, C), (N, C, H, W) or
(N, H, W). Which axis of four is the channels: the one of axis 1 and axis 3 with at most ``MAX_CHANNELS`` entries; where
both or neither qualify the archive is refused rather than guessed at. Labels are integers of shape (N,) or (N, 1).
"""

from __future__ import annotations

import math
import stat
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import IO, Any, Literal, NoReturn

import numpy as np
import torch
from torch import Tensor

from spfde.app.data.images import DataSpec, ImageArray, data_error
from spfde.core.errors import DataError

MAX_CHANNELS = 4
KEYS = ("x_train", "y_train", "x_test", "y_test")
UNLABELLED = ("x_test", "x", "images")
_DESCRIPTION = "Make it with numpy.savez(FILE, x_train=…, y_train=…, x_test=…, y_test=…)."

Layout = Literal["NHW", "NHWC", "NCHW"]
Header = tuple[tuple[int, ...], np.dtype[Any]]


def layout_of(shape: tuple[int, ...]) -> Layout | None:
    """Where the channels are; None where that cannot be told (see the module's rule)."""
    if len(shape) == 3:
        return "NHW"
    if len(shape) != 4:
        return None
    first, last = shape[1] <= MAX_CHANNELS, shape[3] <= MAX_CHANNELS
    if first == last:
        return None
    return "NCHW" if first else "NHWC"


def to_nchw(images: np.ndarray[Any, Any]) -> Tensor:
    """Images of a known layout as a contiguous ``(N, C, H, W)`` tensor, uint8 or float32, that owns its memory."""
    layout = layout_of(images.shape)
    if layout == "NHW":
        images = images[:, None]
    elif layout == "NHWC":
        images = images.transpose(0, 3, 1, 2)
    kind = np.uint8 if images.dtype == np.uint8 else np.float32
    with np.errstate(over="ignore"):
        # A value that float32 cannot hold becomes infinite, which the caller refuses.
        return torch.from_numpy(np.array(images, dtype=kind, order="C", copy=True))


def describe_npz(path: str | Path) -> DataSpec:
    """Shapes from the archive's headers and classes from its labels; no image is read.

    Raises:
        DataError: the archive is missing, damaged or not as the module says.
    """
    with _opened(path, path) as archive:
        return _Reader(archive, path).spec


def load_npz(source: str | Path | IO[bytes], name: str | None = None) -> tuple[DataSpec, ImageArray, ImageArray]:
    """Read and check everything.

    Args:
        source: a path, or an open binary file.
        name: what to call the data set in the spec and in errors; the path if None.

    Raises:
        DataError: as ``describe_npz``, or an image holds a NaN or an infinity.
    """
    shown = name if name is not None else str(source)
    with _opened(source, shown) as archive:
        reader = _Reader(archive, shown)
        train, test = (ImageArray(reader.images(f"x_{split}"), reader.labels[split]) for split in ("train", "test"))
        return reader.spec, train, test


def load_images(path: str | Path) -> Tensor:
    """The images of an archive without labels, (N, C, H, W), uint8 or float32: its x_test, or else its x or images.

    Raises:
        DataError: the archive is missing or damaged, or has none; or an image holds a NaN or an infinity.
    """
    with _opened(path, path) as archive:
        reader = _Archive(archive, path)
        key = next((key for key in UNLABELLED if key in reader.held), None)
        if key is None:
            rule = f"has no {', '.join(UNLABELLED[:-1])} or {UNLABELLED[-1]} (it has {reader.holds})"
            raise data_error(path, rule, "Make it with numpy.savez(FILE, x=…).")
        reader.size_of(key, *reader.header(key))
        return reader.images(key)


class _Archive:
    """Reads arrays, and checks what is said of them."""

    def __init__(self, archive: zipfile.ZipFile, shown: object) -> None:
        self._archive = archive
        self._shown = shown
        self.held = {entry.removesuffix(".npy") for entry in archive.namelist()}

    @property
    def holds(self) -> str:
        return ", ".join(sorted(self.held)) or "nothing"

    def images(self, key: str) -> Tensor:
        """Images (N, C, H, W), all finite."""
        images = to_nchw(self.array(key))
        if images.is_floating_point():
            finite = torch.isfinite(images).flatten(1).all(1)
            if not bool(finite.all()):
                bad = int((~finite).nonzero()[0])
                rule = f"{key}[{bad}] holds a NaN or a value that float32 cannot hold"
                self._refuse(rule, f"Remove or repair the {int((~finite).sum())} such image(s).")
        return images

    def _refuse(self, rule: str, remedy: str) -> NoReturn:
        raise data_error(self._shown, rule, remedy)

    def header(self, key: str) -> Header:
        with self._archive.open(f"{key}.npy") as file:
            version = np.lib.format.read_magic(file)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, _, dtype = read(file)
            left = self._archive.getinfo(f"{key}.npy").file_size - file.tell()
        if not dtype.hasobject and math.prod(shape) * dtype.itemsize != left:
            self._refuse(f"{key} has shape {shape} and {left} bytes of {dtype}", "Make the archive anew.")
        return tuple(shape), dtype

    def array(self, key: str) -> np.ndarray[Any, Any]:
        with self._archive.open(f"{key}.npy") as file:
            array: np.ndarray[Any, Any] = np.lib.format.read_array(file, allow_pickle=False)
            file.read(1)  # the archive's checksum is compared at the end of the entry
        return array

    def size_of(self, key: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> tuple[int, int, int]:
        """Channels, height and width of images with this header."""
        if dtype != np.uint8 and dtype.kind != "f":
            remedy = "Store pixels 0–255 as uint8 (x.astype(numpy.uint8)) or any range as float32."
            self._refuse(f"{key} is {dtype}, but images must be uint8 or floating", remedy)
        if len(shape) not in (3, 4):
            remedy = "Store images as (N, H, W, C), (N, C, H, W) or (N, H, W)."
            self._refuse(f"{key} has shape {shape}, but images have 3 or 4 axes", remedy)
        if 0 in shape:
            self._refuse(f"{key} is empty: its shape is {shape}", "Store at least one image.")
        layout = layout_of(shape)
        if layout is None:
            rule = f"{key} has shape {shape}: the channels could be axis 1 or axis 3 (at most {MAX_CHANNELS} entries)"
            self._refuse(rule, "Store images as (N, H, W, C) or (N, C, H, W) with 1 to 4 channels and larger images.")
        sizes = {"NHW": (1, *shape[1:]), "NHWC": (shape[-1], *shape[1:3]), "NCHW": shape[1:]}
        channels, height, width = sizes[layout]
        return channels, height, width


class _Reader(_Archive):
    """Checks headers and labels when made; images are read on demand."""

    def __init__(self, archive: zipfile.ZipFile, shown: object) -> None:
        super().__init__(archive, shown)
        self._check_keys()
        headers = {key: self.header(key) for key in KEYS}
        image_shape = self._check_images(headers)
        self._check_label_headers(headers)
        self.labels = {split: self._read_labels(split) for split in ("train", "test")}
        self.spec = self._make_spec(*image_shape)

    def _check_keys(self) -> None:
        missing = [key for key in KEYS if key not in self.held]
        if missing:
            self._refuse(f"has no {', '.join(missing)} (it has {self.holds})", _DESCRIPTION)

    def _check_images(self, headers: dict[str, Header]) -> tuple[int, int, int]:
        """Channels, height and width."""
        sizes = [self.size_of(key, *headers[key]) for key in ("x_train", "x_test")]
        (train, train_type), (test, test_type) = headers["x_train"], headers["x_test"]
        if train[1:] != test[1:] or (train_type == np.uint8) != (test_type == np.uint8):
            rule = f"x_train is {train_type} {train}, x_test is {test_type} {test}: images must be alike in both"
            self._refuse(rule, "Store both sets with the same image shape and type.")
        return sizes[0]

    def _check_label_headers(self, headers: dict[str, Header]) -> None:
        for split in ("train", "test"):
            key, count = f"y_{split}", headers[f"x_{split}"][0][0]
            shape, dtype = headers[key]
            if len(shape) == 2 and shape[1] > 1:
                remedy = f"Turn one-hot rows into numbers: {key}.argmax(1)."
                self._refuse(f"{key} has shape {shape}, but labels are one integer an image", remedy)
            if shape not in ((shape[:1] or (0,)), (*shape[:1], 1)):
                self._refuse(f"{key} has shape {shape}, but labels are one integer an image", "Store shape (N,).")
            if dtype.kind not in "iu":
                remedy = f"Store class numbers: {key}.astype(numpy.int64)."
                self._refuse(f"{key} is {dtype}, but labels are integers", remedy)
            if shape[0] != count:
                remedy = "Store one label for every image."
                self._refuse(f"x_{split} holds {count} images and {key} {shape[0]} labels", remedy)

    def _read_labels(self, split: str) -> Tensor:
        labels = self.array(f"y_{split}").reshape(-1).astype(np.int64)
        if int(labels.min()) < 0:
            rule = f"y_{split}[{int(labels.argmin())}] is {int(labels.min())}, but labels are 0, 1, 2, …"
            self._refuse(rule, "Number the classes from 0.")
        return torch.from_numpy(labels)

    def _make_spec(self, channels: int, height: int, width: int) -> DataSpec:
        train, test = self.labels["train"], self.labels["test"]
        num_classes = int(train.max()) + 1
        if num_classes < 2:
            self._refuse("y_train holds class 0 alone, but there must be 2 classes at least", "Add the other classes.")
        self._check_gaps(train, num_classes)
        if int(test.max()) >= num_classes:
            rule = f"y_test[{int(test.argmax())}] is {int(test.max())}, out of range: y_train ends at {num_classes - 1}"
            self._refuse(rule, "Every test class must be in the training set.")
        return DataSpec(str(self._shown), num_classes, channels, (height, width), len(train), len(test))

    def _check_gaps(self, train: Tensor, num_classes: int) -> None:
        """A class or two may lack images in a small set; where most do, a label has gone wrong or counts in steps."""
        present = set(train.tolist())
        unused = num_classes - len(present)
        if not unused:
            return
        first = islice((label for label in range(num_classes) if label not in present), 8)
        named = ", ".join(map(str, first)) + (", …" if unused > 8 else "")
        rule = f"{unused} of {num_classes} classes have no training image ({named})"
        remedy = "Number the classes from 0 without gaps."
        if 2 * unused > num_classes:
            self._refuse(f"y_train[{int(train.argmax())}] is {num_classes - 1}, but {rule}", remedy)
        warnings.warn(f"data={self._shown}: {rule}. {remedy}", stacklevel=2)


@contextmanager
def _opened(source: str | Path | IO[bytes], shown: object) -> Iterator[zipfile.ZipFile]:
    """Open the archive; every way in which a file can be damaged becomes a ``DataError``."""
    try:
        if isinstance(source, str | Path) and stat.S_ISFIFO(Path(source).stat().st_mode):
            raise data_error(shown, "is a queue, which would be waited for", "Give a plain file.")
        with zipfile.ZipFile(source) as archive:
            yield archive
    except DataError:
        raise
    except FileNotFoundError as error:
        raise data_error(shown, "does not exist", "Check the path.") from error
    except (PermissionError, IsADirectoryError) as error:
        raise data_error(shown, f"cannot be read ({error.strerror})", "Check the path and its permissions.") from error
    except Exception as error:
        # zipfile, its decompressors and NumPy's headers raise whatever they like on damaged files.
        raise data_error(shown, f"is no readable .npz archive ({error})", f"Make it anew. {_DESCRIPTION}") from error
