"""What freezing is told, and what it plans: the technique with its fields, and the timeline of a run.

All that a session asks of a plan is how many of the first blocks are frozen in an epoch, and whether masks are at their
target by then. The functions that make plans, one a scheme, are in ``spfde.freezing.schemes``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from spfde.core.numbers import latest_update_epoch
from spfde.core.technique import Technique

Scheme = Literal["single-shot", "single-shot-resume", "periodic", "delayed-periodic"]
FreezeCriterion = Literal["schedule", "structure", "representation"]

SCHEMES: Mapping[Scheme, str] = {
    "single-shot": "Blocks are frozen one after the other, for good.",
    "single-shot-resume": "The same, earlier; at the end everything trains again.",
    "periodic": "Front blocks train one epoch in four, middle blocks one in two.",
    "delayed-periodic": "Everything trains at first, then as periodic.",
}
"""When blocks are frozen, in a line."""

FREEZE_CRITERIA: Mapping[FreezeCriterion, tuple[str, str]] = {
    "schedule": ("As planned.", "none"),
    "structure": (
        "Earlier, where a block's largest weights stay the same.",
        "no FLOPs; sorts the weights once an update epoch",
    ),
    "representation": (
        "Earlier, where CKA of a block's outputs stays the same.",
        "a forward pass of the probe's samples once an update epoch",
    ),
}
"""What lets a block be frozen, and what finding it out costs."""


class ProgressiveFreezing(Technique):
    """Freeze the model from the front, block after block, so that a share of the training FLOPs is saved.

    Source: SpFDE, section 3 (layer freezing) and appendix B (the four schemes). In each of them the frozen blocks are
    a front prefix at every moment, and the same FLOPs reduction is solved for:

    - "single-shot": from the start epoch on, one block more is frozen at each update epoch, and stays frozen.
    - "single-shot-resume": as before, but ``resume_epochs`` earlier, and everything trains again for that long at the
      end.
    - "periodic": front blocks train one epoch in four, middle blocks one in two, the others always.
    - "delayed-periodic": everything trains until the start epoch, and then as in "periodic".

    Departures: the appendix names no default for ``resume_epochs`` and for the delay; ours are below.

    Example:
        >>> recipe = spfde.Recipe(freezing=spfde.ProgressiveFreezing(flops_reduction=0.3, scheme="single-shot"))
        >>> spfde.plan(model, torch.zeros(1, 4), recipe, epochs=40, samples=20).freeze_epochs
        (16, 18, 20)
    """

    name: ClassVar[str] = "progressive-freezing"
    summary: ClassVar[str] = "Freezes blocks front to back, one per update interval; they need no backward pass."
    cost: ClassVar[str] = "of a frozen block, the forward pass alone"
    references: ClassVar[tuple[str, ...]] = ("yuan2022spfde",)

    flops_reduction: float = Field(
        default=0.20, ge=0, lt=1, description="share of the training FLOPs that freezing saves, in [0, 1)"
    )
    fraction: float = Field(default=2 / 3, gt=0, le=1, description="share of the layers that may be frozen, in (0, 1]")
    start_epoch: int | None = Field(
        default=None,
        ge=0,
        description="epoch at which the first block is frozen, or from which on blocks pause periodically, a multiple "
        "of the update interval; None: as late as the target allows, and pauses within the first quarter of the run",
    )
    blocks: tuple[str, ...] | None = Field(
        default=None, description="names of the modules to freeze at once, in order of execution; None: found"
    )
    scheme: Scheme = Field(
        default="single-shot", description="'single-shot', 'single-shot-resume', 'periodic' or 'delayed-periodic'"
    )
    criterion: FreezeCriterion = Field(
        default="schedule",
        description="'schedule': as planned; 'structure' or 'representation': earlier, where a block has converged by "
        "its largest weights, or by CKA of its outputs; at the latest as planned",
    )
    threshold: float = Field(
        default=0.95,
        gt=0,
        le=1,
        description="similarity to the update epoch before from which on a block has converged",
    )
    probe_samples: int = Field(default=128, ge=4, description="samples that 'representation' compares outputs on")
    resume_epochs: int | None = Field(
        default=None,
        ge=1,
        description="with 'single-shot-resume': last epochs, in which all blocks train again, a multiple of the update "
        "interval; None: about a tenth of the run",
    )

    @property
    def cited(self) -> tuple[str, ...]:
        """With what the criterion measures by."""
        measured = ("kornblith2019similarity", "nguyen2021wide") if self.criterion == "representation" else ()
        return (*self.references, *measured)

    @property
    def thaws(self) -> bool:
        """True when frozen blocks train again."""
        return self.scheme != "single-shot"

    @property
    def adapts(self) -> bool:
        """True when blocks are frozen as soon as they have converged."""
        return self.criterion != "schedule"

    @model_validator(mode="after")
    def _fields_fit(self) -> Self:
        if self.resume_epochs is not None and self.scheme != "single-shot-resume":
            raise ValueError("resume_epochs belongs to scheme='single-shot-resume'")
        if self.scheme == "periodic" and self.start_epoch is not None:
            raise ValueError("start_epoch delays the periods: that is scheme='delayed-periodic'")
        if self.scheme == "delayed-periodic" and self.start_epoch is not None and self.flops_reduction == 0:
            raise ValueError("scheme='delayed-periodic' needs a flops_reduction above 0: it says how many blocks pause")
        if self.adapts and self.thaws:
            raise ValueError("criterion freezes blocks for good, earlier than planned: it needs scheme='single-shot'")
        return self


@dataclass(frozen=True)
class FreezePlan:
    """A timeline of freezing.

    Attributes:
        n_blocks: number of blocks.
        frozen: for each epoch how many of the first blocks are frozen.
        reduction: share of the training FLOPs without freezing that is saved.
        pauses: True where freezing is a short pause: masks wait in it as they are, under a soft bound too. Else a block
            is at its target before it is frozen.

    Example:
        >>> plan = spfde.freezing.FreezePlan(n_blocks=3, frozen=(0, 0, 1, 2), reduction=0.2)
        >>> plan.freeze_epochs
        (2, 3, None)
    """

    n_blocks: int
    frozen: tuple[int, ...]
    reduction: float
    pauses: bool = False

    @property
    def freeze_epochs(self) -> tuple[int | None, ...]:
        """For each block the first epoch in which it is frozen, None where it never is."""
        firsts: list[int | None] = [None] * self.n_blocks
        for epoch, count in reversed(list(enumerate(self.frozen))):
            firsts[:count] = [epoch] * count
        return tuple(firsts)

    @property
    def start_epoch(self) -> int | None:
        """The first epoch in which a block is frozen (T_frz), None where none ever is."""
        return next((epoch for epoch, count in enumerate(self.frozen) if count), None)

    @property
    def resume_epoch(self) -> int | None:
        """The epoch from which all blocks train again, to the end; None where some are frozen in the last epoch.

        None for pauses and where nothing is frozen, too.
        """
        if self.pauses or not any(self.frozen) or self.frozen[-1]:
            return None
        return max(epoch for epoch, count in enumerate(self.frozen) if count) + 1

    def n_frozen_at(self, epoch: int) -> int:
        """Number of blocks that are frozen during ``epoch``; they are the first ones. After the run as in its end."""
        return self.frozen[min(epoch, len(self.frozen) - 1)]

    def last_turn(self, block: int, epoch: int, interval: int) -> int | None:
        """The latest update epoch up to ``epoch`` at which the block trains and its mask may change, or None."""
        update_epochs = range(latest_update_epoch(epoch, interval), -1, -interval)
        return next((update_epoch for update_epoch in update_epochs if self.n_frozen_at(update_epoch) <= block), None)

    def settles(self, block: int, epoch: int, interval: int) -> bool:
        """Is the block at its target during ``epoch``, because it is frozen or about to be?

        A block that trained under a soft bound up to the moment of freezing would lose weights that it still uses, with
        no step left to make up for them. So it is at target from the last update epoch on at which it trains before it
        is frozen. Through a pause masks stay as they are; then it is the last update epoch of all at which the block
        trains, unless it trains in the last epoch, which prunes anyway. The sources say nothing of this case.
        """
        turn = self.last_turn(block, epoch, interval)
        if turn is None:
            return True
        if not self.pauses:
            return self.n_frozen_at(turn + interval) > block
        end = len(self.frozen)
        to_come = (*range(turn + interval, end, interval), end - 1)
        return turn < end - 1 and all(self.frozen[update_epoch] > block for update_epoch in to_come)

    @property
    def learning_stops(self) -> tuple[int, ...]:
        """For each block the epoch at which its learning rate reaches its end: its freeze epoch, or the run's length.

        A pause ends nothing. What trains again at the end of a run follows the never frozen from ``resume_epoch`` on.
        """
        run = len(self.frozen)
        return tuple(run if at is None or self.pauses else at for at in self.freeze_epochs)


def blocks_to_freeze(n_layers: Sequence[int], total_layers: int, fraction: float) -> int:
    """Number of blocks whose layers come nearest to ``fraction`` of all layers; at least 1, and the fewer in a tie.

    Args:
        n_layers: number of weighted layers of each block, front to back.
        total_layers: of the whole model, the head included.
        fraction: share of the layers to freeze. Source: two thirds, SpFDE section 3; whole blocks are ours.

    Example:
        >>> spfde.freezing.blocks_to_freeze([2, 2, 2], total_layers=7, fraction=2 / 3)
        2
    """
    wanted, frozen, distances = fraction * total_layers, 0, []
    for count in n_layers:
        frozen += count
        distances.append(abs(frozen - wanted))
    return distances.index(min(distances)) + 1 if distances else 0
