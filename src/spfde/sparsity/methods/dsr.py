"""DSR: weights move to the layers that keep more of theirs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar

from pydantic import Field

from spfde.core.numbers import round_half_up
from spfde.core.registry import register
from spfde.sparsity.criteria import Random
from spfde.sparsity.masker import Masker
from spfde.sparsity.methods.base import Fraction, SparsityMethod
from spfde.sparsity.redistribution import LayerView, Redistribution, Turnover, share_out


@register("method")
class DSR(SparsityMethod):
    """One threshold for all layers decides what is dropped; what grows goes to layers by the weights that they keep.

    The threshold adapts: it doubles when fewer weights than wanted fell below it, and halves when there were more.
    Within a layer weights grow at random. The total of active weights never changes.

    Departures: a layer never loses its last weight; the wanted number is a share of the active weights, where the paper
    fixes a number for each network.

    Attributes:
        drop_fraction: share of the active weights that a mutation is meant to drop, in [0, 1).
        tolerance: how far from it the number may lie before the threshold adapts, in share of it.
        threshold: magnitude below which weights are dropped at the first mutation.
        stop_fraction: share of the run after which the masks stay, in (0, 1].

    Example:
        >>> recipe = spfde.Recipe(sparsity=spfde.DSR(sparsity=0.9))
        >>> session = spfde.attach(model, optimizer, loader, recipe, epochs=10)
        >>> round(session.density, 2)
        0.09
    """

    name: ClassVar[str] = "dsr"
    summary: ClassVar[str] = "Drops below one adaptive threshold and grows at random where layers kept more."
    cost: ClassVar[str] = "3 sparse passes a step; density moves between layers"
    references: ClassVar[tuple[str, ...]] = ("mostafa2019parameter",)
    counts_known: ClassVar[bool] = False

    drop_fraction: Fraction = 0.1
    tolerance: Annotated[float, Field(ge=0.0)] = 0.1
    threshold: Annotated[float, Field(gt=0.0)] = 1e-3
    stop_fraction: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0

    @property
    def varies_counts(self) -> bool:
        return True

    def mutates_at(self, progress: float) -> bool:
        return 0.0 < progress < self.stop_fraction and self.drop_fraction > 0.0

    def strategy(self, masker: Masker) -> Redistribution:
        return Redistribution(masker, allot=self.allot, grow=Random(), memory={"threshold": self.threshold})

    def allot(self, layers: Sequence[LayerView], progress: float, memory: dict[str, float]) -> list[Turnover]:
        """How many units each layer keeps and then holds; see ``Redistribution``."""
        wanted = round_half_up(
            (self.drop_fraction if progress < self.stop_fraction else 0.0) * sum(layer.active for layer in layers)
        )
        if not wanted:
            return [(layer.active, layer.active) for layer in layers]
        threshold = memory["threshold"]
        keep = [max(1, int((layer.scores >= threshold).sum())) for layer in layers]
        dropped = sum(layer.active for layer in layers) - sum(keep)
        if dropped < (1.0 - self.tolerance) * wanted:
            threshold *= 2.0
        elif dropped > (1.0 + self.tolerance) * wanted:
            threshold /= 2.0
        memory["threshold"] = threshold
        return share_out(layers, keep, claims=[float(kept) for kept in keep])
