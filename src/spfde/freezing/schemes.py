"""The functions that plan: when each block is frozen, one function a scheme.

They see plain numbers: what one epoch of backpropagation through each block costs, with the density that the sparsity
schedule gives it in that epoch, and how much of all training FLOPs is to be saved.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from spfde.core.errors import InvalidArgument, Problem, Problems
from spfde.core.numbers import round_half_up
from spfde.freezing.plan import FreezePlan, Scheme

RESUME_SHARE = 0.1
"""Of a run, what "single-shot-resume" trains everything again at its end; SpFDE gives no number."""
DELAY_SHARE = 0.25
"""Of a run, what "delayed-periodic" trains everything at its start, at most; SpFDE gives no number."""
PERIODS = (4, 2)
"""Front blocks train in one epoch of four, middle blocks in one of two (SpFDE, appendix B)."""


@dataclass(frozen=True)
class Savings:
    """What there is to save, and how much of it is wanted.

    Attributes:
        backward: ``backward[b][e]``, FLOPs of backpropagation through block ``b`` in epoch ``e``, front to back.
        total: training FLOPs of the whole run without freezing.
        flops_reduction: share of ``total`` to save.
        interval: Δτ in epochs.
        n_blocks: number of blocks that may be frozen.

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

    @property
    def epochs(self) -> int:
        """Length of the run."""
        return len(self.backward[0]) if self.backward else 0

    def reduction(self, frozen: Sequence[int]) -> float:
        """Share of the training FLOPs that is saved with so many frozen blocks in each epoch."""
        return freezing_saving(self.backward, frozen) / self.total if self.total else 0.0

    def reaches(self, frozen: Sequence[int]) -> bool:
        """Is the target met?"""
        return self.reduction(frozen) >= self.flops_reduction - 1e-12  # sums may fall short of what is met exactly

    def plan(self, frozen: Sequence[int], *, pauses: bool = False) -> FreezePlan:
        """The plan with so many frozen blocks in each epoch."""
        return FreezePlan(len(self.backward), tuple(frozen), self.reduction(frozen), pauses)


def freezing_saving(backward: Sequence[Sequence[float]], frozen: Sequence[int]) -> float:
    """FLOPs of backpropagation that are not done when the first ``frozen[e]`` blocks are frozen in epoch ``e``.

    Example:
        >>> spfde.freezing.freezing_saving([[10.0, 10.0], [5.0, 5.0]], [1, 2])
        25.0
    """
    return math.fsum(backward[block][epoch] for epoch, count in enumerate(frozen) for block in range(count))


def solve(
    savings: Savings,
    *,
    scheme: Scheme = "single-shot",
    start_epoch: int | None = None,
    resume_epochs: int | None = None,
) -> FreezePlan:
    """Plan the freezing of a run by its scheme, so that the target is met, with as little more as can be.

    Args:
        savings: what there is to save, and how much of it is wanted; 0 freezes nothing, or with ``start_epoch`` all
            ``n_blocks``.
        scheme: see ``ProgressiveFreezing``.
        start_epoch: fixes the start instead of solving for it; a multiple of the interval.
        resume_epochs: with "single-shot-resume": how long everything trains again in the end.

    Raises:
        InvalidArgument: the target cannot be reached (the most possible is named), or the start is no update epoch of
        the run.

    Example:
        >>> savings = spfde.freezing.Savings(
        ...     [[10.0] * 8, [10.0] * 8], 400.0, flops_reduction=0.2, interval=2, n_blocks=2
        ... )
        >>> spfde.freezing.solve(savings).frozen
        (0, 0, 1, 1, 2, 2, 2, 2)
    """
    if start_epoch is not None:
        _check_update_epoch("start_epoch", start_epoch, savings)
    elif savings.flops_reduction == 0:
        return savings.plan((0,) * savings.epochs)
    if scheme == "periodic":
        return periodic(savings)
    if scheme == "delayed-periodic":
        return delayed_periodic(savings, start_epoch=start_epoch)
    resumed = 0 if scheme == "single-shot" else _resume_epochs(savings, resume_epochs)
    return single_shot(savings, start_epoch=start_epoch, resume_epochs=resumed)


def single_shot(savings: Savings, *, start_epoch: int | None = None, resume_epochs: int = 0) -> FreezePlan:
    """Freeze one block each interval (SpFDE, algorithm 1), and thaw all for the last epochs (appendix B, resume).

    The start is the largest positive multiple of the interval from which all ``n_blocks`` blocks save enough. Then
    blocks are frozen front to back until the target is met. With ``resume_epochs`` the frozen blocks save so much less,
    and the start that is found is accordingly earlier.
    """
    interval, end = savings.interval, savings.epochs - resume_epochs

    def staggered(start: int, count: int) -> tuple[int, ...]:
        at_update_epoch = ((epoch - start) // interval + 1 for epoch in range(end))
        return (*(max(0, min(count, n)) for n in at_update_epoch), *(0,) * resume_epochs)

    n_blocks = min(savings.n_blocks, len(savings.backward))
    # Saving grows as the start moves forward: the first one that reaches the target, from the end, is the latest.
    starts = _update_epochs_from(end - 1, interval) if start_epoch is None else (start_epoch,)
    start = next((at for at in starts if savings.reaches(staggered(at, n_blocks))), None)
    if start is None:
        earliest = starts[-1] if starts else interval
        most = savings.reduction(staggered(earliest, n_blocks))
        how = f"{n_blocks} blocks frozen one by one from epoch {earliest} on"
        raise _unreachable(savings, most, how + (f" to epoch {end}" if resume_epochs else ""), start_epoch)
    counts: Iterable[int] = range(1, n_blocks + 1) if savings.flops_reduction > 0 else (n_blocks,)
    plans = (staggered(start, count) for count in counts)
    return savings.plan(next(plan for plan in plans if savings.reaches(plan)))


def periodic(savings: Savings, *, delay: int = 0) -> FreezePlan:
    """Front blocks train in one epoch of four, middle blocks in one of two, the others always (SpFDE, appendix B).

    How many blocks are front and middle is solved for: of all pairs within ``n_blocks`` the one that meets the target
    with the least overshoot, or within a point of that one that has front and middle blocks. The periods are powers of
    two and begin together, so what is frozen is a prefix in every epoch.

    Args:
        savings: what there is to save.
        delay: epochs before the first period, in which everything trains; in epoch ``delay`` it does, too.
    """
    n_blocks = min(savings.n_blocks, len(savings.backward))
    pairs = [(front, middle) for middle in range(n_blocks + 1) for front in range(middle + 1)]
    plans = {pair: paused(savings.epochs, *pair, delay=delay) for pair in pairs}
    # Rounded, for sums of equal numbers differ in a digit, and are ties.
    reached = {pair: round(savings.reduction(plan), 9) for pair, plan in plans.items() if savings.reaches(plan)}
    if not reached:
        how = f"{n_blocks} blocks that train one epoch in {PERIODS[0]}" + (f" from epoch {delay} on" if delay else "")
        raise _unreachable(savings, max(map(savings.reduction, plans.values())), how, delay or None)
    near = [pair for pair, reduction in reached.items() if reduction < min(reached.values()) + 0.01]
    # Three parts if possible, then the least overshoot, then more blocks that pause for less.
    best = min(near, key=lambda pair: (not 0 < pair[0] < pair[1], reached[pair], -pair[1]))
    return savings.plan(plans[best], pauses=True)


def delayed_periodic(savings: Savings, *, start_epoch: int | None = None) -> FreezePlan:
    """Everything trains until the start epoch, then as in ``periodic`` (SpFDE, appendix B).

    The start is the latest update epoch in the first quarter of the run from which the target can be reached.
    """
    if start_epoch is not None:
        return periodic(savings, delay=start_epoch)
    n_blocks = min(savings.n_blocks, len(savings.backward))
    starts = _update_epochs_from(math.floor(DELAY_SHARE * savings.epochs), savings.interval) or (savings.interval,)
    most = (at for at in starts if savings.reaches(paused(savings.epochs, n_blocks, n_blocks, delay=at)))
    return periodic(savings, delay=next(most, starts[-1]))


def paused(epochs: int, n_front: int, n_up_to_middle: int, *, delay: int = 0) -> tuple[int, ...]:
    """Frozen blocks in each epoch: the front ones train in one epoch of four, those behind, up to the middle's end, in
    one of two.

    Args:
        epochs: length of the run.
        n_front: number of front blocks.
        n_up_to_middle: number of front and middle blocks.
        delay: epochs before the first period.

    Example:
        >>> spfde.freezing.paused(8, n_front=1, n_up_to_middle=2)
        (0, 2, 1, 2, 0, 2, 1, 2)
    """
    front, middle = PERIODS

    def frozen(since: int) -> int:
        return 0 if since < 0 or since % front == 0 else n_front if since % middle == 0 else n_up_to_middle

    return tuple(frozen(epoch - delay) for epoch in range(epochs))


def _update_epochs_from(last: int, interval: int) -> Sequence[int]:
    """The positive multiples of the interval up to ``last``, the largest first."""
    return range(last // interval * interval, 0, -interval)


def _resume_epochs(savings: Savings, given: int | None) -> int:
    interval = savings.interval
    if given is not None:
        _check_update_epoch("resume_epochs", given, savings)
        return given
    return min(savings.epochs, interval * max(1, round_half_up(RESUME_SHARE * savings.epochs / interval)))


def _check_update_epoch(name: str, value: int, savings: Savings) -> None:
    interval, epochs = savings.interval, savings.epochs
    problems = Problems()
    if value % interval:
        below = value - value % interval
        wanted = f"{below} or {below + interval}" if below or name == "start_epoch" else f"{interval}"
        rule = f"must be a multiple of the update interval ({interval} epochs)"
        problems.add(name, value, rule, f"Pass {wanted}, or change update_interval_epochs.")
    if value >= epochs:
        remedy = "Start earlier." if name == "start_epoch" else "Resume for a shorter time."
        problems.add(name, value, f"must lie within the run ({epochs} epochs)", remedy)
    problems.raise_if_any()


def _unreachable(savings: Savings, possible: float, how: str, start_epoch: int | None) -> InvalidArgument:
    # Rounded down, so that the figure in the message can be asked for.
    most = math.floor(possible * 1000) / 1000
    longer = "start earlier" if start_epoch is not None else "train for more epochs, or shorten update_interval_epochs"
    remedy = (
        f"Ask for flops_reduction={most:.3f} at most, raise fraction, {longer}."
        if most
        else "Train for more epochs, or freeze nothing (flops_reduction=0)."
    )
    return InvalidArgument(
        Problem(
            "flops_reduction",
            savings.flops_reduction,
            f"cannot be reached: the most possible is {most:.3f}, with {how}",
            remedy,
        )
    )
