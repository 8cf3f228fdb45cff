"""Linear centred kernel alignment (CKA): how alike two representations of the same samples are.

CKA compares two matrices of features, one row a sample, by their Gram matrices. It is 1 for features that differ by a
rotation, a shift and a scale. Over many samples the Gram matrices do not fit into memory; sums over minibatches of an
unbiased estimator of HSIC do, and do not depend on the batch size in expectation.

Sources: Kornblith et al., ICML 2019 (arXiv 1905.00414): linear CKA. Song et al., JMLR 2012: the unbiased estimator of
HSIC. Nguyen et al., ICLR 2021 (arXiv 2010.15327), section 3: its sums over minibatches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor

from spfde.core.errors import InvalidArgument, Problem


def linear_cka(x: Tensor, y: Tensor) -> float:
    """Linear CKA of two representations of the same samples, all at once.

    Args:
        x: features ``(n, …)``, one row a sample; every other dimension is a feature.
        y: likewise, with the same ``n`` and any number of features.

    Returns:
        ``||YᵀX||² / (||XᵀX|| ||YᵀY||)`` of the centred features, in [0, 1]; NaN where all samples have the same
        features. This is the biased form; with few samples and many features it is too high.

    Raises:
        InvalidArgument: the numbers of samples differ, or there are fewer than two.

    Example:
        >>> x = torch.randn(16, 8)
        >>> round(spfde.analysis.linear_cka(x, 3 * x + 1), 3)
        1.0
    """
    if len(x) != len(y):
        rule = f"must have as many samples as the other, {len(x)}"
        raise InvalidArgument(Problem("y", tuple(y.shape), rule, "Compare features of the same samples."))
    _check_enough(x, least=2)
    k, l = _centred(_gram(x)), _centred(_gram(y))  # noqa: E741 - the names of the literature
    return _ratio(float((k * l).sum()), float((k * k).sum()), float((l * l).sum()))


def centred_gram(features: Tensor) -> Tensor:
    """The U-centred Gram matrix of a minibatch's features: all that CKA needs to know of them.

    Args:
        features: ``(n, …)``, ``n`` at least 4.

    Returns:
        ``(n, n)`` float64 on the CPU, with zero diagonal and rows that add up to zero. Products are taken in float32
        (float64 for features in float64).

    Raises:
        InvalidArgument: there are fewer than four samples.
    """
    _check_enough(features, least=4)  # the unbiased estimator divides by the number of samples less three
    n = len(features)
    # Off-diagonal entries less their row's and column's means, corrected so that products estimate HSIC unbiasedly.
    k = _gram(features).fill_diagonal_(0.0)
    rows = k.sum(1) / (n - 2)
    k -= rows[:, None] + rows[None, :] - rows.sum() / (n - 1)
    return k.fill_diagonal_(0.0)


def unbiased_hsic(k: Tensor, l: Tensor) -> float:  # noqa: E741
    """Unbiased estimate of HSIC, which may be negative, from two :func:`centred_gram` matrices of the same samples.

    Source: Song et al. 2012, equation 5, in the equivalent form of a product of U-centred matrices.
    """
    n = len(k)
    return float(torch.dot(k.flatten(), l.flatten())) / (n * (n - 3))


class MinibatchCKA:
    """CKA of two representations, added up over minibatches that never meet in memory.

    The value is ``Σ HSIC(x, y) / sqrt(Σ HSIC(x, x) · Σ HSIC(y, y))`` with the unbiased estimator, every minibatch
    counted alike. Pass batches of about equal size.
    """

    def __init__(self) -> None:
        self._xy = self._xx = self._yy = 0.0

    def add(self, k: Tensor, l: Tensor) -> None:  # noqa: E741
        """Add a minibatch by its :func:`centred_gram` matrices."""
        self._xy += unbiased_hsic(k, l)
        self._xx += unbiased_hsic(k, k)
        self._yy += unbiased_hsic(l, l)

    @property
    def value(self) -> float:
        """In [-1, 1]; near 0 for independent features. NaN before the first batch, and for constant features."""
        return _ratio(self._xy, self._xx, self._yy)


Outputs = Callable[[Tensor], Mapping[str, Tensor]]
"""Gives the features of a batch by name, ``(n, …)`` each."""


def batch_grams(outputs: Outputs, batches: Iterable[Tensor]) -> Iterator[dict[str, Tensor]]:
    """Centred Gram matrices by name, one mapping a minibatch; the features are let go at once.

    Example:
        >>> batches = [x for x, _ in loader]
        >>> with spfde.analysis.BlockOutputs(model, ["0"]) as outputs:
        ...     grams = list(spfde.analysis.batch_grams(outputs, batches))
        >>> [gram["0"].shape[0] for gram in grams]
        [8, 8, 4]
    """
    for batch in batches:
        yield {name: centred_gram(features) for name, features in outputs(batch).items()}


def minibatch_cka(grams: Iterable[Mapping[str, Tensor]], reference: Iterable[Mapping[str, Tensor]]) -> dict[str, float]:
    """CKA by name between a model and a reference, both as :func:`batch_grams` over the same minibatches.

    Keep the reference's as a list, and compare any number of models with it, each as it comes.

    Raises:
        ValueError: one has more minibatches than the other.

    Example:
        >>> batches = [x for x, _ in loader]
        >>> with spfde.analysis.BlockOutputs(model, ["0"]) as outputs:
        ...     grams = list(spfde.analysis.batch_grams(outputs, batches))
        >>> {name: round(value, 3) for name, value in spfde.analysis.minibatch_cka(grams, grams).items()}
        {'0': 1.0}
    """
    sums: dict[str, MinibatchCKA] = {}
    for mine, theirs in zip(grams, reference, strict=True):
        for name, gram in mine.items():
            sums.setdefault(name, MinibatchCKA()).add(gram, theirs[name])
    return {name: total.value for name, total in sums.items()}


def _gram(features: Tensor) -> Tensor:
    """Gram matrix of roughly centred features, float64 on the CPU."""
    if features.dim() == 4 and not features.is_contiguous():
        features = features.permute(0, 2, 3, 1)  # channels_last: flat without a copy, and the order does not matter
    flat = features.detach().reshape(len(features), -1)
    flat = flat if flat.dtype in (torch.float32, torch.float64) else flat.float()
    # Centred first: a large mean would take the digits of float32 that tell the samples apart. A product with ones is a
    # mean ten times as fast; its rounding does not matter, for Gram matrices are centred again.
    flat = flat - (flat.new_ones(len(flat)) @ flat).div_(len(flat))
    return (flat @ flat.T).to("cpu", torch.float64)


def _centred(gram: Tensor) -> Tensor:
    return gram - gram.mean(0)[None, :] - gram.mean(1)[:, None] + gram.mean()


def _ratio(xy: float, xx: float, yy: float) -> float:
    return xy / math.sqrt(xx * yy) if xx > 0.0 and yy > 0.0 else math.nan


def _check_enough(x: Tensor, *, least: int) -> None:
    if len(x) < least:
        rule = f"must have at least {least} samples"
        raise InvalidArgument(Problem("x", tuple(x.shape), rule, "Use larger minibatches."))
