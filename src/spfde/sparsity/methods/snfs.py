"""SNFS: sparse momentum, which says where weights are missing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar

from pydantic import Field

from spfde.core.numbers import cosine, round_half_up
from spfde.core.registry import register
from spfde.sparsity.criteria import Gradient
from spfde.sparsity.masker import Masker
from spfde.sparsity.methods.base import Fraction, SparsityMethod
from spfde.sparsity.redistribution import LayerView, Redistribution, Turnover, share_out
from spfde.sparsity.schedule import DenseGradients


@register("method")
class SNFS(SparsityMethod):
    """Sparse networks from scratch: the smoothed gradient decides which layers gain weights, and which weights.

    Each layer drops the same share of its smallest weights. What all layers dropped together goes to them in proportion
    to the mean magnitude of the smoothed gradient over their active weights, and there to the inactive weights where it
    is largest. For this the gradient of every weight is computed at every step, until the last mutation.

    Departures: the gradient is smoothed here and not read from the optimizer, so that any optimizer will do; a layer
    may fill up entirely (the authors' code stops at 99 %).

    Attributes:
        drop_fraction: share of the active weights dropped at the first mutation, in [0, 1).
        final_drop_fraction: the same at the end of the run; a cosine leads there.
        momentum: of the smoothed gradient, in [0, 1).

    Example:
        >>> recipe = spfde.Recipe(sparsity=spfde.SNFS(sparsity=0.9))
        >>> session = spfde.attach(model, optimizer, loader, recipe, epochs=10)
        >>> round(session.density, 2)
        0.09
    """

    name: ClassVar[str] = "snfs"
    summary: ClassVar[str] = "Drops the smallest weights; a smoothed dense gradient says where others grow."
    cost: ClassVar[str] = "2 sparse passes and a dense weight gradient a step"
    references: ClassVar[tuple[str, ...]] = ("dettmers2019sparse",)
    counts_known: ClassVar[bool] = False

    drop_fraction: Fraction = 0.5
    final_drop_fraction: Fraction = 0.005
    momentum: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9

    @property
    def varies_counts(self) -> bool:
        return True

    @property
    def dense_gradients(self) -> DenseGradients:
        return "every step"

    def mutates_at(self, progress: float) -> bool:
        return progress > 0.0 and self._drop_fraction_at(progress) > 0.0

    def strategy(self, masker: Masker) -> Redistribution:
        return Redistribution(masker, allot=self.allot, grow=Gradient(), momentum=self.momentum)

    def allot(self, layers: Sequence[LayerView], progress: float, memory: dict[str, float]) -> list[Turnover]:
        """How many units each layer keeps and then holds; see ``Redistribution``."""
        share = self._drop_fraction_at(progress)
        keep = [max(1, layer.active - round_half_up(share * layer.active)) for layer in layers]
        return share_out(layers, keep, claims=[layer.momentum for layer in layers])

    def _drop_fraction_at(self, progress: float) -> float:
        return cosine(progress, self.drop_fraction, self.final_drop_fraction)
