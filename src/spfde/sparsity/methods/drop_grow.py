"""Drop by one criterion, grow by another: most methods, and the strategy that carries out what they plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, SerializeAsAny, field_serializer, field_validator
from torch import Tensor

from spfde.core.errors import StateMismatch, UsageError
from spfde.core.numbers import cosine, round_half_up
from spfde.core.registry import register
from spfde.core.state import check_entries
from spfde.core.technique import read_named, write_named
from spfde.sparsity.criteria import Criterion, Magnitude, Random
from spfde.sparsity.distribution import active_count
from spfde.sparsity.gradients import Skipped, are_finite, unscaled
from spfde.sparsity.masker import Masker
from spfde.sparsity.methods.base import Fraction, SparsityMethod
from spfde.sparsity.schedule import DenseGradients, MaskPlan
from spfde.sparsity.strategy import Strategy
from spfde.sparsity.weight import MaskedWeight


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
    by_layer: ClassVar[bool] = True
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


class Mutation(Strategy):
    """Carries out the planned mutations by two criteria.

    Where a criterion needs a gradient, the mutation of a layer waits for the first step that has one: of the active
    weights for dropping, of all for growing. Each is given its own.
    """

    def __init__(self, masker: Masker, *, drop: Criterion, grow: Criterion) -> None:
        super().__init__(masker)
        self._drop, self._grow = drop, grow
        self.pending: dict[str, tuple[int, int]] = {}
        self._snapshots: dict[str, Tensor] = {}

    def begin_epoch(self, plan: MaskPlan, live: Sequence[MaskedWeight]) -> None:
        names = {layer.name for layer in live}
        self.pending = {} if plan.update else {name: each for name, each in self.pending.items() if name in names}
        for layer in live:
            own = plan.layers[layer.name]
            counts = min(own.survive, layer.active), int(own.active)
            if own.mutates and not plan.last and counts != (layer.active, layer.active):
                self.pending[layer.name] = counts
        self._mutate({}, {})

    def prune_to_target(self, layers: Sequence[MaskedWeight]) -> None:
        for layer in layers:
            self.pending.pop(layer.name, None)
        super().prune_to_target(layers)

    def wants_dense(self, layer: MaskedWeight) -> bool:
        if layer.name not in self.pending or not self._grow.needs_gradient:
            return False
        survive, final = self.pending[layer.name]
        return final > survive

    def may_want_dense(self) -> bool:
        return bool(self.pending) and self._grow.needs_gradient

    def follows_next_step(self) -> bool:
        return bool(self.pending)

    def follows_every_step(self) -> bool:
        return False

    def before_steps(self, layers: Sequence[MaskedWeight]) -> None:
        if self._drop.needs_gradient:
            super().before_steps(layers)

    def before_step(self, layer: MaskedWeight, gradient: Tensor | None) -> None:
        self._snapshots.pop(layer.name, None)
        if gradient is not None and layer.name in self.pending and self._drop.needs_gradient:
            self._snapshots[layer.name] = unscaled(gradient, self.masker.stepping)

    def end_step(self, *, was_skipped: Skipped) -> None:
        if not self.pending:
            return
        active, self._snapshots = self._snapshots, {}
        dense = self.masker.take_dense_gradients() if self._grow.needs_gradient else {}
        self.masker.average_over_ranks(active)
        is_usable = not was_skipped and are_finite([*active.values(), *dense.values()])
        # Of a sharded model each rank sees its own part of the gradients: all do, or none does.
        if not self.masker.live[0].total(int(not is_usable)):
            self._mutate(active, dense)

    def adopt(self, layer: MaskedWeight) -> None:
        self.pending.pop(layer.name, None)

    def clear(self) -> None:
        self._snapshots.clear()

    def state_dict(self) -> dict[str, Any]:
        # A layer that waits for nothing keeps as many as it has. So it is seen if one is missing.
        layers = self.masker.layers
        return {"pending": {n: list(self.pending.get(n, (each.active, each.active))) for n, each in layers.items()}}

    def check_state(self, state: Mapping[str, Any], masks: Mapping[str, Tensor]) -> None:
        check_entries(state, "the sparse training method", {"pending": dict})
        check_entries(state["pending"], "the pending mutations", dict.fromkeys(masks, list))
        for name, counts in state["pending"].items():
            layer = self.masker.layers[name]
            if not _fits(counts, layer, int(masks[name].sum()) // layer.unit_size):
                raise StateMismatch(f"the pending mutation of {name} in the state does not fit: {counts}.")

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        active = {name: layer.active for name, layer in self.masker.layers.items()}
        saved = {name: (survive, final) for name, (survive, final) in state["pending"].items()}
        self.pending = {name: counts for name, counts in saved.items() if counts != (active[name], active[name])}

    def _mutate(self, active: Mapping[str, Tensor], dense: Mapping[str, Tensor]) -> None:
        """Mutate the layers that have the gradients that they need: those of active weights, and those of all."""
        # In the order of the layers, so that the generator's draws do not depend on the backward pass.
        for layer in self.masker.live:
            name = layer.name
            if name not in self.pending:
                continue
            survive, final = self.pending[name]
            drops, grows = survive < layer.active, final > survive
            lacks_active = drops and self._drop.needs_gradient and name not in active
            lacks_dense = grows and self._grow.needs_gradient and name not in dense
            if lacks_active or lacks_dense:
                continue
            del self.pending[name]
            self._mutate_one(layer, survive, final, active.get(name), dense.get(name))

    def _mutate_one(
        self, layer: MaskedWeight, survive: int, final: int, active: Tensor | None, dense: Tensor | None
    ) -> None:
        """Mutate a layer. Of a sharded one whole tensors are made, which are gone when this returns."""
        drops, grows, weight = survive < layer.active, final > survive, layer.whole(layer.local.detach())
        layer.mutate(
            survive,
            final,
            drop_score=_score(self._drop, layer, weight, active) if drops else None,
            grow_score=_score(self._grow, layer, weight, dense) if grows else None,
        )


def _fits(counts: Sequence[Any], layer: MaskedWeight, active: int) -> bool:
    """Whether a layer with so many active units can have a mutation with those counts."""
    if len(counts) != 2 or any(type(count) is not int for count in counts):
        return False
    survive, final = counts
    return bool(0 < survive <= min(final, active) and final <= layer.n_units)


def _score(criterion: Criterion, layer: MaskedWeight, weight: Tensor, gradient: Tensor | None) -> Tensor | None:
    """The criterion's score of a whole weight, which anybody may have written: it is checked."""
    score = criterion.score(weight, None if gradient is None else layer.whole(gradient))
    if score is None:
        return None
    found = tuple(score.shape) if isinstance(score, Tensor) else type(score).__name__
    if found != tuple(weight.shape):
        raise UsageError(
            f"criterion {criterion.name} scored a weight of shape {tuple(weight.shape)} with {found}. Return a tensor "
            "with one score for each weight, or None for chance."
        )
    if layer.unit_size > 1 and bool((score < 0).any()):
        raise UsageError(
            f"criterion {criterion.name} gives negative scores, and of a group of weights the norm of their scores "
            "counts. Return scores from 0 on, or use it without a structure."
        )
    return score
