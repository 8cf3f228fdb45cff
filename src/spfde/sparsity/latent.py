"""Weights behind the mask: what Top-KAST and STR update in place of the sparse weight that the model computes with.

The parameter holds the sparse weight; beside it lies a dense one, the latent. Before a step of the optimizer they
change places, so that the optimizer updates the latent with the gradient that the sparse weight received; after it the
sparse weight is derived from the latent anew. No layer, and no optimizer, knows of it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from spfde.core.errors import StateMismatch, UsageError
from spfde.core.state import check_entries
from spfde.sparsity.gradients import unscaled
from spfde.sparsity.masks import highest
from spfde.sparsity.schedule import MaskPlan
from spfde.sparsity.strategy import Strategy
from spfde.sparsity.weight import MaskedWeight

if TYPE_CHECKING:
    from spfde.sparsity.masker import Masker


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
    _ENTRIES: ClassVar[Mapping[str, type]] = {"weight": Tensor}

    @property
    def wider(self) -> Tensor | None:
        """Which weights receive a gradient, boolean, where these are more than the mask's."""
        return None

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

    def update(self) -> None:  # noqa: B027  # a mask may follow the steps alone
        """An update epoch: choose the mask anew."""

    def state_dict(self) -> dict[str, Any]:
        """Tensors and primitives."""
        return {"weight": self.weight.clone()}

    def load_state_dict(self, state: Mapping[str, Any], mask: Tensor) -> None:
        """Go on from a saved state and the mask that belongs to it.

        Raises:
            StateMismatch: the state is of another weight.
        """
        check_entries(state, "the latent weights", self._ENTRIES)
        for name, value in state.items():
            if isinstance(value, Tensor) and value.shape != self.weight.shape:
                found, own = tuple(value.shape), tuple(self.weight.shape)
                raise StateMismatch(f"{name} of the latent weights in the state has shape {found}, and here {own}.")
        self.weight = state["weight"].detach().to(self.weight, copy=True)
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

    _ENTRIES: ClassVar[Mapping[str, type]] = {"weight": Tensor, "reach": Tensor}

    def __init__(self, weight: Tensor, *, target: int, reach: int, penalty: float) -> None:
        self.weight = weight.detach().clone()
        self._target, self._n_reach, self._penalty = target, reach, penalty
        self.update()

    @property
    def wider(self) -> Tensor:
        return self._reach

    @property
    def sparse(self) -> Tensor:
        return self.weight.masked_fill(~self.mask, 0.0)

    @property
    def margin(self) -> Tensor:
        return self.weight.abs().masked_fill_(~self.mask, -1.0)

    def update(self) -> None:
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
        self._reach = state["reach"].to(self.mask, copy=True)


class SoftThresholdLatent(Latent):
    """STR: the model computes with ``sign(w) * relu(|w| - sigmoid(s))``, and ``s`` is learnt.

    Args:
        weight: the dense weight.
        start: ``s`` at first.
        decay: weight decay of ``s``, which draws it to 0 and so the threshold up.
    """

    clears_state: ClassVar[bool] = False
    _ENTRIES: ClassVar[Mapping[str, type]] = {"weight": Tensor, "s": float}

    def __init__(self, weight: Tensor, *, start: float, decay: float) -> None:
        self.weight = weight.detach().clone()
        self._s, self._decay, self._slope = start, decay, 0.0
        self._derive()

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

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "s": self._s}

    def load_state_dict(self, state: Mapping[str, Any], mask: Tensor) -> None:
        super().load_state_dict(state, mask)
        self._s = state["s"]

    def _derive(self) -> None:
        self.mask = self.margin > 0
        if not bool(self.mask.any()):
            self.mask = highest(self.weight.abs(), 1)


def final_masks(latents: Sequence[Latent], total: int) -> list[Tensor]:
    """Masks of exactly ``total`` weights over all layers, those of the largest margins; one in each layer at least."""
    margins = [latent.margin.masked_fill(highest(latent.margin, 1), torch.inf) for latent in latents]
    chosen = highest(torch.cat([margin.flatten() for margin in margins]), max(total, len(latents)))
    parts = torch.split(chosen, [margin.numel() for margin in margins])
    return [part.view(margin.shape) for part, margin in zip(parts, margins, strict=True)]


class LatentWeights(Strategy):
    """Steps update the latents; a layer gives its latent up when it is pruned to its target.

    Args:
        masker: see ``Strategy``.
        make: the latent of a dense weight with that target, in weights.
        keeps_at: whether latents are still kept at that progress of the run.
        follows_steps: whether masks follow every step, not update epochs alone. The layers then come to their targets
            together, as soon as all of them have so few weights.
        name: of the method, for errors.
    """

    def __init__(
        self,
        masker: Masker,
        *,
        make: Callable[[Tensor, int], Latent],
        keeps_at: Callable[[float], bool],
        follows_steps: bool,
        name: str,
    ) -> None:
        super().__init__(masker)
        self._make, self._keeps_at, self.changes_every_step, self._name = make, keeps_at, follows_steps, name
        self._latents: dict[str, Latent] = {}

    def start(self, layer: MaskedWeight) -> bool:
        self._latents[layer.name] = self._make(layer.parameter, layer.target)
        self._show(layer)
        return True

    def begin_epoch(self, plan: MaskPlan, live: Sequence[MaskedWeight]) -> None:
        if plan.last or not plan.update:
            return
        stay = not self._keeps_at(plan.progress)
        self._give_up([layer for layer in live if stay or plan.layers[layer.name].to_target])
        for layer in live:
            if layer.name in self._latents:
                self._latents[layer.name].update()
                self._follow(layer)

    def prune_to_target(self, layers: Iterable[MaskedWeight]) -> None:
        layers = list(layers)
        self._give_up(layers)
        super().prune_to_target(layers)

    def before_step(self, layer: MaskedWeight, gradient: Tensor | None, *, has_closure: bool) -> None:
        latent = self._latents.get(layer.name)
        if latent is None:
            return
        if has_closure:
            raise UsageError(f"{self._name} cannot follow optimizer.step(closure). Call step() alone.")
        latent.follow(layer.parameter.device)
        latent.before_step(None if gradient is None else unscaled(gradient, self.masker.optimizer))
        layer.parameter.detach().copy_(latent.weight)

    def after_step(self, layer: MaskedWeight, *, was_skipped: bool) -> None:
        latent = self._latents.get(layer.name)
        if latent is None:
            super().after_step(layer, was_skipped=was_skipped)
            return
        if not was_skipped:
            latent.after_step(layer.parameter.detach(), self.masker.group_of(layer))
        self.clear_idle_state(layer)
        if self.changes_every_step:
            self._follow(layer)
        else:
            layer.parameter.detach().copy_(latent.sparse)

    def end_step(self, *, was_skipped: bool, has_closure: bool) -> None:
        layers = [layer for layer in self.masker.live if layer.name in self._latents]
        if not self.changes_every_step or not layers:
            return
        if sum(layer.active for layer in layers) <= sum(layer.target for layer in layers):
            self._give_up(layers)

    def clear_idle_state(self, layer: MaskedWeight) -> None:
        latent = self._latents.get(layer.name)
        if latent is None or latent.clears_state:
            super().clear_idle_state(layer)

    def adopt(self, layer: MaskedWeight) -> None:
        if layer.name in self._latents:
            self._latents[layer.name] = self._make(layer.parameter, layer.target)

    def state_dict(self) -> dict[str, Any]:
        return {"latents": {name: latent.state_dict() for name, latent in self._latents.items()}}

    def check_state(self, state: Mapping[str, Any], masks: Mapping[str, Tensor]) -> None:
        check_entries(state, f"{self._name}", {"latents": dict})
        check_entries(
            state["latents"], "the latent weights", {name: dict for name in masks if name in state["latents"]}
        )
        for name in state["latents"]:
            self._latent_from(state, name, masks[name])

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        layers = self.masker.layers
        self._latents = {name: self._latent_from(state, name, layers[name].mask) for name in state["latents"]}
        for name, layer in layers.items():
            layer.wider = None if name not in self._latents else self._latents[name].wider

    def _latent_from(self, state: Mapping[str, Any], name: str, mask: Tensor) -> Latent:
        layer = self.masker.layers[name]
        latent = self._make(layer.parameter, layer.target)
        latent.load_state_dict(state["latents"][name], mask)
        return latent

    def _follow(self, layer: MaskedWeight) -> None:
        """Take over the mask and the sparse weight that the latent gives."""
        self._show(layer)
        layer.parameter.detach().copy_(self._latents[layer.name].sparse)
        layer.note_explored()

    def _show(self, layer: MaskedWeight) -> None:
        latent = self._latents[layer.name]
        layer.set_mask(latent.mask, int(latent.mask.sum()))
        layer.wider = latent.wider

    def _give_up(self, layers: Sequence[MaskedWeight]) -> None:
        """Give up the latents of these layers: from now on their masks stay, at the target's total."""
        layers = [layer for layer in layers if layer.name in self._latents]
        if not layers:
            return
        latents = [self._latents.pop(layer.name) for layer in layers]
        masks = final_masks(latents, sum(layer.target for layer in layers))
        for layer, latent, mask in zip(layers, latents, masks, strict=True):
            layer.parameter.detach().copy_(latent.sparse)
            layer.target, layer.wider = int(mask.sum()), None
            layer.set_mask(mask, layer.target)
            layer.clear_outside(self.masker.optimizer)
            layer.note_explored()
