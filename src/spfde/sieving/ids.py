"""The ids of the samples that there are, without keeping those that follow from their number."""

from __future__ import annotations

import torch
from torch import Tensor


class Ids:
    """Sample ids, ascending: kept where they are not 0 … n-1.

    Args:
        ids: shape (n,), long, ascending, without repetition and not negative.

    Attributes:
        end: the largest id, and one more.

    Example:
        >>> from spfde.sieving.ids import Ids
        >>> ids = Ids(torch.tensor([2, 5, 7]))
        >>> len(ids), ids.end, ids.positions(torch.tensor([7, 2]))
        (3, 8, tensor([2, 0]))
        >>> Ids(torch.arange(4)).tensor()
        tensor([0, 1, 2, 3])
    """

    def __init__(self, ids: Tensor) -> None:
        self._n, self.end = ids.numel(), int(ids[-1]) + 1 if ids.numel() else 0
        self._kept = None if self._n == self.end else ids.clone()

    def __len__(self) -> int:
        return self._n

    def tensor(self) -> Tensor:
        """All of them, shape (n,), long; not to be written to."""
        return torch.arange(self._n) if self._kept is None else self._kept

    def positions(self, ids: Tensor) -> Tensor:
        """Where some of them stand among all, long."""
        return ids if self._kept is None else torch.searchsorted(self._kept, ids)
