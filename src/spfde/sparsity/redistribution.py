"""Weights that move between layers: the strategy of DSR and SNFS."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from spfde.core.errors import StateMismatch
from spfde.core.state import check_entries
from spfde.core.torch_private import add_each_, multiply_each_
from spfde.sparsity.criteria import Criterion
from spfde.sparsity.distribution import apportion
from spfde.sparsity.gradients import Skipped, alike, are_finite, nonfinite
from spfde.sparsity.masker import Masker
from spfde.sparsity.masks import bits
from spfde.sparsity.schedule import MaskPlan
from spfde.sparsity.strategy import Strategy
from spfde.sparsity.weight import MaskedWeight

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


Allot = Callable[[Sequence[LayerView], float, dict[str, float]], list[Turnover]]
"""Says for each layer how many units it keeps and then holds, from the layers that learn, the run's progress, and what
the method remembers from one mutation to the next."""


class Redistribution(Strategy):
    """One mutation of all layers together at each update epoch: what some lose others gain.

    Args:
        masker: see ``Strategy``.
        allot: the method's rule.
        grow: by which weights grow within a layer; of the smoothed gradient, where it needs one.
        momentum: of the smoothed gradient, an exponential mean of the dense ones over the steps; None: none is kept.
        memory: what the method remembers at first.
    """

    def __init__(
        self,
        masker: Masker,
        *,
        allot: Allot,
        grow: Criterion,
        momentum: float | None = None,
        memory: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__(masker)
        self._allot, self._grow, self._momentum = allot, grow, momentum
        self._smoothed: dict[str, Tensor] = {}
        self._memory = dict(memory or {})
        self._smooths = False

    def begin_epoch(self, plan: MaskPlan, live: Sequence[MaskedWeight]) -> None:
        names = {layer.name for layer in live}
        self._smoothed = {name: value for name, value in self._smoothed.items() if name in names}
        if plan.update and plan.epoch > 0 and not plan.last:
            self._redistribute(plan.progress, live)
        self._smooths = self._momentum is not None and plan.dense_gradients == "every step"
        if not self._smooths:
            self._smoothed = {}

    def wants_dense(self, layer: MaskedWeight) -> bool:
        return self._smooths

    def may_want_dense(self) -> bool:
        return self._smooths

    def follows_next_step(self) -> bool:
        return self._smooths

    def follows_every_step(self) -> bool:
        return False

    def end_step(self, *, was_skipped: Skipped) -> None:
        if not self._smooths:
            return
        assert self._momentum is not None, "only with momentum anything is smoothed"
        gradients = self.masker.take_dense_gradients()
        if gradients.keys() <= self._smoothed.keys():
            add_where_finite(self._smoothed, gradients, momentum=self._momentum, skipped=was_skipped.found_inf)
        elif not was_skipped and are_finite(list(gradients.values())):
            add_smoothly(self._smoothed, gradients, momentum=self._momentum)

    def clear(self) -> None:
        self._smoothed = {}

    def state_dict(self) -> dict[str, Any]:
        # Where nothing is smoothed there is a tensor without elements. So it is seen if a layer is missing.
        smoothed = {name: self._smoothed.get(name, torch.empty(0)).clone() for name in self.masker.layers}
        return {"smoothed": smoothed, "memory": dict(self._memory), "smooths": self._smooths}

    def check_state(self, state: Mapping[str, Any], masks: Mapping[str, Tensor]) -> None:
        check_entries(state, "the redistribution", {"smoothed": dict, "memory": dict, "smooths": bool})
        check_entries(state["smoothed"], "the smoothed gradients", dict.fromkeys(masks, Tensor))
        for name, gradient in state["smoothed"].items():
            if gradient.numel() and gradient.shape != masks[name].shape:
                raise StateMismatch(f"the smoothed gradient of {name} in the state has shape {tuple(gradient.shape)}.")
        check_entries(state["memory"], "the redistribution's memory", dict.fromkeys(self._memory, (int, float)))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        layers = self.masker.layers
        self._smoothed = {
            name: value.detach().to(layers[name].parameter.device, copy=True)
            for name, value in state["smoothed"].items()
            if value.numel()
        }
        self._memory, self._smooths = dict(state["memory"]), state["smooths"]

    def _redistribute(self, progress: float, live: Sequence[MaskedWeight]) -> None:
        layers = [layer for layer in live if self._momentum is None or layer.name in self._smoothed]
        views = [_view(layer, self._smoothed.get(layer.name)) for layer in layers]
        for layer, (survive, final) in zip(layers, self._allot(views, progress, self._memory), strict=True):
            if (survive, final) != (layer.active, layer.active):
                weight = layer.parameter.detach()
                grow_score = self._grow.score(weight, self._smoothed.get(layer.name))
                layer.mutate(survive, final, drop_score=weight.abs(), grow_score=grow_score)
            layer.target = layer.active


def add_smoothly(means: dict[str, Tensor], gradients: Mapping[str, Tensor], *, momentum: float) -> None:
    """Take the gradients of one step into their exponential means, of which each starts with its first gradient."""
    for name, gradient in gradients.items():
        if name in means:
            means[name].mul_(momentum).add_(gradient, alpha=1.0 - momentum)
        else:
            means[name] = gradient.detach() * (1.0 - momentum)


def add_where_finite(
    means: Mapping[str, Tensor], gradients: Mapping[str, Tensor], *, momentum: float, skipped: Tensor | None = None
) -> None:
    """``add_smoothly`` in a few operations, into means that are there; the device alone knows whether to.

    Args:
        means: of each gradient.
        gradients: one step's; where one has an infinite number or a NaN, no mean changes. They are overwritten.
        momentum: see ``Redistribution``.
        skipped: above zero where the step was skipped, shape (1,): no mean changes then, either.

    Example:
        >>> from spfde.sparsity.redistribution import add_where_finite
        >>> means = {"w": torch.tensor([1.0, 2.0])}
        >>> add_where_finite(means, {"w": torch.tensor([3.0, 4.0])}, momentum=0.5)
        >>> add_where_finite(means, {"w": torch.tensor([5.0, float("inf")])}, momentum=0.5)
        >>> means["w"]
        tensor([2., 3.])
    """
    if not gradients:
        return
    found = nonfinite(list(gradients.values()))
    is_used = found == 0 if skipped is None else found + skipped.to(found).sum() == 0
    names = {id(gradient): name for name, gradient in gradients.items()}
    for (dtype, device), own in alike(gradients.values()).items():
        is_here, into = is_used.to(device), [means[names[id(gradient)]] for gradient in own]
        # Of bits: zero times infinity is no zero.
        integers = [bits(gradient) for gradient in own]
        multiply_each_(integers, is_here.to(integers[0].dtype))
        multiply_each_(into, torch.full((), momentum, dtype=dtype, device=device).masked_fill_(~is_here, 1.0))
        add_each_(into, own, alpha=1.0 - momentum)


def share_out(layers: Sequence[LayerView], keep: Sequence[int], *, claims: Sequence[float]) -> list[Turnover]:
    """Give what all layers dropped together back to them, in proportion to ``claims``."""
    room = [layer.n_units - kept for layer, kept in zip(layers, keep, strict=True)]
    dropped = sum(layer.active - kept for layer, kept in zip(layers, keep, strict=True))
    return [(kept, kept + grown) for kept, grown in zip(keep, apportion(claims, room, dropped), strict=True)]


def _view(layer: MaskedWeight, smoothed: Tensor | None) -> LayerView:
    units = layer.structure.units_of(layer.mask)
    scores = layer.structure.reduce(layer.parameter.detach().abs())[units]
    momentum = 0.0 if smoothed is None else float(smoothed.abs()[layer.mask].mean())
    return LayerView(layer.n_units, scores, momentum)
