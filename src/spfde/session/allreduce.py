"""Gradients that travel sparse: of a masked weight the active entries alone are averaged over the ranks.

The masks are the same on all ranks, so that no indices travel: each rank takes the same entries out of a bucket of
gradients, in the same order, and puts their mean back where they were.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import is_
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.distributed import GradBucket, ProcessGroup, all_reduce  # type: ignore[attr-defined]
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.futures import Future

from spfde.sparsity.weight import MaskedWeight


def active_positions(
    buffer: Tensor, parameters: Sequence[Tensor], offsets: Sequence[int], masks: Sequence[Tensor | None]
) -> Tensor | None:
    """Where the entries of a bucket lie that have a gradient.

    Args:
        buffer: the gradients of the parameters one after the other, shape (n,).
        parameters: each lies in the buffer in the order of its own memory where that has no gaps (channels_last), and
            in row-major order else, as DistributedDataParallel has it.
        offsets: where each begins.
        masks: boolean, of each parameter's shape; None: all its entries have one.

    Returns:
        Ascending, int64, shape (number of entries,), on the buffer's device; None where all have one.

    Example:
        >>> import torch
        >>> from spfde.session.allreduce import active_positions
        >>> weight, bias = torch.zeros(2, 2), torch.zeros(1)
        >>> mask = torch.tensor([[True, False], [False, True]])
        >>> active_positions(torch.zeros(5), [weight, bias], [0, 4], [mask, None])
        tensor([0, 3, 4])
    """
    is_active = torch.ones(buffer.numel(), dtype=torch.bool, device=buffer.device)
    for parameter, offset, mask in zip(parameters, offsets, masks, strict=True):
        if mask is not None:
            # empty_like keeps strides just where memory has no gaps and no overlaps.
            strides = torch.empty_like(parameter, dtype=torch.bool, requires_grad=False).stride()
            if strides != parameter.stride():
                strides = torch.empty(parameter.shape, dtype=torch.bool, device="meta").stride()
            is_active.as_strided(parameter.shape, strides, offset).copy_(mask)
    found = is_active.nonzero().squeeze(1)
    return None if found.numel() == buffer.numel() else found


@dataclass(frozen=True)
class _Known:
    """What was looked up for a bucket, and for which parameters and masks."""

    parameters: list[Tensor]
    masks: list[Tensor | None]
    positions: Tensor | None

    def fits(self, parameters: Sequence[Tensor], masks: Sequence[Tensor | None]) -> bool:
        """Whether they are the same tensors: a mask that changes is another one."""
        return (
            len(parameters) == len(self.parameters)
            and all(map(is_, parameters, self.parameters))
            and all(map(is_, masks, self.masks))
        )


class SparseAllReduce:
    """Averages buckets of gradients over the processes of a group, of masked weights the active entries alone.

    The numbers are those that DistributedDataParallel comes to with the masked gradients, but for the order in which
    more than two processes are summed up.

    Args:
        layers: the masked weights; their gradients are masked when they come. They are not kept alive: when nobody
            masks any more, whole buckets travel.
        group: the processes.

    Attributes:
        sent: bytes that this process has handed over to be averaged.
        whole: bytes of the same buckets with all their entries.
    """

    def __init__(self, layers: Mapping[str, MaskedWeight], group: ProcessGroup) -> None:
        masked = {id(layer.parameter): layer for layer in layers.values() if not layer.is_dense}
        self._layers = WeakValueDictionary(masked)
        self._group, self._size = group, group.size()
        self._known: dict[int, _Known] = {}
        self.sent = self.whole = 0

    def __call__(self, bucket: GradBucket) -> Future[Tensor]:
        """Start to average a bucket; the future is its buffer, with what all ranks agree on."""
        buffer = bucket.buffer()
        positions = None if buffer.is_sparse else self._positions(bucket, buffer)
        self.whole += buffer.numel() * buffer.element_size()
        if positions is None:
            self.sent += buffer.numel() * buffer.element_size()
            return allreduce_hook(self._group, bucket)
        # Divided before, as DistributedDataParallel does: half precision does not overflow.
        packed = buffer.index_select(0, positions).mul_(1.0 / self._size)
        self.sent += packed.numel() * packed.element_size()

        def put_back(done: Future[list[Tensor]]) -> Tensor:
            # What is masked is zero already.
            return buffer.index_copy_(0, positions, done.value()[0])

        averaging = all_reduce(packed, group=self._group, async_op=True)
        assert averaging is not None, "this process is in the group"
        moved: Future[Tensor] = averaging.get_future().then(put_back)
        return moved

    def _positions(self, bucket: GradBucket, buffer: Tensor) -> Tensor | None:
        parameters = bucket.parameters()
        layers = [self._layers.get(id(parameter)) for parameter in parameters]
        masks = [None if layer is None else layer.gradient_mask for layer in layers]
        known = self._known.get(bucket.index())
        if known is None or not known.fits(parameters, masks):
            first = buffer.storage_offset()
            offsets = [int(gradient.storage_offset() - first) for gradient in bucket.gradients()]
            known = _Known(parameters, masks, active_positions(buffer, parameters, offsets, masks))
            self._known[bucket.index()] = known
        return known.positions


def reduce_sparse(state: SparseAllReduce, bucket: GradBucket) -> Future[Tensor]:
    """The communication hook, as DistributedDataParallel calls it."""
    return state(bucket)
