"""Data sets by name or by path: described without their images, or loaded.

The named sets' shapes and counts are written down here, so that a plan needs no data on disk.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from importlib import resources
from inspect import signature
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from spfde.app.data.images import DataSpec, ImageArray, ImageData, channel_statistics, data_error, resized
from spfde.app.data.npz import describe_npz, load_npz, to_nchw
from spfde.app.train.augment import AugmentMode
from spfde.core.errors import InvalidArgument, Problem, nearest

EMBEDDED = "fashion-mini"


@dataclass(frozen=True)
class NamedSet:
    """A data set known by name.

    Attributes:
        spec: its shape and counts.
        augmentation: what ``auto`` stands for: photos may be mirrored, digits and letters may not.
        loader: class in ``torchvision.datasets``; None for the embedded set.
        files: where the files belong under the data root, for those who fetch them by hand.
        class_names: where they are known without the files.
        crop_share: of an image's shorter side, the share that is within the cut at its centre.
        statistics: mean and deviation of each channel that a set in folders is known by, as shares of 255.
    """

    spec: DataSpec
    augmentation: AugmentMode
    loader: str | None = None
    files: str = ""
    class_names: tuple[str, ...] | None = None
    crop_share: float = 1.0
    statistics: tuple[tuple[float, ...], tuple[float, ...]] | None = None


_CLOTHES = "T-shirt/top,Trouser,Pullover,Dress,Coat,Sandal,Shirt,Sneaker,Bag,Ankle boot"


def _mnist_like(name: str, loader: str, augmentation: AugmentMode) -> NamedSet:
    parts = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
    # Unpacked: torchvision takes these as they are, but compares the archives with its own checksums.
    files = f"{loader}/raw/ (unpacked): " + ", ".join(f"{part}-ubyte" for part in parts)
    return NamedSet(DataSpec(name, 10, 1, (28, 28), 60_000, 10_000), augmentation, loader, files)


_SETS = (
    NamedSet(DataSpec(EMBEDDED, 10, 1, (28, 28), 10_000, 2_000), "crop+flip", class_names=tuple(_CLOTHES.split(","))),
    _mnist_like("fashion-mnist", "FashionMNIST", "crop+flip"),
    _mnist_like("mnist", "MNIST", "crop"),
    _mnist_like("kmnist", "KMNIST", "crop"),
    NamedSet(DataSpec("usps", 10, 1, (16, 16), 7_291, 2_007), "crop", "USPS", "usps.bz2, usps.t.bz2"),
    NamedSet(DataSpec("cifar10", 10, 3, (32, 32), 50_000, 10_000), "crop+flip", "CIFAR10", "cifar-10-python.tar.gz"),
    NamedSet(
        DataSpec("cifar100", 100, 3, (32, 32), 50_000, 10_000), "crop+flip", "CIFAR100", "cifar-100-python.tar.gz"
    ),
    NamedSet(DataSpec("svhn", 10, 3, (32, 32), 73_257, 26_032), "crop", "SVHN", "train_32x32.mat, test_32x32.mat"),
    NamedSet(DataSpec("stl10", 10, 3, (96, 96), 5_000, 8_000), "crop+flip", "STL10", "stl10_binary.tar.gz"),
    NamedSet(
        DataSpec("imagenet", 1000, 3, (224, 224), 1_281_167, 50_000),
        "random-resized-crop",
        crop_share=0.875,
        files="train/CLASS/*.JPEG and val/CLASS/*.JPEG, with the same 1,000 folders",
        statistics=((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ),
)
DATASETS = {named.spec.name: named for named in _SETS}


def describe_data(name_or_path: str | Path, image_size: int | None = None) -> DataSpec:
    """Shape and counts, cheaply: nothing is read for a named set, headers and labels for an ``.npz``, and the names of
    the files for a folder.

    Args:
        name_or_path: a key of ``DATASETS``, an ``.npz`` or an image folder. A name wins over a file of that name
            (write ``./cifar10`` for the folder).
        image_size: rows and columns that all images are brought to; None: as they are, and a folder's as its first.

    Raises:
        InvalidArgument: neither a known name nor a path.
        DataError: the data are missing or not what they should be.
    """
    kind = _kind(name_or_path)
    if kind != "folder":
        spec = DATASETS[str(name_or_path)].spec if kind == "named" else describe_npz(name_or_path)
        return replace(spec, image_size=(image_size, image_size)) if image_size else spec
    with torchvision_needed(name_or_path):
        from spfde.app.data.folders import describe_folder
    return describe_folder(name_or_path, image_size=image_size)


def usual_crop_share(data: str) -> float:
    """What ``crop_share`` is where it is not given: the named set's own, and 1 otherwise."""
    return DATASETS[data].crop_share if data in DATASETS else 1.0


def load_data(
    name_or_path: str | Path, *, root: str | Path, image_size: int | None = None, crop_share: float | None = None
) -> ImageData:
    """Load a data set for training; named sets of torchvision are downloaded into ``root`` when they are not there, and
    imagenet is expected there as ``train/`` and ``val/``.

    Args:
        name_or_path: as ``describe_data``.
        root: folder of the downloaded sets; made when needed.
        image_size: as ``describe_data``.
        crop_share: the images are scaled so that this share of their shorter side comes to the image size, which is
            then cut at their centre; None: see ``usual_crop_share``.

    Raises:
        InvalidArgument: as ``describe_data``.
        DataError: the data are missing and cannot be fetched, or not what they should be.
    """
    kind = _kind(name_or_path)
    share = usual_crop_share(str(name_or_path)) if crop_share is None else crop_share
    if kind == "folder":
        with torchvision_needed(name_or_path):
            from spfde.app.data.folders import load_folder
        return load_folder(name_or_path, image_size=image_size, crop_share=share)
    if kind == "npz":
        spec, train, test = load_npz(name_or_path)
        return _in_memory(spec, train, test, "crop", image_size, share, None)
    named = DATASETS[str(name_or_path)]
    if named.statistics is not None:
        with torchvision_needed(name_or_path):
            from spfde.app.data.folders import KnownFolder, load_known
        remedy = f"Fetch it by hand (https://image-net.org), and pass --data-root DIR where DIR has {named.files}."
        return load_known(
            KnownFolder(named.spec, named.statistics, named.augmentation, remedy), Path(root), image_size, share
        )
    if named.loader is None:
        content = (resources.files("spfde.app") / "assets" / "fashion_mini.npz").read_bytes()
        spec, train, test = load_npz(io.BytesIO(content), named.spec.name)
        names: Any = named.class_names
    else:
        opened = [_open_torchvision(named, Path(root), train=part) for part in (True, False)]
        (train, test), names = map(_array_of, opened), getattr(opened[0], "classes", None)
        channels, height, width = train.images.shape[1:]
        classes = int(max(train.labels.max(), test.labels.max())) + 1
        spec = DataSpec(named.spec.name, classes, channels, (height, width), len(train), len(test))
    if spec != named.spec:
        remedy = f"Remove its files from {root} and run again to fetch them anew."
        raise data_error(name_or_path, f"is {spec} there, not {named.spec}", remedy)
    names = tuple(map(str, names)) if names is not None and len(names) == spec.num_classes else None
    return _in_memory(spec, train, test, named.augmentation, image_size, share, names)


def names_in(name_or_path: str | Path) -> tuple[str, ...] | None:
    """Names of the classes, as far as they are known without reading the data."""
    named = DATASETS.get(str(name_or_path))
    if named is not None:
        return named.class_names
    folder = Path(name_or_path) / "train"
    if not os.path.isdir(folder):
        return None
    return tuple(sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith(".")))


def _in_memory(
    spec: DataSpec,
    train: ImageArray,
    test: ImageArray,
    augmentation: AugmentMode,
    image_size: int | None,
    crop_share: float,
    names: tuple[str, ...] | None,
) -> ImageData:
    if image_size or crop_share != 1:
        size = (image_size, image_size) if image_size else spec.image_size
        train, test = (ImageArray(resized(part.images, size, crop_share), part.labels) for part in (train, test))
        spec = replace(spec, image_size=size)
    mean, std = channel_statistics(train.images)
    return ImageData(spec, train, test, mean, std, augmentation, class_names=names)


def _kind(name_or_path: str | Path) -> Literal["named", "npz", "folder"]:
    text, path = str(name_or_path), Path(name_or_path)
    if text in DATASETS:
        return "named"
    if path.suffix.lower() == ".npz":
        return "npz"
    if os.path.isdir(path):  # which takes any text, too long ones too
        return "folder"
    if os.path.exists(path):
        raise data_error(text, "is neither an .npz nor a folder", "Give a name, an .npz or an image folder.")
    if path.name != text:
        raise data_error(text, "does not exist", "Check the path.")
    remedy = f"{nearest(text, DATASETS)} A path to an image folder or an .npz will do too."
    raise InvalidArgument(Problem("data", text, "is no known data set, and no such file exists", remedy))


@contextmanager
def torchvision_needed(name: object) -> Iterator[None]:
    """Say what to install where torchvision, an extra that is slow to import, is missing."""
    try:
        yield
    except ImportError as error:
        remedy = f"Install it: pip install 'spfde[vision]'. Or use --data {EMBEDDED}."
        raise data_error(name, f"needs another package ({error})", remedy) from error


def _array_of(dataset: Any) -> ImageArray:
    """One part of a torchvision set, as ``(N, C, H, W)`` of uint8."""
    raw_labels = dataset.targets if hasattr(dataset, "targets") else dataset.labels
    return ImageArray(to_nchw(np.asarray(dataset.data)), torch.as_tensor(np.asarray(raw_labels).astype(np.int64)))


def _open_torchvision(named: NamedSet, root: Path, *, train: bool) -> Any:
    name = named.spec.name
    with torchvision_needed(name):
        from torchvision import datasets
    constructor = getattr(datasets, str(named.loader))
    has_split = "split" in signature(constructor).parameters
    part: dict[str, Any] = {"split": "train" if train else "test"} if has_split else {"train": train}
    missing = [path for path in (root, *root.parents) if not path.exists()]
    try:
        try:
            return constructor(root=str(root), download=False, **part)
        except RuntimeError:  # "not found": fetch it, or unpack an archive that was put there by hand
            return constructor(root=str(root), download=True, **part)
    except Exception as error:  # the network, the disk, damaged files and missing packages raise all sorts
        _remove_empty(root, missing)
        remedy = f"Fetch the files elsewhere and put them under {root}: {named.files}. Or use --data {EMBEDDED}."
        rule = f"cannot be read from {root} or downloaded ({type(error).__name__}: {error})"
        raise data_error(name, rule, remedy) from error


def _remove_empty(root: Path, missing: list[Path]) -> None:
    """Take away the empty folders that a failed download left, and the root when it was made for it."""
    nested = sorted((path for path in root.rglob("*") if path.is_dir()), reverse=True) if root.is_dir() else []
    for path in (*nested, *missing):
        with suppress(OSError):
            path.rmdir()
