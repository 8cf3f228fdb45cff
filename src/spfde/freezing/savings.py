"""What there is to save by freezing, in plain numbers: what a scheme sees of a model and a run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

from spfde.freezing.plan import Timing

Timeline = tuple[int, ...]
"""How many of the first blocks are frozen, for each epoch of a run."""


@dataclass(frozen=True)
class Savings:
    """What there is to save, and how much of it is wanted.

    Attributes:
        backward: ``backward[b][e]``, FLOPs of backpropagation through block ``b`` in epoch ``e``, front to back.
        total: training FLOPs of the whole run without freezing.
        flops_reduction: share of ``total`` to save.
        interval: Δτ in epochs.
        n_blocks: number of blocks that may be frozen.
        timing: at any epoch ("exact"), or at update epochs ("update").
        delays: for each block the epochs after the start before which it is not frozen; None: an interval for each
            block before it.

    Example:
        >>> savings = spfde.freezing.Savings(
        ...     [[10.0] * 8, [10.0] * 8], 400.0, flops_reduction=0.2, interval=2, n_blocks=2
        ... )
        >>> savings.reduction([0, 0, 1, 1, 2, 2, 2, 2])
        0.25
    """

    backward: Sequence[Sequence[float]]
    total: float
    flops_reduction: float
    interval: int
    n_blocks: int
    timing: Timing = "exact"
    delays: Sequence[int] | None = None

    @property
    def epochs(self) -> int:
        """Length of the run."""
        return len(self.backward[0]) if self.backward else 0

    def update_epochs(self, last: int) -> Sequence[int]:
        """The positive multiples of the interval up to ``last``, the largest first."""
        return range(last // self.interval * self.interval, 0, -self.interval)

    def starts(self, last: int) -> Sequence[int]:
        """The epochs up to ``last`` at which freezing may start, the latest first.

        Masks have an interval before it, for a block to come to its target.
        """
        return range(last, self.interval - 1, -1) if self.timing == "exact" else self.update_epochs(last)

    def one_by_one(self, start: int, *, end: int) -> list[int]:
        """The epoch at which each block that may be frozen is, as early as can be; ``end`` for never."""
        delays = range(0, self.n_blocks * self.interval, self.interval) if self.delays is None else self.delays
        return [min(start + delay, end) for delay in delays[: self.n_blocks]]

    @cached_property
    def of_front(self) -> Sequence[Sequence[float]]:
        """``of_front[e][n]``: FLOPs that are saved in epoch ``e`` where the first ``n`` blocks are frozen."""
        return [tuple(accumulate(blocks, initial=0.0)) for blocks in zip(*self.backward, strict=True)]

    def reduction(self, frozen: Timeline) -> float:
        """Share of the training FLOPs that is saved with so many frozen blocks in each epoch."""
        # Rounded once, so that to freeze more never seems to save less.
        saved = math.fsum(of_front[count] for of_front, count in zip(self.of_front, frozen, strict=True))
        return self.share(saved)

    def share(self, saved: float) -> float:
        """So many FLOPs as a share of the whole run's."""
        return saved / self.total if self.total else 0.0

    def reaches(self, frozen: Timeline) -> bool:
        """Is the target met?"""
        return self.reduction(frozen) >= self.enough

    @property
    def enough(self) -> float:
        """The reduction that meets the target: sums may fall short of what is met exactly."""
        return self.flops_reduction - 1e-12
