"""A loader of any kind, where nothing is sieved: its batches drive the clock, and nothing is known of their samples."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from spfde.core.errors import InvalidArgument, Problem, UsageError
from spfde.sieving.loader import Event, SievedLoader, check_loader, loader_generators

Batches = Iterable[Any] | Callable[[], Iterable[Any]] | None
"""Batches of an epoch: what can be iterated once for each, a function that returns it, or None (they are elsewhere)."""


class StreamLoader:
    """The loader of a session over batches that are not made of samples with ids.

    Attributes:
        samples: of an epoch.
        batch_size: of a batch, as far as it is known.
        on_event, iteration, is_ended, batches_handed, samples_handed, handed_by, handed_size: see ``SievedLoader``.
    """

    on_event: Callable[[Event], None]
    passed_over = 0
    current_indices = handed_keys = None
    had_workers = asks_for_more = False

    def __init__(self, source: Batches, *, samples: int, batch_size: int) -> None:
        self.source, self.samples, self.batch_size = source, samples, batch_size
        self.on_event = lambda event: None
        self.iteration = self.handed_by = -1
        self.is_ended = False
        self.batches_handed = self.samples_handed = self.handed_size = 0
        self.started_with: list[Tensor] = []

    def __len__(self) -> int:
        if self.source is None or callable(self.source):
            raise TypeError("the number of batches is not known")
        return len(self.source)  # type: ignore[arg-type]  # a TypeError where it has none

    def n_left(self, taken: int) -> int:
        """All: an epoch of such batches is not resumed amid itself."""
        return len(self)

    def __iter__(self) -> Iterator[Any]:
        if self.source is None:
            raise UsageError("session.loader is empty, for attach was given loader=None. Iterate your own loader.")
        self.on_event("start")
        self.iteration += 1
        self.is_ended = False
        self.batches_handed = self.samples_handed = 0
        return self._batches(iter(self.source() if callable(self.source) else self.source), self.iteration)

    def _batches(self, batches: Iterator[Any], number: int) -> Iterator[Any]:
        for batch in batches:
            self.handed_by, self.handed_size = number, samples_in(batch) or self.batch_size
            if number == self.iteration:
                self.batches_handed += 1
                self.samples_handed += self.handed_size
            self.on_event("batch")
            yield batch
        self.is_ended = self.is_ended or number == self.iteration
        self.on_event("end")

    def go_on(self, taken: int | None, started_with: Sequence[Tensor] = ()) -> None:
        """An epoch of such batches is not resumed amid itself."""

    def states_at_end(self) -> list[Tensor]:
        """The states of the generators that the loader inside owns."""
        return [generator.get_state() for generator in loader_generators(self)]

    def end_workers(self) -> None:
        """There are none of its own."""


def is_stream(loader: object) -> bool:
    """Whether a loader's samples have no ids, or are not batched in a way that can be carried over."""
    if isinstance(loader, SievedLoader) or not isinstance(loader, DataLoader):
        return not isinstance(loader, SievedLoader)
    if isinstance(loader.dataset, IterableDataset):
        return True
    return any(
        problem.argument != "loader.sampler" and "length 0" not in problem.rule for problem in check_loader(loader)
    )


def check_stream(loader: object) -> list[Problem]:
    """Find what keeps a loader without sample ids from being iterated once an epoch."""
    if isinstance(loader, StreamLoader):
        remedy = "Pass what it was made from, or detach the other session first."
        return [Problem("loader", type(loader).__name__, "is already the loader of a session", remedy)]
    if isinstance(loader, DataLoader):
        return [problem for problem in check_loader(loader) if "length 0" in problem.rule]
    if loader is None or callable(loader):
        return []
    if isinstance(loader, (str, bytes)) or not isinstance(loader, Iterable):
        remedy = "Pass a DataLoader, or any iterable of batches where nothing is sieved."
        return [Problem("loader", loader, "must be a DataLoader, or an iterable of batches", remedy)]
    if isinstance(loader, Iterator):
        remedy = "Pass what makes it, a function say: attach(model, optimizer, make_batches, …)."
        return [
            Problem("loader", type(loader).__name__, "can be iterated once only, and each epoch iterates it", remedy)
        ]
    return []


def stream_of(loader: Batches, *, samples_per_epoch: int | None, sample: Any) -> StreamLoader:
    """What a session makes of a loader without sample ids.

    Raises:
        InvalidArgument: it cannot be told how many samples an epoch has.
    """
    first = loader[0] if isinstance(loader, Sequence) and len(loader) else None
    batch_size = _batch_size(loader) or samples_in(first) or samples_in(sample) or 1
    samples = samples_per_epoch if samples_per_epoch is not None else _count(loader, batch_size)
    if samples is None:
        rule = "is needed, for it cannot be told how many samples this loader has in an epoch"
        remedy = "Pass samples_per_epoch= to attach: the bill is reckoned from it."
        raise InvalidArgument(Problem("samples_per_epoch", None, rule, remedy))
    return StreamLoader(loader, samples=samples, batch_size=batch_size)


def samples_in(batch: Any) -> int | None:
    """Samples in a batch: the length of its first tensor or array; None where there is none."""
    if batch is None or isinstance(batch, (str, bytes)):
        return None
    if isinstance(batch, Tensor) or hasattr(batch, "shape"):
        return int(batch.shape[0]) if len(batch.shape) else None
    if isinstance(batch, Mapping):
        batch = batch.values()
    elif not isinstance(batch, (list, tuple)):
        return None
    return next((found for part in batch if (found := samples_in(part)) is not None), None)


def _batch_size(loader: Any) -> int | None:
    for owner in (loader, getattr(loader, "batch_sampler", None)):
        size = getattr(owner, "batch_size", None)
        if isinstance(size, int) and size > 0:
            return size
    return None


def _count(loader: Any, batch_size: int) -> int | None:
    if isinstance(loader, Sequence):
        return sum(samples_in(batch) or batch_size for batch in loader)
    dataset = getattr(loader, "dataset", None)
    try:
        n = len(dataset)  # type: ignore[arg-type]  # a TypeError where it has none
        size = getattr(loader, "batch_size", None)
        return n - n % size if size and getattr(loader, "drop_last", False) else n
    except TypeError:
        pass
    try:
        return len(loader) * batch_size
    except TypeError:
        return None
