"""Sparse tensors in few bytes: the values that are not zero, and a bit for each place. Lossless, bit by bit.

Without a mask, a value is left out when all of its bits are zero: negative zeros and NaN are kept as they are. Places
are row-major, one bit each, lowest bit first. A tensor that is smaller as it is (**dense**) stays so: with 32-bit
values, below 3 % sparsity.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from spfde.core.errors import InvalidArgument, Problem

Kind = Literal["dense", "mask"]

# Types to look at bits as; numpy knows no bfloat16 and no 8-bit floats.
_BITS_OF = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# Entries that are expanded at a time: what is between the file and the tensor stays in the second-level cache.
_CHUNK = 2**16
_ALIGNMENT = 64


@dataclass(frozen=True)
class Encoded:
    """A tensor as it is stored."""

    kind: Kind
    shape: tuple[int, ...]
    values: Tensor  # what is kept, one-dimensional, of the tensor's own type; with ``dense`` all of it
    positions: Tensor  # a packed mask (uint8); empty with ``dense``

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.positions.nbytes


@dataclass(frozen=True)
class WeightBytes:
    """Bytes of a model's tensors, dense and as ``encode`` stores them; file headers not counted."""

    dense: int
    compressed: int


def encoded_bytes(numel: int, active: int, *, itemsize: int) -> int:
    """Bytes of a tensor as ``encode`` stores it: the values that are kept and a bit for each entry, or all of it."""
    return min(active * itemsize + math.ceil(numel / 8), numel * itemsize)


def weight_bytes(tensors: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> WeightBytes:
    """What ``encode`` stores tensors in with these masks; those without a mask are taken to hold no zeros.

    Args:
        tensors: by name (``model.state_dict()``); their values are not read.
        masks: by name; True where the weight exists.

    Example:
        >>> session = spfde.attach(model, optimizer, loader, spfde.presets.static, epochs=2)
        >>> taken = spfde.export.weight_bytes(model.state_dict(), session.masks)
        >>> taken.compressed < taken.dense
        True
    """
    return bytes_of_counts(tensors, {name: int(masks[name].count_nonzero()) for name in tensors if name in masks})


def bytes_of_counts(tensors: Mapping[str, Tensor], active: Mapping[str, int]) -> WeightBytes:
    """:func:`weight_bytes` where the number of active weights is known, by name."""
    dense = compressed = 0
    for name, tensor in tensors.items():
        dense += tensor.nbytes
        if name not in active or tensor.element_size() not in _BITS_OF:
            compressed += tensor.nbytes
            continue
        compressed += encoded_bytes(tensor.numel(), active[name], itemsize=tensor.element_size())
    return WeightBytes(dense, compressed)


def encode(tensor: Tensor, mask: Tensor | None = None) -> Encoded:
    """The strided tensor in as few bytes as this module can; on the CPU.

    Kept is what the mask says, whatever it is; other zeros lose their signs. Without a mask every value with a bit set
    is kept.

    Raises:
        InvalidArgument: a value outside the mask is not zero, or the mask has another shape.
    """
    flat = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().view(-1)
    shape, nothing = tuple(tensor.shape), torch.empty(0, dtype=torch.uint8)
    if mask is not None:
        _check_mask(tensor, mask)
    if flat.element_size() not in _BITS_OF:
        return Encoded("dense", shape, flat, nothing)
    bits = as_bits(flat)
    kept = bits != 0 if mask is None else mask.detach().cpu().contiguous().view(-1).numpy()
    positions = np.flatnonzero(kept)
    if encoded_bytes(flat.numel(), len(positions), itemsize=flat.element_size()) == flat.nbytes:
        return Encoded("dense", shape, flat, nothing)
    values = torch.from_numpy(bits[positions]).view(tensor.dtype)
    return Encoded("mask", shape, values, torch.from_numpy(np.packbits(kept, bitorder="little")))


def decode(encoded: Mapping[str, Encoded]) -> dict[str, Tensor]:
    """The tensors that were encoded, each with a storage of its own in one allocation.

    One allocation, because fresh memory is the dear part of reading: the system hands out a large one in large pages.

    Raises:
        InvalidArgument: positions do not fit the shape or the values; the data are damaged.
    """
    for name, item in encoded.items():
        _check(name, item, _has_possible_size(item))
    sizes = {name: math.prod(item.shape) * item.values.element_size() for name, item in encoded.items()}
    starts, total = {}, 0
    for name, size in sizes.items():
        starts[name] = total
        total += size + -size % _ALIGNMENT
    memory = np.zeros(total, dtype=np.uint8)
    decoded = {}
    for name, item in encoded.items():
        tensor = torch.empty(0, dtype=item.values.dtype)
        if size := sizes[name]:  # views of an empty array have strides that torch refuses
            tensor = torch.from_numpy(memory[starts[name] : starts[name] + size]).view(item.values.dtype)
        if item.kind == "dense":
            _check(name, item, item.values.numel() == tensor.numel())
            tensor.copy_(item.values)
        else:
            _check(name, item, _fill(as_bits(tensor), as_bits(item.values), item.positions.numpy()))
        decoded[name] = tensor.view(item.shape)
    return decoded


def _has_possible_size(item: Encoded) -> bool:
    """Whether what is stored says as much as the shape does, before there is memory for it."""
    if not all(type(side) is int and side >= 0 for side in item.shape):
        return False
    numel = math.prod(item.shape)
    stored = item.values.numel() if item.kind == "dense" else item.positions.numel()
    return item.values.dim() == 1 and stored == (numel if item.kind == "dense" else -(-numel // 8))


def as_bits(tensor: Tensor) -> np.ndarray[Any, Any]:
    """A tensor's memory as numpy's integers of the same size, if it has such."""
    return tensor.view(_BITS_OF.get(tensor.element_size(), tensor.dtype)).numpy()


def _fill(target: np.ndarray[Any, Any], values: np.ndarray[Any, Any], packed: np.ndarray[Any, Any]) -> bool:
    """Put the values where they belong; False where that cannot be."""
    if packed.dtype != np.uint8 or len(packed) != math.ceil(len(target) / 8):
        return False
    taken = 0
    for start in range(0, len(target), _CHUNK):
        part = target[start : start + _CHUNK]
        bits = np.unpackbits(packed[start // 8 : (start + _CHUNK) // 8], count=len(part), bitorder="little")
        # Indices: numpy assigns through them three times as fast as through a mask, and finds them faster in booleans.
        positions = np.flatnonzero(bits.view(np.bool_))
        if taken + len(positions) > len(values):
            return False
        part[positions] = values[taken : taken + len(positions)]
        taken += len(positions)
    return taken == len(values)


def _check(name: str, item: Encoded, fits: bool) -> None:
    if not fits:
        found = f"{item.values.numel()} values of shape {item.shape} by {item.kind}"
        raise InvalidArgument(Problem(name, found, "values, positions and shape do not fit", "The data are damaged."))


def _check_mask(tensor: Tensor, mask: Tensor) -> None:
    if mask.shape != tensor.shape or mask.dtype != torch.bool:
        found, rule = f"{mask.dtype} of shape {tuple(mask.shape)}", f"must be bool of shape {tuple(tensor.shape)}"
        raise InvalidArgument(Problem("mask", found, rule, "Pass the masks of this model (session.masks)."))
    outside = int(torch.count_nonzero(tensor.detach().masked_fill(mask.to(tensor.device), 0)))
    if outside:
        rule, remedy = "all weights outside the mask must be zero", "Pass the masks that the weights were trained with."
        raise InvalidArgument(Problem("mask", f"{outside} other weights", rule, remedy))
