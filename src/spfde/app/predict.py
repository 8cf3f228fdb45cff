"""The command ``spfde predict``: the classes of images that have no labels, by a run's weights."""

from __future__ import annotations

import csv
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor, nn

from spfde.app.data.datasets import names_in, torchvision_needed, usual_crop_share
from spfde.app.data.images import DataSpec, resized
from spfde.app.data.listing import is_shown_image
from spfde.app.data.npz import load_images
from spfde.app.declaring import with_words
from spfde.app.options import PredictionOptions
from spfde.app.runs.folder import CONFIG, RunFolder
from spfde.app.runs.trained import Which, machine_of, model_of, spec_in, statistics_in
from spfde.app.train.augment import normalise
from spfde.app.train.machine import Machine
from spfde.app.train.options import TrainOptions
from spfde.core.errors import DataError, InvalidArgument, Problem, RunFolderError
from spfde.core.files import written_whole
from spfde.core.technique import Technique
from spfde.export.inference import compute_natively

_NATIVE_FROM = 64
"""Images. Fewer are computed by PyTorch in less time than it takes to load the kernels."""
_MOST_AROUND_SHARES = 16.0
"""Numbers as large as this are no shares of the full brightness, and none that were normalised."""
_GREY = torch.tensor([19595, 38470, 7471], dtype=torch.int32).view(3, 1, 1)
"""Red, green and blue in grey (ITU-R 601), in 1/65536, as Pillow has them."""

Read = tuple[str, Tensor | str]
"""What an image is called, with its pixels, (C, H, W), or what is wrong with it."""


@with_words
class PredictOptions(Technique, PredictionOptions):
    """How to predict, as ``spfde predict`` takes it."""


@dataclass(frozen=True)
class Predicted:
    """What was done.

    Attributes:
        n: images that have a line.
        unread: what is wrong with each of the others.
        how: the model, its weights, and what it was computed with.
    """

    n: int
    unread: tuple[str, ...]
    how: str

    def __str__(self) -> str:
        return f"{self.n:,} images, {self.how}"


@dataclass(frozen=True)
class _Images:
    """Images in batches.

    Attributes:
        column: what they are called by: file or index.
        n: how many there are.
        batches: read so many at a time.
    """

    column: str
    n: int
    batches: Callable[[int], Iterator[Sequence[Read]]]


def predict_images(
    folder: Path, images: Path, options: PredictOptions, *, out: Path | None = None, which: Which = "best"
) -> Predicted:
    """Write the most probable classes of images, a line each, in the run's precision; the run may still be training.

    They are brought to the run's size, cut and normalised as its test images were. What cannot be read has no line.

    Args:
        folder: the run's.
        images: an image, a folder with images in it and below, or an ``.npz`` with x_test, x or images.
        options: see ``spfde predict --help``.
        out: the file, written whole or not at all; None: the standard output, batch by batch.
        which: the best or the last checkpoint.

    Raises:
        RunFolderError: no run folder, no checkpoint yet, or a damaged one.
        InvalidArgument: there are no images, they do not fit the run, or an option is wrong; or ``out`` exists.
        DataError: the archive is damaged.
    """
    if out is not None and out.exists():
        raise InvalidArgument(Problem("--out", str(out), "exists already", "Remove it, or choose another name."))
    if out is not None and not out.parent.is_dir():
        raise InvalidArgument(Problem("--out", str(out), f"there is no folder {out.parent}", "Make it first."))
    run = RunFolder.existing(folder)
    config = run.read_json(CONFIG)
    trained, spec = TrainOptions.from_config(config, folder / CONFIG), spec_in(config, folder / CONFIG)
    mean, std = statistics_in(config, spec, folder / CONFIG)
    names = _class_names(config, trained, spec, folder / CONFIG)
    if options.top > spec.num_classes:
        rule = f"is more than the run's {spec.num_classes} classes"
        raise InvalidArgument(Problem("top", options.top, rule, f"Use {spec.num_classes} at most."))
    machine = machine_of(trained, options.device)
    share = usual_crop_share(trained.data) if trained.crop_share is None else trained.crop_share
    found = _open(images, spec, share, mean)
    with machine.in_use():
        epoch, model = model_of(run, trained, spec, machine, which)
        engine = _engine(options.engine, model, machine, found.n)
        n, unread = 0, list[str]()
        with _written_to(out) as file:
            write = csv.writer(file, lineterminator="\n").writerow
            more = [f"{word}_{place}" for place in range(2, options.top + 1) for word in ("label", "probability")]
            write([found.column, "label", "probability", *more])
            for batch in found.batches(options.batch_size):
                good = [(name, pixels) for name, pixels in batch if isinstance(pixels, Tensor)]
                unread += [pixels for _, pixels in batch if isinstance(pixels, str)]
                if good:
                    x = normalise(torch.stack([pixels for _, pixels in good]).to(machine.device), mean, std)
                    for (name, _), row in zip(good, _most_probable(model, x, machine, options.top), strict=True):
                        write([name, *(cell for share, label in row for cell in (names[label], f"{share:.6f}"))])
                n += len(good)
                file.flush()
            if out is not None and not n:  # and no file is left that would stand in the way of the next try
                raise DataError(f"{images}: none of the images can be read, the first because of this. {unread[0]}")
    how = f"{trained.model}, {which} weights (epoch {epoch}), {engine} engine, {machine.precision} on {machine.device}"
    return Predicted(n, tuple(unread), how)


@torch.no_grad()
def _most_probable(model: nn.Module, x: Tensor, machine: Machine, top: int) -> list[list[tuple[float, int]]]:
    """Probability and number of the most probable classes, for each image."""
    with machine.autocast():
        logits = model(x.contiguous(memory_format=torch.channels_last))
    shares, labels = logits.float().softmax(1).topk(top)
    return [
        list(zip(*both, strict=True)) for both in zip(shares.tolist(), labels.tolist(), strict=True)
    ]  # fmt: skip


def _engine(asked: str, model: nn.Module, machine: Machine, n: int) -> str:
    """Put the engine on the model; its name."""
    if asked == "native" and machine.device.type != "cpu":
        raise InvalidArgument(Problem("engine", asked, "computes on CPUs", "Use --device cpu."))
    if asked == "masked" or (asked == "auto" and (n < _NATIVE_FROM or machine.device.type != "cpu")):
        return "masked"
    try:
        compute_natively(model)
    except InvalidArgument as error:
        if asked == "auto":
            return "masked"
        problems = (replace(problem, remedy="Use --engine masked or auto.") for problem in error.problems)
        raise InvalidArgument(*problems) from None
    return "native"


def _class_names(config: Mapping[str, Any], trained: TrainOptions, spec: DataSpec, path: Path) -> Sequence[str]:
    """As the run noted them; of runs that did not, as far as they are known; numbers otherwise."""
    noted = config["data"].get("class_names")
    names = names_in(trained.data) if noted is None else noted
    if noted is not None and not (
        isinstance(noted, list) and len(noted) == spec.num_classes and all(isinstance(name, str) for name in noted)
    ):
        raise RunFolderError(f"{path}: does not name the run's {spec.num_classes} classes. Restore it from a copy.")
    fits = names is not None and len(names) == spec.num_classes
    return names if fits and names is not None else [str(label) for label in range(spec.num_classes)]


@contextmanager
def _written_to(out: Path | None) -> Iterator[TextIO]:
    if out is None:
        yield sys.stdout
        return
    # Names of files may hold bytes that are no text.
    with written_whole(out) as (draft,), open(draft, "w", encoding="utf-8", errors="surrogateescape") as file:
        yield file


# --- images -----------------------------------------------------------------------------------------------------------


def _open(images: Path, spec: DataSpec, crop_share: float, mean: Tensor) -> _Images:
    """The images at a path.

    Raises:
        InvalidArgument: there are none, or they do not fit the run.
        DataError: an archive is damaged.
    """
    if not images.exists():
        raise InvalidArgument(Problem("IMAGES", str(images), "does not exist", "Check the path."))
    in_shares = bool(((mean >= 0) & (mean <= 1)).all())
    if images.suffix.lower() == ".npz" and not images.is_dir():
        return _archived(images, spec, crop_share, in_shares=in_shares)
    if not in_shares or spec.channels not in (1, 3):
        rule = f"are files of 8 bits, and the run's images have {spec.channels} channels of floats or others"
        raise InvalidArgument(Problem("IMAGES", str(images), rule, "Put images like the run's own into an .npz."))
    paths = _files_below(images) if images.is_dir() else [str(images)]
    if not paths:
        raise InvalidArgument(Problem("IMAGES", str(images), "holds no image", "Check the path."))
    with torchvision_needed(images):
        from spfde.app.data import decoding  # noqa: F401
    return _Images("file", len(paths), partial(_decoded, paths, partial(_read, spec=spec, crop_share=crop_share)))


def _archived(path: Path, spec: DataSpec, crop_share: float, *, in_shares: bool) -> _Images:
    pixels = load_images(path)
    if pixels.shape[1] != spec.channels:
        rule = f"has images of {pixels.shape[1]} channels, and the run's have {spec.channels}"
        raise InvalidArgument(Problem("IMAGES", str(path), rule, "Give images like the run's own."))
    most = float(pixels.abs().max()) if pixels.dtype != torch.uint8 and pixels.numel() else 0.0
    if in_shares and most > _MOST_AROUND_SHARES:
        rule = f"has numbers up to {most:g}, and the mean of the run's lies between 0 and 1"
        raise InvalidArgument(Problem("IMAGES", str(path), rule, "Give uint8, or divide by 255."))
    if pixels.dtype == torch.uint8 and not in_shares:
        rule = "has images of uint8, and the run was trained on numbers of another range"
        raise InvalidArgument(Problem("IMAGES", str(path), rule, "Give images like the run's own."))

    def batches(size: int) -> Iterator[Sequence[Read]]:
        for start in range(0, len(pixels), size):
            part = pixels[start : start + size]
            if tuple(part.shape[2:]) != spec.image_size or crop_share != 1:
                part = resized(part, spec.image_size, crop_share)
            yield [(str(start + place), image) for place, image in enumerate(part)]

    return _Images("index", len(pixels), batches)


def _files_below(root: Path) -> list[str]:
    """Images in a folder and below it, in the order of their paths; hidden ones are passed over."""

    def refuse(error: OSError) -> None:
        raise error

    found = []
    for folder, below, names in os.walk(root, onerror=refuse):
        below[:] = [name for name in below if not name.startswith(".")]
        found += [path for path in (os.path.join(folder, name) for name in names) if is_shown_image(path)]
    return sorted(found)


def _decoded(paths: Sequence[str], read: Callable[[str], Read], size: int) -> Iterator[Sequence[Read]]:
    """Batches of files, each read while the one before it is computed."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        coming = pool.map(read, paths[:size])  # decoders release the interpreter's lock
        for start in range(size, len(paths) + size, size):
            batch, coming = list(coming), pool.map(read, paths[start : start + size])
            yield batch


def _read(path: str, spec: DataSpec, crop_share: float) -> Read:
    from spfde.app.data.decoding import decode, fit

    if not os.path.isfile(path):  # a queue would be waited for without end
        return path, f"{path}: is no plain file."
    height, width = (math.ceil(side / crop_share) for side in spec.image_size)
    try:
        pixels = fit(decode(path, at_least=(height, width)), spec.image_size, crop_share)
    except DataError as error:
        return path, str(error)
    return path, pixels if spec.channels == 3 else _grey(pixels)


def _grey(pixels: Tensor) -> Tensor:
    """One channel of three, uint8."""
    weighted = (pixels.to(torch.int32) * _GREY).sum(0, keepdim=True)
    return ((weighted + 2**15) // 2**16).to(torch.uint8)
