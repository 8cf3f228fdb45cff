"""Whether the processes of a run have the same data, so that the session can deal one order of samples out."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Subset

from spfde.core.errors import Problem
from spfde.session.distributed import World, fingerprint
from spfde.sieving.loader import population_of

_LABELS = ("targets", "labels")
_ROWS = 64
"""Rows of a large tensor that are compared."""


def check_same_data(loader: DataLoader[Any], world: World, *, sieves: bool) -> list[Problem]:
    """What the ranks' loaders differ in, though the session takes them for the same; no sample is loaded.

    Every rank has to call it. Data sets are told apart by type, length, indices of subsets, labels and a part of the
    tensors that they hold; others that load what they hold are taken for equal.
    """
    found = _description(loader)
    of_ranks = world.gather({name: fingerprint(value) for name, value in found.items()}, what="the data sets")
    differing = [name for name in found if len({own.get(name) for own in of_ranks}) > 1]
    if not differing:
        return []
    ways = "Give every rank the whole data set, in one order; the session deals it out"
    if not sieves:
        ways += ". Or deal it out yourself, by sampler=DistributedSampler(dataset) on the whole"
    if differing == ["batch_size"]:
        ways = "Pass the same batch_size and drop_last on every rank"
    return [
        Problem(
            "loader",
            f"that of rank {world.rank}, of {found['length'][0]:,} samples",
            f"must be the same on all {world.size} ranks, for the session deals out its samples, and differs in "
            f"{', '.join(name.replace('_', ' ') for name in differing)}",
            f"{ways}.",
        )
    ]


def _description(loader: DataLoader[Any]) -> dict[str, Any]:
    """What can be compared, by what a message calls it."""
    kinds: list[str] = []
    lengths: list[int] = []
    indices: list[Any] = []
    labels: list[Any] = []
    contents: list[Any] = []
    waiting: list[Any] = [loader.dataset]
    while waiting:
        dataset = waiting.pop()
        # Without the module: a script is __main__ in one process, and __mp_main__ in those that it starts.
        kinds.append(type(dataset).__qualname__)
        lengths.append(len(dataset) if hasattr(dataset, "__len__") else -1)
        if isinstance(dataset, Subset):
            indices.append(_values(dataset.indices))
            waiting.append(dataset.dataset)
        elif isinstance(dataset, ConcatDataset):
            waiting.extend(dataset.datasets)
        labels += [_values(getattr(dataset, name, None)) for name in _LABELS]
        held = getattr(dataset, "tensors", None)
        held = list(held) if isinstance(held, (list, tuple)) else [getattr(dataset, "__dict__", {}).get("data")]
        contents += [_rows(own) for own in held]
    sampler: Any = loader.sampler
    return {
        "length": lengths,
        "type": kinds,
        "indices": indices,
        "labels": labels,
        "content": contents,
        "samples_drawn": [
            population_of(loader),
            type(sampler).__qualname__,
            _values(getattr(sampler, "weights", None)),
        ],
        "batch_size": [loader.batch_size, loader.drop_last],
    }


def _values(values: Any) -> Any:
    """Numbers as a tensor; None for what cannot be compared."""
    if values is None or callable(values):
        return None
    try:
        return values.detach() if isinstance(values, Tensor) else torch.as_tensor(np.asarray(values))
    except (TypeError, ValueError):
        return None


def _rows(values: Any) -> Any:
    """A part of a tensor or an array, spread over its length, and its shape; None for anything else."""
    if not isinstance(values, (Tensor, np.ndarray)) or not values.ndim or not len(values):
        return None
    return tuple(values.shape), _values(values[:: -(-len(values) // _ROWS)])
