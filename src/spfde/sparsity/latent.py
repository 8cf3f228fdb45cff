"""Weights behind the mask: what Top-KAST and STR update in place of the sparse weight that the model computes with.

The parameter holds the sparse weight; beside it lies a dense one, the latent. Before a step of the optimizer they
change places, so that the optimizer updates the latent with the gradient that the sparse weight received; after it the
sparse weight is derived from the latent anew. No layer, and no optimizer, knows of it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from spfde.core.errors import StateMismatch
from spfde.sparsity.masks import highest


class Latent(ABC):
    """The dense weight behind one masked weight.

    Attributes:
        weight: the latent, of the weight's shape.
        mask: which weights the model computes with.
        clears_state: whether weights without a gradient stay where they are, so that their optimizer state is zero;
            else momentum and weight decay go on moving them.
    """

    weight: Tensor
    mask: Tensor
    clears_state: ClassVar[bool] = True

    @property
    @abstractmethod
    def reach(self) -> Tensor:
        """Which weights receive a gradient, boolean."""

    @property
    @abstractmethod
    def sparse(self) -> Tensor:
        """The weight that the model computes with."""

    @property
    @abstractmethod
    def margin(self) -> Tensor:
        """How much each weight deserves its place, by which the final mask is chosen."""

    def before_step(self, gradient: Tensor | None) -> None:  # noqa: B027  # most have nothing to do
        """The optimizer is about to step on the latent with this gradient."""

    def follow(self, device: torch.device) -> None:
        """Move to where the model has moved since."""
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(self, name, value.to(device))

    @abstractmethod
    def after_step(self, stepped: Tensor, group: Mapping[str, Any]) -> None:
        """Take the latent as the optimizer left it.

        Args:
            stepped: the latent after the step, not to be kept.
            group: the optimizer's options for this weight; ``lr`` is used.
        """

    @abstractmethod
    def turn(self, progress: float) -> None:
        """An update epoch: choose the mask anew."""

    def state_dict(self) -> dict[str, Any]:
        """Tensors and primitives."""
        return {"weight": self.weight.clone()}

    def load_state_dict(self, state: Mapping[str, Any], mask: Tensor) -> None:
        """Go on from a saved state and the mask that belongs to it.

        Raises:
            StateMismatch: the state is of another weight.
        """
        weight = state.get("weight")
        if not isinstance(weight, Tensor) or weight.shape != self.weight.shape:
            raise StateMismatch("the state's latent weights are missing, or of another model.")
        self.weight = weight.detach().to(self.weight, copy=True)
        self.mask = torch.empty_like(self.weight, dtype=torch.bool).copy_(mask)


class TopKLatent(Latent):
    """Top-KAST: the model computes with the largest weights, and a larger set receives gradients.

    Args:
        weight: the dense weight.
        target: number of weights that the model computes with (set A).
        reach: number of weights that receive a gradient (set B, which holds A).
        penalty: L2 penalty on B's weights; those outside A are penalised by ``penalty / density``, so that they
            have to earn their place.
    """

    def __init__(self, weight: Tensor, *, target: int, reach: int, penalty: float) -> None:
        self.weight = weight.detach().clone()
        self._target, self._n_reach, self._penalty = target, reach, penalty
        self.turn(0.0)

    @property
    def reach(self) -> Tensor:
        return self._reach

    @property
    def sparse(self) -> Tensor:
        return self.weight.masked_fill(~self.mask, 0.0)

    @property
    def margin(self) -> Tensor:
        return self.weight.abs().masked_fill_(~self.mask, -1.0)

    def turn(self, progress: float) -> None:
        magnitude = self.weight.abs()
        self.mask = highest(magnitude, self._target)
        self._reach = highest(magnitude, self._n_reach)

    def after_step(self, stepped: Tensor, group: Mapping[str, Any]) -> None:
        density = self._target / self.weight.numel()
        shrink = float(group["lr"]) * self._penalty
        moved = torch.where(self.mask, stepped * (1.0 - shrink), stepped * (1.0 - shrink / density))
        # Neither weight decay nor momentum moves what receives no gradient.
        self.weight = torch.where(self._reach, moved, self.weight)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "reach": self._reach.clone()}

    def load_state_dict(self, state: Mapping[str, Any], mask: Tensor) -> None:
        super().load_state_dict(state, mask)
        reach = state.get("reach")
        if not isinstance(reach, Tensor) or reach.shape != self.weight.shape or reach.dtype != torch.bool:
            raise StateMismatch("the state's set of weights with gradients is missing, or of another model.")
        self._reach = reach.to(self.weight.device, copy=True)


class SoftThresholdLatent(Latent):
    """STR: the model computes with ``sign(w) * relu(|w| - sigmoid(s))``, and ``s`` is learnt.

    Args:
        weight: the dense weight.
        start: ``s`` at first.
        decay: weight decay of ``s``, which draws it to 0 and so the threshold up.
    """

    clears_state: ClassVar[bool] = False

    def __init__(self, weight: Tensor, *, start: float, decay: float) -> None:
        self.weight = weight.detach().clone()
        self._s, self._decay, self._slope = start, decay, 0.0
        self._derive()

    @property
    def reach(self) -> Tensor:
        return self.mask

    @property
    def threshold(self) -> float:
        """Weights up to this magnitude are zero to the model."""
        return float(torch.sigmoid(torch.tensor(self._s, dtype=torch.float64)))

    @property
    def margin(self) -> Tensor:
        return self.weight.abs() - self.threshold

    @property
    def sparse(self) -> Tensor:
        return self.margin.clamp_(min=0.0).copysign_(self.weight).masked_fill_(~self.mask, 0.0)

    def before_step(self, gradient: Tensor | None) -> None:
        self._slope = 0.0
        if gradient is not None:
            # d|w_sparse|/ds is -sigmoid'(s) wherever the weight is not zero.
            threshold = self.threshold
            along = (gradient * self.weight.sign())[self.mask].sum(dtype=torch.float64)
            self._slope = -float(along) * threshold * (1.0 - threshold)

    def after_step(self, stepped: Tensor, group: Mapping[str, Any]) -> None:
        self.weight = stepped.detach().clone()
        self._s -= float(group["lr"]) * (self._slope + self._decay * self._s)
        self._derive()

    def turn(self, progress: float) -> None:
        """The mask follows the threshold at every step."""

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "s": self._s}

    def load_state_dict(self, state: Mapping[str, Any], mask: Tensor) -> None:
        super().load_state_dict(state, mask)
        if not isinstance(state.get("s"), float):
            raise StateMismatch("the state's threshold is missing.")
        self._s = state["s"]

    def _derive(self) -> None:
        self.mask = self.margin > 0
        if not bool(self.mask.any()):
            self.mask = highest(self.weight.abs(), 1)


def settled_masks(latents: Sequence[Latent], total: int) -> list[Tensor]:
    """Masks of exactly ``total`` weights over all layers, those of the largest margins; one in each layer at least."""
    margins = [latent.margin.masked_fill(highest(latent.margin, 1), torch.inf) for latent in latents]
    chosen = highest(torch.cat([margin.flatten() for margin in margins]), max(total, len(latents)))
    parts = torch.split(chosen, [margin.numel() for margin in margins])
    return [part.view(margin.shape) for part, margin in zip(parts, margins, strict=True)]


def swap_in(parameter: Tensor, latent: Latent, gradient: Tensor | None) -> None:
    """Put the latent in the parameter's place, for the optimizer's step."""
    latent.before_step(gradient)
    parameter.detach().copy_(latent.weight)
