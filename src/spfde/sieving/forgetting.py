"""Forgetting events: how often a sample goes from right to wrong while it is trained on.

A forgetting event of a sample is a transition from "classified correctly" at one presentation to "misclassified" at the
next one. The paper counts them within each update interval and starts again at the next, so that samples which came
back from the removed set are treated as the others are (arXiv 2209.11204, section on circular data sieving; the measure
itself is from Toneva et al., arXiv 1812.05159).
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor

from spfde.sieving.accumulator import Deferred

NeverLearned = Literal["hard", "literal"]

_UNSEEN = -1


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


def difficulty(forgotten: Tensor, *, seen: Tensor, learned: Tensor, never_learned: NeverLearned = "hard") -> Tensor:
    """Turn forgetting counts into a difficulty per sample; the lowest are the easiest.

    A sample that was never right cannot be forgotten: its count is 0, the same as that of the easiest samples. The
    paper does not say what happens to these; ``"hard"`` gives them infinite difficulty (as Toneva et al. do),
    ``"literal"`` takes the bare count. A sample that was not presented at all gives no evidence and is infinitely hard
    in both cases.

    Args:
        forgotten: forgetting events, shape (n,).
        seen: presented at least once, shape (n,), bool.
        learned: right at least once, shape (n,), bool.
        never_learned: what to make of samples that were seen and never right.

    Returns:
        Difficulty, shape (n,), float32, ``inf`` for the hard ones.
    """
    hard = ~seen if never_learned == "literal" else ~learned
    return forgotten.to(torch.float32).masked_fill(hard, torch.inf)


class ForgettingCounter(Deferred):
    """Counts forgetting events of samples 0 … n-1 over one interval.

    ``observe(indices, correct)`` only keeps what it is given; the counting happens when a result is read, or about once
    an epoch. So a training step on a GPU is never made to wait.
    """

    noun: ClassVar[str] = "forgetting counts"
    argument: ClassVar[str] = "correct"
    dtype: ClassVar[torch.dtype] = torch.bool

    def __init__(self, n: int, *, never_learned: NeverLearned = "hard") -> None:
        """Start an interval.

        Args:
            n: number of sample ids (the length of the data set, also where only a subset is drawn from it).
            never_learned: what ``difficulty`` makes of samples that were seen and never right.
        """
        super().__init__(n)
        self.never_learned: NeverLearned = never_learned

    @property
    def counts(self) -> Tensor:
        """Forgetting events per sample, shape (n,), long."""
        self._fold()
        return self._kept["forgotten"].clone()

    @property
    def seen(self) -> Tensor:
        """Which samples were presented in this interval, shape (n,), bool."""
        self._fold()
        return self._kept["last"] != _UNSEEN

    @property
    def learned(self) -> Tensor:
        """Which samples were right at least once in this interval, shape (n,), bool."""
        self._fold()
        return self._kept["learned"].clone()

    def difficulty(self, never_learned: NeverLearned | None = None) -> Tensor:
        """Difficulty per sample as the function ``difficulty`` has it, shape (n,), float32."""
        chosen = self.never_learned if never_learned is None else never_learned
        return difficulty(self.counts, seen=self.seen, learned=self.learned, never_learned=chosen)

    def _fields(self) -> dict[str, Tensor]:
        return {
            "forgotten": torch.zeros(self.n, dtype=torch.long),
            "last": torch.full((self.n,), _UNSEEN, dtype=torch.int8),
            "learned": torch.zeros(self.n, dtype=torch.bool),
        }

    def _fold_in(self, indices: Tensor, values: Tensor) -> None:
        forgotten, self._kept["last"], learned = count_forgetting(indices, values, self._kept["last"])
        self._kept["forgotten"] += forgotten
        self._kept["learned"] |= learned
