"""Mixup and CutMix: each image of a batch is mixed with another one of it, and so are their classes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from spfde.app.train.options import TrainOptions
from spfde.core.numbers import mix

_BATCH, _PARTNER = 40, 41  # salts


@dataclass(frozen=True)
class Mix:
    """How a batch is mixed.

    Attributes:
        partner: for each image the one that it is mixed with, int64 ``(N,)``.
        share: of an image that remains its own, in [1/2, 1].
        box: first row, first column, end row and end column of what comes from the partner; None: it is blended over
            all of the image.
    """

    partner: Tensor
    share: float
    box: tuple[int, int, int, int] | None = None


class Mixing:
    """Mixup (arXiv 1710.09412) or CutMix (arXiv 1905.04899) of whole batches; with both, each batch has one of them.

    The share is drawn for a whole batch, as in both papers' code. It follows, as all here, from the seeds of the
    batch's samples, whatever their order. One below a half is turned into its rest, as fastai does for mixup: an image
    then always stays mostly itself, so that what the model makes of it tells of this very sample. For mixup the pairs
    have the same distribution as without; for CutMix the smaller part is always a rectangle, which is a departure.

    Args:
        mixup: both parameters of mixup's beta distribution; 0 for no mixup.
        cutmix: likewise, CutMix's.
        classes: how many there are.

    Example:
        >>> from spfde.app.train.mixing import Mixing
        >>> mixing = Mixing(mixup=0.2, cutmix=0.0, classes=3)
        >>> images, labels = torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 2, 0])
        >>> mixed, probabilities = mixing(images, labels, seeds=torch.arange(4))
        >>> mixed.shape, probabilities.argmax(1).tolist()
        (torch.Size([4, 3, 8, 8]), [0, 1, 2, 0])
    """

    def __init__(self, *, mixup: float, cutmix: float, classes: int) -> None:
        self._mixup, self._cutmix, self._classes = mixup, cutmix, classes

    def __call__(self, images: Tensor, labels: Tensor, seeds: Tensor) -> tuple[Tensor, Tensor]:
        """Images ``(N, C, H, W)``, floating, and class probabilities ``(N, classes)``, float32, on the same device.

        Args:
            images, labels: of the batch; labels are classes ``(N,)``.
            seeds: of its samples, int64 ``(N,)``, on the CPU.
        """
        drawn = self.draw(seeds, images.shape[2], images.shape[3])
        partner = drawn.partner.to(images.device, non_blocking=True)
        # Not F.one_hot: it looks at the labels, and so waits for the device.
        probabilities = torch.zeros(len(labels), self._classes, device=labels.device)
        for classes, share in ((labels, drawn.share), (labels[partner], 1 - drawn.share)):
            probabilities.scatter_add_(1, classes[:, None], torch.full_like(probabilities[:, :1], share))
        if drawn.box is None:
            return torch.lerp(images[partner], images, drawn.share), probabilities
        top, left, bottom, right = drawn.box
        mixed = images.clone()
        mixed[:, :, top:bottom, left:right] = images[partner, :, top:bottom, left:right]
        return mixed, probabilities

    def draw(self, seeds: Tensor, height: int, width: int) -> Mix:
        """How the batch of these samples is mixed, for images of this size."""
        # RandomState: its numbers are the same in all versions of NumPy.
        random = np.random.RandomState(int(mix(seeds.sum()[None], _BATCH)) % 2**32)
        order = mix(seeds, _PARTNER).argsort(stable=True)
        partner = torch.empty_like(order)
        partner[order] = order.roll(1)
        cuts = random.random_sample() < 0.5 if self._mixup and self._cutmix else bool(self._cutmix)
        alpha = self._cutmix if cuts else self._mixup
        share = random.beta(alpha, alpha)
        share = max(share, 1 - share)
        if not cuts:
            return Mix(partner, share)
        side = 0.5 * (1 - share) ** 0.5
        (top, bottom), (left, right) = (
            (max(0, at - int(side * size)), min(size, at + int(side * size)))
            for size in (height, width)
            for at in (int(random.random_sample() * size),)
        )
        return Mix(partner, 1 - (bottom - top) * (right - left) / (height * width), (top, left, bottom, right))


def mixing_of(options: TrainOptions, classes: int) -> Mixing | None:
    """What a run's options ask for; None for no mixing."""
    if not options.mixup and not options.cutmix:
        return None
    return Mixing(mixup=options.mixup, cutmix=options.cutmix, classes=classes)
