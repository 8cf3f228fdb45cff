"""STR: thresholds that are learnt."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from spfde.core.registry import register
from spfde.sparsity.gradients import unscaled
from spfde.sparsity.latent import LatentWeights
from spfde.sparsity.masker import Masker
from spfde.sparsity.masks import highest
from spfde.sparsity.methods.base import SparsityMethod
from spfde.sparsity.weight import MaskedWeight


@register("method")
class STR(SparsityMethod):
    """Soft threshold reparameterisation: each layer learns the magnitude up to which its weights are zero.

    The model computes with ``sign(w) * relu(|w| - sigmoid(s))``; a layer's ``s`` is updated with the weight's learning
    rate. Training starts dense. As soon as all layers together are at the target, or at ``stop_fraction`` of the run,
    the masks are fixed at exactly the target's total, and trained as static ones from then on; how it is shared out
    between the layers is what was learnt.

    Departures: the paper reaches a sparsity through the weight decay that is tuned for it, over a long run; here ``s``
    has a decay of its own and the target is exact. ``s`` is updated by plain gradient descent. A layer never loses its
    last weight. ``spfde plan`` cannot know when the target is reached and counts dense layers up to ``stop_fraction``.

    Attributes:
        threshold_start: ``s`` at first; ``sigmoid(-10)`` is 4.5e-5.
        threshold_decay: weight decay of ``s``, per unit of learning rate.
        stop_fraction: share of the run after which the masks stay, in (0, 1].

    Example:
        >>> recipe = spfde.Recipe(sparsity=spfde.STR(sparsity=0.9))
        >>> session = spfde.attach(model, optimizer, loader, recipe, epochs=10)
        >>> round(session.density, 2)
        1.0
    """

    name: ClassVar[str] = "str"
    summary: ClassVar[str] = "Dense to sparse: each layer learns the threshold under which its weights are zero."
    cost: ClassVar[str] = "3 passes a step at a density that falls from dense to the target"
    references: ClassVar[tuple[str, ...]] = ("kusupati2020str",)
    structured: ClassVar[bool] = False
    refuses_closures: ClassVar[bool] = True
    counts_known: ClassVar[bool] = False

    init: Literal["magnitude"] = "magnitude"
    threshold_start: Annotated[float, Field(lt=0.0)] = -10.0
    threshold_decay: Annotated[float, Field(ge=0.0)] = 0.01
    stop_fraction: Annotated[float, Field(gt=0.0, le=1.0)] = 0.75

    @property
    def varies_counts(self) -> bool:
        return True

    def first_count(self, target: int, n_units: int) -> int:
        return n_units

    def mutation_counts(self, target: int, n_units: int, active: int, progress: float) -> tuple[int, int]:
        final = active if progress < self.stop_fraction else min(active, target)
        return final, final

    def strategy(self, masker: Masker) -> SoftThresholdLatents:
        return SoftThresholdLatents(masker, self)


class SoftThresholdLatents(LatentWeights):
    """The model computes with what of the latent exceeds the threshold, and ``s`` is learnt."""

    changes_every_step = True
    _ENTRIES: ClassVar[Mapping[str, type]] = {"weight": Tensor, "s": float}

    def __init__(self, masker: Masker, method: STR) -> None:
        super().__init__(masker, stop_fraction=method.stop_fraction)
        self._method = method
        self._s: dict[str, float] = {}
        self._slope: dict[str, float] = {}

    def start(self, layer: MaskedWeight) -> bool:
        self._s[layer.name] = self._method.threshold_start
        return super().start(layer)

    def choose(self, layer: MaskedWeight) -> None:
        mask = self.margin(layer) > 0
        if not bool(mask.any()):
            mask = highest(self.latent(layer).abs(), 1)
        layer.set_mask(mask, int(mask.sum()))

    def margin(self, layer: MaskedWeight) -> Tensor:
        return self.latent(layer).abs() - threshold(self._s[layer.name])

    def sparse(self, layer: MaskedWeight) -> Tensor:
        above = soft_threshold(self.latent(layer), self._s[layer.name])
        return above.masked_fill(~layer.mask, 0.0)

    def latent_of(self, layer: MaskedWeight, weight: Tensor) -> Tensor:
        return (weight.abs() + threshold(self._s[layer.name])).copysign_(weight)

    def before_step(self, layer: MaskedWeight, gradient: Tensor | None) -> None:
        super().before_step(layer, gradient)
        if layer.name not in self._latents:
            return
        self._slope[layer.name] = 0.0
        if gradient is not None:
            own = unscaled(gradient, self.masker.stepping)
            self._slope[layer.name] = threshold_slope(self.latent(layer), own, self._s[layer.name], layer.mask)

    def stepped(self, layer: MaskedWeight, weight: Tensor, learning_rate: float) -> Tensor:
        name = layer.name
        self._s[name] -= learning_rate * (self._slope[name] + self._method.threshold_decay * self._s[name])
        return weight.clone()

    def _saved(self, layer: MaskedWeight) -> dict[str, Any]:
        return {**super()._saved(layer), "s": self._s[layer.name]}

    def _load(self, layer: MaskedWeight, saved: Mapping[str, Any]) -> None:
        super()._load(layer, saved)
        self._s[layer.name] = saved["s"]


def threshold(s: float) -> float:
    """``sigmoid(s)``: weights up to this magnitude are zero to the model."""
    return float(torch.sigmoid(torch.tensor(s, dtype=torch.float64)))


def soft_threshold(weight: Tensor, s: float) -> Tensor:
    """``sign(w) * relu(|w| - sigmoid(s))``."""
    return (weight.abs() - threshold(s)).clamp_(min=0.0).copysign_(weight)


def threshold_slope(weight: Tensor, gradient: Tensor, s: float, mask: Tensor) -> float:
    """The loss's derivative by ``s``, from the sparse weight's: each weight in the mask goes with ``-sigmoid'(s)``."""
    along = (gradient * weight.sign())[mask].sum(dtype=torch.float64)
    return -float(along) * threshold(s) * (1.0 - threshold(s))
