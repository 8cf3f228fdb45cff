"""From a mask to the lists that the kernels schedule: which weights there are, and where each of them reads.

A convolution has one list for its forward pass and the gradient of its weight, and for the gradient of its input one
list for each residue of the input's rows and columns by the stride (one list in all at stride 1). All are compressed
rows in chunks of source channels, so that what a tile reads of the source stays in the first-level cache.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from spfde.engines.native.layout import Layout
from spfde.engines.native.structs import struct

_MOST = 2**31 - 1


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

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the output for an input of that size."""
        sizes = []
        axes = zip((height, width), self.kernel, self.padding, self.extra, self.dilation, strict=True)
        for size, k, p, more, d in axes:
            sizes.append((size + 2 * p + more - d * (k - 1) - 1) // self.stride + 1)
        return sizes[0], sizes[1]

    def halos(self, height: int, width: int) -> tuple[int, int]:
        """Halo that the input needs to be read in the forward pass, and the output in the backward pass."""
        inside, outside = 0, 0
        for axis, size in enumerate((height, width)):
            k, p, d, s = self.kernel[axis], self.padding[axis], self.dilation[axis], self.stride
            n_out = self.output_size(height, width)[axis]
            inside = max(inside, p, (n_out - 1) * s + (k - 1) * d - p - (size - 1))
            # Input row i belongs to output row (i + p - k * d) / s.
            outside = max(outside, -((p - (k - 1) * d) // s), (size - 1 + p) // s - (n_out - 1))
        return inside, outside


@dataclass(frozen=True)
class Entries:
    """One list for the kernels.

    Attributes:
        index: position of each entry's weight in the weight's storage, int32.
        start: int32 [chunks * rows + 1].
        offset: int32 [entries].
        origin: row and column residue of the target (gradient of the input), else (0, 0).
        c: as the kernels take it.
    """

    index: Tensor
    start: Tensor
    offset: Tensor
    origin: tuple[int, int]
    c: ctypes.Structure

    @property
    def n(self) -> int:
        return len(self.index)


@dataclass(frozen=True)
class WeightLists:
    """The lists of one convolution for one mask and one pair of layouts."""

    forward: Entries
    backward: tuple[Entries, ...]


def build(
    geometry: Geometry, active: Tensor, strides: Sequence[int], source: Layout, target: Layout, *, chunk_bytes: int
) -> WeightLists:
    """Make the lists of a convolution.

    Args:
        geometry: the convolution.
        active: bool of the weight's shape [out, in / groups, kernel height, kernel width].
        strides: the weight's, in elements.
        source: layout of the input.
        target: layout of the output.
        chunk_bytes: of the source that one chunk of channels may read for a tile.
    """
    out, inner, kh, kw = active.nonzero(as_tuple=True)
    index = out * strides[0] + inner * strides[1] + kh * strides[2] + kw * strides[3]
    per_group = geometry.out_channels // geometry.groups
    channel = inner + out // per_group * (geometry.in_channels // geometry.groups)
    dh, dw = (kh * geometry.dilation[0] - geometry.padding[0], kw * geometry.dilation[1] - geometry.padding[1])

    def entries(
        rows: Tensor,
        n_rows: int,
        columns: Tensor,
        down: Tensor,
        right: Tensor,
        read: Layout,
        keep: Tensor | None,
        origin: tuple[int, int],
    ) -> Entries:
        offset = columns * read.span + down * read.pitch + right * read.lanes
        where = index
        if keep is not None:
            rows, columns, offset, where = rows[keep], columns[keep], offset[keep], index[keep]
        assert not len(offset) or int(offset.abs().max()) <= _MOST, "layouts_of leaves values of this size alone"
        most = max(1, chunk_bytes // (_tile_pixels(geometry) * read.lanes * 4))
        chunks = max(1, -(-read.channels // most))
        width = max(1, -(-read.channels // chunks))
        key = columns // width * n_rows + rows
        order = _sorted(key, chunks * n_rows)
        start = torch.zeros(chunks * n_rows + 1, dtype=torch.int32)
        start[1:] = torch.bincount(key, minlength=chunks * n_rows).cumsum(0)
        where, offset = where[order].to(torch.int32), offset[order].to(torch.int32)
        c = struct("Entries")(n_rows, chunks, start.data_ptr(), offset.data_ptr())
        return Entries(where, start, offset, origin, c)

    forward = entries(out, geometry.out_channels, channel, dh, dw, source, None, (0, 0))
    backward, s = [], geometry.stride
    for residue_h in range(s):
        for residue_w in range(s):
            down, right = residue_h - dh, residue_w - dw
            keep = None if s == 1 else ((down % s == 0) & (right % s == 0)).nonzero(as_tuple=True)[0]
            rows = geometry.in_channels
            backward.append(entries(channel, rows, out, down // s, right // s, target, keep, (residue_h, residue_w)))
    return WeightLists(forward, tuple(backward))


def _sorted(keys: Tensor, n: int) -> Tensor:
    """Positions by their keys, which are below ``n``; equal ones keep their order."""
    # Of 16 bits NumPy's stable sort is by counting.
    return torch.from_numpy(keys.numpy().astype(np.uint16 if n <= 1 << 16 else np.int64).argsort(kind="stable"))


def _tile_pixels(geometry: Geometry) -> int:
    """Pixels of the source under a tile of eight pixels of the target."""
    height = (geometry.kernel[0] - 1) * geometry.dilation[0] + 1
    width = (geometry.kernel[1] - 1) * geometry.dilation[1] + 1
    return height * (7 * geometry.stride + width)


def _pair(value: Any) -> tuple[int, int]:
    return (int(value), int(value)) if isinstance(value, int) else (int(value[0]), int(value[1]))
