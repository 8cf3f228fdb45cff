"""What is done to parameters between the passes, for many small tensors in one call."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from spfde.engines.native.structs import struct

_PIECE = 16_384  # numbers of a tensor that a thread takes at once


class Outside:
    """The numbers of many tensors that lie where their masks have nothing.

    Args:
        library: the kernels.
        tensors: each dense in memory, of the kernels' type.
        masks: bool, as the tensors lie.
    """

    def __init__(self, library: ctypes.CDLL, tensors: Sequence[Tensor], masks: Sequence[Tensor]) -> None:
        self._kernel, self._tensors, self._masks = library.spfde_outside, list(tensors), list(masks)
        self._places = _places(tensors)
        masked = struct("Masked")
        pieces = [
            masked(place + first * tensor.itemsize, mask.data_ptr() + first, min(_PIECE, tensor.numel() - first))
            for place, tensor, mask in zip(self._places, self._tensors, self._masks, strict=True)
            for first in range(0, tensor.numel(), _PIECE)
        ]
        self._n, self._pieces = ctypes.c_int64(len(pieces)), (masked * len(pieces))(*pieces)

    def is_of(self, tensors: Sequence[Tensor], masks: Sequence[Tensor]) -> bool:
        """Whether it is about these, and they lie where they lay."""
        return (
            len(masks) == len(self._masks)
            and all(mask is other for mask, other in zip(masks, self._masks, strict=True))
            and _places(tensors) == self._places
            and all(one.stride() == other.stride() for one, other in zip(tensors, masks, strict=True))
        )

    def is_any(self) -> bool:
        """Whether one of them is not zero."""
        return self._call(clears=False)

    def clear(self) -> None:
        """Set them to +0. PyTorch is told of it if there were any."""
        if self._call(clears=True):
            increment_version(self._tensors)

    def _call(self, *, clears: bool) -> bool:
        return bool(self._kernel(self._pieces, self._n, clears, ctypes.c_int64(torch.get_num_threads())))


def _places(tensors: Iterable[Tensor]) -> list[int]:
    return list(map(Tensor.data_ptr, tensors))
