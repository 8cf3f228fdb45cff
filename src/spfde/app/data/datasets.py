"""Data sets by name or by path: described without their images, or loaded.

The named sets' shapes and counts are written down here, so that a plan needs no data on disk.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
import torch

from spfde.app.data.folders import IN_MEMORY_BYTES, describe_folder, load_folder
from spfde.app.data.images import DataSpec, ImageArray, ImageData, channel_statistics, collate, data_error
from spfde.app.data.npz import Layout, describe_npz, load_npz, to_nchw
from spfde.app.train.augment import AugmentMode
from spfde.core.errors import InvalidArgument, Problem, nearest

__all__ = [
    "DATASETS",
    "EMBEDDED",
    "DataSpec",
    "ImageArray",
    "ImageData",
    "NamedSet",
    "collate",
    "describe_data",
    "load_data",
]

EMBEDDED = "fashion-mini"


@dataclass(frozen=True)
class NamedSet:
    """A data set known by name.

    Attributes:
        spec: its shape and counts.
        augmentation: what ``auto`` stands for: photos may be mirrored, digits and letters may not.
        loader: class in ``torchvision.datasets``; None for the embedded set.
        splits: how the class is told which part is wanted: ``train=True`` or ``split="train"``.
        layout: of the class's ``data``.
        files: where the files belong under the data root, for those who fetch them by hand.
    """

    spec: DataSpec
    augmentation: AugmentMode
    loader: str | None = None
    splits: Literal["train", "split"] = "train"
    layout: Layout = "NHW"
    files: str = ""


def _idx_files(folder: str) -> str:
    names = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
    # Unpacked: torchvision takes these as they are, but compares the archives with its own checksums.
    return f"{folder}/raw/ (unpacked): " + ", ".join(f"{name}-ubyte" for name in names)


def _registry() -> dict[str, NamedSet]:
    def spec(name: str, classes: int, channels: int, side: int, train: int, test: int) -> DataSpec:
        return DataSpec(name, classes, channels, (side, side), train, test)

    sets = [
        NamedSet(spec(EMBEDDED, 10, 1, 28, 10_000, 2_000), "crop+flip"),
        NamedSet(
            spec("fashion-mnist", 10, 1, 28, 60_000, 10_000),
            "crop+flip",
            "FashionMNIST",
            files=_idx_files("FashionMNIST"),
        ),
        NamedSet(spec("mnist", 10, 1, 28, 60_000, 10_000), "crop", "MNIST", files=_idx_files("MNIST")),
        NamedSet(spec("kmnist", 10, 1, 28, 60_000, 10_000), "crop", "KMNIST", files=_idx_files("KMNIST")),
        NamedSet(spec("usps", 10, 1, 16, 7_291, 2_007), "crop", "USPS", files="usps.bz2, usps.t.bz2"),
        NamedSet(
            spec("cifar10", 10, 3, 32, 50_000, 10_000),
            "crop+flip",
            "CIFAR10",
            layout="NHWC",
            files="cifar-10-python.tar.gz",
        ),
        NamedSet(
            spec("cifar100", 100, 3, 32, 50_000, 10_000),
            "crop+flip",
            "CIFAR100",
            layout="NHWC",
            files="cifar-100-python.tar.gz",
        ),
        NamedSet(
            spec("svhn", 10, 3, 32, 73_257, 26_032),
            "crop",
            "SVHN",
            splits="split",
            layout="NCHW",
            files="train_32x32.mat, test_32x32.mat",
        ),
        NamedSet(
            spec("stl10", 10, 3, 96, 5_000, 8_000),
            "crop+flip",
            "STL10",
            splits="split",
            layout="NCHW",
            files="stl10_binary.tar.gz",
        ),
    ]
    return {entry.spec.name: entry for entry in sets}


DATASETS: Mapping[str, NamedSet] = MappingProxyType(_registry())


def describe_data(name_or_path: str | Path, *, image_size: tuple[int, int] | None = None) -> DataSpec:
    """Shape and counts, cheaply: nothing is read for a named set, headers and labels for an ``.npz``, and the names of
    the files for a folder.

    Args:
        name_or_path: a key of ``DATASETS``, an ``.npz`` or an image folder. A name wins over a file of that name
            (write ``./cifar10`` for the folder).
        image_size: (height, width) for the images of a folder; None takes it from its first image.

    Raises:
        InvalidArgument: neither a known name nor a path, or ``image_size`` given for something else than a folder.
        DataError: the data are missing or not what they should be.
    """
    kind = _kind(name_or_path, image_size)
    if kind == "named":
        return DATASETS[str(name_or_path)].spec
    if kind == "npz":
        return describe_npz(name_or_path)
    return describe_folder(name_or_path, image_size=image_size)


def load_data(
    name_or_path: str | Path,
    *,
    root: str | Path,
    image_size: tuple[int, int] | None = None,
    in_memory_bytes: int = IN_MEMORY_BYTES,
) -> ImageData:
    """Load a data set for training; named sets of torchvision are downloaded into ``root`` when they are not there.

    Args:
        name_or_path: as ``describe_data``.
        root: folder of the downloaded sets; made when needed.
        image_size: as ``describe_data``.
        in_memory_bytes: an image folder is kept in memory when its decoded images fit into this many bytes.

    Raises:
        InvalidArgument: as ``describe_data``.
        DataError: the data are missing and cannot be fetched, or not what they should be.
    """
    kind = _kind(name_or_path, image_size)
    if kind == "folder":
        return load_folder(name_or_path, image_size=image_size, in_memory_bytes=in_memory_bytes)
    if kind == "npz":
        spec, train, test = load_npz(name_or_path)
        return _in_memory(spec, train, test, "crop")
    named = DATASETS[str(name_or_path)]
    if named.loader is None:
        content = (resources.files("spfde.app") / "assets" / "fashion_mini.npz").read_bytes()
        spec, train, test = load_npz(io.BytesIO(content), named.spec.name)
    else:
        train, test = (_from_torchvision(named, Path(root), train=part) for part in (True, False))
        spec = replace(named.spec, train_samples=len(train), test_samples=len(test))
    if spec != named.spec:
        rule = (
            f"holds {spec.train_samples} + {spec.test_samples} images of {spec.num_classes} classes, not {named.spec}"
        )
        raise data_error(name_or_path, rule, f"Remove its files from {root} and run again to fetch them anew.")
    return _in_memory(spec, train, test, named.augmentation)


def _in_memory(spec: DataSpec, train: ImageArray, test: ImageArray, augmentation: AugmentMode) -> ImageData:
    mean, std = channel_statistics(train.images)
    return ImageData(spec, train, test, mean, std, augmentation)


def _kind(name_or_path: str | Path, image_size: tuple[int, int] | None) -> Literal["named", "npz", "folder"]:
    text, path = str(name_or_path), Path(name_or_path)
    kind: Literal["named", "npz", "folder"]
    if text in DATASETS:
        kind = "named"
    elif path.suffix.lower() == ".npz":
        kind = "npz"
    elif path.is_dir():
        kind = "folder"
    elif path.exists():
        raise data_error(text, "is neither an .npz nor a folder", "Give a name, an .npz or an image folder.")
    elif path.name != text:
        raise data_error(text, "does not exist", "Check the path.")
    else:
        remedy = f"{nearest(text, DATASETS)} A path to an image folder or an .npz will do too."
        raise InvalidArgument(Problem("data", text, "is no known data set, and no such file exists", remedy))
    if image_size is not None and kind != "folder":
        remedy = "Leave it out, or give an image folder."
        raise InvalidArgument(Problem("image_size", image_size, f"is fixed for {text}", remedy))
    if image_size is not None and min(image_size) < 1:
        raise InvalidArgument(Problem("image_size", image_size, "must be at least 1 pixel", "Give (height, width)."))
    return kind


def _from_torchvision(named: NamedSet, root: Path, *, train: bool) -> ImageArray:
    """One part of a torchvision set, as ``(N, C, H, W)`` of uint8."""
    dataset = _open_torchvision(named, root, train=train)
    raw_labels = dataset.targets if hasattr(dataset, "targets") else dataset.labels
    images = to_nchw(np.asarray(dataset.data), named.layout)
    labels = torch.as_tensor(np.asarray(raw_labels).astype(np.int64))
    name, expected = named.spec.name, named.spec.sample_shape
    if images.shape[1:] != expected:
        rule = f"its images have shape {tuple(images.shape[1:])}, not {expected}"
        raise data_error(name, rule, f"Remove its files from {root} and run again to fetch them anew.")
    if len(labels) == 0 or int(labels.min()) < 0 or int(labels.max()) >= named.spec.num_classes:
        rule = f"its labels must be in 0 … {named.spec.num_classes - 1}"
        raise data_error(name, rule, f"Remove its files from {root} and run again to fetch them anew.")
    return ImageArray(images, labels)


def _open_torchvision(named: NamedSet, root: Path, *, train: bool) -> Any:
    name, split = named.spec.name, "train" if train else "test"
    try:
        from torchvision import datasets  # slow to import, and an extra
    except ImportError as error:
        remedy = f"Install it: pip install 'spfde[vision]'. Or use --data {EMBEDDED}."
        raise data_error(name, "needs the package torchvision", remedy) from error
    constructor = getattr(datasets, str(named.loader))
    part: dict[str, Any] = {"train": train} if named.splits == "train" else {"split": split}
    missing = _missing_parents(root)
    try:
        try:
            return constructor(root=str(root), download=False, **part)
        except RuntimeError:  # "not found": fetch it, or unpack an archive that was put there by hand
            return constructor(root=str(root), download=True, **part)
    except ImportError as error:
        raise data_error(name, f"needs another package ({error})", "Install it with pip.") from error
    except Exception as error:  # the network, the disk and damaged files raise all sorts
        _remove_empty(root, missing)
        remedy = f"Fetch the files elsewhere and put them under {root}: {named.files}. Or use --data {EMBEDDED}."
        raise data_error(
            name, f"cannot be read from {root} or downloaded ({type(error).__name__}: {error})", remedy
        ) from error


def _missing_parents(root: Path) -> list[Path]:
    return [path for path in (root, *root.parents) if not path.exists()]


def _remove_empty(root: Path, missing: list[Path]) -> None:
    """Take away the empty folders that a failed download left, and the root when it was made for it."""
    nested = sorted((path for path in root.rglob("*") if path.is_dir()), reverse=True) if root.is_dir() else []
    for path in (*nested, *missing):
        try:
            path.rmdir()
        except OSError:
            continue
