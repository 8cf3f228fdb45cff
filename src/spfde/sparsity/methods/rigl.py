"""RigL: growth by the dense gradient."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor

from spfde.core.numbers import cosine
from spfde.sparsity import mutation
from spfde.sparsity.methods.base import Fraction, Gradients, SparsityMethod


class RigL(SparsityMethod):
    """Drop the smallest weights, grow those with the largest dense gradient.

    Departure: the paper skips the gradient update in a step that mutates; here the mutation follows the update.

    Attributes:
        drop_fraction: share of the active weights dropped at the first mutation, in [0, 1).
        stop_fraction: share of the run after which the mask stays, in (0, 1]; the cosine ends there.
    """

    name: ClassVar[str] = "rigl"
    summary: ClassVar[str] = "Drops the smallest weights and grows those with the largest dense gradient."
    cost: ClassVar[str] = "3 sparse passes a step; at an update epoch one step's weight gradient is dense"
    references: ClassVar[tuple[str, ...]] = ("evci2020rigl",)

    drop_fraction: Fraction = 0.3
    stop_fraction: Annotated[float, Field(gt=0.0, le=1.0)] = 0.75

    @property
    def gradients(self) -> Gradients:
        return "dense"

    def drop_fraction_at(self, progress: float) -> float:
        return cosine(progress / self.stop_fraction, self.drop_fraction)

    def grow_score(self, gradient: Tensor | None) -> Tensor:
        assert gradient is not None, "RigL grows by the dense gradient"
        return mutation.gradient(gradient)
