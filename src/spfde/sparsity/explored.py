"""In-time over-parameterisation: which weights have ever been active (Liu et al., ITOP, arXiv 2102.02887)."""

from __future__ import annotations

import torch
from torch import Tensor

from spfde.sparsity.masks import pack, unpack


class Explored:
    """The union of all masks that a weight has had, one bit a weight, on the CPU.

    Attributes:
        numel: elements of the weight.
        packed: eight weights a byte, as :func:`spfde.sparsity.masks.pack` has them.
    """

    def __init__(self, numel: int) -> None:
        self.numel = numel
        self.packed = torch.zeros(-(-numel // 8), dtype=torch.uint8)

    def add(self, mask: Tensor) -> None:
        """Take in another mask, of ``numel`` elements."""
        self.packed |= pack(mask)

    @property
    def count(self) -> int:
        """Weights that have been active at least once."""
        return int(unpack(self.packed, (self.numel,)).sum())
