"""The shape of a convolution, and what its kernels work through: windows of rows, and tiles of pixels.

``kernels/window.h`` and ``kernels/product.h`` say what they are.
"""

from __future__ import annotations

import ctypes
import functools
import math
from dataclasses import dataclass
from typing import Any

from torch import nn

from spfde.engines.native.layout import Layout
from spfde.engines.native.structs import struct

# What a window may take; the second-level cache (512 KiB or more) holds more than it, and both of a backward pass.
_MOST_WINDOW = 256 << 10
# Rows of a window are so many bytes from a multiple of a page apart, so that they do not fall on the same cache lines.
_PAGE, _OFF_PAGE = 4096, 704
# What an entry costs besides its products, in products.
_ENTRY_COST = 3


@dataclass(frozen=True)
class Vectors:
    """What the kernels were compiled for.

    Attributes:
        lanes: images to a vector.
        registers: vectors.
        pairs: products of pairs of bf16.
    """

    lanes: int
    registers: int
    pairs: bool


@dataclass(frozen=True)
class Geometry:
    """The shape of a convolution: a stride that is equal both ways, padding before, and ``extra`` of it behind."""

    out_channels: int
    in_channels: int
    kernel: tuple[int, int]
    stride: int
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    extra: tuple[int, int] = (0, 0)

    @classmethod
    def of(cls, module: nn.Conv2d | nn.Linear) -> Geometry:
        """The geometry of a module; 'same' padding is resolved. A linear layer is a convolution with a 1x1 kernel."""
        if isinstance(module, nn.Linear):
            return cls(module.out_features, module.in_features, (1, 1), 1, (0, 0), (1, 1), 1)
        kernel, dilation = _pair(module.kernel_size), _pair(module.dilation)
        padding: Any = module.padding
        extra = (0, 0)
        if padding == "valid":
            padding = (0, 0)
        elif padding == "same":
            rows, columns = ((k - 1) * d for k, d in zip(kernel, dilation, strict=True))
            padding, extra = (rows // 2, columns // 2), (rows % 2, columns % 2)
        channels, stride = (
            (module.out_channels, module.in_channels),
            module.stride[0],
        )  # ops.py takes equal strides only
        return cls(*channels, kernel, stride, _pair(padding), dilation, module.groups, extra)

    @property
    def spans(self) -> tuple[int, int]:
        """Rows and columns from the first tap of the kernel to the last, both included."""
        rows, columns = ((k - 1) * d + 1 for k, d in zip(self.kernel, self.dilation, strict=True))
        return rows, columns

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the output for an input of that size."""
        sizes = []
        for size, span, p, more in zip((height, width), self.spans, self.padding, self.extra, strict=True):
            sizes.append((size + 2 * p + more - span) // self.stride + 1)
        return sizes[0], sizes[1]

    def reads_every_row(self, height: int) -> bool:
        """Is each row of an image of that many rows read for a row of the output that the same thread writes?"""
        last = (self.output_size(height, 1 << 20)[0] - 1) * self.stride - self.padding[0] + self.spans[0] - 1
        return self.spans[0] - self.padding[0] >= self.stride and last >= height - 1

    def turned(self, axis: int) -> list[tuple[int, int, int]]:
        """Along an axis, for the gradient of the input: tap, residue of the input's pixel, and how far off it reads."""
        k, d, s, p = self.kernel[axis], self.dilation[axis], self.stride, self.padding[axis]
        taps = ((tap, residue, residue + p - tap * d) for tap in range(k) for residue in range(s))
        return [(tap, residue, away // s) for tap, residue, away in taps if away % s == 0]


@dataclass(frozen=True)
class Window:
    """Rows of all channels; see ``kernels/window.h``."""

    slots: int
    pitch: int
    span: int
    plane: int
    above: int
    lead: int
    stride: int

    @functools.cached_property
    def c(self) -> ctypes.Structure:
        """As the kernels take it."""
        return struct("Window")(self.slots, self.pitch, self.span, self.plane, self.above, self.lead, self.stride)


@dataclass(frozen=True)
class Tile:
    """Target pixels, and the rows, planes of columns and pixels that they read; see ``kernels/product.h``."""

    rows: int
    columns: int
    high: int
    planes: int
    wide: int

    @functools.cached_property
    def c(self) -> ctypes.Structure:
        """As the kernels take it."""
        return struct("Tile")(self.rows, self.columns, self.high, self.planes, self.wide)

    @property
    def pixels(self) -> int:
        """Vectors of the scratch that it reads of a channel."""
        return self.high * self.planes * self.wide


@dataclass(frozen=True)
class ForwardShape:
    """What the forward pass works through: ``step`` rows of the target at a time."""

    window: Window
    tile: Tile
    step: int


@dataclass(frozen=True)
class GradientShape:
    """What the backward pass works through.

    Attributes:
        window, source: of the gradient of the output, and of the input.
        tile: of the input's pixels of one residue.
        weight: rows and columns, in registers, of the tiles from which gradients of weights are summed.
        step: rows of the output at a time.
        height: rows to work through.
    """

    window: Window
    source: Window
    tile: Tile
    weight: tuple[int, int]
    step: int
    height: int


@functools.lru_cache(maxsize=4096)
def forward_shape(geometry: Geometry, source: Layout, target: Layout, vectors: Vectors) -> ForwardShape:
    """The shape of a forward pass for layouts of any batch."""
    rows, columns = best_size(target.height, target.width, vectors, 1)
    tile = _tile(geometry, rows, columns)

    def window(step: int) -> Window:
        return _source_window(geometry, source, _up(target.width, columns), step)

    step = rows
    while step < target.height and window(2 * step).slots * window(2 * step).pitch * source.itemsize <= _MOST_WINDOW:
        if step >= 4:
            break
        step *= 2
    return ForwardShape(window(step), tile, step)


@functools.lru_cache(maxsize=4096)
def gradient_shape(geometry: Geometry, source: Layout, target: Layout, vectors: Vectors) -> GradientShape:
    """The shape of a backward pass; ``source`` and ``target`` are the layouts of the forward pass."""
    s = geometry.stride
    height, width = (max(t, -(-n // s)) for t, n in ((target.height, source.height), (target.width, source.width)))
    rows, columns = best_size(height, width, vectors, 1)
    lump = 2 if vectors.pairs and source.itemsize == 2 else 1
    weight = best_size(target.height, target.width, vectors, lump)
    (above, below), (left, right) = (_reach(geometry, axis) for axis in (0, 1))
    whole = max(_up(width, columns), _up(target.width, weight[1] * lump))
    span = (left + whole + right) * target.lanes

    def windows(step: int) -> tuple[Window, Window]:
        return (
            Window(step + above + below, _pitch(target, span), span, span, above, left, 1),
            _source_window(geometry, source, _up(target.width, weight[1] * lump), step),
        )

    def fit(step: int) -> bool:
        return sum(window.slots * window.pitch for window in windows(step)) * source.itemsize <= 2 * _MOST_WINDOW

    step = max(rows, weight[0])
    if step < 4 and 8 * step <= height and fit(2 * step):  # of fewer rows there would be too few bands
        step *= 2
    tile = Tile(rows, columns, rows + above + below, 1, columns + left + right)
    return GradientShape(*windows(step), tile, weight, step, height)


def best_size(height: int, width: int, vectors: Vectors, lump: int) -> tuple[int, int]:
    """Rows and columns of a tile, in registers of ``lump`` pixels, with the least work for an image of that size."""
    sizes = [(2, 8), (4, 4), (1, 8), (2, 4), (1, 4), (4, 2), (2, 2), (1, 1)]  # with_size in product.h
    fitting = [(rows, columns) for rows, columns in sizes if rows * columns * 2 <= vectors.registers]

    def work(size: tuple[int, int]) -> int:
        rows, columns = size
        return -(-height // rows) * -(-width // (columns * lump)) * (rows * columns + _ENTRY_COST)

    return min(fitting, key=work)


def _tile(geometry: Geometry, rows: int, columns: int) -> Tile:
    s, (high, wide) = geometry.stride, geometry.spans
    return Tile(rows, columns, (rows - 1) * s + high, min(s, wide), columns + (wide - 1) // s)


def _source_window(geometry: Geometry, source: Layout, width: int, step: int) -> Window:
    """Of what ``step`` rows of ``width`` pixels of the output read."""
    s, (high, wide), (above, left) = geometry.stride, geometry.spans, geometry.padding
    plane = max(width + (wide - 1) // s, -(-(left + source.width) // s)) * source.lanes
    return Window((step - 1) * s + high, _pitch(source, s * plane), s * plane, plane, above, left, s)


def _reach(geometry: Geometry, axis: int) -> tuple[int, int]:
    """How far before and behind a pixel the gradient of the input reads."""
    away = [0, *(away for *_, away in geometry.turned(axis))]
    return -min(away), max(away)


def _pitch(layout: Layout, span: int) -> int:
    n_bytes = layout.channels * span * layout.itemsize
    return (n_bytes + (_OFF_PAGE - n_bytes) % _PAGE) // layout.itemsize


def _up(size: int, unit: int) -> int:
    return math.ceil(size / unit) * unit


def _pair(value: Any) -> tuple[int, int]:
    return (int(value), int(value)) if isinstance(value, int) else (int(value[0]), int(value[1]))
