"""A number that tells tensors apart, exact in their bits, on any device."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

from spfde.core.sharding import own_part

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# Floating point of one byte has no arithmetic; of these the bits 1000 0000 are minus zero, of the others they are not.
_BYTES_WITH_MINUS_ZERO = (torch.float8_e4m3fn, torch.float8_e5m2)
_AT_ONCE = 2**20
"""Elements that are added at once: what it takes in memory is bounded by them, some 30 MB."""


def checksum(tensor: Tensor, first: int = 0) -> Tensor:
    """Sum of the bits, weighted by position, modulo 2^64: int64, no dimensions, on the tensor's device.

    The memory layout does not matter, nor the sign of zero. Integers are added in any order with one result: that of a
    whole tensor is the sum of those of its parts. Of a DTensor the part in this process counts.

    Args:
        tensor: of any kind.
        first: position of the tensor's first element, where it is a part of a whole one.
    """
    tensor = own_part(tensor).detach()
    if tensor.is_quantized:
        tensor = tensor.int_repr()
    if tensor.is_complex():
        tensor, first = torch.view_as_real(tensor), 2 * first
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    odd = 2 * torch.arange(min(tensor.numel(), _AT_ONCE), device=tensor.device) + 1
    position = first
    for flat in _pieces(tensor):
        bits = _bits(flat)
        total += (bits * odd[: bits.numel()]).sum() + 2 * position * bits.sum()
        position += bits.numel()
    return total


def _pieces(tensor: Tensor) -> Iterator[Tensor]:
    """The elements in their order, in flat tensors of ``_AT_ONCE`` at most."""
    if tensor.is_contiguous():
        yield from torch.split(tensor.view(-1), _AT_ONCE)
    elif tensor.numel() <= _AT_ONCE:
        yield tensor.reshape(-1)
    elif tensor.shape[0] == 1:
        yield from _pieces(tensor[0])
    else:
        for part in torch.split(tensor, max(1, _AT_ONCE * tensor.shape[0] // tensor.numel())):
            yield from _pieces(part)


def _bits(flat: Tensor) -> Tensor:
    """The bits of each element as int64; those of minus zero are those of zero."""
    if flat.is_floating_point() and flat.element_size() > 1:
        flat = flat + 0.0
    bits = flat.view(_INTEGERS[flat.element_size()]).to(torch.int64)
    return bits.masked_fill_(bits == 0x80, 0) if flat.dtype in _BYTES_WITH_MINUS_ZERO else bits


def checksums(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Of each tensor; an accelerator is waited for once."""
    return dict(zip(tensors, together(checksum(tensor) for tensor in tensors.values()), strict=True))


def together(numbers: Iterable[Tensor]) -> list[int]:
    """The values of integer tensors without dimensions; an accelerator is waited for once."""
    numbers = list(numbers)
    if not numbers:
        return []
    first = numbers[0].device
    found: list[int] = torch.stack([number.to(first) for number in numbers]).tolist()
    return found
