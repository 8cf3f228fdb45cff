"""Augmentation image by image, where samples are loaded: in a loader's workers, or in the process itself.

It is for what cannot be done for a batch at once: crops of files, whose images differ in size, and RandAugment.
What is drawn follows from seed, epoch and sample id, so that neither workers nor processes make a difference.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset

from spfde.app.data.images import Box, ImageArray, ImageData, collate, fetched
from spfde.app.train import random_crop
from spfde.app.train.augment import BatchAugment
from spfde.app.train.options import TrainOptions
from spfde.core.errors import InvalidArgument, Problem
from spfde.core.numbers import mix

_RANDAUGMENT = 30  # salt


@runtime_checkable
class WholeImages(Protocol):
    """Images that are decoded when they are asked for, each in a size of its own."""

    def __len__(self) -> int: ...

    def cropped(self, index: int, box_in: Callable[[int, int], Box]) -> tuple[Tensor, int]:
        """A part of an image at the size of all, and its label; the part is given by the image's height and width."""
        ...


class AugmentedSamples(Dataset[tuple[Tensor, int]]):
    """A training set whose samples come augmented as ``session.augmentation_seeds`` says for the epoch.

    The epoch lies in memory that workers share. Those that stay from one epoch to the next take up their new work only
    when the loader is iterated again, and what they still had to do of an epoch that was left is thrown away: so it is
    enough to tell the epoch before each iteration.

    Args:
        part: the samples, as ``ImageArray``, image files, or a part of one of these.
        augment: crops and flips.
        seed: of the run.
        randaugment: changes an image by its seed; None for no RandAugment.
        is_shared: whether workers are to see the epoch.
    """

    def __init__(
        self,
        part: Dataset[tuple[Tensor, int]],
        augment: BatchAugment,
        *,
        seed: int,
        randaugment: RandAugment | None = None,
        is_shared: bool = False,
    ) -> None:
        self._part, self._augment, self._seed, self._randaugment = part, augment, seed, randaugment
        self._files = files_of(part) if augment.mode == "random-resized-crop" else None
        self._epoch = torch.zeros((), dtype=torch.int64)
        if is_shared:
            self._epoch.share_memory_()  # type: ignore[no-untyped-call]

    def begin_epoch(self, epoch: int) -> None:
        """From now on samples are those of this epoch; before the first call, of epoch 0."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self._part)  # type: ignore[arg-type]  # it has a length

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """One image ``(C, H, W)`` and its label."""
        images, labels = self.__getitems__([index])
        return images[0], int(labels[0])

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """A batch ``(B, C, H, W)`` and its labels ``(B,)``."""
        seeds = mix(torch.as_tensor(indices, dtype=torch.int64), self._seed, int(self._epoch), 0)
        if self._files is None:
            images, labels = fetched(self._part, indices)
            images = self._augment.replay(images, seeds)
        else:
            images, labels = self._cropped(*self._files, indices, seeds)
        if self._randaugment is not None:
            pairs = zip(images, mix(seeds, _RANDAUGMENT).tolist(), strict=True)
            images = torch.stack([self._randaugment(image, seed) for image, seed in pairs])
        return images, labels

    def _cropped(
        self, files: WholeImages, positions: Sequence[int], indices: Sequence[int], seeds: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Random resized crops of whole images, and flips."""
        made = []
        for index, drawn, flip in zip(indices, random_crop.draws(seeds), self._augment.flips(seeds), strict=True):
            image, label = files.cropped(positions[index], partial(_box, drawn))
            made.append((image.flip(2) if flip else image, label))
        return collate(made)


def _box(drawn: Tensor, height: int, width: int) -> Box:
    top, left, rows, columns = random_crop.boxes(drawn[None], height, width)[0].tolist()
    return top, left, rows, columns


def files_of(part: Dataset[tuple[Tensor, int]]) -> tuple[WholeImages, Sequence[int]] | None:
    """The files that a set's images come from, and where among them each sample's is; None where there are none."""
    whole = part.dataset if isinstance(part, Subset) else part
    files: Any = whole.files if isinstance(whole, ImageArray) else whole
    if not isinstance(files, WholeImages):
        return None
    return files, part.indices if isinstance(part, Subset) else range(len(files))


def why_one_by_one(options: TrainOptions, data: ImageData, augment: BatchAugment) -> str | None:
    """Why a run's images are augmented one by one; None where they are not."""
    if options.randaugment is not None:
        return "RandAugment changes each image by itself"
    if augment.mode == "random-resized-crop" and files_of(data.train) is not None:
        return "each image is cropped from its whole file"
    return None


def augmented(options: TrainOptions, data: ImageData, augment: BatchAugment, *, workers: int) -> AugmentedSamples:
    """The training set of a run whose images are augmented one by one.

    Args:
        options, data, augment: of the run.
        workers: of the loader that it is for.

    Raises:
        InvalidArgument: RandAugment was asked for, and images are not of 8 bits.
    """
    change = None
    if options.randaugment is not None:
        change = RandAugment(options.randaugment_ops, options.randaugment)
        if any(array.images.dtype != torch.uint8 for array in data.arrays):
            rule, remedy = (
                "needs images of 8 bits (uint8), and these are float32",
                "Leave it out, or convert the images.",
            )
            raise InvalidArgument(Problem("randaugment", options.randaugment, rule, remedy))
    return AugmentedSamples(data.train, augment, seed=options.seed, randaugment=change, is_shared=workers > 0)


class RandAugment:
    """Some operations of a magnitude, drawn for each image by its seed: torchvision's, with its fourteen operations.

    Source: Cubuk et al., arXiv 1909.13719.

    Args:
        operations: how many, one after the other.
        magnitude: of each, from 0 to 30.

    Example:
        >>> from spfde.app.train.one_by_one import RandAugment
        >>> RandAugment(2, 9)(torch.zeros(3, 8, 8, dtype=torch.uint8), seed=0).shape
        torch.Size([3, 8, 8])
    """

    def __init__(self, operations: int, magnitude: int) -> None:
        from torchvision.transforms import InterpolationMode, v2

        self._change = v2.RandAugment(operations, magnitude, interpolation=InterpolationMode.BILINEAR)

    def __call__(self, image: Tensor, seed: int) -> Tensor:
        """Change an image ``(1 or 3, H, W)`` of uint8."""
        # torchvision draws from the global generator of the CPU, which is put back.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            changed: Tensor = self._change(image)
        return changed
