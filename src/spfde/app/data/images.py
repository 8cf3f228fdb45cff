"""Images with labels: what a data set is, in memory and described."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset, Subset

from spfde.app.train.augment import AugmentMode
from spfde.core.errors import DataError, Problem

Split = Literal["val", "test"]
"""The sets that a model is evaluated on: the validation set and the test set."""
Box = tuple[int, int, int, int]
"""First row, first column, height and width of a part of an image, in pixels."""


@dataclass(frozen=True)
class DataSpec:
    """What is known of a data set without its images.

    Attributes:
        name: the registered name, or the path as given.
        num_classes: labels are ``0 … num_classes - 1``.
        image_size: (height, width) in pixels.
    """

    name: str
    num_classes: int
    channels: int
    image_size: tuple[int, int]
    train_samples: int
    test_samples: int

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """(channels, height, width)."""
        return (self.channels, *self.image_size)


class ImageArray(Dataset[tuple[Tensor, int]]):
    """Images and labels in memory.

    A ``DataLoader`` with ``collate_fn=collate`` fetches a whole batch with one vectorised index.

    Args:
        images: ``(N, C, H, W)``, uint8 or float32.
        labels: ``(N,)``, int64.
        files: what the images were decoded from, if anything: they may be larger there.
    """

    def __init__(self, images: Tensor, labels: Tensor, files: Dataset[tuple[Tensor, int]] | None = None) -> None:
        self.files = files
        self.images = images.contiguous()
        self.labels = labels.contiguous()
        self._on: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """One image ``(C, H, W)`` and its label."""
        return self.images[index], int(self.labels[index])

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """A batch ``(B, C, H, W)`` and its labels ``(B,)``; ``DataLoader`` calls this when it is there."""
        index = torch.as_tensor(indices, dtype=torch.int64)
        # index_select copies whole images; indexing with [] was seven times slower here.
        return self.images.index_select(0, index), self.labels.index_select(0, index)

    def on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Images and labels on a device, to be read: one copy for all who ask, for as long as this array lives.

        The copy is complete when this returns: any stream may read it.
        """
        if device not in self._on:
            self._on[device] = self.images.to(device), self.labels.to(device)
        return self._on[device]

    def is_on(self, device: torch.device) -> bool:
        """Whether they lie there already."""
        return device in self._on


def collate(batch: Any) -> tuple[Tensor, Tensor]:
    """Make a batch ``(images, labels)``: a whole one is passed through, a list of samples is stacked."""
    if isinstance(batch, tuple):
        images, labels = batch
        return images, labels
    return torch.stack([image for image, _ in batch]), torch.tensor([int(label) for _, label in batch])


def draw(dataset: Dataset[tuple[Tensor, int]], count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """So many images and labels at most, drawn at random: sets come sorted by class."""
    order = torch.randperm(len(dataset), generator=generator)  # type: ignore[arg-type]  # it has a length
    return collate([dataset[index] for index in order[:count].tolist()])


@dataclass(frozen=True, eq=False)
class ImageData:
    """A data set ready for training.

    Attributes:
        spec: its shape and counts.
        train: training set; samples are images ``(C, H, W)`` (uint8 or float32, not normalised) and labels.
        test: test set, likewise.
        mean: ``(C,)`` over the training set, in the unit of ``normalise`` (shares of 255 for uint8).
        std: likewise; 1 for a channel that is constant.
        default_augmentation: what ``auto`` stands for.
        in_memory: whether all sets lie in memory, as ``ImageArray``; if not, samples are decoded when asked for, and
            loader workers pay off.
        validation: what is held out of the training set, which no longer has it; None where nothing is.
        class_names: of each class, in order; None where the data do not name them.
    """

    spec: DataSpec
    train: Dataset[tuple[Tensor, int]]
    test: Dataset[tuple[Tensor, int]]
    mean: Tensor
    std: Tensor
    default_augmentation: AugmentMode
    in_memory: bool = True
    validation: Dataset[tuple[Tensor, int]] | None = None
    class_names: tuple[str, ...] | None = None

    @property
    def evaluated_on(self) -> Split:
        """The set that every epoch of a run is evaluated on."""
        return "test" if self.validation is None else "val"

    def split(self, name: Split) -> Dataset[tuple[Tensor, int]]:
        """The set of that name; the test set in place of a validation set that there is not."""
        return self.test if name == "test" or self.validation is None else self.validation

    @property
    def arrays(self) -> list[ImageArray]:
        """What lies in memory, each once."""
        return [array for array in map(array_of, (self.train, self.test)) if array is not None]

    @property
    def padding(self) -> int:
        """For ``BatchAugment``, in pixels: the usual 4 up to 32 pixels, an eighth of the shorter side above."""
        return max(4, min(self.spec.image_size) // 8)

    def facts(self) -> dict[str, Any]:
        """What tells it from other data, as JSON has it."""
        shape = {**vars(self.spec), "image_size": list(self.spec.image_size)}
        held_out = {} if self.validation is None else {"validation_samples": len(self.validation)}  # type: ignore[arg-type]
        return {**shape, **held_out, "mean": self.mean.tolist(), "std": self.std.tolist()}


def array_of(part: Dataset[tuple[Tensor, int]]) -> ImageArray | None:
    """The array that a set is, or is a part of; None where samples are decoded when they are asked for."""
    whole = part.dataset if isinstance(part, Subset) else part
    return whole if isinstance(whole, ImageArray) else None


def fetched(part: Dataset[tuple[Tensor, int]], indices: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Images ``(B, C, H, W)`` and labels ``(B,)`` of some samples, as a loader with ``collate`` has them."""
    together: Any = getattr(part, "__getitems__", None)
    return collate([part[index] for index in indices] if together is None else together(list(indices)))


def resized(images: Tensor, size: tuple[int, int], crop_share: float = 1.0) -> Tensor:
    """Images ``(N, C, H, W)`` at another height and width: scaled so that they cover it, and cut at their centre.

    Args:
        images: the images.
        size: (height, width) wanted.
        crop_share: share of the scaled image's shorter side that is within the cut.
    """
    height, width = images.shape[2:]
    scale = max(size[0] / height, size[1] / width) / crop_share
    to = (max(size[0], round(height * scale)), max(size[1], round(width * scale)))
    top, left = (to[0] - size[0]) // 2, (to[1] - size[1]) // 2
    made = []
    for chunk in torch.split(images, 1024):
        scaled = F.interpolate(chunk.float(), to, mode="bilinear", antialias=True)
        scaled = scaled[:, :, top : top + size[0], left : left + size[1]]
        made.append((scaled.round().clamp(0, 255) if images.dtype == torch.uint8 else scaled).to(images.dtype))
    return torch.cat(made)


def channel_statistics(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (of the population) per channel, ``(C,)`` float32 each.

    Args:
        images: ``(N, C, H, W)``; uint8 gives shares of 255. Sums are exact integers for uint8, float64 otherwise.
    """
    if images.dtype == torch.uint8:
        channels = images.shape[1]
        counts = torch.zeros(channels, 256, dtype=torch.int64)
        for chunk in torch.split(images, 1024):
            for channel in range(channels):
                counts[channel] += torch.bincount(chunk[:, channel].reshape(-1), minlength=256)
        levels = torch.arange(256, dtype=torch.float64) / 255
        share = counts.double() / counts.sum(1, keepdim=True)
        mean = share @ levels
        variance = (share * (levels - mean[:, None]) ** 2).sum(1)
    else:
        pixels = images.numel() / images.shape[1]
        axes = (0, 2, 3)
        mean = torch.stack([chunk.double().sum(axes) for chunk in torch.split(images, 1024)]).sum(0) / pixels
        squares = [(chunk.double() - mean.view(1, -1, 1, 1)).pow(2).sum(axes) for chunk in torch.split(images, 1024)]
        variance = torch.stack(squares).sum(0) / pixels
    std = variance.sqrt()
    std = torch.where(std > 1e-8 * mean.abs().clamp(min=1e-8), std, torch.ones_like(std))
    return mean.float(), std.float()


def data_error(data: object, rule: str, remedy: str) -> DataError:
    """A ``DataError`` that names the argument ``data``, its value, the rule and the remedy."""
    return DataError(str(Problem("data", str(data), rule, remedy)))
