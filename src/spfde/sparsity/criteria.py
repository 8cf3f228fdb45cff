"""Which weights are dropped, and which grow: criteria, one class each.

A criterion scores every weight of a layer; of active ones the highest scores stay, of inactive ones the highest grow.
A further one is a class of this form under ``@register("drop")`` or ``@register("grow")``, here or anywhere else.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor

from spfde.core.registry import register
from spfde.core.technique import Technique
from spfde.sparsity import mutation


class Criterion(Technique):
    """What all criteria share.

    Attributes:
        summary: what it does, in a line.
    """

    summary: ClassVar[str]

    @property
    def needs_gradient(self) -> bool:
        """Whether scores need the gradient: for dropping that of the active weights, for growing that of all.

        The mutation then waits for the first step that has one.
        """
        return False

    def score(self, weight: Tensor, gradient: Tensor | None) -> Tensor | None:
        """Score of each weight, of the weight's shape; the highest stay, or grow. NaN ranks lowest.

        Args:
            weight: the masked weight; not to be changed.
            gradient: of its shape, where :attr:`needs_gradient`; else None.

        Returns:
            None where nothing speaks for one weight or another: chance decides.
        """
        raise NotImplementedError(f"{type(self).__name__} has no score")


@register("drop")
class Magnitude(Criterion):
    """The largest weights stay: ``|w|``."""

    name: ClassVar[str] = "magnitude"
    summary: ClassVar[str] = "The largest weights stay."

    def score(self, weight: Tensor, gradient: Tensor | None) -> Tensor:
        return mutation.magnitude(weight)


@register("drop")
class MagnitudePlusGradient(Criterion):
    """MEST's importance ``|w| + λ |g|`` (arXiv 2110.14032); λ is 0 in the released code, 0.5 in SparCL's.

    Attributes:
        gradient_weight: λ.
    """

    name: ClassVar[str] = "magnitude-plus-gradient"
    summary: ClassVar[str] = "The largest |w| + λ|g| stay."
    references: ClassVar[tuple[str, ...]] = ("yuan2021mest",)

    gradient_weight: Annotated[float, Field(ge=0.0)] = 0.5

    @property
    def needs_gradient(self) -> bool:
        return self.gradient_weight > 0.0

    def score(self, weight: Tensor, gradient: Tensor | None) -> Tensor:
        if gradient is None:
            return mutation.magnitude(weight)
        return mutation.magnitude_plus_gradient(weight, gradient, self.gradient_weight)


@register("drop")
@register("grow")
class Random(Criterion):
    """Chance decides, uniformly."""

    name: ClassVar[str] = "random"
    summary: ClassVar[str] = "Chance decides."

    def score(self, weight: Tensor, gradient: Tensor | None) -> None:
        return None


@register("drop")
@register("grow")
class Gradient(Criterion):
    """The largest gradients ``|g|``; for growing that of all weights, which is dense (RigL, arXiv 1911.11134)."""

    name: ClassVar[str] = "gradient"
    summary: ClassVar[str] = "The largest gradients."
    references: ClassVar[tuple[str, ...]] = ("evci2020rigl",)

    @property
    def needs_gradient(self) -> bool:
        return True

    def score(self, weight: Tensor, gradient: Tensor | None) -> Tensor:
        assert gradient is not None, "a criterion that needs a gradient is given one"
        return mutation.gradient(gradient)
