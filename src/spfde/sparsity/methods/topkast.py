"""Top-KAST: sparse forward and sparse backward passes, with a wider set of weights that learn."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from spfde.core.numbers import round_half_up
from spfde.core.registry import register
from spfde.sparsity.latent import LatentWeights
from spfde.sparsity.masker import Masker
from spfde.sparsity.masks import highest
from spfde.sparsity.methods.base import Fraction, SparsityMethod
from spfde.sparsity.weight import MaskedWeight


@register("method")
class TopKAST(SparsityMethod):
    """The model computes with the largest weights of each layer, and some more receive gradients and may overtake them.

    At each update epoch the sets are chosen anew by magnitude. The wider set is penalised in inverse proportion to the
    density where the model does not compute with it, so that a weight comes in only if its gradient insists.

    A dense weight is kept beside the sparse one. The last epoch trains the sparse one alone.

    Departures: the sets are chosen at update epochs, where the paper does it every so many steps; the paper's penalty
    is part of the loss, here it follows the step (as decoupled weight decay does).

    Attributes:
        exploration: density of the gradient above that of the weights, in share of all weights of the layer.
        penalty: L2 penalty on the weights that learn, per unit of learning rate.
        stop_fraction: share of the run after which only the sparse weights learn, in (0, 1].

    Example:
        >>> recipe = spfde.Recipe(sparsity=spfde.TopKAST(sparsity=0.9))
        >>> session = spfde.attach(model, optimizer, loader, recipe, epochs=10)
        >>> round(session.density, 2)
        0.09
    """

    name: ClassVar[str] = "topkast"
    summary: ClassVar[str] = "Computes with the largest weights while a wider set of them learns."
    cost: ClassVar[str] = "2 sparse passes and a wider weight gradient a step"
    references: ClassVar[tuple[str, ...]] = ("jayakumar2020topkast",)
    structured: ClassVar[bool] = False
    refuses_closures: ClassVar[bool] = True

    init: Literal["magnitude"] = "magnitude"
    exploration: Fraction = 0.1
    penalty: Annotated[float, Field(ge=0.0)] = 1e-4
    stop_fraction: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0

    def gradient_count(self, n_units: int, active: int, progress: float) -> int:
        if progress >= self.stop_fraction:
            return active
        return min(n_units, active + round_half_up(self.exploration * n_units))

    def mutates_at(self, progress: float) -> bool:
        return 0.0 < progress < self.stop_fraction

    def strategy(self, masker: Masker) -> TopKLatents:
        return TopKLatents(masker, self)


class TopKLatents(LatentWeights):
    """The model computes with the largest weights, the mask, and a wider set receives gradients."""

    _ENTRIES: ClassVar[Mapping[str, type]] = {"weight": Tensor, "reach": Tensor}

    def __init__(self, masker: Masker, method: TopKAST) -> None:
        super().__init__(masker, stop_fraction=method.stop_fraction)
        self._method = method

    def choose(self, layer: MaskedWeight) -> None:
        magnitude = self.latent(layer).abs()
        layer.set_mask(highest(magnitude, layer.target), layer.target)
        layer.wider = highest(magnitude, self._method.gradient_count(layer.numel, layer.target, 0.0))

    def sparse(self, layer: MaskedWeight) -> Tensor:
        return self.latent(layer).masked_fill(~layer.mask, 0.0)

    def margin(self, layer: MaskedWeight) -> Tensor:
        return self.latent(layer).abs().masked_fill_(~layer.mask, -1.0)

    def stepped(self, layer: MaskedWeight, weight: Tensor, learning_rate: float) -> Tensor:
        density = layer.target / layer.numel
        shrink = learning_rate * self._method.penalty
        # Those outside the mask are penalised more, so that they have to earn their place.
        moved = torch.where(layer.mask, weight * (1.0 - shrink), weight * (1.0 - shrink / density))
        # Neither weight decay nor momentum moves what receives no gradient.
        return torch.where(layer.gradient_mask, moved, self.latent(layer))

    def _saved(self, layer: MaskedWeight) -> dict[str, Any]:
        return {**super()._saved(layer), "reach": layer.gradient_mask.clone()}

    def _load(self, layer: MaskedWeight, saved: Mapping[str, Any]) -> None:
        super()._load(layer, saved)
        layer.wider = saved["reach"].to(layer.mask, copy=True)
