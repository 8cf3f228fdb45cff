"""A number that tells tensors apart, exact in their bits, on any device."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def checksum(tensor: Tensor) -> Tensor:
    """Sum of the bits, weighted by position, modulo 2^64: int64, no dimensions, on the tensor's device.

    The memory layout does not matter, nor the sign of zero. Integers are added in any order with one result.
    """
    flat = tensor.detach().contiguous().view(-1)
    if flat.is_complex():
        flat = torch.view_as_real(flat).view(-1)
    if flat.is_floating_point():
        flat = flat + 0.0  # of minus zero: zero
    bits = flat.view(_INTEGERS[flat.element_size()]).to(torch.int64)
    return (bits * torch.arange(1, 2 * bits.numel(), 2, device=bits.device)).sum()


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
