"""DEEP R: rewiring at every step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from spfde.core.registry import register
from spfde.core.state import check_entries
from spfde.sparsity.gradients import Skipped
from spfde.sparsity.masker import Masker
from spfde.sparsity.masks import grow_random
from spfde.sparsity.methods.base import SparsityMethod
from spfde.sparsity.schedule import MaskPlan
from spfde.sparsity.strategy import Strategy
from spfde.sparsity.weight import MaskedWeight


@register("method")
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

    Example:
        >>> recipe = spfde.Recipe(sparsity=spfde.DeepR(sparsity=0.9))
        >>> session = spfde.attach(model, optimizer, loader, recipe, epochs=10)
        >>> round(session.density, 2)
        0.09
    """

    name: ClassVar[str] = "deepr"
    summary: ClassVar[str] = "Rewires at every step: a weight that crosses zero gives way to a random one."
    references: ClassVar[tuple[str, ...]] = ("bellec2018deep",)
    structured: ClassVar[bool] = False

    l1: Annotated[float, Field(ge=0.0)] = 1e-5
    noise: Annotated[float, Field(ge=0.0)] = 1e-5

    def strategy(self, masker: Masker) -> Rewiring:
        return Rewiring(masker, l1=self.l1, noise=self.noise)


class Rewiring(Strategy):
    """DEEP R's step after the optimizer's: penalty, noise, and who crosses zero gives way."""

    changes_every_step = True

    def __init__(self, masker: Masker, *, l1: float, noise: float) -> None:
        super().__init__(masker)
        self._l1, self._noise = l1, noise
        self._is_over = False
        self._negative: dict[str, Tensor] = {}
        self._learning: set[str] = set()

    def begin_epoch(self, plan: MaskPlan, live: Sequence[MaskedWeight]) -> None:
        self._is_over = plan.last

    def begin_step(self, layer: MaskedWeight) -> None:
        self._learning.discard(layer.name)
        if not self._is_over:
            self._negative[layer.name] = torch.signbit(layer.parameter.detach())

    def before_step(self, layer: MaskedWeight, gradient: Tensor | None) -> None:
        # Nothing moves a weight that has no gradient (a frozen one).
        if gradient is not None:
            self._learning.add(layer.name)

    def after_step(self, layer: MaskedWeight, *, was_skipped: Skipped) -> None:
        negative = self._negative.pop(layer.name, None)
        if negative is not None and layer.name in self._learning and not was_skipped:
            learning_rate = float(self.masker.group_of(layer)["lr"])
            weight, mask = rewire(
                layer.parameter.detach(),
                layer.mask,
                negative,
                shrink=learning_rate * self._l1,
                noise=learning_rate * self._noise,
                generator=self.masker.generator,
            )
            layer.parameter.detach().copy_(weight)
            layer.set_mask(mask, layer.active)
        super().after_step(layer, was_skipped=was_skipped)

    def state_dict(self) -> dict[str, Any]:
        return {"is_over": self._is_over}

    def check_state(self, state: Mapping[str, Any], masks: Mapping[str, Tensor]) -> None:
        check_entries(state, "the rewiring", {"is_over": bool})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._is_over = state["is_over"]


def rewire(
    weight: Tensor, mask: Tensor, before: Tensor, *, shrink: float, noise: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """One step of deep rewiring, after the gradient step: weights that cross zero go dormant, others wake up.

    A connection keeps the sign that it has; of a weight that is zero, the sign bit says which one.

    Args:
        weight: after the gradient step.
        mask: boolean, of its shape.
        before: the weight's sign bits before the step, boolean, of its shape.
        shrink: by how much the magnitude of active weights shrinks (learning rate times the L1 penalty).
        noise: standard deviation of what is added to active weights.
        generator: a CPU generator.

    Returns:
        The weight and the mask, with as many active weights as before. Those that woke up are zero, of a random sign.

    Source: Bellec et al. (DEEP R, arXiv 1711.05136), algorithm 1.
    """
    flat, active = weight.flatten(), mask.flatten().nonzero().squeeze(1)
    negative = before.flatten()[active]
    # theta, as the paper has it: the magnitude, counted along the sign that the connection has.
    theta = torch.where(negative, -flat[active], flat[active]) - shrink
    if noise:
        drawn = torch.randn(len(active), generator=generator, dtype=torch.float32)
        theta = theta + noise * drawn.to(theta)
    stays = theta >= 0
    alive = torch.zeros_like(mask.flatten())
    alive[active[stays]] = True
    grown = grow_random(alive, len(active), generator)
    awake = (grown & ~alive).nonzero().squeeze(1)
    signs = torch.rand(len(awake), generator=generator).to(weight.device) < 0.5
    result = torch.zeros_like(flat)
    result[active[stays]] = torch.where(negative[stays], -theta[stays], theta[stays])
    result[awake] = torch.where(signs, -0.0, 0.0).to(flat.dtype)
    return result.view(weight.shape), grown.view(mask.shape)
