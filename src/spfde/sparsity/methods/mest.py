"""MEST: elastic mutation, with or without a soft memory bound."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field, model_validator

from spfde.core.numbers import steps
from spfde.core.registry import register
from spfde.sparsity.criteria import Criterion, Magnitude, MagnitudePlusGradient, Random
from spfde.sparsity.methods.base import Fraction
from spfde.sparsity.methods.drop_grow import DropGrow


@register("method")
class MEST(DropGrow):
    """Elastic mutation (EM), and with a soft memory bound EM&S.

    With the soft bound a layer trains above its target density and is pruned back to it, then regrown, at each update
    epoch; the bound shrinks to nothing. Without it a shrinking share of the weights is dropped and regrown at random.
    Defaults are those of the released CIFAR scripts, as shares of the run; 0.2 and 0.1 of the active weights are 2 and
    1 points of density at 90 % sparsity.

    Departures: optimizer state of grown weights starts at zero (the released code lets the old momentum live on); at
    epoch 0 nothing is dropped, for untrained weights say nothing.

    Attributes:
        soft_bound: EM&S when true, EM when false.
        soft_bound_steps: density above the target, by stage.
        drop_steps: share of the target's active weights dropped at an update epoch, by stage (EM only).
        decay_at: progress at which the next stage starts; one fewer than stages.
        gradient_weight: λ in the importance |w| + λ|g|; 0 in the released code.

    Example:
        >>> recipe = spfde.Recipe(sparsity=spfde.MEST(sparsity=0.9, soft_bound=False))
        >>> session = spfde.attach(model, optimizer, loader, recipe, epochs=10)
        >>> round(session.density, 2)
        0.09
    """

    name: ClassVar[str] = "mest"
    summary: ClassVar[str] = "Elastic mutation with a soft memory bound; no dense gradient, ever."
    cost: ClassVar[str] = "3 sparse passes a step, at the soft bound's density"
    references: ClassVar[tuple[str, ...]] = ("yuan2021mest",)
    _count_remedy: ClassVar[str] = "Use soft_bound=False, or another method, such as set or rigl."

    drop: ClassVar[Criterion] = Magnitude()  # type: ignore[misc]  # no field: fixed
    grow: ClassVar[Criterion] = Random()  # type: ignore[misc]  # no field: fixed
    drop_fraction: ClassVar[float] = 0.0  # type: ignore[misc]  # no field: fixed
    decay: ClassVar[str] = "constant"  # type: ignore[misc]  # no field: fixed
    stop_fraction: ClassVar[float] = 1.0  # type: ignore[misc]  # no field: fixed

    soft_bound: bool = True
    soft_bound_steps: tuple[Fraction, ...] = (0.05, 0.025, 0.0)
    drop_steps: tuple[Fraction, ...] = (0.2, 0.1, 0.0)
    decay_at: tuple[Annotated[float, Field(ge=0.0, le=1.0)], ...] = (90 / 160, 120 / 160)
    gradient_weight: Annotated[float, Field(ge=0.0)] = 0.0

    @model_validator(mode="after")
    def _stages_fit(self) -> MEST:
        field = "soft_bound_steps" if self.soft_bound else "drop_steps"
        if len(getattr(self, field)) != len(self.decay_at) + 1:
            raise ValueError(f"{field} must have one value more than decay_at")
        if list(self.decay_at) != sorted(self.decay_at):
            raise ValueError("decay_at must rise")
        return self

    @property
    def drop_criterion(self) -> Criterion:
        if self.gradient_weight == 0.0:
            return Magnitude()
        return MagnitudePlusGradient(gradient_weight=self.gradient_weight)

    def drop_fraction_at(self, progress: float) -> float:
        return 0.0 if self.soft_bound else steps(progress, self.drop_steps, self.decay_at)

    @property
    def varies_counts(self) -> bool:
        return self.soft_bound

    def excess_at(self, progress: float) -> float:
        return steps(progress, self.soft_bound_steps, self.decay_at) if self.soft_bound else 0.0
