"""A masked weight that is sharded over the ranks by FSDP2 (``torch.distributed.fsdp.fully_shard``).

Each rank has some rows of the weight, of its gradient, of its optimizer state, and of its mask. Steps mask what is
there. Where a mask is drawn or changed, every rank gathers the whole weight, and the whole gradient where a criterion
needs one, of one layer at a time, and decides on them as one process does, with the generator that all ranks share. So
the masks are those of one process, entry by entry, and counts are exact; each rank keeps its rows.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor

from spfde.core.sharding import first_row, own_part, sum_over_ranks
from spfde.sparsity.masks import pack, unpack
from spfde.sparsity.weight import MaskedWeight


class ShardedWeight(MaskedWeight):
    """A weight of which this process has some rows: see ``MaskedWeight`` for what each method gives.

    Setting a mask, and all that is given whole or as a total, is an exchange: every rank has to call it.
    """

    parameter: Any  # a DTensor, sharded along dimension 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._n_explored = self.numel if self.is_dense else 0
        self._set_apart: weakref.ref[Tensor] | None = None

    @property
    def local(self) -> Tensor:
        own: Tensor = own_part(self.parameter)
        return own

    @property
    def grad(self) -> Tensor | None:
        gradient = self.parameter.grad
        return None if gradient is None else own_part(gradient)

    @property
    def shown(self) -> Tensor:
        """The mask as a DTensor, sharded like the weight; ``full_tensor()`` of it, called by every rank, is whole."""
        spread: Tensor = self._spread(self.mask)
        return spread

    def whole(self, own: Tensor) -> Tensor:
        gathered: Tensor = self._spread(own).full_tensor()
        return gathered

    def own(self, whole: Tensor) -> Tensor:
        start = first_row(self.parameter)
        rows: Tensor = whole[start : start + len(self.local)]
        return rows

    def total(self, count: int) -> int:
        return int(sum_over_ranks(torch.tensor(count, device=self.local.device), self.parameter))

    def adds_up(self, grad: Tensor) -> bool:
        # Gradients that were reduced together are views of one tensor, and share its version: masking one of them
        # writes to all, as far as that tells. So a gradient that may be added to is set apart, under its own version.
        is_known = self._set_apart is not None and self._set_apart() is grad
        if is_known and super().adds_up(grad):
            return True
        self.parameter.grad = self._spread(grad.clone())
        self._set_apart = weakref.ref(own_part(self.parameter.grad))
        return False

    @property
    def n_explored(self) -> int:
        return self._n_explored  # counted where all ranks do: not every rank may ask

    def set_mask(self, mask: Tensor, n_active: int) -> None:
        super().set_mask(mask, n_active)
        self._n_explored = self.total(int(self._own_explored().sum()))

    def saved_explored(self) -> Tensor:
        return pack(self.whole(self._own_explored().to(self.local.device)))

    def load_explored(self, saved: Tensor) -> None:
        whole = unpack(saved, tuple(self.parameter.shape))
        self.explored, self._n_explored = pack(self.own(whole)), int(whole.sum())

    def _own_explored(self) -> Tensor:
        return unpack(self.explored, tuple(self.mask.shape))

    def _spread(self, own: Tensor) -> Any:
        """A tensor of which each rank has the rows that it has of the weight, as a DTensor."""
        like = self.parameter
        return type(like).from_local(
            own, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
        )
