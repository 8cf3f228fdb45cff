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


class Criterion(Technique):
    """What all criteria share.

    Attributes:
        summary: what it does, in a line.
        needs_gradient: whether scores need the gradient: for dropping that of the active weights, for growing that of
            all. The mutation then waits for the first step that has one.

    Example:
        >>> class Smallest(spfde.sparsity.Criterion):
        ...     name = "smallest"
        ...     summary = "The smallest weights stay."
        ...
        ...     def score(self, weight, gradient):
        ...         return -weight.abs()
        >>> Smallest().score(torch.tensor([1.0, -2.0]), None)
        tensor([-1., -2.])
    """

    summary: ClassVar[str]
    needs_gradient: ClassVar[bool] = False

    def score(self, weight: Tensor, gradient: Tensor | None) -> Tensor | None:
        """Score of each weight, of the weight's shape; the highest stay, or grow. NaN ranks lowest.

        Where a structure groups weights, a group's score is the L2 norm of its weights' scores, which must then not be
        negative.

        Args:
            weight: the masked weight, before anything is dropped; not to be changed.
            gradient: of its shape, where :attr:`needs_gradient`; else None. The one for growing may still have a loss
                scale in it, the same for all weights.

        Returns:
            None where nothing speaks for one weight or another: chance decides.
        """
        raise NotImplementedError(f"{type(self).__name__} has no score")


@register("drop")
class Magnitude(Criterion):
    """The largest weights stay: ``|w|``.

    Example:
        >>> spfde.sparsity.Magnitude().score(torch.tensor([1.0, -2.0]), None)
        tensor([1., 2.])
    """

    name: ClassVar[str] = "magnitude"
    summary: ClassVar[str] = "The largest weights stay."

    def score(self, weight: Tensor, gradient: Tensor | None) -> Tensor:
        return weight.abs()


@register("drop")
class MagnitudePlusGradient(Criterion):
    """MEST's importance ``|w| + λ |g|`` (arXiv 2110.14032); λ is 0 in the released code, 0.5 in SparCL's.

    Attributes:
        gradient_weight: λ.

    Example:
        >>> criterion = spfde.sparsity.MagnitudePlusGradient(gradient_weight=0.5)
        >>> criterion.score(torch.tensor([1.0, -2.0]), torch.tensor([4.0, 0.0]))
        tensor([3., 2.])
    """

    name: ClassVar[str] = "magnitude-plus-gradient"
    summary: ClassVar[str] = "The largest |w| + λ|g| stay."
    references: ClassVar[tuple[str, ...]] = ("yuan2021mest",)

    gradient_weight: Annotated[float, Field(ge=0.0)] = 0.5

    @property
    def needs_gradient(self) -> bool:  # type: ignore[override]  # of the field
        return self.gradient_weight > 0.0

    def score(self, weight: Tensor, gradient: Tensor | None) -> Tensor:
        if gradient is None:
            return weight.abs()
        return weight.abs().add(gradient.abs(), alpha=self.gradient_weight)


@register("drop")
@register("grow")
class Random(Criterion):
    """Chance decides, uniformly.

    Example:
        >>> spfde.sparsity.Random().score(torch.tensor([1.0, -2.0]), None) is None
        True
    """

    name: ClassVar[str] = "random"
    summary: ClassVar[str] = "Chance decides."

    def score(self, weight: Tensor, gradient: Tensor | None) -> None:
        return None


@register("drop")
@register("grow")
class Gradient(Criterion):
    """The largest gradients ``|g|``; for growing that of all weights, which is dense (RigL, arXiv 1911.11134).

    Example:
        >>> spfde.sparsity.Gradient().score(torch.tensor([1.0, -2.0]), torch.tensor([-4.0, 0.0]))
        tensor([4., 0.])
    """

    name: ClassVar[str] = "gradient"
    summary: ClassVar[str] = "The largest gradients."
    needs_gradient: ClassVar[bool] = True
    references: ClassVar[tuple[str, ...]] = ("evci2020rigl",)

    def score(self, weight: Tensor, gradient: Tensor | None) -> Tensor:
        assert gradient is not None, "a criterion that needs a gradient is given one"
        return gradient.abs()
