"""Top-KAST: sparse forward and sparse backward passes, with a wider set of weights that learn."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from spfde.core.numbers import round_half_up
from spfde.core.registry import register
from spfde.sparsity.latent import LatentWeights, TopKLatent
from spfde.sparsity.methods.base import Fraction, SparsityMethod

if TYPE_CHECKING:
    from spfde.sparsity.masker import Masker


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
        return (
            min(n_units, active + round_half_up(self.exploration * n_units)) if self._learns_wider(progress) else active
        )

    def mutates_at(self, progress: float) -> bool:
        return progress > 0.0 and self._learns_wider(progress)

    def strategy(self, masker: Masker) -> LatentWeights:
        return LatentWeights(
            masker, make=self._latent_of, keeps_at=self._learns_wider, follows_steps=False, name=self.name
        )

    def _learns_wider(self, progress: float) -> bool:
        return progress < self.stop_fraction

    def _latent_of(self, weight: Tensor, target: int) -> TopKLatent:
        reach = self.gradient_count(weight.numel(), target, 0.0)
        return TopKLatent(weight, target=target, reach=reach, penalty=self.penalty)
