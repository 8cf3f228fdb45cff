"""Drop, then grow: the strategy of most methods."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from spfde.core.errors import StateMismatch, UsageError
from spfde.core.state import check_all, check_entries
from spfde.sparsity.criteria import Criterion
from spfde.sparsity.gradients import unscaled
from spfde.sparsity.schedule import MaskPlan
from spfde.sparsity.strategy import Strategy
from spfde.sparsity.weight import MaskedWeight

if TYPE_CHECKING:
    from spfde.sparsity.masker import Masker


class Mutation(Strategy):
    """Carries out the planned mutations by two criteria.

    Where a criterion needs a gradient, the mutation of a layer waits for the first step that has one: of the active
    weights for dropping, of all for growing. Each is given its own.

    Args:
        masker: see ``Strategy``.
        drop: by which weights are kept.
        grow: by which weights grow.
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
            if own.mutates and not plan.last:
                self._mutate_or_wait(layer, own.survive, int(own.active))

    def prune_to_target(self, layers: Iterable[MaskedWeight]) -> None:
        layers = list(layers)
        for layer in layers:
            self.pending.pop(layer.name, None)
        super().prune_to_target(layers)

    def wants_dense(self, layer: MaskedWeight) -> bool:
        return layer.name in self.pending and self._waits_for(layer, *self.pending[layer.name])[1]

    def before_step(self, layer: MaskedWeight, gradient: Tensor | None, *, has_closure: bool) -> None:
        if gradient is not None and layer.name in self.pending and self._drop.needs_gradient:
            self._snapshots[layer.name] = unscaled(gradient, self.masker.optimizer)

    def end_step(self, *, was_skipped: bool, has_closure: bool) -> None:
        if not self.pending:
            return
        active = self._take_snapshots(has_closure=has_closure)
        dense = self.masker.take_dense_gradients() if self._grow.needs_gradient else {}
        self.masker.average_over_ranks(active)
        self.masker.average_over_ranks(dense)
        gradients = (*active.values(), *dense.values())
        if was_skipped or not all(bool(gradient.isfinite().all()) for gradient in gradients):
            return
        # In the order of the layers, so that the generator's draws do not depend on the backward pass.
        for layer in self.masker.live:
            name = layer.name
            if name not in self.pending:
                continue
            for_dropping, for_growing = self._waits_for(layer, *self.pending[name])
            if (name in active or not for_dropping) and (name in dense or not for_growing):
                self._mutate(layer, *self.pending.pop(name), active.get(name), dense.get(name))

    def adopt(self, layer: MaskedWeight) -> None:
        self.pending.pop(layer.name, None)

    def clear(self) -> None:
        self._snapshots.clear()

    def state_dict(self) -> dict[str, Any]:
        return {"pending": {name: list(each) for name, each in self.pending.items()}}

    def check_state(self, state: Mapping[str, Any], masks: Mapping[str, Tensor]) -> None:
        check_entries(state, "the sparse training method", {"pending": dict})
        check_all(state["pending"], "the pending mutations", list)
        for name, counts in state["pending"].items():
            layer = self.masker.layers.get(name)
            if layer is None or not _fits(counts, layer, int(masks[name].sum()) // layer.unit_size):
                raise StateMismatch(f"the pending mutation of {name} in the state does not fit: {counts}.")

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.pending = {name: (survive, final) for name, (survive, final) in state["pending"].items()}

    def _mutate_or_wait(self, layer: MaskedWeight, survive: int, final: int) -> None:
        survive = min(survive, layer.active)
        if survive == final == layer.active:
            return
        if any(self._waits_for(layer, survive, final)):
            self.pending[layer.name] = (survive, final)
        else:
            self._mutate(layer, survive, final, None, None)

    def _waits_for(self, layer: MaskedWeight, survive: int, final: int) -> tuple[bool, bool]:
        """Whether a mutation needs the gradients of the active weights, and those of all."""
        return self._drop.needs_gradient and survive < layer.active, self._grow.needs_gradient and final > survive

    def _mutate(
        self, layer: MaskedWeight, survive: int, final: int, active: Tensor | None, dense: Tensor | None
    ) -> None:
        self.mutate(
            layer,
            survive,
            final,
            drop_score=_score(self._drop, layer, active) if survive < layer.active else None,
            grow_score=_score(self._grow, layer, dense) if final > survive else None,
        )

    def _take_snapshots(self, *, has_closure: bool) -> dict[str, Tensor]:
        """The gradients of active weights, for dropping; without the loss scale, which dense ones still have."""
        taken, self._snapshots = self._snapshots, {}
        if has_closure and self._drop.needs_gradient:
            # The step itself ran the backward pass: what was there before it is stale.
            waiting = [layer for layer in self.masker.live if layer.name in self.pending]
            taken = {layer.name: layer.parameter.grad for layer in waiting if layer.parameter.grad is not None}
        return taken


def _fits(counts: Sequence[Any], layer: MaskedWeight, active: int) -> bool:
    """Whether a layer with so many active units can have a mutation with those counts."""
    if len(counts) != 2 or any(type(count) is not int for count in counts):
        return False
    survive, final = counts
    return bool(0 < survive <= min(final, active) and final <= layer.n_units)


def _score(criterion: Criterion, layer: MaskedWeight, gradient: Tensor | None) -> Tensor | None:
    """The criterion's score, which anybody may have written.

    Raises:
        UsageError: it is no score for each weight.
    """
    weight = layer.parameter.detach()
    score = criterion.score(weight, gradient)
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
