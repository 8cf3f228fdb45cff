"""What freezing is told, and what it plans: the technique with its fields, and the timeline of a run.

All that a timeline asks of a plan is how many of the first blocks are frozen in an epoch, and whether that is a pause.
The schemes that make plans are in ``spfde.freezing.schemes``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from spfde.core.registry import find, registered
from spfde.core.technique import Technique

if TYPE_CHECKING:
    from spfde.freezing.schemes import FreezingScheme

FreezeCriterion = Literal["schedule", "structure", "representation"]

Unit = Literal["block", "layer"]
Timing = Literal["exact", "update"]

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

    - "single-shot": from the start epoch on, one block more is frozen each interval, and stays frozen.
    - "single-shot-resume": as before, but ``resume_epochs`` earlier, and everything trains again for that long at the
      end.
    - "periodic": front blocks train one epoch in four, middle blocks one in two, the others always.
    - "delayed-periodic": everything trains until the start epoch, and then as in "periodic".

    Departures: the paper freezes at update epochs; here the start may be any epoch, and the last blocks wait until they
    are needed, so that little more is saved than was asked for (``timing="update"`` is the paper's). Single layers are
    ours (``unit="layer"``). The appendix names no default for ``resume_epochs`` and for the delay; ours are below.

    Example:
        >>> recipe = spfde.Recipe(freezing=spfde.ProgressiveFreezing(flops_reduction=0.3, scheme="single-shot"))
        >>> spfde.plan(model, torch.zeros(1, 4), recipe, epochs=40, samples=20).freeze_epochs
        (16, 18, 22)
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
        description="epoch at which the first block is frozen, or from which on blocks pause periodically; for pauses "
        "and with timing='update' a multiple of the update interval; None: as late as the target allows, and pauses "
        "within the first quarter of the run",
    )
    blocks: tuple[str, ...] | None = Field(
        default=None, description="names of the modules to freeze at once, in order of execution; None: found"
    )
    unit: Unit = Field(
        default="block",
        description="what is frozen at once: a 'block', or a 'layer' with its norm, for models of few blocks",
    )
    timing: Timing = Field(
        default="exact",
        description="single-shot: 'exact', at any epoch, so that little more is saved than asked for; or 'update', at "
        "update epochs alone, as in the paper",
    )
    scheme: str = Field(
        default="single-shot",
        description="'single-shot', 'single-shot-resume', 'periodic', 'delayed-periodic' or a registered scheme",
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
    as_far_as_possible: bool = Field(
        default=False,
        description="freeze what can be reached where the reduction cannot: what presets ask for",
    )

    @field_validator("scheme")
    @classmethod
    def _is_registered(cls, name: str) -> str:
        find("freezing-scheme", name, argument="scheme")
        return name

    @property
    def scheme_class(self) -> type[FreezingScheme]:
        """The class that is registered under the scheme's name."""
        return find("freezing-scheme", self.scheme, argument="scheme")

    @property
    def cited(self) -> tuple[str, ...]:
        """With the scheme's own, and what the criterion measures by."""
        measured = ("kornblith2019similarity", "nguyen2021wide") if self.criterion == "representation" else ()
        return (*self.references, *self.scheme_class.references, *measured)

    @property
    def thaws(self) -> bool:
        """True when frozen blocks train again."""
        return self.scheme_class.thaws

    @property
    def adapts(self) -> bool:
        """True when blocks are frozen as soon as they have converged."""
        return self.criterion != "schedule"

    @model_validator(mode="after")
    def _fields_fit(self) -> Self:
        for name in ("start_epoch", "resume_epochs"):
            if getattr(self, name) is not None and name not in self.scheme_class.takes:
                others = [scheme for scheme, kind in registered("freezing-scheme").items() if name in kind.takes]
                raise ValueError(f"scheme={self.scheme!r} takes no {name}; these do: {', '.join(others)}")
        if self.scheme_class.pauses and self.start_epoch is not None and self.flops_reduction == 0:
            raise ValueError(f"scheme={self.scheme!r} needs a flops_reduction above 0: it says how many blocks pause")
        if self.adapts and self.thaws:
            raise ValueError("criterion freezes blocks for good, earlier than planned: it needs scheme='single-shot'")
        return self


@dataclass(frozen=True)
class FreezePlan:
    """A timeline of freezing."""

    n_blocks: int
    frozen: tuple[int, ...]  # for each epoch how many of the first blocks are frozen
    reduction: float  # share of the training FLOPs without freezing that is saved
    # True where freezing is a short pause: masks wait in it as they are, under a soft bound too. Else a block is at
    # its target before it is frozen.
    pauses: bool = False
    asked: float = 0.0  # the share that was asked for; more than ``reduction`` where no more could be reached

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

    @property
    def learning_stops(self) -> tuple[int, ...]:
        """For each block the epoch at which its learning rate reaches its end: its freeze epoch, or the run's length.

        A pause ends nothing. What trains again at the end of a run follows the never frozen from ``resume_epoch`` on.
        """
        run = len(self.frozen)
        return tuple(run if at is None or self.pauses else at for at in self.freeze_epochs)


def delays(sizes: Sequence[int], interval: int, timing: Timing) -> tuple[int, ...]:
    """Epochs after the start before which each part of each block is not frozen: one block an interval at most.

    The layers of a block are spread over its interval, or with "update" come together at its beginning.

    Args:
        sizes: number of parts of each block, front to back; 1 for a block that is frozen as a whole.
        interval: Δτ in epochs.
        timing: see ``ProgressiveFreezing``.
    """
    within = interval if timing == "exact" else 0
    return tuple(block * interval + part * within // size for block, size in enumerate(sizes) for part in range(size))


def blocks_to_freeze(n_layers: Sequence[int], total_layers: int, fraction: float) -> int:
    """Number of blocks whose layers come nearest to ``fraction`` of all layers; at least 1, and the fewer in a tie.

    Source: two thirds, SpFDE section 3; whole blocks are ours.

    Args:
        n_layers: number of weighted layers of each block, front to back.
        total_layers: of the whole model, the head included.
    """
    wanted, frozen, distances = fraction * total_layers, 0, []
    for count in n_layers:
        frozen += count
        distances.append(abs(frozen - wanted))
    return distances.index(min(distances)) + 1 if distances else 0
