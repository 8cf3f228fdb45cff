"""Sparse evolutionary training."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from spfde.core.numbers import cosine
from spfde.sparsity.methods.base import Fraction, SparsityMethod


class SET(SparsityMethod):
    """Drop the smallest weights, grow as many at random.

    Departures: by magnitude, as most re-implementations, where the paper drops the weights next to zero on each side;
    grown weights start at zero, where the paper draws them at random.

    Attributes:
        drop_fraction: share of the active weights dropped at the first mutation, in [0, 1).
        decay: "cosine" to zero at ``stop_fraction``, or "constant" until then.
        stop_fraction: share of the run after which the mask stays, in (0, 1].
    """

    name: ClassVar[str] = "set"
    summary: ClassVar[str] = "Drops the smallest weights and grows random ones."
    references: ClassVar[tuple[str, ...]] = ("mocanu2018set",)

    drop_fraction: Fraction = 0.3
    decay: Literal["cosine", "constant"] = "cosine"
    stop_fraction: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0

    def drop_fraction_at(self, progress: float) -> float:
        if progress >= self.stop_fraction:
            return 0.0
        if self.decay == "constant":
            return self.drop_fraction
        return cosine(progress / self.stop_fraction, self.drop_fraction)
