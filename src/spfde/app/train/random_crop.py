"""Random resized crop: a part of an image of random size and shape, scaled to the size that the model takes.

Source: Szegedy et al., arXiv 1409.4842, section 6, with the numbers and the ten tries of torchvision.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from spfde.core.numbers import mix

SCALE = (0.08, 1.0)
"""Share of the image's area that a crop has."""
RATIO = (3 / 4, 4 / 3)
"""Width by height of a crop."""
TRIES = 10
N_DRAWS = 2 * TRIES + 2
"""Numbers that a crop takes."""
_FIRST_SALT = 4  # those below belong to crop and flip


def draws(seeds: Tensor) -> Tensor:
    """The random numbers of crops, ``(N, N_DRAWS)`` in [0, 1), by the images' seeds, int64 ``(N,)``."""
    kind = torch.float32 if seeds.device.type == "mps" else torch.float64
    whole = [mix(seeds, _FIRST_SALT + number) >> 30 for number in range(N_DRAWS)]  # 32 bits: exact in either type
    return torch.stack(whole, 1).to(kind).div_(2.0**32).clamp_(max=1 - 2.0**-24)


def boxes(drawn: Tensor, height: int, width: int) -> Tensor:
    """First row, first column, height and width of the crops, int64 ``(N, 4)``.

    Of ten sizes and shapes the first one that fits into the image is taken; where none does, the largest part at its
    centre whose shape is allowed.

    Args:
        drawn: as ``draws`` has them.
        height, width: of the images.

    Example:
        >>> from spfde.app.train.random_crop import boxes, draws
        >>> boxes(draws(torch.arange(2)), 100, 200).tolist()
        [[20, 83, 59, 60], [4, 39, 91, 79]]
    """
    least, most = map(math.log, RATIO)
    area = height * width * (SCALE[0] + (SCALE[1] - SCALE[0]) * drawn[:, :TRIES])
    ratio = torch.exp(least + (most - least) * drawn[:, TRIES : 2 * TRIES])
    rows, columns = (area / ratio).sqrt().round().long(), (area * ratio).sqrt().round().long()
    fits = (rows > 0) & (rows <= height) & (columns > 0) & (columns <= width)
    first, is_found = fits.int().argmax(1, keepdim=True), fits.any(1)
    largest = min(height, round(width / RATIO[0])), min(width, round(height * RATIO[1]))
    starts, sizes = [], []
    for tried, otherwise, whole, place in zip((rows, columns), largest, (height, width), drawn.T[-2:], strict=True):
        size = torch.where(is_found, tried.gather(1, first)[:, 0], otherwise)
        starts.append(torch.where(is_found, (place * (whole - size + 1)).long(), (whole - size) // 2))
        sizes.append(size)
    return torch.stack([*starts, *sizes], 1)


def resized_crop(images: Tensor, boxes: Tensor, flip: Tensor) -> Tensor:
    """Crop each image at its own box, scale that to the images' size, and mirror it left to right where asked.

    Bilinear; a crop is never larger than the image, so nothing is scaled down.

    Args:
        images: ``(N, C, H, W)``, uint8 or floating, any device.
        boxes: ``(N, 4)``, as ``boxes`` gives them.
        flip: ``(N,)`` booleans.

    Returns:
        A new tensor like ``images``.
    """
    n, _, height, width = images.shape
    top, left, rows, columns = boxes.to(images.device, torch.float32, non_blocking=True)[:, :, None].unbind(1)
    flip = flip.to(images.device, non_blocking=True)[:, None]
    down = _places(top, rows, height, images.device)
    right = _places(left, columns, width, images.device)
    right = torch.where(flip, right.flip(1), right)
    grid = torch.empty(n, height, width, 2, device=images.device)
    grid[..., 0] = ((2 * right + 1) / width - 1)[:, None, :]
    grid[..., 1] = ((2 * down + 1) / height - 1)[:, :, None]
    made = F.grid_sample(images.float(), grid, mode="bilinear", padding_mode="border", align_corners=False)
    return (made.round_().clamp_(0, 255) if images.dtype == torch.uint8 else made).to(images.dtype)


def _places(start: Tensor, size: Tensor, whole: int, device: torch.device) -> Tensor:
    """Where in the image each of ``whole`` pixels of a crop is read, ``(N, whole)``; not beyond the crop's edge."""
    step = (torch.arange(whole, device=device) + 0.5) * size / whole - 0.5
    return start + torch.minimum(step.clamp(min=0), size - 1)
