"""A DataLoader over the partial set that behaves like the user's own, and knows which samples it hands out.

A built DataLoader takes no new sampler, so a second one is built with the same arguments. Its batch sampler draws from
the user's sampler and passes over removed samples: the order stays the sampler's, and with nothing removed batches and
random draws are those of the plain loader, bit for bit.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any, Literal

import torch
from torch import Generator, Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from spfde.core.errors import Problem, UsageError
from spfde.sieving.batch_sampler import Rest, SievedBatchSampler, iterates_as, subset_indices
from spfde.sieving.by_id import iterated
from spfde.sieving.tickets import as_ids

Event = Literal["start", "batch", "end", "taken over"]


def check_loader(loader: object) -> list[Problem]:
    """Find what keeps a loader from being sieved; empty when all is well. Draws and iterates nothing."""
    if isinstance(loader, SievedLoader):
        remedy = "Pass the DataLoader that it was made from, or detach the other session first."
        return [Problem("loader", _kind(loader), "is already the loader of a session", remedy)]
    if not isinstance(loader, DataLoader):
        remedy = "Pass a torch.utils.data.DataLoader over a map-style data set."
        return [Problem("loader", _kind(loader), "must be a DataLoader", remedy)]
    if isinstance(loader.dataset, IterableDataset):
        return [iterated(loader.dataset)]
    return [*_dataset_problems(loader), *_batching_problems(loader)]


def _dataset_problems(loader: DataLoader[Any]) -> list[Problem]:
    dataset: Any = loader.dataset
    try:
        length = len(dataset)
    except TypeError:
        remedy = "Give the data set a __len__."
        return [Problem("loader.dataset", _kind(dataset), "has no length", remedy)]
    if length == 0:
        remedy = "Pass a data set with samples in it."
        return [Problem("loader.dataset", _kind(dataset), "has length 0", remedy)]
    if iterates_as(loader.sampler, SubsetRandomSampler):
        indices = subset_indices(loader.sampler)
        if indices.numel() == 0:
            remedy = "Pass a sampler with indices in it."
            return [Problem("loader.sampler", _kind(loader.sampler), "has no indices", remedy)]
        wrong = indices[(indices < 0) | (indices >= length)]
        if wrong.numel():
            rule = f"must hold indices in [0, {length})"
            return [Problem("loader.sampler", int(wrong[0]), rule, "Count the samples from 0.")]
    return []


def _batching_problems(loader: DataLoader[Any]) -> list[Problem]:
    problems = []
    if loader.batch_sampler is None:
        rule = "no batches are made by the loader, so there are none to make from the partial set"
        problems.append(Problem("loader.batch_size", None, rule, "Give the DataLoader a batch_size."))
    elif type(loader.batch_sampler) is not BatchSampler or loader.batch_size is None:
        rule = "is your own: how it would batch the partial set is not known"
        remedy = "Pass sampler=, batch_size= and drop_last= to the DataLoader instead."
        problems.append(Problem("loader.batch_sampler", _kind(loader.batch_sampler), rule, remedy))
    kind = type(loader)
    if kind.__iter__ is not DataLoader.__iter__ or kind._get_iterator is not DataLoader._get_iterator:
        rule = "iterates in its own way, which cannot be carried over to another loader"
        remedy = "Attach with a plain DataLoader, and wrap session.loader afterwards."
        if kind.__module__.startswith("accelerate."):
            remedy = "Call spfde.integrations.accelerate.attach, which takes what prepare() gives."
        problems.append(Problem("loader", _kind(loader), rule, remedy))
    return problems


def population_of(loader: DataLoader[Any]) -> Tensor:
    """Ids of the samples that the loader draws from, shape (n,), long, ascending.

    The indices of a ``SubsetRandomSampler``; what ``RandomSampler`` and ``SequentialSampler`` run over; for any other
    sampler the whole data set.
    """
    sampler: Any = loader.sampler
    if iterates_as(sampler, SubsetRandomSampler):
        ids: Tensor = torch.unique(subset_indices(sampler))
        return ids
    whole: Any = loader.dataset
    if iterates_as(sampler, RandomSampler) or iterates_as(sampler, SequentialSampler):
        whole = sampler.data_source
    return torch.arange(len(whole))


def loader_generators(loader: Any) -> list[Generator]:
    """The generators that a loader and its samplers own, each once, in this order; the global one is not among them.

    A sampler of the user's own is asked for an attribute ``generator``.
    """
    found: list[Generator] = []
    loader = getattr(loader, "source", loader)
    own = getattr(loader, "batch_sampler", None)
    for owner in (loader, getattr(loader, "sampler", None), own, getattr(own, "sampler", None)):
        generator = getattr(owner, "generator", None)
        if isinstance(generator, Generator) and not any(generator is known for known in found):
            found.append(generator)
    return found


def has_own_order(sampler: Any) -> bool:
    """Whether it is known of a sampler that it leaves the global generator alone."""
    if iterates_as(sampler, SequentialSampler):
        return True
    is_known = any(iterates_as(sampler, kind) for kind in (RandomSampler, SubsetRandomSampler, WeightedRandomSampler))
    return is_known and sampler.generator is not None


def settings_of(loader: DataLoader[Any]) -> dict[str, Any]:
    """The arguments that a DataLoader was made with, less the data set and what makes its batches."""
    found = {
        "num_workers": loader.num_workers,
        "collate_fn": loader.collate_fn,
        "pin_memory": loader.pin_memory,
        "timeout": loader.timeout,
        "worker_init_fn": loader.worker_init_fn,
        "multiprocessing_context": loader.multiprocessing_context,
        "generator": loader.generator,
        "prefetch_factor": loader.prefetch_factor,
        "persistent_workers": loader.persistent_workers,
    }
    # Not every version of PyTorch has these two.
    if hasattr(loader, "in_order"):
        found["in_order"] = loader.in_order
    if getattr(loader, "pin_memory_device", ""):
        found["pin_memory_device"] = loader.pin_memory_device
    return found


class SievedLoader(DataLoader[Any]):
    """The loader of a session: batches of the partial set, and their sample ids.

    ``batch_size``, ``drop_last`` and ``sampler`` read as those of the user's loader. Where a trainer makes a loader of
    its own that draws from ``batch_sampler``, that one's batches count as handed out when they are drawn.

    Attributes:
        on_event: told of what happens: "start" before an iteration, before anything is drawn (an exception prevents
            it), "batch" just before one is handed out, and "end" after the last; not where an iteration is left early.
            "taken over" comes before the "start" of an iteration that another loader makes.
        iteration: number of the newest iteration; -1 before the first.
        is_ended: whether it has come to its end.
        batches_handed: batches handed out in it, and ``samples_handed`` their samples.
        passed_over: batches of its epoch that all ranks had taken before it started, in the run that goes on.
        started_with: the states of the generators when it started, the global one's last.
        handed_by: the iteration that handed out the last batch, ``handed_keys`` what the sampler gave for its samples
            (None where that is not known), and ``handed_size`` their number.
        asks_for_more: whether the loop asks for one batch more than there are, as a for loop does.
        had_workers: a run goes on whose persistent workers had been started before.
    """

    on_event: Callable[[Event], None]

    def __init__(self, loader: DataLoader[Any], batch_sampler: SievedBatchSampler) -> None:
        """Build a loader with the arguments of another one that takes its batches from ``batch_sampler``.

        Args:
            loader: the user's loader, without problems according to ``check_loader``.
            batch_sampler: made from the loader's own sampler, batch size and ``drop_last``.
        """
        super().__init__(loader.dataset, batch_sampler=batch_sampler, **settings_of(loader))
        # With a batch sampler DataLoader sets these to None, False and a sequential sampler, and locks them. It makes
        # no use of them for a map-style data set, while users read them.
        vars(self).update(batch_size=loader.batch_size, drop_last=loader.drop_last, sampler=loader.sampler)
        self.on_event = lambda event: None
        self.had_workers = False
        self.asks_for_more = True
        self._source: SievedBatchSampler = batch_sampler
        batch_sampler.be_watched_by(self)
        self._goes_on: tuple[int, Sequence[Tensor]] | None = None
        self.iteration, self.handed_by = -1, -1
        self._begin(0)
        self.iteration = -1

    def _begin(self, passed_over: int) -> None:
        self.iteration += 1
        self.is_ended = False
        self.batches_handed = self.samples_handed = self.handed_size = 0
        self.passed_over = passed_over
        self.handed_keys: list[Any] | None = None
        self._rest: Rest | None = None
        self._at_end: list[Tensor] | None = None
        self.started_with = _states(self)

    def go_on(self, taken: int | None, started_with: Sequence[Tensor] = ()) -> None:
        """The next iteration gives what is left of an epoch in a run that goes on; None: it gives a whole one.

        Args:
            taken: batches of it that all ranks had taken. They are passed over, and their samples are not loaded.
            started_with: see the attribute of this name.
        """
        self._goes_on = None if taken is None else (taken, started_with)

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]  # PyTorch names its private iterator here
        self.on_event("start")
        (taken, started_with), self._goes_on = self._goes_on or (None, ()), None
        # A new queue for each iteration: one that was left early may have batches in it that nobody fetched. Workers
        # are sent their first batches in here, so the sampler has to know the queue before.
        queue: deque[list[Any]] = deque()
        self._source.handed_on, self._source.passed_over = queue, taken or 0
        own = self.generator
        try:
            with self._drawing_as_before(started_with):
                self._begin(taken or 0)
                if self.had_workers and self.persistent_workers and self._iterator is None:
                    # PyTorch draws a seed for the workers when it starts them. The run that goes on here has drawn it
                    # long ago: drawn once more, the order of its samples would be another. So a copy gives it.
                    self.generator = torch.Generator()
                    self.generator.set_state(torch.get_rng_state() if own is None else own.get_state())
                inner = super().__iter__()
                self._rest, self._source.newest = self._source.newest, None
                if taken is not None and self._rest is not None:
                    self._rest.look_ahead()
        finally:
            self._source.handed_on, self._source.passed_over = None, 0
            self.generator = own
        return _Iteration(self, inner, queue)

    @contextmanager
    def _drawing_as_before(self, started_with: Sequence[Tensor]) -> Iterator[None]:
        """Begin with the generators as they were; the global one is put back afterwards."""
        if not started_with:
            yield
            return
        *owned, shared = started_with
        with self._shared_restored() as is_drawn_from:
            if is_drawn_from:
                torch.set_rng_state(shared)
            self._set(owned)
            yield

    @contextmanager
    def _shared_restored(self) -> Iterator[bool]:
        """Put the global generator back, where the order comes from it: other threads may be drawing from it."""
        is_drawn_from = self.generator is None or not has_own_order(self.sampler)
        with torch.random.fork_rng(devices=[], enabled=is_drawn_from):
            yield is_drawn_from

    def n_left(self, taken: int) -> int:
        """Batches in an epoch of which all ranks have taken so many, or a ``TypeError`` where that is not known."""
        return self._source.n_left(taken)

    def hand_out(self, iteration: int, keys: list[Any], *, is_known: bool = True) -> None:
        """A batch of an iteration is about to be in somebody's hands."""
        if iteration == self.iteration:
            self.batches_handed += 1
            self.samples_handed += len(keys)
        self.handed_by, self.handed_size = iteration, len(keys)
        self.handed_keys = keys if is_known else None
        self.on_event("batch")

    def end(self, iteration: int) -> None:
        """An iteration has come to its end."""
        if iteration == self.iteration:
            self.is_ended = True
            self._set(self._at_end)
        self.on_event("end")

    @property
    def has_more(self) -> bool:
        """Whether the newest iteration has a batch left: its indices are drawn, and its samples not loaded."""
        return self._rest is not None and self._rest.has_more

    def states_at_end(self) -> list[Tensor]:
        """The states of the loader's own generators when the newest iteration, which has handed out all, has ended.

        Samplers may draw once more when they are asked for one batch too many. Not every loop asks for it: a state goes
        on as this one does in its other epochs.
        """
        now = _states(self)[:-1]
        if not self.asks_for_more or self.is_ended or self._rest is None:
            return now
        if self._at_end is None:
            with self._shared_restored():
                self._rest.look_ahead()
            self._at_end = _states(self)[:-1]
            self._set(now)
        return self._at_end

    def _set(self, states: Sequence[Tensor] | None) -> None:
        for generator, state in zip(loader_generators(self), states or (), strict=False):
            generator.set_state(state)

    def watch(self, batches: Callable[[int], Iterator[list[int]]]) -> Iterator[list[int]]:
        """Batches that are drawn from the batch sampler without this loader."""
        if not _is_drawn_by_a_loader():
            yield from batches(0)
            return
        self.on_event("taken over")
        self.on_event("start")
        (taken, started_with), self._goes_on = self._goes_on or (0, ()), None
        with self._drawing_as_before(started_with):
            self._begin(taken)
            rest = batches(taken)
        iteration = self.iteration
        for batch in rest:
            self.hand_out(iteration, list(batch))
            yield batch
        self.end(iteration)

    def end_workers(self) -> None:
        """End the workers that would stay for the next iteration, which starts others."""
        self._iterator = None  # PyTorch's iterator ends them when nobody holds it

    @property
    def current_indices(self) -> Tensor | None:
        """Ids of the samples in the batch handed out last, shape (batch,), long.

        None before the first batch; with ``in_order=False`` and workers, as the order is then not known; after an
        error in a worker, for the rest of that iteration; and when the sampler's indices are not integers.
        """
        return None if self.handed_keys is None else as_ids(self.handed_keys)


class _Iteration(Iterator[Any]):
    """One pass over a ``SievedLoader``: PyTorch's own iterator, and the ids that belong to each batch.

    The loader holds no reference to it, so that leaving a loop early ends the workers as with the plain loader.
    """

    def __init__(self, loader: SievedLoader, inner: Iterator[Any], queue: deque[list[Any]]) -> None:
        self._loader = loader
        self._inner = inner
        self._queue = queue
        self._number = loader.iteration
        self._ended = False
        self._in_order = loader.num_workers == 0 or bool(getattr(loader, "in_order", True))

    def __len__(self) -> int:
        return len(self._loader)

    def __next__(self) -> Any:
        loader = self._loader
        if self._number != loader.iteration and self._inner is loader._iterator:
            # Persistent workers serve one iteration at a time: fetching here would take batches from the newer one.
            raise UsageError(
                "this iteration of the loader ended when a newer one began, as both use the same persistent workers. "
                "Finish one loop before starting the next, or use persistent_workers=False."
            )
        try:
            batch = next(self._inner)
        except StopIteration:
            if not self._ended:
                self._ended = True
                loader.end(self._number)
            raise
        except Exception:
            self._lose_track()
            raise
        loader.hand_out(self._number, self._queue.popleft() if self._queue else [], is_known=self._in_order)
        return batch

    def _lose_track(self) -> None:
        # Without workers the failed batch is the only one under way. With workers it is not known whether the batch is
        # lost or still to come (a timeout), so from here on no ids are better than wrong ones.
        if self._loader.num_workers == 0:
            self._queue.clear()
        else:
            self._in_order = False


def _states(loader: DataLoader[Any]) -> list[Tensor]:
    """Of the generators that give an epoch its order: the loader's own, and the global one."""
    return [*(generator.get_state() for generator in loader_generators(loader)), torch.get_rng_state()]


def _is_drawn_by_a_loader() -> bool:
    """Whether another DataLoader asks for batches, and nobody else: only then they are loaded."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        name = str(frame.f_globals.get("__name__"))
        if name == "torch.utils.data.dataloader" or name.startswith("torchdata."):
            return True
        frame = frame.f_back
    return False


def _kind(value: object) -> str:
    return type(value).__name__
