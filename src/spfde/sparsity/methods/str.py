"""STR: thresholds that are learnt."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from spfde.core.registry import register
from spfde.sparsity.latent import LatentWeights, SoftThresholdLatent
from spfde.sparsity.methods.base import SparsityMethod

if TYPE_CHECKING:
    from spfde.sparsity.masker import Masker


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
        final = active if self._learns_threshold(progress) else min(active, target)
        return final, final

    def strategy(self, masker: Masker) -> LatentWeights:
        return LatentWeights(
            masker, make=self._latent_of, keeps_at=self._learns_threshold, follows_steps=True, name=self.name
        )

    def _learns_threshold(self, progress: float) -> bool:
        return progress < self.stop_fraction

    def _latent_of(self, weight: Tensor, target: int) -> SoftThresholdLatent:
        return SoftThresholdLatent(weight, start=self.threshold_start, decay=self.threshold_decay)
