"""A method is two criteria and a schedule."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, SerializeAsAny, field_serializer, field_validator

from spfde.core.numbers import cosine, round_half_up
from spfde.core.registry import register
from spfde.core.technique import read_named, write_named
from spfde.sparsity.criteria import Criterion, Magnitude, Random
from spfde.sparsity.distribution import active_count
from spfde.sparsity.drop_grow import Mutation
from spfde.sparsity.methods.base import Fraction, SparsityMethod
from spfde.sparsity.schedule import DenseGradients

if TYPE_CHECKING:
    from spfde.sparsity.masker import Masker


@register("method")
class DropGrow(SparsityMethod):
    """At each update epoch drop weights by one criterion, and grow as many by another.

    SET, RigL, MEST, SET-ITOP, RigL-ITOP and the static mask are this class with fields of their own. Grown weights
    start at zero.

    Attributes:
        drop: by which active weights stay: a criterion, its name, or a table with ``name`` and its fields.
        grow: by which inactive weights grow, likewise.
        drop_fraction: share of the target's active weights dropped at the first mutation, in [0, 1).
        soft_bound: density above the target between mutations at first, in share of all weights of the layer, as MEST's
            EM&S has it; each mutation drops to the target (less the drop fraction) and grows to the bound.
        decay: both fall as a "cosine" to zero at ``stop_fraction``, or are "constant" until then.
        stop_fraction: share of the run after which the mask stays, in (0, 1].

    Example:
        >>> import spfde
        >>> from spfde.sparsity import DropGrow, Gradient, Magnitude
        >>> rigl_like = DropGrow(sparsity=0.9, drop=Magnitude(), grow=Gradient(), drop_fraction=0.3)
        >>> DropGrow(sparsity=0.9, grow="gradient") == rigl_like
        True
    """

    name: ClassVar[str] = "drop-grow"
    summary: ClassVar[str] = "Drops weights by one criterion and grows as many by another."
    references: ClassVar[tuple[str, ...]] = ("mocanu2018set",)
    _count_remedy: ClassVar[str] = "Use soft_bound=0, or another method, such as set or rigl."

    drop: SerializeAsAny[Criterion] = Field(default=Magnitude(), description="a criterion, such as Magnitude()")
    grow: SerializeAsAny[Criterion] = Field(default=Random(), description="a criterion, such as Random()")
    drop_fraction: Fraction = 0.3
    soft_bound: Fraction = 0.0
    decay: Literal["cosine", "constant"] = "cosine"
    stop_fraction: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0

    @field_validator("drop", "grow", mode="before", check_fields=False)
    @classmethod
    def _read_criterion(cls, value: Any, info: Any) -> Any:
        return read_named(info.field_name, value, argument=info.field_name)

    @field_serializer("drop", "grow", check_fields=False)
    def _write_criterion(self, criterion: Criterion) -> dict[str, Any]:
        return write_named(criterion)

    @property
    def cited(self) -> tuple[str, ...]:
        """With where the criteria are from."""
        return (*super().cited, *self.drop_criterion.cited, *self.grow.cited)

    @property
    def drop_criterion(self) -> Criterion:
        """By which active weights stay."""
        return self.drop

    @property
    def dense_gradients(self) -> DenseGradients:
        return "one step" if self.grow.needs_gradient else "none"

    @property
    def varies_counts(self) -> bool:
        return self.excess_at(0.0) > 0.0

    def drop_fraction_at(self, progress: float) -> float:
        """Share of the target's active units that a mutation drops and grows again."""
        return self._decayed(self.drop_fraction, progress)

    def excess_at(self, progress: float) -> float:
        """Density above the target, in share of all units of the layer."""
        return self._decayed(self.soft_bound, progress)

    def mutation_counts(self, target: int, n_units: int, active: int, progress: float) -> tuple[int, int]:
        final = min(n_units, target + round_half_up(self.excess_at(progress) * n_units))
        survive = target if progress == 0.0 else active_count(target, self.drop_fraction_at(progress))
        return min(survive, active, final), final

    def mutates_at(self, progress: float) -> bool:
        return progress > 0.0 and self.drop_fraction_at(progress) > 0.0

    def strategy(self, masker: Masker) -> Mutation:
        return Mutation(masker, drop=self.drop_criterion, grow=self.grow)

    def _decayed(self, value: float, progress: float) -> float:
        if progress >= self.stop_fraction:
            return 0.0
        return value if self.decay == "constant" else cosine(progress / self.stop_fraction, value)
