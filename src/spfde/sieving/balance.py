"""Balance of classes: the same share of each class leaves, and the queue brings the classes back evenly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor
from torch.utils.data import Subset

from spfde.core.errors import InvalidArgument, Problem
from spfde.sieving.accumulator import Accumulator
from spfde.sieving.evidence import labels_kind

UNKNOWN = -1
"""Label of a sample whose class nobody has told yet."""


def largest_remainder(counts: Tensor, k: int) -> Tensor:
    """Share ``k`` out over groups in proportion to their sizes ``counts``, long: integers with the sum ``k``.

    Each group gets its exact share rounded down; what is left goes to the largest remainders, equals from the front.
    """
    total = max(int(counts.sum()), 1)
    shares = k * counts // total
    remainders = k * counts % total
    first = torch.argsort(remainders, descending=True, stable=True)[: k - int(shares.sum())]
    shares[first] += 1
    return shares


def spread(labels: Tensor) -> Tensor:
    """Positions in an order in which any stretch holds about the same share of each class; within one it stays."""
    classes = _Classes(labels)
    return torch.argsort((classes.rank.to(torch.float64) + 0.5) / classes.counts[classes.of], stable=True)


class _Classes:
    """What samples of a class there are: found by one sort, however many classes.

    Attributes:
        counts: samples of each class, in the order of the labels, long.
        of: which of these each sample is of, long [N].
        rank: how many of its class come before each sample, long [N].
    """

    def __init__(self, labels: Tensor) -> None:
        _, self.of, self.counts = torch.unique(labels, return_inverse=True, return_counts=True)
        grouped = torch.argsort(self.of, stable=True)
        first = self.counts.cumsum(0) - self.counts
        self.rank = torch.empty_like(self.of)
        self.rank[grouped] = torch.arange(labels.numel()) - first[self.of[grouped]]


def take_evenly(order: Tensor, labels: Tensor, k: int) -> Tensor:
    """The first ``k`` of an order, the same share of each class.

    Args:
        order: positions, the most wanted first, shape (n,), long.
        labels: class of each position, shape (n,), long; those of unknown class come last.
        k: how many, at most n.

    Returns:
        Positions, shape (k,), long, the classes spread evenly.
    """
    ordered = labels[order]
    candidates = order[ordered != UNKNOWN]
    classes = _Classes(labels[candidates])
    shares = largest_remainder(classes.counts, min(k, candidates.numel()))
    is_taken = classes.rank < shares[classes.of]
    # Class by class, for where classes come to the same place the spread keeps the order that it is given.
    known = candidates[is_taken][torch.argsort(classes.of[is_taken], stable=True)]
    known = known[spread(labels[known])]
    return torch.cat([known, order[ordered == UNKNOWN][: k - known.numel()]])


class ClassLabels(Accumulator):
    """The class of each sample: known from the start, or learned from what the loop reports.

    Attributes:
        collects: whether reports have to tell the classes.
    """

    def __init__(self, n: int, known: Tensor | None = None) -> None:
        """Keep labels of sample ids 0 … n-1; ``known``, of shape (n,), where they are known."""
        super().__init__(n, "the class labels")
        self.collects = known is None
        if known is not None:
            self._kept["labels"] = known[:n].clone()

    @property
    def labels(self) -> Tensor:
        """Class of each sample, shape (n,), long; -1 where unknown."""
        return self._kept["labels"]

    def from_report(self, logits: Tensor | None, y: Tensor | None) -> Tensor | None:
        """The classes in a report, long [N]; None where they are known already.

        Raises:
            InvalidArgument: there are none.
        """
        if not self.collects:
            return None
        soft = logits is not None and y is not None and labels_kind(logits, y) == "soft"
        if y is None or soft:
            found = "soft labels" if soft else "no y"
            rule = "tells no classes, which balanced=True needs"
            raise InvalidArgument(Problem("observe", found, rule, _REMEDY))
        return (y.detach().reshape(-1) > 0.5).long() if y.is_floating_point() else y.detach().reshape(-1).long()

    def _start(self) -> dict[str, Tensor]:
        return {"labels": torch.full((self.n,), UNKNOWN)}

    def _add(self, indices: Tensor, values: Tensor) -> None:
        if values.numel() and int(values.min()) < 0:
            rule, remedy = "must hold class indices from 0 on while classes are balanced", _REMEDY
            raise InvalidArgument(Problem("y", int(values.min()), rule, remedy))
        self._kept["labels"][indices] = values


_REMEDY = (
    "Pass attach(labels=...), one class a sample, give the data set `targets` or `labels`, or report class indices "
    "as y. For a task without classes leave balanced out."
)


def find_labels(dataset: Any, given: Tensor | Sequence[int] | None = None) -> Tensor | None:
    """The class of each sample of a data set, shape (n,), long, without loading any sample.

    Args:
        dataset: asked for ``targets`` or ``labels``; a ``Subset`` for those of the set that it is taken from.
        given: takes precedence.

    Returns:
        None where the data set does not tell.

    Raises:
        InvalidArgument: there are labels, and they are no class indices, or not one for each sample.
    """
    if given is not None:
        return _class_indices("labels", given, len(dataset))
    if isinstance(dataset, Subset):
        whole = find_labels(dataset.dataset)
        return None if whole is None else whole[torch.as_tensor(dataset.indices, dtype=torch.long)]
    for name in ("targets", "labels"):
        found = getattr(dataset, name, None)
        if found is not None and not callable(found):
            return _class_indices(f"loader.dataset.{name}", found, len(dataset))
    return None


def _class_indices(name: str, labels: Any, n: int) -> Tensor:
    try:
        found = labels if isinstance(labels, Tensor) else torch.as_tensor(np.asarray(labels))
    except (TypeError, ValueError):
        raise InvalidArgument(Problem(name, labels, "must hold class indices to be balanced", _REMEDY)) from None
    integers = not found.is_floating_point() and not found.is_complex()
    if found.shape != (n,) or not integers or (n and int(found.min()) < 0):
        value = f"{found.dtype} of shape {tuple(found.shape)}"
        rule = f"must hold a class index from 0 on for each of the {n} samples, as balanced=True needs"
        raise InvalidArgument(Problem(name, value, rule, _REMEDY))
    return found.detach().to("cpu", torch.long)


def shuffled_evenly(labels: Tensor, generator: Generator) -> Tensor:
    """A random order with the classes spread evenly, shape (n,), long."""
    order = torch.randperm(labels.numel(), generator=generator)
    return order[spread(labels[order])]
