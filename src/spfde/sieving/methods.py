"""Sieving methods: plain data and pure rules. They say how many samples leave and when; the sieve does it."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import ClassVar, Self

from pydantic import Field, field_validator, model_validator

from spfde.core.errors import InvalidArgument, Problem
from spfde.core.numbers import latest_update_epoch, round_half_up
from spfde.core.registry import find, register
from spfde.core.say import counted
from spfde.core.technique import Technique
from spfde.sieving.criteria import Forgetting, NeverLearned, SievingCriterion


class SievingMethod(Technique, ABC):
    """What all sieving methods share: how many samples are left out, and which ones count as easy.

    Attributes:
        removed_fraction: share of all samples that is left out, in [0, 1).
        criterion: name of the criterion by which samples count as easy: "forgetting" (the fewest forgetting events),
            "loss" (the lowest mean loss), "el2n" (the lowest mean error L2 norm), "random"; or by which the partial set
            is drawn anew: "top-loss" (the highest last loss in a random pool), "repeated-random"; or a registered one.
        never_learned: samples that were never right are hard, or ("literal") as easy as their count of 0; for
            "forgetting" alone.
        balanced: the same share of each class leaves.

    Example:
        >>> method = spfde.DataSieving(removed_fraction=0.2)
        >>> isinstance(method, spfde.sieving.SievingMethod), method.n_removed(50_000)
        (True, 10000)
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    cost: ClassVar[str] = "none; a sample that is left out costs nothing"

    removed_fraction: float = Field(
        default=0.2, ge=0.0, lt=1.0, description="the share of all samples that is left out, in [0, 1)"
    )
    criterion: str = Field(
        default="forgetting",
        description='"forgetting", "loss", "el2n", "random", "top-loss", "repeated-random" or a registered criterion',
    )
    never_learned: NeverLearned = Field(
        default="hard",
        description="'hard' keeps samples that were never right, 'literal' ranks them by their count of 0",
    )
    balanced: bool = Field(default=False, description="whether the same share of each class leaves")

    @field_validator("criterion")
    @classmethod
    def _is_registered(cls, name: str) -> str:
        find("sieving-criterion", name, argument="criterion")
        return name

    def make_criterion(self) -> SievingCriterion:
        """The criterion of that name."""
        kind: type[SievingCriterion] = find("sieving-criterion", self.criterion, argument="criterion")
        return kind(never_learned=self.never_learned) if issubclass(kind, Forgetting) else kind()

    @property
    def cited(self) -> tuple[str, ...]:
        """With where the criterion is from."""
        return (*self.references, *self.make_criterion().references)

    @property
    def rescales(self) -> bool:
        """Whether the loop has to weight its losses."""
        return False

    def n_removed(self, n: int) -> int:
        """Number of samples left out of ``n`` in the end, rounded half up."""
        return round_half_up(self.removed_fraction * n)

    @abstractmethod
    def n_removed_at_start(self, n: int) -> int:
        """Number of samples removed before training."""

    @abstractmethod
    def moves(self, n: int) -> tuple[int, int]:
        """Number of samples that leave at an update, and that come back."""

    @abstractmethod
    def updates_at(self, epoch: int, *, interval: int, epochs: int) -> bool:
        """Whether samples move at the top of ``epoch``."""

    @abstractmethod
    def samples_in_use(self, n: int, epoch: int, *, interval: int, epochs: int) -> int:
        """Size of the partial set during ``epoch``."""

    def n_full_epochs(self, epochs: int) -> int:
        """Number of epochs, at the end of a run of ``epochs``, in which all samples are used again."""
        return 0

    def at_length(self, epochs: int) -> Self:
        """The method while it leaves samples out, in a run of ``epochs``: ``removed_fraction`` is the share then.

        Raises:
            InvalidArgument: it would be all samples.
        """
        return self

    def check_interval(self, interval: int) -> None:
        """Raise ``InvalidArgument`` where the method does not fit an update every ``interval`` epochs."""

    def check_length(self, epochs: int, interval: int) -> None:
        """Raise ``InvalidArgument`` where the method does not fit a run of ``epochs``, updated every ``interval``."""


@register("sieving-method")
class DataSieving(SievingMethod):
    """Train on a part of the data that changes over time: the paper's y %.

    Where the paper leaves room: the removed share is one of all samples; the swapped share is one of the *partial* set
    (the strict reading); samples that were never right are hard; ties are broken at random from the run's seed. Other
    criteria than forgetting, the balance of classes and the weights of losses are not in the paper.

    ``swap_fraction=0`` removes samples once and for all, at random.

    ``full_last`` is the annealing of InfoBatch (arXiv 2303.04947): all samples are used in the last epochs. That more
    are left out before, so that the run presents as many samples as without it, is ours.

    Attributes:
        swap_fraction: share of the partial set swapped at each update; None takes ``removed_fraction``. Without meaning
            for criteria that draw the partial set anew.
        full_last: share of the run, at its end, in which all samples are used, rounded to whole epochs, halves up, and
            one at least; 0 for none. ``removed_fraction`` is the mean over the run then, to half a sample an epoch.
        offset_epochs: updates are at epochs 0 < e with e % Δτ = ``offset_epochs``, which is less than Δτ.
        rescale_loss: ``session.loss_weights`` gives weights that keep the gradient unbiased; the loop has to use them.

    Example:
        >>> session = spfde.attach(model, optimizer, loader, spfde.Recipe(sieving=spfde.DataSieving()), epochs=10)
        >>> len(session.partial_set), len(session.removed_set)
        (16, 4)
    """

    name: ClassVar[str] = "circular"
    summary: ClassVar[str] = "Leaves out a share of the samples and swaps the easiest for removed ones at every update."
    references: ClassVar[tuple[str, ...]] = ("yuan2022spfde",)

    swap_fraction: float | None = Field(
        default=None,
        ge=0.0,
        le=1.0,
        description="the share of the partial set swapped at each update, in [0, 1]; None takes removed_fraction",
    )
    full_last: float = Field(
        default=0.0,
        ge=0.0,
        lt=1.0,
        description="the share of the run, at its end, in which all samples are used, in [0, 1)",
    )
    offset_epochs: int = Field(
        default=0,
        ge=0,
        description="epochs by which samples move after masks do, from 0 to less than update_interval_epochs",
    )
    rescale_loss: bool = Field(default=False, description="whether losses are weighted by session.loss_weights()")

    @model_validator(mode="after")
    def _swaps_or_draws_anew(self) -> Self:
        if self.swap_fraction is not None and self.make_criterion().redraws:
            rule = f'has no meaning with criterion="{self.criterion}", which draws the whole partial set anew'
            raise InvalidArgument(Problem("swap_fraction", self.swap_fraction, rule, "Leave it out."))
        return self

    @property
    def cited(self) -> tuple[str, ...]:
        infobatch = ("qin2024infobatch",) if self.rescale_loss or self.full_last else ()
        weights = ("horvitz1952generalization",) if self.rescale_loss else ()
        return (*super().cited, *infobatch, *weights)

    @property
    def rescales(self) -> bool:
        return self.rescale_loss

    def n_removed_at_start(self, n: int) -> int:
        return self.n_removed(n)

    def moves(self, n: int) -> tuple[int, int]:
        """As many leave as come back.

        At least 1 unless the fraction is 0, so that every sample gets its turn; at most the number of removed samples,
        as no more can come back, and at most the size of the partial set.
        """
        removed = self.n_removed(n)
        fraction = self.removed_fraction if self.swap_fraction is None else self.swap_fraction
        if removed == 0 or fraction == 0:
            return 0, 0
        swapped = min(max(1, round_half_up(fraction * (n - removed))), removed, n - removed)
        return swapped, swapped

    def n_full_epochs(self, epochs: int) -> int:
        return max(1, round_half_up(self.full_last * epochs)) if self.full_last else 0

    def at_length(self, epochs: int) -> Self:
        n_full = self.n_full_epochs(epochs)
        if not n_full or not self.removed_fraction:
            return self
        n_before = epochs - n_full
        if self.removed_fraction * epochs >= n_before:
            rule = (
                f"cannot be the mean over a run that uses all samples in the last {n_full} of "
                f"{counted(epochs, 'epoch')}: none would be left before"
            )
            most = math.ceil(n_before / epochs * 1000 - 1) / 1000
            share = f"removed_fraction={most:g} at most" if most > 0 else "removed_fraction=0"
            less = "full_last=0" if n_full == 1 else "a lower full_last"
            remedy = f"Take {share}, or {less} (it is {self.full_last:g})."
            raise InvalidArgument(Problem("removed_fraction", self.removed_fraction, rule, remedy))
        raised = self.removed_fraction * epochs / n_before
        return self.model_copy(update={"removed_fraction": raised, "full_last": 0.0})

    def check_interval(self, interval: int) -> None:
        if self.offset_epochs >= interval:
            rule = f"must be less than the update interval, {counted(interval, 'epoch')}"
            remedy = f"Take {interval - 1} at most, or update_interval_epochs={self.offset_epochs + 1} or more."
            raise InvalidArgument(Problem("offset_epochs", self.offset_epochs, rule, remedy))

    def check_length(self, epochs: int, interval: int) -> None:
        self.check_interval(interval)
        self.at_length(epochs)

    def updates_at(self, epoch: int, *, interval: int, epochs: int) -> bool:
        """As samples swap, and at the first of the epochs that use all, whether an update epoch or not."""
        n_full = self.n_full_epochs(epochs)
        is_update = epoch % interval == self.offset_epochs and 0 < epoch < epochs - max(1, n_full)
        return is_update or (n_full > 0 and epoch == epochs - n_full)

    def samples_in_use(self, n: int, epoch: int, *, interval: int, epochs: int) -> int:
        if epoch >= epochs - self.n_full_epochs(epochs):
            return n
        return n - self.at_length(epochs).n_removed(n)


@register("sieving-method")
class OneTimeRemoval(SievingMethod):
    """Train on all the data first, then leave the easiest samples out for good: MEST's data-efficient training.

    Defaults are those of the released CIFAR-100 script: 12,000 of 50,000 samples are removed at epoch 70 of 160.
    Forgetting events are counted from epoch 0 on, over the whole first phase; samples that were never right stay.

    Departures: the epoch is rounded to an update epoch, and ties are broken at random (the released code sorts, ties
    as they fall).

    Attributes:
        at_fraction: when samples are removed, as a share of the run, in (0, 1).

    Example:
        >>> removal = spfde.OneTimeRemoval(removed_fraction=0.24, at_fraction=70 / 160)
        >>> removal.removal_epoch(epochs=160, interval=5), removal.n_removed(50_000)
        (70, 12000)
    """

    name: ClassVar[str] = "one-time"
    summary: ClassVar[str] = "Trains on all samples first, then removes the least forgotten once and for all."
    references: ClassVar[tuple[str, ...]] = ("yuan2021mest",)

    removed_fraction: float = Field(
        default=0.24, ge=0.0, lt=1.0, description="the share of all samples that is removed, in [0, 1)"
    )
    at_fraction: float = Field(
        default=70 / 160, gt=0.0, lt=1.0, description="when samples are removed, as a share of the run, in (0, 1)"
    )

    def removal_epoch(self, epochs: int, interval: int) -> int:
        """The update epoch nearest to ``at_fraction`` of the run, neither the first epoch nor the last.

        Raises:
            InvalidArgument: there is no such update epoch.
        """
        last = latest_update_epoch(max(epochs - 2, 0), interval)
        if last == 0:
            rule = f"finds no update in a run of {counted(epochs, 'epoch')} with one every {interval}"
            remedy = "Train longer, or take a shorter update_interval_epochs."
            raise InvalidArgument(Problem("at_fraction", self.at_fraction, rule, remedy))
        return min(max(round_half_up(self.at_fraction * epochs / interval), 1) * interval, last)

    def check_length(self, epochs: int, interval: int) -> None:
        if self.removed_fraction > 0:
            self.removal_epoch(epochs, interval)

    def n_removed_at_start(self, n: int) -> int:
        return 0

    def moves(self, n: int) -> tuple[int, int]:
        return self.n_removed(n), 0

    def updates_at(self, epoch: int, *, interval: int, epochs: int) -> bool:
        return epoch == self.removal_epoch(epochs, interval)

    def samples_in_use(self, n: int, epoch: int, *, interval: int, epochs: int) -> int:
        if self.removed_fraction == 0 or epoch < self.removal_epoch(epochs, interval):
            return n
        return n - self.n_removed(n)


def check_fraction(technique: SievingMethod, n: int, batch_size: int, epochs: int) -> list[Problem]:
    """Find out whether the partial set of ``n`` samples still fills a batch; empty when all is well.

    Nothing is wrong while nothing is removed: a data set smaller than a batch is then the user's own choice.

    Args:
        technique: the method.
        n: number of samples.
        batch_size: samples in a batch.
        epochs: length of the run.
    """
    try:
        removed = technique.at_length(epochs).n_removed(n)
    except InvalidArgument as error:
        return list(error.problems)
    if removed == 0 or n - removed >= batch_size:
        return []
    n_full = technique.n_full_epochs(epochs)
    until = f" until all are used in the last {n_full} of {counted(epochs, 'epoch')}" if n_full else ""
    rule = f"leaves {n - removed} of {n} samples, no full batch of {batch_size}{until}"
    # Rounded down, so that the number that is printed works.
    most = max(0.0, math.floor((n - batch_size) / n * (epochs - n_full) / epochs * 1000) / 1000)
    share = f"removed_fraction={most:g} at most" if most else "removed_fraction=0 (all samples)"
    size = f", or batch_size={n - removed} at most" if removed < n else ""
    remedy = f"Take {share}{size}."
    return [Problem("removed_fraction", technique.removed_fraction, rule, remedy)]
