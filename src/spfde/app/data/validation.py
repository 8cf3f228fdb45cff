"""The validation set: a share of the training set that is held out, the same for all runs of a seed."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.utils.data import Subset

from spfde.app.data.images import DataSpec, ImageData
from spfde.core.errors import InvalidArgument, Problem
from spfde.core.numbers import mix, round_half_up
from spfde.sieving.balance import find_labels, take_evenly

_SALT = 0x5EED
"""Of the numbers that are drawn here: other choices that go by seed and sample id must not follow from them."""


def trained_on(spec: DataSpec, share: float, batch_size: int) -> DataSpec:
    """The data with the samples alone that are trained on; no labels are needed to count them.

    Args:
        spec: of the whole set.
        share: of the training set that is held out, in [0, 1).
        batch_size: samples of a step.

    Raises:
        InvalidArgument: the share is out of its range, nothing is left to validate on, or no full batch to train on.

    Example:
        >>> from spfde.app.data.datasets import describe_data
        >>> from spfde.app.data.validation import trained_on
        >>> trained_on(describe_data("cifar10"), 0.1, batch_size=64).train_samples
        45000
    """
    if not share:
        return spec
    if not 0 <= share < 1:
        remedy = "Expected: share of the training set that is held out."
        raise InvalidArgument(Problem("validation_share", share, "is not in [0, 1)", remedy))
    held_out = round_half_up(share * spec.train_samples)
    left = spec.train_samples - held_out
    if not held_out:
        rule = f"leaves none of {spec.train_samples:,} training samples to validate on"
        remedy = f"Take {1 / spec.train_samples:.2g} or more, or leave it out."
        raise InvalidArgument(Problem("validation_share", share, rule, remedy))
    if left < batch_size:
        rule = f"leaves {left:,} of {spec.train_samples:,} training samples, no full batch of {batch_size:,}"
        raise InvalidArgument(Problem("validation_share", share, rule, "Take a smaller share, or smaller batches."))
    return replace(spec, train_samples=left)


def hold_out(data: ImageData, share: float, seed: int) -> ImageData:
    """The data with a validation set, which training no longer has; without a share, as they are.

    Mean and deviation stay those of the whole training set.

    Args:
        data: with the whole training set.
        share: of it, in [0, 1); the samples are so many as ``trained_on`` says.
        seed: what is drawn follows from it alone.
    """
    if not share:
        return data
    labels = find_labels(data.train)
    assert labels is not None, "every data set of the trainer tells its labels"
    chosen = drawn(labels, round_half_up(share * len(labels)), seed)
    rest = torch.ones(len(labels), dtype=torch.bool)
    rest[chosen] = False
    train, validation = (Subset(data.train, part.tolist()) for part in (rest.nonzero().flatten(), chosen))
    return replace(data, spec=replace(data.spec, train_samples=len(train)), train=train, validation=validation)


def drawn(labels: Tensor, count: int, seed: int) -> Tensor:
    """So many samples at random, the same share of each class.

    Args:
        labels: class of each sample, shape (n,), long.
        count: how many, at most n.
        seed: the choice depends on it and on the labels alone, on any machine.

    Returns:
        Their ids in order, shape (count,), long.

    Example:
        >>> from spfde.app.data.validation import drawn
        >>> drawn(torch.tensor([0] * 8 + [1] * 4), 3, seed=0).tolist()
        [4, 5, 9]
    """
    order = torch.argsort(mix(torch.arange(len(labels)), seed, _SALT), stable=True)
    return take_evenly(order, labels, count).sort().values
