"""When each block is frozen.

The planner sees plain numbers: what one epoch of backpropagation through each block costs, with the density that the
sparsity schedule gives it in that epoch. It returns a ``FreezePlan``, and all that a session asks of a plan is how many
of the first blocks are frozen in an epoch; another scheme is another function that returns a plan.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from pydantic import Field

from spfde.errors import InvalidArgument, Problem, Problems
from spfde.technique import Technique


class ProgressiveFreezing(Technique):
    """Freeze the model from the front, block after block, so that a share of the training FLOPs is saved.

    Source: SpFDE, section 3 (layer freezing) and appendix B, the single-shot scheme: once frozen, a block stays frozen.
    The start epoch is the latest multiple of the update interval that reaches the target; then one block follows per
    interval.
    """

    name: ClassVar[str] = "progressive-freezing"
    summary: ClassVar[str] = "Freezes blocks front to back, one per update interval; they need no backward pass."
    citation: ClassVar[str] = (
        "Geng Yuan, Yanyu Li, Sheng Li, Zhenglun Kong, Sergey Tulyakov, Xulong Tang, Yanzhi Wang, Jian Ren. "
        "Layer Freezing & Data Sieving: Missing Pieces of a Generic Framework for Sparse Training. NeurIPS 2022. "
        "arXiv:2209.11204"
    )
    bibtex: ClassVar[str] = """@inproceedings{yuan2022spfde,
  title = {Layer Freezing \\& Data Sieving: Missing Pieces of a Generic Framework for Sparse Training},
  author = {Yuan, Geng and Li, Yanyu and Li, Sheng and Kong, Zhenglun and Tulyakov, Sergey and Tang, Xulong and
            Wang, Yanzhi and Ren, Jian},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2022},
  eprint = {2209.11204},
  archiveprefix = {arXiv}
}"""

    flops_reduction: float = Field(
        default=0.20, ge=0, lt=1, description="share of the training FLOPs that freezing saves, in [0, 1)"
    )
    fraction: float = Field(default=2 / 3, gt=0, le=1, description="share of the layers that may be frozen, in (0, 1]")
    start_epoch: int | None = Field(
        default=None,
        ge=0,
        description="epoch at which the first block is frozen, a multiple of the update interval; None: as late as the "
        "target allows",
    )
    blocks: tuple[str, ...] | None = Field(
        default=None, description="names of the modules to freeze at once, in order of execution; None: found"
    )
    cache_variants: int = Field(
        default=0,
        ge=0,
        description="augmented variants of each sample whose output of the frozen front is kept, so that its forward "
        "pass is not done again; 0: none. Native engine; see session.augmentation_seeds",
    )
    cache_precision: Literal["fp16", "int8"] = Field(default="fp16", description="of what is kept: 'fp16' or 'int8'")
    cache_limit_gib: float = Field(default=8.0, gt=0, description="room for what is kept, in GiB; fewer variants fit")
    cache_folder: str | None = Field(default=None, description="folder for a memory-mapped file; None: in memory")
    scheme: Literal["single-shot"] = Field(
        default="single-shot", description="'single-shot': frozen blocks stay frozen"
    )


@dataclass(frozen=True)
class FreezePlan:
    """A timeline of freezing.

    Attributes:
        freeze_epochs: for each block the epoch at whose start it is frozen, None where it never is.
        start_epoch: epoch at which the first block is frozen (T_frz), None where nothing is.
        reduction: share of the training FLOPs without freezing that is saved.
    """

    freeze_epochs: tuple[int | None, ...]
    start_epoch: int | None
    reduction: float

    def n_frozen_at(self, epoch: int) -> int:
        """Number of blocks that are frozen during ``epoch``; they are the first ones."""
        return sum(self.frozen_by(epoch))

    def frozen_by(self, epoch: int) -> tuple[bool, ...]:
        """For each block: is it frozen during ``epoch``?"""
        return tuple(at is not None and at <= epoch for at in self.freeze_epochs)


def blocks_to_freeze(n_layers: Sequence[int], total_layers: int, fraction: float) -> int:
    """Number of blocks whose layers come nearest to ``fraction`` of all layers; at least 1, and the fewer in a tie.

    Args:
        n_layers: number of weighted layers of each block, front to back.
        total_layers: of the whole model, the head included.
        fraction: share of the layers to freeze. Source: two thirds, SpFDE section 3; whole blocks are ours.
    """
    wanted, frozen, distances = fraction * total_layers, 0, []
    for count in n_layers:
        frozen += count
        distances.append(abs(frozen - wanted))
    return distances.index(min(distances)) + 1 if distances else 0


def freezing_saving(backward: Sequence[Sequence[float]], freeze_epochs: Sequence[int | None]) -> float:
    """FLOPs of backpropagation that are not done when each block is frozen at its epoch."""
    return math.fsum(
        flops for block, at in zip(backward, freeze_epochs, strict=False) if at is not None for flops in block[at:]
    )


def solve(
    backward: Sequence[Sequence[float]],
    total: float,
    *,
    flops_reduction: float,
    interval: int,
    epochs: int,
    n_blocks: int,
    start_epoch: int | None = None,
) -> FreezePlan:
    """Choose the freeze epoch of each block (SpFDE, algorithm 1).

    The start is the largest positive multiple of ``interval`` from which the first ``n_blocks`` blocks, frozen one per
    interval, save ``flops_reduction * total``. Then blocks are frozen front to back until the target is met.

    Args:
        backward: ``backward[b][e]``, FLOPs of backpropagation through block ``b`` in epoch ``e``, front to back.
        total: training FLOPs of the whole run without freezing.
        flops_reduction: share of ``total`` to save; 0 freezes nothing, or all ``n_blocks`` when ``start_epoch`` is
            given.
        interval: Δτ in epochs.
        epochs: length of the run.
        n_blocks: number of blocks that may be frozen.
        start_epoch: fixes the start instead of solving for it.

    Raises:
        InvalidArgument: the target cannot be reached (the most possible is named), or the start is no beat of the run.
    """
    n_blocks = min(n_blocks, len(backward))
    never: tuple[int | None, ...] = (None,) * len(backward)
    if start_epoch is not None:
        _check_start(start_epoch, interval, epochs)
    elif flops_reduction == 0:
        return FreezePlan(never, None, 0.0)

    def staggered(start: int, count: int) -> tuple[int | None, ...]:
        at = [start + index * interval for index in range(count)]
        return tuple(epoch if epoch < epochs else None for epoch in at) + never[count:]

    def reduction(plan: Sequence[int | None]) -> float:
        return freezing_saving(backward, plan) / total if total else 0.0

    # Saving grows as the start moves forward: the first one that reaches the target, from the end, is the latest.
    starts = range((epochs - 1) // interval * interval, 0, -interval) if start_epoch is None else (start_epoch,)
    target = flops_reduction - 1e-12  # a sum may fall short of a target that is met exactly
    start = next((at for at in starts if reduction(staggered(at, n_blocks)) >= target), None)
    if start is None:
        earliest = starts[-1] if starts else interval
        most = reduction(staggered(earliest, n_blocks))
        raise _unreachable(flops_reduction, most, earliest, n_blocks, fixed=start_epoch is not None)
    count = n_blocks
    if flops_reduction > 0:
        count = next(n for n in range(1, n_blocks + 1) if reduction(staggered(start, n)) >= target)
    plan = staggered(start, count)
    return FreezePlan(plan, start if any(at is not None for at in plan) else None, reduction(plan))


def _check_start(start_epoch: int, interval: int, epochs: int) -> None:
    problems = Problems()
    if start_epoch % interval:
        below = start_epoch - start_epoch % interval
        problems.add(
            "start_epoch",
            start_epoch,
            f"must be a multiple of the update interval ({interval} epochs)",
            f"Pass {below} or {below + interval}, or change update_interval_epochs.",
        )
    if start_epoch >= epochs:
        problems.add("start_epoch", start_epoch, f"must lie within the run ({epochs} epochs)", "Start earlier.")
    problems.raise_if_any()


def _unreachable(wanted: float, possible: float, start: int, n_blocks: int, *, fixed: bool) -> InvalidArgument:
    # Rounded down, so that the figure in the message can be asked for.
    most = math.floor(possible * 1000) / 1000
    remedy = "start earlier" if fixed else "train for more epochs, or shorten update_interval_epochs"
    return InvalidArgument(
        Problem(
            "flops_reduction",
            wanted,
            f"cannot be reached: the most possible is {most:.3f}, with {n_blocks} blocks frozen one by one from "
            f"epoch {start} on",
            f"Ask for at most {most:.3f}, raise fraction, {remedy}.",
        )
    )
