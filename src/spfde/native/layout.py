"""The blocked layout of a value, and the buffers that hold values."""

from __future__ import annotations

import ctypes
import functools
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

# Tokens lie like images of one row: so many vectors to a channel, lane after lane. What a tile reads of all channels is
# then one piece of memory.
TOKEN_COLUMNS = 8

_NUMPY = {torch.float32: np.float32, torch.float64: np.float64, torch.int32: np.int32}
_ALIGNMENT = 64  # bytes: a cache line, and the widest vector


class CBlocked(ctypes.Structure):
    """``Blocked`` of the kernels."""

    _fields_ = [(name, ctypes.c_int64) for name in ("groups", "channels", "height", "width", "halo", "batch", "span")]


@dataclass(frozen=True)
class Layout:
    """Images in groups of ``lanes``, a pixel of a group one vector; see ``kernels/lanes.h``.

    Attributes:
        batch: images.
        channels, height, width: of an image.
        halo: zero pixels on a side of each image.
        lanes: images in a group.
    """

    batch: int
    channels: int
    height: int
    width: int
    halo: int
    lanes: int

    @property
    def groups(self) -> int:
        return -(-self.batch // self.lanes)

    @property
    def pitch(self) -> int:
        """Numbers from a pixel to the one below it."""
        return self.channels * self.span

    @functools.cached_property
    def span(self) -> int:
        """Numbers from a channel to the next."""
        return (self.width + self.halo) * self.lanes

    @property
    def lead(self) -> int:
        """Zeros before the first channel of a group."""
        return self.halo * self.pitch + self.halo * self.lanes

    @functools.cached_property
    def group(self) -> int:
        """Numbers from a group of images to the next."""
        return (self.height + self.halo) * self.pitch

    @functools.cached_property
    def numel(self) -> int:
        """Numbers in the buffer, halos and empty lanes included."""
        return self.lead + self.groups * self.group

    @functools.cached_property
    def c(self) -> CBlocked:
        """As the kernels take it."""
        return CBlocked(self.groups, self.channels, self.height, self.width, self.halo, self.batch, self.span)


class Pool:
    """Buffers that are used again. A buffer comes back when the last tensor on it is gone.

    Kernels write pixels of images only, so the zeros of halos and empty lanes, once written, stay: a buffer serves one
    layout for good.

    Args:
        dtype: of the tensors that are handed out.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._free: dict[object, list[np.ndarray[Any, Any]]] = defaultdict(list)
        self._bytes = 0

    @property
    def bytes(self) -> int:
        """Memory of all buffers, free or in use."""
        return self._bytes

    def take(self, layout: Layout) -> Tensor:
        """A flat tensor of ``layout.numel``; pixels hold anything, all else is zero."""
        return self._take(layout, layout.numel, self.dtype)

    def take_flat(self, numel: int, dtype: torch.dtype | None = None) -> Tensor:
        """A flat tensor of ``numel`` that holds anything."""
        dtype = dtype or self.dtype
        return self._take((numel, dtype), numel, dtype)

    def release(self) -> None:
        """Give the memory of the free buffers back to the system."""
        for arrays in self._free.values():
            self._bytes -= sum(array.nbytes for array in arrays)
        self._free.clear()

    def _take(self, key: object, numel: int, dtype: torch.dtype) -> Tensor:
        free = self._free[key]
        if not free:
            free.append(_zeros(numel * dtype.itemsize).view(_NUMPY[dtype])[:numel])
            self._bytes += free[-1].nbytes
        # The tensor's storage holds the array, the array its lease: no counting of our own.
        return torch.from_numpy(np.asarray(_Lease(free.pop(), free)))


class _Lease:
    """An array on loan; it goes back to its shelf when nothing refers to the lease any more."""

    def __init__(self, array: np.ndarray[Any, Any], shelf: list[np.ndarray[Any, Any]]) -> None:
        self._array, self._shelf = array, shelf
        self.__array_interface__ = array.__array_interface__

    def __del__(self) -> None:
        self._shelf.append(self._array)


def _zeros(n_bytes: int) -> np.ndarray[Any, Any]:
    n_bytes = -(-n_bytes // _ALIGNMENT) * _ALIGNMENT
    raw = np.zeros(n_bytes + _ALIGNMENT, dtype=np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + n_bytes]
