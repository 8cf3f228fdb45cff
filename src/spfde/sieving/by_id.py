"""Samples in shards: data sets that stream, taken sample by sample, and an order that goes from shard to shard."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Generator, Tensor
from torch.utils.data import Dataset, IterableDataset, Sampler

from spfde.core.errors import InvalidArgument, Problem


class ById(Dataset[Any]):
    """A data set that gives samples by their ids though PyTorch would iterate it, as one of samples with ids.

    ``litdata.StreamingDataset`` and ``streaming.StreamingDataset`` have a length and give any sample, and are
    subclasses of ``IterableDataset`` nevertheless: a DataLoader would iterate them, and no sample could be left out.

    Args:
        source: the data set, with ``__len__`` and ``__getitem__``.

    Raises:
        InvalidArgument: it has no length, or gives no sample by its id.

    Example:
        >>> from spfde.sieving import ById
        >>> samples = ById(["a", "b", "c"])
        >>> len(samples), samples[1]
        (3, 'b')
    """

    def __init__(self, source: Any) -> None:
        if not _gives_by_id(source):
            rule = "has no __len__ or no __getitem__: its samples have no ids"
            raise InvalidArgument(Problem("source", type(source).__name__, rule, "Take a data set with both."))
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Any:
        return self.source[int(index)]


def iterated(dataset: IterableDataset[Any]) -> Problem:
    """What is wrong with a data set that a DataLoader iterates, and what helps."""
    rule = "is iterable-style: its samples have no ids and cannot be left out"
    remedy = "Use a map-style data set (with __getitem__ and __len__)."
    if _gives_by_id(dataset):
        remedy = "It gives samples by their ids, too: make the DataLoader of spfde.sieving.ById(dataset)."
    return Problem("loader.dataset", type(dataset).__name__, rule, remedy)


def _gives_by_id(dataset: Any) -> bool:
    """Whether it has a length and a ``__getitem__`` that is not the one of PyTorch's, which gives nothing."""
    kind = type(dataset)
    own = getattr(kind, "__getitem__", None)
    return own is not None and own is not IterableDataset.__getitem__ and hasattr(kind, "__len__")


class ShardSampler(Sampler[int]):
    """A random order that stays within a few shards at a time, so that each is fetched once an epoch.

    The shards come in random order, ``window`` at a time, and the samples of a window are shuffled.

    Args:
        sizes: samples of each shard, in the order of the ids: shard 0 has the ids from 0 on.
        window: shards that are open at once; as many as there are give a random order of all samples.
        generator: of the order; None takes PyTorch's own. One of the run's own lets a resumed run draw the same.

    Raises:
        InvalidArgument: a shard or the window has less than one.

    Example:
        >>> import torch
        >>> from spfde.sieving import ShardSampler
        >>> order = list(ShardSampler([2, 2, 2], window=1, generator=torch.Generator().manual_seed(0)))
        >>> sorted(order), [i // 2 for i in order[::2]] == [i // 2 for i in order[1::2]]
        ([0, 1, 2, 3, 4, 5], True)
    """

    def __init__(self, sizes: Sequence[int], *, window: int = 16, generator: Generator | None = None) -> None:
        for name, value in (("window", window), ("sizes", min(sizes, default=0))):
            if value < 1:
                raise InvalidArgument(Problem(name, value, "must be 1 or more", "Count the samples of each shard."))
        self.window, self.generator = window, generator
        self._ends = torch.tensor([0, *sizes]).cumsum(0)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __iter__(self) -> Iterator[int]:
        # One number is drawn from the generator, at once: the rest of the epoch follows from it.
        seed = int(torch.empty((), dtype=torch.int64).random_(generator=self.generator))
        drawn = Generator().manual_seed(seed)
        return self._order(torch.randperm(len(self._ends) - 1, generator=drawn), drawn)

    def _order(self, shards: Tensor, drawn: Generator) -> Iterator[int]:
        for some in torch.split(shards, self.window):
            ids = torch.cat([torch.arange(int(self._ends[shard]), int(self._ends[shard + 1])) for shard in some])
            yield from ids[torch.randperm(len(ids), generator=drawn)].tolist()
