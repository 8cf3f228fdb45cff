"""What a model is called with: samples from a loader's data set, read so that no generator moves."""

from __future__ import annotations

import contextlib
import inspect
import random
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset

from spfde.core.errors import InvalidArgument, Problem
from spfde.core.generators import GeneratorsRestored
from spfde.core.torch_private import compiled_inside

Sample = Tensor | tuple[Any, ...] | list[Any] | Mapping[str, Any]


class Untraceable(InvalidArgument):
    """The model's forward pass cannot be followed: it fails on tensors without values, or its inputs are not known."""


def unwrap(model: nn.Module) -> nn.Module:
    """The user's own module inside ``torch.compile``'s or a data-parallel wrapper."""
    while True:
        inner = compiled_inside(model)
        if inner is None and isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            inner = model.module
        if inner is None:
            return model
        model = inner


def sample_from(loader: Any, model: nn.Module, indices: Sequence[int] = (0,), *, argument: str = "sample") -> Sample:
    """The model's inputs from the first item of a loader's data set, or from others, without iterating the loader.

    Global generators are put back afterwards, so that a random augmentation of these items leaves no trace. Of a
    tuple the first element is taken, of a mapping the entries that ``model.forward`` has arguments for.

    Raises:
        Untraceable: these items make no batch: ``collate_fn`` drops them as damaged, or they cannot be read. The
            ``argument`` that is to be given instead is named.
    """
    try:
        with without_traces(loader.dataset):
            batch = batch_of(loader, indices)
    except Exception as error:
        items = f"item {indices[0]} of the data set" if len(indices) == 1 else f"{len(indices)} items of the data set"
        rule = f"is needed, for the loader's collate_fn makes no batch of {items} ({type(error).__name__}: {error})"
        remedy = f"Pass {argument}= to attach: an input of the model."
        raise Untraceable(Problem(argument, None, rule, remedy)) from error
    return _inputs_of(batch, model)


def sample_of(loader: Any, model: nn.Module) -> Sample:
    """The model's inputs, as far as a loader of any kind tells them without being iterated."""
    if isinstance(loader, Sequence) and len(loader):
        return _inputs_of(loader[0], model)
    dataset = getattr(loader, "dataset", None)
    if dataset is None or isinstance(dataset, IterableDataset) or not hasattr(loader, "collate_fn"):
        rule = "is needed, for the model's inputs cannot be told from this loader"
        raise Untraceable(Problem("sample", None, rule, "Pass sample= to attach: an input of the model."))
    return sample_from(loader, model)


def _inputs_of(batch: Any, model: nn.Module) -> Sample:
    if isinstance(batch, Mapping):
        accepted = inspect.signature(unwrap(model).forward).parameters
        inputs = {key: value for key, value in batch.items() if key in accepted}
        if inputs:
            return inputs
    elif isinstance(batch, Tensor):
        return batch
    elif isinstance(batch, (tuple, list)) and batch and isinstance(batch[0], Tensor):
        return (batch[0],)
    rule = "the model's inputs cannot be told from a batch of the loader"
    raise Untraceable(Problem("sample", None, rule, "Pass sample= to attach."))


def batch_of(loader: Any, indices: Sequence[int]) -> Any:
    """The batch that the loader's ``collate_fn`` makes of these items; the loader is not iterated."""
    dataset = loader.dataset
    together = hasattr(dataset, "__getitems__")
    return loader.collate_fn(dataset.__getitems__(list(indices)) if together else [dataset[i] for i in indices])


@contextlib.contextmanager
def without_traces(dataset: object) -> Iterator[None]:
    """Read items of a data set: generators come back, the global ones and those that it holds."""
    with GeneratorsRestored(), _own_generators_restored(dataset):
        yield


def call_arguments(sample: Sample) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of the model's call."""
    if isinstance(sample, Mapping):
        return (), dict(sample)
    if isinstance(sample, (tuple, list)):
        return tuple(sample), {}
    return (sample,), {}


@contextlib.contextmanager
def _own_generators_restored(dataset: object) -> Iterator[None]:
    """Put back the generators that a data set holds, itself or in the transforms and data sets that it wraps."""
    put_back = [_putting_back(generator) for generator in _generators_in(dataset, depth=4)]
    try:
        yield
    finally:
        for restore in put_back:
            restore()


def _putting_back(generator: Any) -> Callable[[], object]:
    """What puts a generator back into the state that it has now."""
    if isinstance(generator, np.random.Generator):
        bits = generator.bit_generator
        return partial(setattr, bits, "state", bits.state)
    if isinstance(generator, random.Random):
        return partial(generator.setstate, generator.getstate())
    return partial(generator.set_state, generator.get_state())


def _generators_in(owner: object, depth: int) -> Iterator[object]:
    kinds = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
    for value in getattr(owner, "__dict__", {}).values():
        if isinstance(value, kinds):
            yield value
        elif depth > 0:
            inner = value if isinstance(value, (list, tuple)) and len(value) < 100 else (value,)
            for item in inner:
                if hasattr(item, "__dict__") and not isinstance(item, (type, Tensor, types.ModuleType)):
                    yield from _generators_in(item, depth - 1)
