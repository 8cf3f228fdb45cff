"""Forgetting events: how often a sample goes from right to wrong while it is trained on.

A forgetting event of a sample is a transition from "classified correctly" at one presentation to "misclassified" at the
next one. The paper counts them within each update interval and starts again at the next, so that samples which came
back from the removed set are treated as the others are (arXiv 2209.11204, section on circular data sieving; the measure
itself is from Toneva et al., arXiv 1812.05159).
"""

from __future__ import annotations

import torch
from torch import Tensor


def count_forgetting(indices: Tensor, correct: Tensor, last: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Count correct-to-wrong transitions in a stream of presentations.

    Args:
        indices: sample of each presentation, in order of time, shape (m,), long, values in [0, n).
        correct: whether that presentation was classified correctly, shape (m,), bool.
        last: outcome of the latest earlier presentation of each sample, shape (n,), int8: -1 unseen, 0 wrong, 1 right.

    Returns:
        Number of forgetting events in this stream, shape (n,), long; the new ``last``; and which samples were right at
        least once in this stream, shape (n,), bool. Splitting a stream and adding up gives the same as one call.
    """
    n = last.numel()
    learned = torch.zeros(n, dtype=torch.bool)
    if indices.numel() == 0:
        return torch.zeros(n, dtype=torch.long), last.clone(), learned
    # A stable sort brings the presentations of a sample together and keeps their order in time.
    samples, order = torch.sort(indices, stable=True)
    now = correct[order]
    first = torch.ones_like(now)
    first[1:] = samples[1:] != samples[:-1]
    final = first.roll(-1)  # the entry before a new sample, and the very last one, as the very first is always a first
    before = torch.where(first, last[samples], now.roll(1).to(torch.int8))
    forgotten = torch.bincount(samples[(before == 1) & ~now], minlength=n)
    newest = last.clone()
    newest[samples[final]] = now[final].to(torch.int8)
    learned[samples[now]] = True
    return forgotten, newest, learned
