"""Weights for the losses of sieved samples, which keep the gradient unbiased.

Training on the partial set P of m of n samples takes mean gradients over P, and hard samples are in P more often than
easy ones. Weighted by ``(m / n) / π``, with π the probability that a sample is in P, the mean over P has the mean over
all samples for its expectation (Horvitz and Thompson 1952). InfoBatch (arXiv 2303.04947) rescales by the same rule,
where each easy sample is left out by a coin of known probability.
"""

from __future__ import annotations

from torch import Tensor


def inclusion_probabilities(included: Tensor, updates: int, *, initial: float) -> Tensor:
    """The probability that a sample is in the partial set, from the history of the sieve, float64 in (0, 1].

    The first set is drawn uniformly at random, so its probability is known exactly and stands in the mean in place of
    its outcome. Who leaves later is decided by difficulty, for which there is no coin to know: the share of the updates
    after which a sample was in the set is taken. This is ours; it assumes that a sample's gradient changes little while
    the queue goes round once. The probabilities always add up to the size of the partial set.

    The sieve scales the weights that follow to a mean of 1 over the partial set (the ratio estimator of Hájek), as the
    probabilities are estimates: a learning rate means the same with and without weights.

    Args:
        included: number of updates after which each sample was in the partial set, shape (n,), integers.
        updates: number of updates so far.
        initial: share of the samples that the first set holds.
    """
    return (included.double() + initial) / (1 + updates)
