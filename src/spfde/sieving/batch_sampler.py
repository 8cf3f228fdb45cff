"""The batch sampler of a partial set: the user's own sampler, passing over what is left out."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, RandomSampler, Sampler, SequentialSampler, SubsetRandomSampler

from spfde.core.errors import UsageError


class SievedBatchSampler(BatchSampler):
    """Batches of the user's sampler without the removed samples.

    Laziness is kept: nothing is drawn from the sampler before the first batch is asked for, and no index before it is
    needed. ``DataLoader`` draws its base seed between the two and makes the iterator twice when it has workers, so this
    is what keeps the draws in the plain loader's order.
    """

    def __init__(
        self,
        sampler: Sampler[int] | Iterable[int],
        batch_size: int,
        drop_last: bool,
        *,
        keep: Callable[[], Tensor | None] | None = None,
        share: tuple[int, int] = (0, 1),
    ) -> None:
        """Wrap a sampler.

        Args:
            sampler: the user's sampler, which yields sample ids.
            batch_size: samples in a batch.
            drop_last: whether the last batch is left out when it is not full.
            keep: gives the bool mask over sample ids that are in the partial set, or None while nothing is removed;
                asked once at the start of each iteration.
            share: (rank, size): of every ``size`` batches the one at ``rank`` is yielded. Every rank yields the same
                number: the first batches of an epoch come again where they do not divide, or, with ``drop_last``,
                the rest is left out.

        Raises:
            UsageError: made anew by a trainer, from the arguments that every batch sampler has.
        """
        if keep is None:
            raise UsageError(
                "a trainer makes the batch sampler of session.loader anew, to deal its batches out, and session.loader "
                "does that itself. Pass use_distributed_sampler=False to Lightning's Trainer (or to Fabric's "
                "setup_dataloaders), and keep session.loader from other wrappers."
            )
        super().__init__(sampler, batch_size, drop_last)
        self.keep = keep
        self.share = share
        #: Of the iteration of ``SievedLoader`` that starts: where batches are noted, and how many of all ranks' batches
        #: are passed over.
        self.handed_on: deque[list[Any]] | None = None
        self.passed_over = 0
        self.newest: Rest | None = None
        self._watcher: weakref.ref[Any] | None = None

    def be_watched_by(self, loader: Any) -> None:
        """Let a ``SievedLoader`` look after iterations that it does not make: of somebody, or of another loader.

        It is not held: a cycle would leave its workers to the garbage collector, in which they end after seconds only.
        """
        self._watcher = weakref.ref(loader)

    def __iter__(self) -> Iterator[list[int]]:
        if self.handed_on is None:
            watcher = None if self._watcher is None else self._watcher()
            found: Iterator[list[int]] = self._batches(0) if watcher is None else watcher.watch(self._batches)
            return found
        self.newest = Rest(self._batches(self.passed_over), self.handed_on)
        return self.newest

    def _batches(self, taken: int) -> Iterator[list[int]]:
        keep = self.keep()
        batches = super().__iter__() if keep is None else self._kept(keep)
        if self.share[1] > 1:
            return _dealt(batches, *self.share, drop_rest=self.drop_last, taken=taken)
        return islice(batches, taken, None) if taken else batches

    def __len__(self) -> int:
        """Number of batches in an epoch; see ``n_left``."""
        return self.n_left(0)

    def n_left(self, taken: int) -> int:
        """Number of batches for this rank, in an epoch of which the ranks have taken so many together.

        Raises:
            TypeError: something is removed, and the sampler (random with replacement, or not one of PyTorch's own)
                does not tell how many of its samples are in the partial set.
        """
        keep = self.keep()
        if keep is None:
            n_batches = int(super().__len__())
        else:
            n_batches = _divide(self._n_kept(keep), self.batch_size, drop_rest=self.drop_last)
        return _divide(max(0, n_batches - taken), self.share[1], drop_rest=self.drop_last)

    def n_samples(self) -> int:
        """Samples of an epoch, over all processes, before ``drop_last``.

        Raises:
            TypeError: it is not known; see ``__len__``.
        """
        keep = self.keep()
        return len(self.sampler) if keep is None else self._n_kept(keep)  # type: ignore[arg-type]  # a TypeError

    def _kept(self, keep: Tensor) -> Iterator[list[int]]:
        # bytes and filter: one look-up in C for each index, about 2 ms for 50,000. Filtering a tensor and turning it
        # into ints costs as much, and this serves every sampler, lazily and with the very index objects it yields.
        contains = keep.numpy().tobytes()
        yield from BatchSampler(filter(contains.__getitem__, self.sampler), self.batch_size, self.drop_last)

    def _n_kept(self, keep: Tensor) -> int:
        sampler: Any = self.sampler
        if iterates_as(sampler, SubsetRandomSampler):
            return int(keep[subset_indices(sampler)].sum())
        if iterates_as(sampler, SequentialSampler):
            return int(keep.sum())
        if iterates_as(sampler, RandomSampler) and not sampler.replacement:
            rounds, rest = divmod(sampler.num_samples, len(sampler.data_source))
            if rest == 0:
                return int(rounds * keep.sum())
        raise TypeError(
            f"the number of batches over a partial set is not known in advance with {type(sampler).__name__}: "
            "it depends on what the sampler draws"
        )


def _divide(n: int, size: int, *, drop_rest: bool) -> int:
    return n // size if drop_rest else -(-n // size)


def _dealt(
    batches: Iterator[list[int]], rank: int, size: int, *, drop_rest: bool, taken: int = 0
) -> Iterator[list[int]]:
    """Every ``size``-th batch, from ``rank`` on, of those that are not taken.

    A last round that is not full is filled from the first batches.
    """
    first: list[list[int]] = []
    hand: list[list[int]] = []
    for number, batch in enumerate(batches):
        if len(first) < size:
            first.append(batch)
        if number < taken:
            continue
        hand.append(batch)
        if len(hand) == size:
            yield hand[rank]
            hand = []
    if hand and not drop_rest:
        yield (hand + (first * size)[: size - len(hand)])[rank]


class Rest(Iterator[list[int]]):
    """The batches of an epoch, from the first one that was not taken.

    Args:
        batches: those.
        queue: where the batches that are asked for are noted.
    """

    def __init__(self, batches: Iterator[list[int]], queue: deque[list[Any]]) -> None:
        self._batches, self._queue = batches, queue
        self._ahead: list[list[int]] = []

    def look_ahead(self) -> bool:
        """Draw one batch more from the sampler, for the next call; returns whether there is one."""
        if not self._ahead:
            self._ahead = list(islice(self._batches, 1))
        return bool(self._ahead)

    @property
    def has_more(self) -> bool:
        """Whether a batch is left that was not handed on; it may draw one batch more from the sampler."""
        return bool(self._queue) or self.look_ahead()

    def __next__(self) -> list[int]:
        if not self.look_ahead():
            raise StopIteration
        batch = self._ahead.pop()
        self._queue.append(list(batch))  # a copy: a data set's __getitems__ may change the list that it is given
        return batch


def iterates_as(sampler: object, kind: type) -> bool:
    """Whether a sampler is of this kind and does not iterate in a way of its own."""
    return isinstance(sampler, kind) and type(sampler).__iter__ is kind.__iter__  # type: ignore[attr-defined]


def subset_indices(sampler: Any) -> Tensor:
    """The indices of a ``SubsetRandomSampler``, shape (n,), long."""
    return torch.as_tensor(sampler.indices, dtype=torch.long).cpu()
