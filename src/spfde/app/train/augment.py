"""Random crop and flip of whole batches, on the batch's device.

Every sample gets its own crop and its own flip, as if it had been transformed alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from spfde.app.train import random_crop
from spfde.core.errors import StateMismatch
from spfde.core.generator_states import check_torch
from spfde.core.numbers import mix
from spfde.core.state import check_entries

AugmentMode = Literal["none", "crop", "crop+flip", "random-resized-crop"]
Moves = tuple[Tensor, ...]
"""For each image the first row and the first column of its crop, or the box of its random resized crop, and whether it
is flipped (left out where no image is)."""


def crop_flip(images: Tensor, top: Tensor, left: Tensor, flip: Tensor | None = None, *, padding: int) -> Tensor:
    """Crop each image from its zero-padded self at its own offset, then mirror it left to right where asked.

    Args:
        images: ``(N, C, H, W)``, any dtype and device.
        top: ``(N,)`` integers in ``[0, 2 * padding]``: first row of the crop.
        left: likewise, first column.
        flip: ``(N,)`` booleans, or None to flip nothing.
        padding: zero pixels added on each side before the crop.

    Returns:
        A new contiguous tensor like ``images``.
    """
    n, channels, height, width = images.shape
    top, left = (offset.to(images.device, non_blocking=True) for offset in (top, left))
    padded = F.pad(images, (padding, padding, padding, padding))
    columns = torch.arange(width, device=images.device).expand(n, width)
    if flip is not None:
        columns = torch.where(flip.to(images.device, non_blocking=True)[:, None], width - 1 - columns, columns)
    columns = columns + left[:, None]
    rows = torch.arange(height, device=images.device) + top[:, None]
    index = (rows[:, :, None] * (width + 2 * padding) + columns[:, None, :]).view(n, 1, height * width)
    flat = padded.reshape(n, channels, -1).gather(2, index.expand(n, channels, height * width))
    return flat.view(n, channels, height, width)


def normalise(batch: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """``(batch - mean) / std`` per channel as float32; uint8 images are taken as the shares of 255 that they stand for.

    Args:
        batch: ``(N, C, H, W)``, uint8 or floating.
        mean: ``(C,)`` in the images' own unit (shares in [0, 1] for uint8); moved to the batch's device.
        std: likewise.
    """
    scale = 255.0 if batch.dtype == torch.uint8 else 1.0
    device, shape = batch.device, (1, -1, 1, 1)
    factor = (1.0 / (scale * std.to(device=device, dtype=torch.float32))).view(shape)
    shift = (mean.to(device=device, dtype=torch.float32) * scale).view(shape)
    return batch.to(torch.float32).sub(shift).mul_(factor)


class BatchAugment:
    """Random crop and flip for one batch at a time.

    The draws come from ``generator`` on the CPU, so that they are the same whatever the device of the batch; a mode
    that needs no draw takes none.

    Args:
        mode: ``none``, ``crop``, ``crop+flip`` (flip with probability one half), or ``random-resized-crop`` and flip,
            which always go by the seeds of samples.
        generator: a CPU generator, the only source of randomness.
        padding: pixels of zeros on each side before the crop.
    """

    def __init__(self, mode: AugmentMode, generator: torch.Generator, *, padding: int = 4) -> None:
        self.mode: AugmentMode = mode
        self.padding = padding
        self.generator = generator

    def __call__(self, images: Tensor) -> Tensor:
        """Augment ``images`` of shape ``(N, C, H, W)``; the input is left as it is."""
        return images if self.mode == "none" else self.move(images, self.draw(len(images)))

    @property
    def goes_by_sample(self) -> bool:
        """Whether images are augmented by their seeds alone, never batch by batch."""
        return self.mode == "random-resized-crop"

    def replay(self, images: Tensor, seeds: Tensor) -> Tensor:
        """Augment each image as its seed, int64 ``(N,)``, says; the generator is left alone."""
        return images if self.mode == "none" else self.move(images, self.moves_of(seeds, images.shape[2:]))

    def move(self, images: Tensor, moves: Moves) -> Tensor:
        """Crop and flip ``images`` of shape ``(N, C, H, W)`` as the moves of each say, on the images' device."""
        if self.mode == "random-resized-crop":
            return random_crop.resized_crop(images, *moves)
        return crop_flip(images, *moves, padding=self.padding)

    def draw(self, n: int) -> Moves:
        """Draw the moves of ``n`` images, on the CPU."""
        offsets = torch.randint(0, 2 * self.padding + 1, (2, n), generator=self.generator)
        if self.mode == "crop":
            return offsets[0], offsets[1]
        return offsets[0], offsets[1], torch.randint(0, 2, (n,), generator=self.generator).bool()

    def moves_of(self, seeds: Tensor, size: Sequence[int]) -> Moves:
        """The moves of images that have these seeds, int64 ``(N,)``, and this height and width.

        Of a crop they are whole numbers alone, so equal on every device.
        """
        span, flip = 2 * self.padding + 1, self.flips(seeds)
        if self.mode == "random-resized-crop":
            return random_crop.boxes(random_crop.draws(seeds), *size), flip
        offsets = mix(seeds, 1) % span, mix(seeds, 2) % span
        return offsets if self.mode == "crop" else (*offsets, flip)

    @staticmethod
    def flips(seeds: Tensor) -> Tensor:
        """Whether images that have these seeds are flipped, where a mode flips: booleans ``(N,)``."""
        return mix(seeds, 3) % 2 == 1

    def state_dict(self) -> dict[str, Any]:
        """The mode, the padding and the generator's state."""
        return {"mode": self.mode, "padding": self.padding, "generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the generator.

        Raises:
            StateMismatch: the state is of another mode or padding, or is not a state of this class.
        """
        check_entries(state, "the augmentation", {"mode": str, "padding": int, "generator": Tensor})
        for field in ("mode", "padding"):
            if state[field] != getattr(self, field):
                raise StateMismatch(
                    f"augmentation: the saved {field} is {state[field]!r}, this run's is {getattr(self, field)!r}. "
                    "Resume with the augmentation that the run was started with."
                )
        check_torch(state["generator"], "the augmentation's generator")
        self.generator.set_state(state["generator"].cpu())
