"""RigL: growth by the dense gradient."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field

from spfde.core.registry import register
from spfde.sparsity.criteria import Criterion, Gradient, Magnitude
from spfde.sparsity.methods.drop_grow import DropGrow


@register("method")
class RigL(DropGrow):
    """Drop the smallest weights, grow those with the largest dense gradient.

    Departure: the paper skips the gradient update in a step that mutates; here the mutation follows the update.

    Attributes:
        drop_fraction: share of the active weights dropped at the first mutation, in [0, 1).
        stop_fraction: share of the run after which the mask stays, in (0, 1]; the cosine ends there.

    Example:
        >>> recipe = spfde.Recipe(sparsity=spfde.RigL(sparsity=0.9, stop_fraction=0.5))
        >>> session = spfde.attach(model, optimizer, loader, recipe, epochs=10)
        >>> round(session.density, 2)
        0.09
    """

    name: ClassVar[str] = "rigl"
    summary: ClassVar[str] = "Drops the smallest weights and grows those with the largest dense gradient."
    cost: ClassVar[str] = "3 sparse passes a step; at an update epoch one step's weight gradient is dense"
    references: ClassVar[tuple[str, ...]] = ("evci2020rigl",)

    drop: ClassVar[Criterion] = Magnitude()  # type: ignore[misc]  # no field: fixed
    grow: ClassVar[Criterion] = Gradient()  # type: ignore[misc]  # no field: fixed
    soft_bound: ClassVar[float] = 0.0  # type: ignore[misc]  # no field: fixed
    decay: ClassVar[str] = "cosine"  # type: ignore[misc]  # no field: fixed
    stop_fraction: Annotated[float, Field(gt=0.0, le=1.0)] = 0.75
