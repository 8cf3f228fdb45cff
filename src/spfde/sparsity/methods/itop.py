"""ITOP: dynamic sparse training that tries many weights in its course."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from spfde.core.registry import register
from spfde.sparsity.methods.base import Fraction
from spfde.sparsity.methods.rigl import RigL
from spfde.sparsity.methods.set import SET


@register("method")
class SETITOP(SET):
    """SET as ITOP sets it: half of the active weights change places at first, layers by ERK.

    What counts is how many weights are tried over the run (``session.explored``): small batches, a long run, and an
    update interval long enough for a grown weight to show its worth. The authors mutate every 1,500 steps of 128
    samples on CIFAR, about four epochs; give Δτ to match.

    Example:
        >>> recipe = spfde.Recipe(sparsity=spfde.SETITOP(sparsity=0.9))
        >>> session = spfde.attach(model, optimizer, loader, recipe, epochs=10)
        >>> round(session.density, 2)
        0.1
    """

    name: ClassVar[str] = "set-itop"
    summary: ClassVar[str] = "SET that tries many weights in its course: half of them change places, layers by ERK."
    references: ClassVar[tuple[str, ...]] = ("mocanu2018set", "liu2021itop")

    distribution: Literal["uniform", "erk"] = "erk"
    drop_fraction: Fraction = 0.5


@register("method")
class RigLITOP(RigL):
    """RigL as ITOP sets it: half of the active weights change places at first, layers by ERK, to the end of the run.

    As :class:`SETITOP`, with an interval of 4,000 steps in the authors' CIFAR runs, about ten epochs.

    Example:
        >>> recipe = spfde.Recipe(sparsity=spfde.RigLITOP(sparsity=0.9))
        >>> session = spfde.attach(model, optimizer, loader, recipe, epochs=10)
        >>> round(session.density, 2)
        0.1
    """

    name: ClassVar[str] = "rigl-itop"
    summary: ClassVar[str] = "RigL that tries many weights in its course: half of them change places, layers by ERK."
    references: ClassVar[tuple[str, ...]] = ("evci2020rigl", "liu2021itop")

    distribution: Literal["uniform", "erk"] = "erk"
    drop_fraction: Fraction = 0.5
    stop_fraction: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
