"""Gradual magnitude pruning, from the dense net down."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar

from pydantic import Field, model_validator

from spfde.core.numbers import round_half_up
from spfde.core.registry import register
from spfde.sparsity.masker import Masker
from spfde.sparsity.methods.base import Fraction, SparsityMethod
from spfde.sparsity.schedule import MaskPlan
from spfde.sparsity.strategy import Strategy
from spfde.sparsity.weight import MaskedWeight


@register("method")
class GMP(SparsityMethod):
    """Start dense and drop the smallest weights, step by step, until the target is reached. Nothing grows.

    The sparsity follows ``s - s * (1 - p)**3``, ``p`` running from 0 at ``start_fraction`` to 1 at ``stop_fraction``
    (with ``initial_sparsity`` 0; it starts there otherwise).

    Departure: dropped weights stay at zero, where the authors' code lets those masked under a threshold return.

    Attributes:
        initial_sparsity: before the first pruning, in [0, 1), and at most the layer's target.
        start_fraction: share of the run after which pruning starts, in [0, 1).
        stop_fraction: share of the run at which the target is reached, in (0, 1].

    Example:
        >>> recipe = spfde.Recipe(sparsity=spfde.GMP(sparsity=0.9))
        >>> session = spfde.attach(model, optimizer, loader, recipe, epochs=10)
        >>> round(session.density, 2)
        1.0
    """

    name: ClassVar[str] = "gmp"
    summary: ClassVar[str] = (
        "Dense to sparse: the smallest weights go, one update epoch after another, along a cubic schedule."
    )
    cost: ClassVar[str] = "3 passes a step at a density that falls from dense to the target"
    references: ClassVar[tuple[str, ...]] = ("zhu2018prune",)
    by_layer: ClassVar[bool] = True

    initial_sparsity: Fraction = 0.0
    start_fraction: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    stop_fraction: Annotated[float, Field(gt=0.0, le=1.0)] = 0.75

    @model_validator(mode="after")
    def _starts_before_it_stops(self) -> GMP:
        if self.start_fraction >= self.stop_fraction:
            raise ValueError("start_fraction must be less than stop_fraction")
        return self

    @property
    def varies_counts(self) -> bool:
        return True

    def first_count(self, target: int, n_units: int) -> int:
        return self._scheduled(target, n_units, 0.0)

    def mutation_counts(self, target: int, n_units: int, active: int, progress: float) -> tuple[int, int]:
        # A layer that has come to its target early, by freezing say, stays there.
        final = min(active, self._scheduled(target, n_units, progress))
        return final, final

    def strategy(self, masker: Masker) -> Pruning:
        return Pruning(masker)

    def _scheduled(self, target: int, n_units: int, progress: float) -> int:
        done = (progress - self.start_fraction) / (self.stop_fraction - self.start_fraction)
        left = (1.0 - min(max(done, 0.0), 1.0)) ** 3
        start = max(target, n_units - round_half_up(self.initial_sparsity * n_units))
        return target + round_half_up((start - target) * left)


class Pruning(Strategy):
    """Drops to what is planned, by magnitude; what has fewer weights already keeps them."""

    def begin_epoch(self, plan: MaskPlan, live: Sequence[MaskedWeight]) -> None:
        for layer in live:
            self.prune(layer, int(plan.layers[layer.name].active))
