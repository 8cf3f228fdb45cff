"""From a file to pixels: whatever Pillow can decode without starting another program, upright and in RGB.

Pillow says what a file is, and decodes it, a JPEG at a lower resolution where it has more than is needed. A JPEG of
which every pixel is needed is decoded by torchvision, to the same pixels by the same library without Pillow's copies,
and PyTorch scales, in a quarter of Pillow's time (``benchmarks/decoding.py``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg

from spfde.app.data.images import Box, data_error
from spfde.core.errors import DataError

# What Pillow turns into 8 bits a channel as it is meant: 0 is black, the largest value white.
_EIGHT_BITS = {"1", "L", "P", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "LA", "PA"}
# By their content, whatever their name: Pillow would start another program for some, such as Ghostscript.
_FORMATS = ("JPEG", "PNG", "BMP", "PPM", "TIFF", "WEBP", "GIF")
_JPEG = b"\xff\xd8\xff"
_WITH_ALPHA = {"RGBA", "LA", "PA"}
_RGB = ImageReadMode.RGB
# Some builds of torchvision come without its decoders.
_HAS_DECODER = hasattr(torch.ops.image, "decode_jpeg")
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


def decode(path: str, at_least: tuple[int, int] | None = None) -> Tensor:
    """The upright image of a file.

    Args:
        path: of the file.
        at_least: (height, width) that the caller needs: a JPEG with twice as much or more is decoded at a lower
            resolution, which still covers it. None: every pixel.

    Returns:
        Pixels ``(3, H, W)``, uint8, with no promise of how they lie in memory.

    Raises:
        DataError: the file cannot be decoded; the message names it.
    """
    with _opened(path) as image:
        return _upright(image, path, at_least)


def decode_part(path: str, box_in: Callable[[int, int], Box], size: tuple[int, int]) -> Tensor:
    """A part of the upright image of a file, scaled; as coarsely decoded as that allows.

    Args:
        path: of the file.
        box_in: gives the part, of the image's height and width.
        size: (height, width) wanted.

    Returns:
        ``(3, height, width)``, uint8, contiguous.

    Raises:
        DataError: the file cannot be decoded; the message names it.
    """
    with _opened(path) as image:
        width, height = _upright_size(image)
        top, left, rows, columns = box_in(height, width)
        coarser = min(rows / size[0], columns / size[1])
        whole = _upright(image, path, (math.ceil(height / coarser), math.ceil(width / coarser)))
    down, across = whole.shape[1] / height, whole.shape[2] / width
    bottom, right = round((top + rows) * down), round((left + columns) * across)
    top, left = min(round(top * down), bottom - 1), min(round(left * across), right - 1)
    return scale(whole[:, top:bottom, left:right], size)


def fit(image: Tensor, size: tuple[int, int], share: float = 1.0) -> Tensor:
    """Cut an image at its centre to the shape of ``size``, and scale what is left to it.

    Args:
        image: ``(C, H, W)``, uint8.
        size: (height, width).
        share: of the largest part of that shape, by its sides, that is left.

    Returns:
        ``(C, height, width)``, uint8, contiguous.
    """
    height, width = size
    rows, columns = image.shape[1:]
    # The largest part of that shape: all rows, or all columns.
    if rows * width > columns * height:
        rows = max(1, round(columns * height / width))
    else:
        columns = max(1, round(rows * width / height))
    rows, columns = max(1, round(rows * share)), max(1, round(columns * share))
    top, left = (image.shape[1] - rows) // 2, (image.shape[2] - columns) // 2
    return scale(image[:, top : top + rows, left : left + columns], size)


def scale(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Scale a whole image ``(C, H, W)`` of uint8 to ``(height, width)``, bilinear, smoothed where it shrinks."""
    if tuple(image.shape[1:]) == size:
        return image.contiguous()
    return F.interpolate(image[None], size, mode="bilinear", antialias=True)[0].contiguous()


def size_of(path: str) -> tuple[int, int]:
    """Width and height of the upright image, by the file's header.

    Raises:
        DataError: the file has none that is known.
    """
    with _opened(path) as image:
        return _upright_size(image)


def _upright_size(image: Any) -> tuple[int, int]:
    width, height = image.size
    return (height, width) if image.getexif().get(_ORIENTATION) in _ON_ITS_SIDE else (width, height)


def _upright(image: Any, path: str, at_least: tuple[int, int] | None) -> Tensor:
    """Pixels as ``decode`` gives them."""
    turn, whole = image.getexif().get(_ORIENTATION), image.size
    if at_least is not None:
        height, width = at_least if turn not in _ON_ITS_SIDE else at_least[::-1]
        image.draft("RGB", (width, height))
    is_plain = image.format == "JPEG" and image.mode == "RGB" and image.size == whole and turn not in _TURNS
    if is_plain and _HAS_DECODER:
        image.fp.seek(0)
        found: Tensor = decode_jpeg(torch.frombuffer(bytearray(image.fp.read()), dtype=torch.uint8), _RGB)
        return found
    pixels = _as_rgb(image, path)
    if turn in _TURNS:
        pixels = pixels.transpose(_TURNS[turn])
    return torch.from_numpy(np.array(pixels)).permute(2, 0, 1)


def check_header(path: str) -> None:
    """Look whether a file begins as an image does: for JPEGs, which may be a million, at three bytes.

    Raises:
        DataError: it does not.
    """
    with _named_errors(path), open(path, "rb", buffering=0) as file:
        begin = file.read(len(_JPEG))
    if begin != _JPEG:
        size_of(path)


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
    return image if image.mode == "RGB" else image.convert("RGB")  # which would make a copy


@contextmanager
def _opened(path: str) -> Iterator[Any]:
    with _named_errors(path), Image.open(path, formats=_FORMATS) as image:
        yield image


@contextmanager
def _named_errors(path: str) -> Iterator[None]:
    try:
        yield
    except DataError:
        raise
    except Exception as error:  # decoders raise whatever they like on damaged files
        rule = f"cannot be read as an image ({type(error).__name__}: {error})"
        raise data_error(path, rule, "Repair or remove the file.") from error
