"""From a data set to augmented batches on the device: out of the device's own memory, or through a DataLoader.

Where images lie changes where the work is done, and never what comes out of it: order, crops and flips are equal.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, RandomSampler, Subset

from spfde.app.data.images import ImageData, Split, array_of, collate
from spfde.app.train.augment import BatchAugment, Moves
from spfde.app.train.one_by_one import AugmentedSamples, augmented, why_one_by_one
from spfde.app.train.options import TrainOptions
from spfde.core.errors import InvalidArgument, Problem
from spfde.cost import format_bytes
from spfde.session.distributed import World
from spfde.session.session import Session

EVALUATION_BATCH = 256
MOST_WORKERS = 16
SHARE_OF_FREE = 0.5
"""Of the device's free memory, at most so much is taken by images: the model and its activations come after them."""


class Feed(ABC):
    """Gives a session's batches as images and labels on the device.

    Args:
        data: the images.
        device: where batches go.
        augment: crops and flips.
        options: of the run.
        by_sample: crops and flips follow from (seed, epoch, sample id); otherwise they are drawn batch by batch.
        world: the processes that share the images to evaluate on.

    Attributes:
        loader: what the session is attached to; what it hands out goes into ``batch``.
        where: where the images lie and why, in a line for the user; None where nothing was chosen.
    """

    loader: DataLoader[Any]
    where: str | None = None
    _samples: AugmentedSamples | None = None  # where they come augmented one by one
    _evaluating: tuple[DataLoader[Any], ...] = ()  # those whose workers stay

    def __init__(
        self,
        data: ImageData,
        device: torch.device,
        augment: BatchAugment,
        options: TrainOptions,
        *,
        by_sample: bool,
        world: World | None = None,
    ) -> None:
        self._data, self._device, self._augment = data, device, augment
        self._by_sample = by_sample or augment.goes_by_sample
        self._world = world or World()
        self._prepare(options)

    @abstractmethod
    def _prepare(self, options: TrainOptions) -> None:
        """Make the loaders."""

    def begin_epoch(self, epoch: int) -> None:
        """The loader is about to be iterated for this epoch."""
        if self._samples is not None:
            self._samples.begin_epoch(epoch)

    def batch(self, handed: Any, session: Session) -> tuple[Tensor, Tensor]:
        """A batch of ``session.loader``: augmented images ``(N, C, H, W)``, not normalised, and labels ``(N,)``."""
        images, labels = self.plain(handed)
        if self._samples is not None:
            return images, labels
        if session.caches_prefix or (self._by_sample and self._augment.mode != "none"):
            return self._augmented(images, handed, session), labels
        return self._augment(images), labels

    def _augmented(self, images: Tensor, handed: Any, session: Session) -> Tensor:
        return self._augment.replay(images, session.augmentation_seeds())

    def end_workers(self, loader: object) -> None:
        """End the processes that load for the session's loader, and for evaluation, where some stay from pass to pass.

        Left to the collection of garbage, each of them is waited for: 5 s where its queue is collected first.
        """
        for each in (loader, *self._evaluating):
            iterator = getattr(each, "_iterator", None)  # PyTorch's name, of a pass by workers that stay
            if iterator is not None:
                iterator._shutdown_workers()

    @property
    def loading_is_work(self) -> bool:
        """Whether samples are decoded, or augmented one by one, when they are loaded."""
        return self._samples is not None or not self._data.in_memory

    @abstractmethod
    def plain(self, handed: Any) -> tuple[Tensor, Tensor]:
        """A batch of the loader on the device, as the data set has it."""

    @abstractmethod
    def evaluation_batches(self, split: Split) -> Iterator[tuple[Tensor, Tensor]]:
        """This process's share of a set to evaluate on, in order, on the device."""

    def _splits(self) -> dict[Split, range]:
        """The sets to evaluate on, and the positions that this process takes."""
        names: tuple[Split, ...] = ("test",) if self._data.validation is None else ("val", "test")
        sizes = {name: len(self._data.split(name)) for name in names}  # type: ignore[arg-type]  # they have a length
        return {name: range(self._world.rank, size, self._world.size) for name, size in sizes.items()}


class HostFeed(Feed):
    """Images come from a DataLoader and cross to the device batch by batch, behind the loop's back where pinned."""

    def _prepare(self, options: TrainOptions) -> None:
        is_one_by_one = why_one_by_one(options, self._data, self._augment) is not None
        workers = workers_for(self._data, options.workers, is_one_by_one=is_one_by_one)
        if is_one_by_one:
            self._samples = augmented(options, self._data, self._augment, workers=workers)
        train = self._data.train if self._samples is None else self._samples
        self.loader = shuffled(train, options, **self._loading(workers))
        evaluating = self._loading(workers_for(self._data, options.workers))
        self._evaluated: dict[Split, DataLoader[Any]] = {
            split: DataLoader(self._data.split(split), EVALUATION_BATCH, sampler=own, **evaluating)
            for split, own in self._splits().items()
        }
        self._evaluating = tuple(self._evaluated.values())

    def _loading(self, workers: int) -> dict[str, Any]:
        return {
            "collate_fn": collate,
            "num_workers": workers,
            "persistent_workers": workers > 0,
            "pin_memory": self._device.type == "cuda",
        }

    def plain(self, handed: Any) -> tuple[Tensor, Tensor]:
        images, labels = handed
        return images.to(self._device, non_blocking=True), labels.to(self._device, non_blocking=True)

    def evaluation_batches(self, split: Split) -> Iterator[tuple[Tensor, Tensor]]:
        return map(self.plain, self._evaluated[split])


class SampleIds(Dataset[int]):
    """The ids of ``size`` samples: a data set for those who have the samples elsewhere."""

    def __init__(self, size: int) -> None:
        self._size = size

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> int:
        return index

    def __getitems__(self, indices: list[int]) -> Tensor:
        """The ids of a batch, ``(B,)``, int64."""
        return torch.tensor(indices, dtype=torch.int64)


class DeviceFeed(Feed):
    """Images and labels lie on the device, and of a batch only its samples' ids cross over.

    An epoch's crops and flips are drawn there for all samples at once: what a batch asks of the CPU is then a fraction
    of a millisecond, which a GPU that is busy with the batch before does not notice.
    """

    def _prepare(self, options: TrainOptions) -> None:
        self._train = _OnDevice(self._data.train, self._device)
        self.loader = shuffled(SampleIds(len(self._train)), options, collate_fn=_as_given)
        # A loader draws from the global generator for each pass: with one here, it is where it would be otherwise.
        self._evaluated = {
            split: (
                _OnDevice(part := self._data.split(split), self._device),
                DataLoader(SampleIds(len(part)), EVALUATION_BATCH, sampler=own, collate_fn=_as_given),  # type: ignore[arg-type]
            )
            for split, own in self._splits().items()
        }
        self._moves: tuple[int, Moves] | None = None  # of all samples, and the epoch that they are for

    def batch(self, handed: Tensor, session: Session) -> tuple[Tensor, Tensor]:
        return super().batch(self._moved(handed), session)

    def plain(self, handed: Tensor) -> tuple[Tensor, Tensor]:
        return self._train.taken(self._moved(handed))

    def _augmented(self, images: Tensor, handed: Tensor, session: Session) -> Tensor:
        if session.caches_prefix:  # which variant of a sample comes is announced batch by batch
            return super()._augmented(images, handed, session)
        if self._moves is None or self._moves[0] != session.epoch:
            seeds = self._moved(session.augmentation_seeds(torch.arange(len(self._train))))
            self._moves = (session.epoch, self._augment.moves_of(seeds, images.shape[2:]))
        return self._augment.move(images, tuple(moves[handed] for moves in self._moves[1]))

    def _moved(self, ids: Tensor) -> Tensor:
        if self._device.type == "cuda" and not ids.is_cuda:
            ids = ids.pin_memory()  # the copy waits for nothing then
        return ids.to(self._device, non_blocking=True)

    def evaluation_batches(self, split: Split) -> Iterator[tuple[Tensor, Tensor]]:
        part, loader = self._evaluated[split]
        return (part.taken(self._moved(ids)) for ids in loader)


class _OnDevice:
    """A set whose images lie on the device: whole arrays there, and of a part of one the positions of its samples."""

    def __init__(self, part: Dataset[tuple[Tensor, int]], device: torch.device) -> None:
        array = array_of(part)
        assert array is not None, "what is not in memory cannot lie on the device"
        self._images, self._labels = array.on(device)
        self._positions = torch.tensor(part.indices, device=device) if isinstance(part, Subset) else None

    def __len__(self) -> int:
        return len(self._labels if self._positions is None else self._positions)

    def taken(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Images and labels of so many samples, all on the device."""
        at = ids if self._positions is None else self._positions[ids]
        return self._images.index_select(0, at), self._labels.index_select(0, at)


def _as_given(batch: Any) -> Any:
    return batch


def make_feed(
    data: ImageData,
    device: torch.device,
    augment: BatchAugment,
    options: TrainOptions,
    processes: World | None = None,
) -> Feed:
    """The feed that was asked for, or that the device has the room for.

    Where several processes share the data, crops and flips always go by sample: a generator of each process would draw
    the same for other samples, and stand elsewhere when their last batches differ.

    Args:
        data, device, augment, options: of the run.
        processes: those that share the data.

    Raises:
        InvalidArgument: the device was asked for, and the images are not in memory, do not fit, or are augmented one by
            one; or the frozen front's outputs are to be kept, and they are.
    """
    one_by_one = why_one_by_one(options, data, augment)
    if one_by_one is not None and options.cache_variants:
        remedy = "Leave it out, or use --augment crop+flip without --randaugment."
        raise InvalidArgument(
            Problem("cache_variants", options.cache_variants, f"does not work, as {one_by_one}", remedy)
        )
    reason = one_by_one or _why_not_on(device, data)
    if options.data_on == "device" and reason is not None:
        raise InvalidArgument(Problem("data_on", "device", reason, "Use --data-on host, or auto."))
    if options.data_on == "auto" and reason is None and options.workers:
        reason = f"workers={options.workers} was asked for"
    world = processes or World()
    by_sample = options.augment_draws == "sample" or world.is_shared
    on_device = options.data_on == "device" or (options.data_on == "auto" and device.type == "cuda" and reason is None)
    feed = (DeviceFeed if on_device else HostFeed)(data, device, augment, options, by_sample=by_sample, world=world)
    if on_device:
        feed.where = f"data: {format_bytes(size_of(data))} of images and labels in the memory of {device}"
    elif options.data_on == "auto" and device.type == "cuda":
        feed.where = f"data: images cross to {device} batch by batch, as {reason}"
    return feed


def size_of(data: ImageData) -> int:
    """Bytes of the images and labels that are in memory."""
    return sum(array.images.nbytes + array.labels.nbytes for array in data.arrays)


def _why_not_on(device: torch.device, data: ImageData) -> str | None:
    """Why the images cannot lie on the device; None where they can."""
    if not data.in_memory:
        return "the images are too many to be decoded into memory"
    if device.type != "cuda":
        return None  # the CPU has them already, and other devices do not tell
    if all(array.is_on(device) for array in data.arrays):
        return None  # another run reads them there
    free, _ = torch.cuda.mem_get_info(device)
    if size_of(data) <= SHARE_OF_FREE * free:
        return None
    return f"their {format_bytes(size_of(data))} are more than half of the {format_bytes(free)} that are free on it"


def shuffled(dataset: Dataset[Any], options: TrainOptions, **settings: Any) -> DataLoader[Any]:
    """A loader that shuffles by the run's seed.

    The order has a generator of its own: a loader draws from its generator whenever it starts workers, so that with one
    for both the order would depend on their number, and on when a run was resumed.
    """
    order = torch.Generator().manual_seed(options.seed)
    return DataLoader(
        dataset,
        batch_size=options.batch_size,
        sampler=RandomSampler(dataset, generator=order),  # type: ignore[arg-type]  # it has a length
        generator=torch.Generator().manual_seed(options.seed),
        **settings,
    )


def workers_for(data: ImageData, asked: int | None, *, is_one_by_one: bool = False) -> int:
    """Loader processes: as many as were asked for, or one a core where images have to be decoded, or are
    augmented one by one.

    Processes that ``torchrun`` has started on one host share its cores. Each has ``MOST_WORKERS`` at most: one decodes
    some 650 photographs a second, and few models train on more than sixteen times as many.
    """
    if asked is not None:
        return asked
    together = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return 0 if data.in_memory and not is_one_by_one else min(MOST_WORKERS, max(1, cores() // together))


def cores() -> int:
    """Those that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
