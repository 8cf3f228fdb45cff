"""Weights that move between layers: the strategy of DSR and SNFS."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from spfde.core.errors import StateMismatch
from spfde.core.state import check_all, check_entries
from spfde.sparsity.criteria import Criterion, Magnitude
from spfde.sparsity.distribution import apportion
from spfde.sparsity.gradients import SmoothedGradients
from spfde.sparsity.schedule import MaskPlan
from spfde.sparsity.strategy import Strategy
from spfde.sparsity.weight import MaskedWeight

if TYPE_CHECKING:
    from spfde.sparsity.masker import Masker

Turnover = tuple[int, int]
"""Active units that survive a mutation, and active units after it."""


@dataclass(frozen=True)
class LayerView:
    """What a method that moves weights between layers sees of one.

    Attributes:
        n_units: units of the layer, existing or not.
        scores: keep score of each active unit, shape (active,).
        momentum: mean magnitude of the smoothed gradient of the active units; 0 where none is kept.
    """

    n_units: int
    scores: Tensor
    momentum: float

    @property
    def active(self) -> int:
        """Number of active units."""
        return self.scores.numel()


Allot = Callable[[Sequence[LayerView], float, MutableMapping[str, float]], list[Turnover]]
"""Says for each layer how many units it keeps and then holds, from the layers that learn, the run's progress, and what
the method remembers from one mutation to the next."""


class Redistribution(Strategy):
    """One mutation of all layers together at each update epoch: what some lose others gain.

    Args:
        masker: see ``Strategy``.
        allot: the method's rule.
        grow: by which weights grow within a layer; of the smoothed gradient, where it needs one.
        momentum: of the smoothed gradient; None: none is kept.
    """

    def __init__(self, masker: Masker, *, allot: Allot, grow: Criterion, momentum: float | None = None) -> None:
        super().__init__(masker)
        self._allot, self._grow, self._momentum = allot, grow, momentum
        self._smoothed = SmoothedGradients()
        self._memory: dict[str, float] = {}
        self._smooths = False

    def begin_epoch(self, plan: MaskPlan, live: Sequence[MaskedWeight]) -> None:
        self._smoothed.keep({layer.name for layer in live})
        if plan.update and plan.epoch > 0 and not plan.last:
            self._redistribute(plan.progress, live)
        self._smooths = self._momentum is not None and plan.dense_gradients == "every step"
        if not self._smooths:
            self._smoothed.clear()

    def wants_dense(self, layer: MaskedWeight) -> bool:
        return self._smooths

    def end_step(self, *, was_skipped: bool, has_closure: bool) -> None:
        if not self._smooths:
            return
        assert self._momentum is not None, "only with momentum anything is smoothed"
        gradients = self.masker.take_dense_gradients()
        self.masker.average_over_ranks(gradients)
        if not was_skipped and all(bool(gradient.isfinite().all()) for gradient in gradients.values()):
            self._smoothed.add(gradients, momentum=self._momentum)

    def clear(self) -> None:
        self._smoothed.clear()

    def state_dict(self) -> dict[str, Any]:
        return {"smoothed": self._smoothed.state_dict(), "memory": dict(self._memory), "smooths": self._smooths}

    def check_state(self, state: Mapping[str, Any], masks: Mapping[str, Tensor]) -> None:
        check_entries(state, "the redistribution", {"smoothed": dict, "memory": dict, "smooths": bool})
        check_entries(state["smoothed"], "the smoothed gradients", {n: Tensor for n in masks if n in state["smoothed"]})
        for name, gradient in state["smoothed"].items():
            if gradient.shape != masks[name].shape:
                raise StateMismatch(f"the smoothed gradient of {name} in the state has shape {tuple(gradient.shape)}.")
        check_all(state["memory"], "the redistribution's memory", (int, float))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._smoothed.load_state_dict(state["smoothed"])
        self._memory, self._smooths = dict(state["memory"]), state["smooths"]

    def _redistribute(self, progress: float, live: Sequence[MaskedWeight]) -> None:
        smoothed = self._smoothed.values
        layers = [layer for layer in live if self._momentum is None or layer.name in smoothed]
        views = [_view(layer, smoothed.get(layer.name)) for layer in layers]
        for layer, (survive, final) in zip(layers, self._allot(views, progress, self._memory), strict=True):
            if (survive, final) != (layer.active, layer.active):
                weight = layer.parameter.detach()
                self.mutate(
                    layer,
                    survive,
                    final,
                    drop_score=Magnitude().score(weight, None),
                    grow_score=self._grow.score(weight, smoothed.get(layer.name)),
                )
            layer.target = layer.active


def share_out(layers: Sequence[LayerView], keep: Sequence[int], *, claims: Sequence[float]) -> list[Turnover]:
    """Give what all layers dropped together back to them, in proportion to ``claims``."""
    names = [str(index) for index in range(len(layers))]
    room = {name: layer.n_units - kept for name, layer, kept in zip(names, layers, keep, strict=True)}
    dropped = sum(layer.active - kept for layer, kept in zip(layers, keep, strict=True))
    grown = apportion(dict(zip(names, claims, strict=True)), room, dropped)
    return [(kept, kept + grown[name]) for name, kept in zip(names, keep, strict=True)]


def _view(layer: MaskedWeight, smoothed: Tensor | None) -> LayerView:
    units = layer.structure.units_of(layer.mask)
    scores = layer.unit_scores(layer.parameter.detach().abs())[units]
    momentum = 0.0 if smoothed is None else float(smoothed.abs()[layer.mask].mean())
    return LayerView(layer.n_units, scores, momentum)
