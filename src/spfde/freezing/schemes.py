"""Freezing schemes: when each block is frozen, one registered class a scheme, and the plan that is solved for with it.

They see plain numbers: what one epoch of backpropagation through each block costs, with the density that the sparsity
schedule gives it in that epoch, and how much of all training FLOPs is to be saved.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from typing import ClassVar

from spfde.core.errors import InvalidArgument, Problem, Problems
from spfde.core.numbers import round_half_up
from spfde.core.registry import find, register
from spfde.core.say import counted
from spfde.freezing.plan import FreezePlan
from spfde.freezing.savings import Savings, Timeline

RESUME_SHARE = 0.1
"""Of a run, what "single-shot-resume" trains everything again at its end; SpFDE gives no number."""
DELAY_SHARE = 0.25
"""Of a run, what "delayed-periodic" trains everything at its start, at most; SpFDE gives no number."""
NEAR = 0.005
"""How much more than what was asked for, of all FLOPs, a plan may save without looking for one that is nearer."""
PERIODS = (4, 2)
"""Front blocks train in one epoch of four, middle blocks in one of two (SpFDE, appendix B)."""


class FreezingScheme(ABC):
    """When blocks are frozen: the base of every scheme.

    A subclass defines ``timelines``. Source of those here: SpFDE, section 3 and appendix B.

    Args:
        start_epoch: asked for as the start, in place of what the scheme would take.
        resume_epochs: asked for as the length of the end in which everything trains; likewise.

    Attributes:
        name: how recipes and the command line call it.
        summary: what it does, in a line.
        references: what to cite for it beside ``ProgressiveFreezing``.
        thaws: whether frozen blocks train again.
        pauses: whether they do so after a short pause, through which masks wait as they are, above their target too.
        takes: which of ``start_epoch`` and ``resume_epochs`` it heeds.

    Example:
        >>> from spfde.freezing import FreezingScheme, Savings
        >>> class AtOnce(FreezingScheme):
        ...     name = "at-once"
        ...     summary = "All blocks are frozen at the same time."
        ...
        ...     def timelines(self, savings):
        ...         for start in savings.update_epochs(savings.epochs - 1):
        ...             yield (0,) * start + (savings.n_blocks,) * (savings.epochs - start)
        >>> next(iter(AtOnce().timelines(Savings([[1.0] * 4] * 2, 24.0, 0.1, 2, 2))))
        (0, 0, 2, 2)
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    references: ClassVar[tuple[str, ...]] = ()
    thaws: ClassVar[bool] = False
    pauses: ClassVar[bool] = False
    takes: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, *, start_epoch: int | None = None, resume_epochs: int | None = None) -> None:
        self.start_epoch, self.resume_epochs = start_epoch, resume_epochs

    @abstractmethod
    def timelines(self, savings: Savings) -> Iterable[Timeline]:
        """What the scheme could do, the most wanted first: the first that saves enough is taken.

        Without one that does, the one that saves most is the most possible, so it should be among them.
        """


def solve(
    savings: Savings,
    *,
    scheme: str = "single-shot",
    start_epoch: int | None = None,
    resume_epochs: int | None = None,
    as_far_as_possible: bool = False,
) -> FreezePlan:
    """Plan the freezing of a run by its scheme, so that the target is met, with as little more as can be.

    A target of 0 freezes nothing, or with ``start_epoch`` all ``n_blocks``. The other arguments are the fields of
    ``ProgressiveFreezing``.

    Raises:
        InvalidArgument: the target cannot be reached (the most possible is named), a given epoch is none of the run
            or no update epoch where it must be one, or there is no such scheme.
    """
    kind: type[FreezingScheme] = find("freezing-scheme", scheme, argument="scheme")
    problems = Problems()
    for name, value in (("start_epoch", start_epoch), ("resume_epochs", resume_epochs)):
        if value is not None:
            at_any = name == "start_epoch" and savings.timing == "exact" and issubclass(kind, SingleShot)
            problems.found += _problems_with_epoch(name, value, savings, at_any=at_any)
    problems.raise_if_any()
    best: Timeline = (0,) * savings.epochs
    wants_something = savings.flops_reduction > 0 or start_epoch is not None
    chosen = kind(start_epoch=start_epoch, resume_epochs=resume_epochs)
    for frozen in chosen.timelines(savings) if wants_something else ():
        _check_timeline(chosen, frozen, savings)
        if savings.reaches(frozen):
            best = frozen
            break
        best = max(best, frozen, key=savings.reduction)
    if not (as_far_as_possible or savings.reaches(best)):
        raise _unreachable(savings, best, start_epoch)
    return FreezePlan(
        len(savings.backward), best, savings.reduction(best), pauses=kind.pauses, asked=savings.flops_reduction
    )


@register("freezing-scheme")
class SingleShot(FreezingScheme):
    """Freeze one block after the other, at most one each interval (SpFDE, algorithm 1).

    The start is the latest epoch from which all ``n_blocks`` blocks, an interval apart, save enough. Then, from the
    last block to the second, each is frozen as late as the target allows, which may be never. Where that still saves
    ``NEAR`` more than was asked for, a start earlier by less than an interval may come nearer: the blocks behind the
    first wait longer then.

    With ``timing="update"`` it is the paper's: the start is an update epoch, and blocks are frozen front to back, one
    at each update epoch, until the target is met.
    """

    name = "single-shot"
    summary = "Blocks are frozen one after the other, for good."
    takes = frozenset({"start_epoch"})

    def timelines(self, savings: Savings) -> Iterator[Timeline]:
        return self._one_by_one(savings, end=savings.epochs)

    def _one_by_one(self, savings: Savings, *, end: int) -> Iterator[Timeline]:
        def from_epoch(start: int, n_blocks: int) -> Timeline:
            return _frozen_from(savings.one_by_one(start, end=end)[:n_blocks], savings.epochs, end=end)

        def most(start: int) -> float:
            return savings.reduction(from_epoch(start, savings.n_blocks))

        starts = savings.starts(end - 1) if self.start_epoch is None else (self.start_epoch,)
        if not starts:
            return
        # The earlier the start, the more is saved: halving finds the latest that is early enough, or as good as any.
        latest = bisect_left(starts, min(savings.enough, most(starts[-1])), key=most)
        if savings.flops_reduction > 0 and most(starts[latest]) >= savings.enough:
            if savings.timing == "exact":
                near = starts[latest : latest + savings.interval]
                yield _frozen_from(_nearest(savings, near, end=end), savings.epochs, end=end)
            yield from (from_epoch(starts[latest], n_blocks) for n_blocks in range(1, savings.n_blocks))
        yield from_epoch(starts[latest], savings.n_blocks)


def _frozen_from(freeze_epochs: Sequence[int], epochs: int, *, end: int) -> Timeline:
    """Frozen blocks in each epoch, where each is frozen from its own to ``end``."""
    return (*(bisect_right(freeze_epochs, epoch) for epoch in range(end)), *(0,) * (epochs - end))


def _nearest(savings: Savings, starts: Sequence[int], *, end: int) -> list[int]:
    """Of the starts the first that saves little more than is asked for, or that which saves least more.

    Args:
        savings: what there is to save.
        starts: the latest first; from each of them enough can be saved.
        end: the epoch at which everything trains again, or the run's length.
    """
    # By block and epoch, what is saved where it is frozen from there on; one more epoch saves nothing.
    saved = [list(accumulate(reversed(block[:end]), initial=0.0))[::-1] for block in savings.backward]
    wanted = (savings.flops_reduction - 5e-13) * savings.total
    best, least = list[int](), math.inf
    for start in starts:
        at = savings.one_by_one(start, end=end)
        more = sum(block[epoch] for block, epoch in zip(saved, at, strict=False)) - wanted
        before, latest = list(at), end
        for block in reversed(range(1, len(at))):
            choice = range(at[block], latest + 1)
            lost = [saved[block][at[block]] - saved[block][epoch] for epoch in choice]
            index = bisect_right(lost, more) - 1
            more, at[block] = more - lost[index], choice[index]
            latest = end if at[block] == end else at[block] - (before[block] - before[block - 1])
        if more < least - 1e-9 * savings.total:
            best, least = at, more
        # From earlier on the first block alone would save as much more.
        if least <= NEAR * savings.total or saved[0][start] - wanted >= least:
            break
    return best


@register("freezing-scheme")
class SingleShotResume(SingleShot):
    """As single-shot, and thaw all for the last epochs (SpFDE, appendix B).

    The frozen blocks save so much less, and the start that is found is accordingly earlier.
    """

    name = "single-shot-resume"
    summary = "The same, earlier; at the end everything trains again."
    thaws = True
    takes = frozenset({"start_epoch", "resume_epochs"})

    def timelines(self, savings: Savings) -> Iterator[Timeline]:
        epochs, interval = savings.epochs, savings.interval
        tenth = min(epochs, interval * max(1, round_half_up(RESUME_SHARE * epochs / interval)))
        return self._one_by_one(savings, end=epochs - (self.resume_epochs or tenth))


@register("freezing-scheme")
class Periodic(FreezingScheme):
    """Front blocks train in one epoch of four, middle blocks in one of two, the others always (SpFDE, appendix B).

    How many blocks are front and middle is solved for: of all pairs within ``n_blocks`` the one that meets the target
    with the least overshoot, or within a point of that one that has front and middle blocks. The periods are powers of
    two and begin together, so what is frozen is a prefix in every epoch.
    """

    name = "periodic"
    summary = "Front blocks train one epoch in four, middle blocks one in two."
    thaws = True
    pauses = True

    def timelines(self, savings: Savings) -> Iterator[Timeline]:
        yield self._nearest(savings, delay=0)

    def _nearest(self, savings: Savings, *, delay: int) -> Timeline:
        """That of the best pair; where none meets the target, that of the pair that saves most."""
        counts = range(savings.n_blocks + 1)
        pairs = [(front, middle) for middle in counts for front in range(middle + 1)]
        phases = [
            [math.fsum(of_front[n] for of_front in savings.of_front[delay + phase :: PERIODS[0]]) for n in counts]
            for phase in range(PERIODS[0])
        ]
        shares = {
            pair: savings.share(sum(phases[phase][_frozen_at(phase, *pair)] for phase in range(PERIODS[0])))
            for pair in pairs
        }
        # Rounded, for sums of equal numbers differ in a digit, and are ties.
        reached = {pair: round(share, 9) for pair, share in shares.items() if share >= savings.enough}
        if not reached:
            return paused(savings.epochs, *pairs[-1], delay=delay)
        least = min(reached.values())
        near = [pair for pair, reduction in reached.items() if reduction < least + 0.01]
        # Three parts if possible, then the least overshoot, then more blocks that pause for less.
        best = min(near, key=lambda pair: (not 0 < pair[0] < pair[1], reached[pair], -pair[1]))
        return paused(savings.epochs, *best, delay=delay)


@register("freezing-scheme")
class DelayedPeriodic(Periodic):
    """Everything trains until the start epoch and in it, then as in ``periodic`` (SpFDE, appendix B).

    The start is the latest update epoch in the first quarter of the run from which the target can be reached.
    """

    name = "delayed-periodic"
    summary = "Everything trains at first, then as periodic."
    takes = frozenset({"start_epoch"})

    def timelines(self, savings: Savings) -> Iterator[Timeline]:
        quarter = math.floor(DELAY_SHARE * savings.epochs)
        starts = savings.update_epochs(quarter) or (min(savings.interval, savings.epochs),)
        if self.start_epoch is not None:
            starts = (self.start_epoch,)
        most = _saved_by_all(savings)
        needed = min(savings.flops_reduction * savings.total, max(most[start] for start in starts))
        for start in starts:
            # Others cannot be the answer, and each costs a look at the whole run. These sums are rounded at each step.
            if most[start] >= needed - 1e-9 * savings.total:
                yield self._nearest(savings, delay=start)


def paused(epochs: int, n_front: int, n_up_to_middle: int, *, delay: int = 0) -> Timeline:
    """Frozen blocks in each epoch, of which the first ``delay`` are before the first period."""
    begun = (_frozen_at(since, n_front, n_up_to_middle) for since in range(epochs - delay))
    return (*(0,) * min(delay, epochs), *begun)


def _frozen_at(since: int, n_front: int, n_up_to_middle: int) -> int:
    front, middle = PERIODS
    return 0 if since % front == 0 else n_front if since % middle == 0 else n_up_to_middle


def _saved_by_all(savings: Savings) -> Sequence[float]:
    """FLOPs saved where all blocks that may are front blocks, and pause from an epoch on: for each such epoch."""
    front, epochs = PERIODS[0], savings.epochs
    every_fourth = [0.0] * (epochs + front)  # what one epoch in four saves, from an epoch on
    for epoch in reversed(range(epochs)):
        every_fourth[epoch] = savings.of_front[epoch][savings.n_blocks] + every_fourth[epoch + front]
    return [sum(every_fourth[epoch + 1 : epoch + front]) for epoch in range(epochs + 1)]


def _problems_with_epoch(name: str, value: int, savings: Savings, *, at_any: bool) -> list[Problem]:
    interval, epochs = savings.interval, savings.epochs
    problems = []
    if value % interval and not at_any:
        below = value - value % interval
        wanted = f"{below} or {below + interval}" if below or name == "start_epoch" else f"{interval}"
        rule = f"must be a multiple of the update interval ({counted(interval, 'epoch')})"
        problems.append(Problem(name, value, rule, f"Pass {wanted}, or change update_interval_epochs."))
    if value >= epochs:
        remedy = "Start earlier." if name == "start_epoch" else "Resume for a shorter time."
        problems.append(Problem(name, value, f"must lie within the run ({counted(epochs, 'epoch')})", remedy))
    return problems


def _check_timeline(scheme: FreezingScheme, frozen: Timeline, savings: Savings) -> None:
    """A scheme of one's own may be wrong."""
    fits = len(frozen) == savings.epochs and all(0 <= count <= savings.n_blocks for count in frozen)
    if not fits or (not scheme.thaws and list(frozen) != sorted(frozen)):
        rule = f"must say for each of {savings.epochs} epochs how many of at most {savings.n_blocks} blocks are frozen"
        remedy = "Let the number never fall, or set thaws = True."
        raise InvalidArgument(Problem(f"{type(scheme).__name__}.timelines", frozen, rule, remedy))


def _unreachable(savings: Savings, best: Timeline, start_epoch: int | None) -> InvalidArgument:
    # Rounded down, so that the figure in the message can be asked for.
    most = math.floor(savings.reduction(best) * 1000) / 1000
    longer = "start earlier" if start_epoch is not None else "train for more epochs"
    if start_epoch is None and savings.interval > 1:
        longer += ", or shorten update_interval_epochs"
    remedy = (
        f"Ask for flops_reduction={most:.3f} at most, raise fraction, {longer}."
        if most
        else "Train for more epochs, or freeze nothing (flops_reduction=0)."
    )
    first = next((epoch for epoch, count in enumerate(best) if count), None)
    how = "" if first is None else f", with {counted(max(best), 'block')} frozen, the first in epoch {first}"
    rule = f"cannot be reached: the most possible is {most:.3f}{how}"
    return InvalidArgument(Problem("flops_reduction", savings.flops_reduction, rule, remedy))
