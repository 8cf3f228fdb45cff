"""Sparse evolutionary training."""

from __future__ import annotations

from typing import ClassVar

from spfde.core.registry import register
from spfde.sparsity.criteria import Criterion, Magnitude, Random
from spfde.sparsity.methods.drop_grow import DropGrow


@register("method")
class SET(DropGrow):
    """Drop the smallest weights, grow as many at random.

    Departures: by magnitude, as most re-implementations, where the paper drops the weights next to zero on each side;
    grown weights start at zero, where the paper draws them at random.

    Attributes:
        drop_fraction: share of the active weights dropped at the first mutation, in [0, 1).
        decay: "cosine" to zero at ``stop_fraction``, or "constant" until then.
        stop_fraction: share of the run after which the mask stays, in (0, 1].

    Example:
        >>> recipe = spfde.Recipe(sparsity=spfde.SET(sparsity=0.9, drop_fraction=0.2))
        >>> session = spfde.attach(model, optimizer, loader, recipe, epochs=10)
        >>> round(session.density, 2)
        0.09
    """

    name: ClassVar[str] = "set"
    summary: ClassVar[str] = "Drops the smallest weights and grows random ones."
    references: ClassVar[tuple[str, ...]] = ("mocanu2018set",)

    drop: ClassVar[Criterion] = Magnitude()  # type: ignore[misc]  # no field: fixed
    grow: ClassVar[Criterion] = Random()  # type: ignore[misc]  # no field: fixed
    soft_bound: ClassVar[float] = 0.0  # type: ignore[misc]  # no field: fixed
