"""The baseline: a mask that never changes."""

from __future__ import annotations

from typing import ClassVar

from spfde.core.registry import register
from spfde.sparsity.criteria import Criterion, Magnitude, Random
from spfde.sparsity.methods.drop_grow import DropGrow


@register("method")
class StaticSparse(DropGrow):
    """A fixed random mask: the baseline of dynamic sparse training.

    Example:
        >>> recipe = spfde.Recipe(sparsity=spfde.StaticSparse(sparsity=0.9))
        >>> session = spfde.attach(model, optimizer, loader, recipe, epochs=10)
        >>> round(session.density, 2)
        0.09
    """

    name: ClassVar[str] = "static"
    summary: ClassVar[str] = "A fixed random mask, never changed."
    references: ClassVar[tuple[str, ...]] = ("liu2022random",)

    drop: ClassVar[Criterion] = Magnitude()  # type: ignore[misc]  # no field: fixed
    grow: ClassVar[Criterion] = Random()  # type: ignore[misc]  # no field: fixed
    drop_fraction: ClassVar[float] = 0.0  # type: ignore[misc]  # no field: fixed
    soft_bound: ClassVar[float] = 0.0  # type: ignore[misc]  # no field: fixed
    decay: ClassVar[str] = "constant"  # type: ignore[misc]  # no field: fixed
    stop_fraction: ClassVar[float] = 1.0  # type: ignore[misc]  # no field: fixed
