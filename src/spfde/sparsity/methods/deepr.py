"""DEEP R: rewiring at every step."""

from __future__ import annotations

from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from spfde.sparsity import mutation
from spfde.sparsity.methods.base import SparsityMethod


class DeepR(SparsityMethod):
    """Every weight keeps its sign; one that would cross zero goes dormant, and a random dormant one wakes up.

    After each step of the optimizer the active weights shrink by an L1 penalty and are shaken by noise, as the paper's
    Langevin dynamics do. Each layer keeps its number of active weights at every step.

    Departures: the step is that of the caller's optimizer, momentum included (state of dormant weights is cleared),
    where the paper takes plain gradient descent; a weight that wakes up draws its sign anew; the last epoch rewires no
    more.

    Attributes:
        l1: penalty on the magnitude of active weights, per unit of learning rate.
        noise: standard deviation of the noise, per unit of learning rate. The paper's temperature is
            ``learning_rate * noise**2 / 2``. Both defaults are those of the authors' MNIST script.
    """

    name: ClassVar[str] = "deepr"
    summary: ClassVar[str] = "Rewires at every step: a weight that crosses zero gives way to a random one."
    cost: ClassVar[str] = "3 sparse passes a step"
    references: ClassVar[tuple[str, ...]] = ("bellec2018deep",)
    groups_units: ClassVar[bool] = False
    rewires: ClassVar[bool] = True
    changes_every_step: ClassVar[bool] = True

    l1: Annotated[float, Field(ge=0.0)] = 1e-5
    noise: Annotated[float, Field(ge=0.0)] = 1e-5

    def rewire(
        self, weight: Tensor, mask: Tensor, negative: Tensor, *, learning_rate: float, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        return mutation.rewire(
            weight,
            mask,
            negative,
            shrink=learning_rate * self.l1,
            noise=learning_rate * self.noise,
            generator=generator,
        )
