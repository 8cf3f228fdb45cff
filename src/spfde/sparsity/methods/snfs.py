"""SNFS: sparse momentum, which says where weights are missing."""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor

from spfde.core.numbers import cosine, round_half_up
from spfde.sparsity import mutation
from spfde.sparsity.methods.base import Fraction, Gradients, LayerView, SparsityMethod, Turnover
from spfde.sparsity.methods.dsr import share_out


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
    """

    name: ClassVar[str] = "snfs"
    summary: ClassVar[str] = "Drops the smallest weights; a smoothed dense gradient says where others grow."
    cost: ClassVar[str] = "2 sparse passes and a dense weight gradient a step"
    references: ClassVar[tuple[str, ...]] = ("dettmers2019sparse",)
    allots: ClassVar[bool] = True
    counts_known: ClassVar[bool] = False

    drop_fraction: Fraction = 0.5
    final_drop_fraction: Fraction = 0.005
    momentum: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9

    @property
    def gradients(self) -> Gradients:
        return "smoothed"

    @property
    def gradient_momentum(self) -> float:
        return self.momentum

    def drop_fraction_at(self, progress: float) -> float:
        return cosine(progress, self.drop_fraction, self.final_drop_fraction)

    def grow_score(self, gradient: Tensor | None) -> Tensor:
        assert gradient is not None, "SNFS grows by the smoothed gradient"
        return mutation.gradient(gradient)

    def allot(
        self, layers: Sequence[LayerView], *, progress: float, memory: MutableMapping[str, float]
    ) -> list[Turnover]:
        share = self.drop_fraction_at(progress)
        keep = [max(1, layer.active - round_half_up(share * layer.active)) for layer in layers]
        return share_out(layers, keep, claims=[layer.momentum for layer in layers])
