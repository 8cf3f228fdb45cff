"""Several processes: the same choices on every rank, and counts that are summed over them.

Each rank runs the same session on the same masks and the same partial set; a batch of the epoch's order belongs to one
rank. Equal seeds and equal weights make equal masks, so only three things travel: what was observed, the gradients that
a mutation ranks weights by, and the counts of the bill.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler, SequentialSampler

from spfde.core.errors import Problem, UsageError
from spfde.core.sharding import is_dtensor
from spfde.core.torch_private import tree_map_only


class OtherRankFailed(UsageError):
    """Another rank has found something wrong, so that this one does not go on."""

    def __init__(self) -> None:
        super().__init__("another rank has found something wrong, and says what. All ranks end here.")


@dataclass(frozen=True)
class World:
    """The processes that train together.

    Attributes:
        rank: this process, from 0.
        size: number of processes; 1 without ``torch.distributed``.
    """

    rank: int = 0
    size: int = 1

    @classmethod
    def current(cls) -> World:
        """The processes of ``torch.distributed``'s default group, if there is one."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return cls(torch.distributed.get_rank(), torch.distributed.get_world_size())
        return cls()

    @property
    def is_shared(self) -> bool:
        """Whether there is more than one process."""
        return self.size > 1

    def gather(self, item: Any, error: Exception | None = None, *, what: str) -> list[Any]:
        """``item`` of every rank, in order of rank. Every rank has to call it.

        A rank that has found something wrong passes its ``error``, so that the others do not wait for it: it is raised
        here, and wherever they gather next, whatever that is, they raise ``UsageError``.

        Args:
            item: anything that can be pickled.
            error: what this rank has found.
            what: what is exchanged: ranks that exchange different things are told which, by ``UsageError``.
        """
        items: list[Any] = [(error is not None, what, item)] * self.size
        if self.is_shared:
            torch.distributed.all_gather_object(items, items[0])
        if error is not None:
            raise error
        if any(failed for failed, _, _ in items):
            raise OtherRankFailed
        other = next(((rank, theirs) for rank, (_, theirs, _) in enumerate(items) if theirs != what), None)
        if other is not None:
            raise UsageError(
                f"rank {self.rank} exchanges {what}, and rank {other[0]} {other[1]}: they do not do the same. Call "
                "observe(), begin_epoch(), end_epoch() and verify() on every rank, equally often and in the same order."
            )
        return [own for _, _, own in items]

    def sum(self, value: int, *, what: str) -> int:
        """The sum over the ranks. Every rank has to call it."""
        return sum(self.gather(value, what=what))

    def average_(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor by its mean over the ranks. Every rank has to call it, with tensors of equal shapes."""
        if self.is_shared:
            for tensor in tensors:
                torch.distributed.all_reduce(tensor)
                tensor /= self.size

    def disagrees(self, item: Any, *, what: str) -> bool:
        """Whether ``item`` (primitives and tensors) differs between ranks. Every rank has to call it."""
        return len(set(self.gather(fingerprint(item), what=what))) > 1


def fingerprint(item: Any) -> str:
    """A short text that is equal for equal primitives and tensors."""
    return hashlib.sha256(repr(tree_map_only(Tensor, _digest, item)).encode()).hexdigest()


def _digest(tensor: Tensor) -> tuple[str, str]:
    if is_dtensor(tensor):
        return f"{tensor.dtype} {tuple(tensor.shape)}", "sharded: each rank has rows of its own"
    content = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data
    return f"{tensor.dtype} {tuple(tensor.shape)}", hashlib.sha256(content).hexdigest()


def check_shared_loader(loader: DataLoader[Any], world: World, *, sieves: bool) -> list[Problem]:
    """What keeps several processes from sharing the loader's epochs; empty with one process.

    The session deals out the batches itself, so the samplers of all ranks must give the same order.
    """
    if not world.is_shared:
        return []
    if isinstance(loader.sampler, DistributedSampler):
        if not sieves:
            return []
        return [
            Problem(
                "loader.sampler",
                "DistributedSampler",
                "deals out the whole data set, and the session has to deal out the partial set",
                "Use shuffle=True with generator=torch.Generator().manual_seed(seed), the same on every rank.",
            )
        ]
    if isinstance(loader.sampler, SequentialSampler):
        return []
    generator = getattr(loader.sampler, "generator", None)
    if generator is None or world.disagrees(generator.get_state(), what="the loaders' generators"):
        return [
            Problem(
                "loader.generator",
                generator,
                f"must be the same on all {world.size} ranks, for the session deals out the batches of one order",
                "Pass generator=torch.Generator().manual_seed(seed) to the DataLoader, with one seed for all ranks.",
            )
        ]
    return []


def deals_out(loader: DataLoader[Any], world: World) -> bool:
    """Whether the session has to deal out the loader's batches over the ranks."""
    return world.is_shared and not isinstance(loader.sampler, DistributedSampler)


def join_first(world: World) -> None:
    """Raise ``UsageError`` where the processes are others than when the session was attached."""
    now = World.current()
    if now != world:
        raise UsageError(
            f"the session was attached in a group of {world.size}, and now {now.size} train together: it would go on "
            "by itself, on samples and masks of its own. Join the process group first "
            "(torch.distributed.init_process_group, or what your trainer calls), then attach."
        )


def go_on_together(world: World, place: tuple[int, bool, int | None]) -> None:
    """Raise ``UsageError`` where ranks are about to go on at different places. Every rank has to call it.

    Args:
        world: the processes.
        place: the epoch, whether it is at its bottom, and the batches that were taken of it in the run that goes on.
    """
    places = world.gather(place, what="where it goes on")
    other = next((rank for rank, theirs in enumerate(places) if theirs != place), None)
    if other is not None:
        raise UsageError(
            f"rank {world.rank} goes on in epoch {place[0]} and rank {other} in epoch {places[other][0]}, or behind "
            "other batches of it. A state was loaded on some ranks only: load those of the model, the optimizer and "
            "the session on every rank (DistributedDataParallel hands on the weights alone)."
        )


def refuse_another_loader(world: World) -> None:
    """Raise ``UsageError`` where another loader takes ``session.loader``'s batches, which are dealt out already."""
    if world.is_shared:
        raise UsageError(
            "another loader takes the batches of session.loader, to deal them out over the ranks once more, and "
            "some samples would never be seen. Do not prepare session.loader (leave it out of prepare()), and "
            "pass use_distributed_sampler=False to Lightning's Trainer; iterate session.loader itself."
        )
