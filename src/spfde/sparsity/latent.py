"""Weights behind the mask: what Top-KAST and STR update in place of the sparse weight that the model computes with.

The parameter holds the sparse weight; beside it lies a dense one, the latent. Before a step of the optimizer they
change places, so that the optimizer updates the latent with the gradient that the sparse weight received; after it the
sparse weight is derived from the latent anew. No layer, and no optimizer, knows of it.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from spfde.core.errors import StateMismatch, UsageError
from spfde.core.state import check_entries
from spfde.sparsity.gradients import Skipped
from spfde.sparsity.masker import Masker
from spfde.sparsity.masks import highest_overall
from spfde.sparsity.schedule import MaskPlan
from spfde.sparsity.strategy import Strategy
from spfde.sparsity.weight import MaskedWeight


class LatentWeights(Strategy):
    """Steps update the latents; a layer gives its latent up when it is pruned to its target.

    With ``changes_every_step`` masks follow every step, and the layers come to their targets together, as soon as all
    of them have so few weights. Else they follow update epochs, and weights without a gradient stay where they are, so
    that their optimizer state is zero.

    Args:
        masker: see ``Strategy``.
        stop_fraction: share of the run after which no latents are kept.
    """

    _ENTRIES: ClassVar[Mapping[str, type]]
    """What is saved of a layer, with types; tensors have the weight's shape."""

    def __init__(self, masker: Masker, *, stop_fraction: float) -> None:
        super().__init__(masker)
        self._stop_fraction = stop_fraction
        self._latents: dict[str, Tensor] = {}

    @abstractmethod
    def choose(self, layer: MaskedWeight) -> None:
        """Give the layer the mask that follows from its latent, and say which weights learn."""

    @abstractmethod
    def sparse(self, layer: MaskedWeight) -> Tensor:
        """The weight that the model computes with."""

    @abstractmethod
    def margin(self, layer: MaskedWeight) -> Tensor:
        """How much each weight deserves its place, by which the final mask is chosen."""

    @abstractmethod
    def stepped(self, layer: MaskedWeight, weight: Tensor, learning_rate: float) -> Tensor:
        """The latent after a step: a new tensor, from the ``weight`` that the optimizer left."""

    def latent(self, layer: MaskedWeight) -> Tensor:
        """The layer's latent, with its mask where the model is now."""
        layer.follow()
        self._latents[layer.name] = self._latents[layer.name].to(layer.parameter.device)
        return self._latents[layer.name]

    def start(self, layer: MaskedWeight) -> bool:
        self._latents[layer.name] = layer.parameter.detach().clone()
        self.choose(layer)
        layer.parameter.detach().copy_(self.sparse(layer))
        return True

    def begin_epoch(self, plan: MaskPlan, live: Sequence[MaskedWeight]) -> None:
        if plan.last or not plan.update:
            return
        is_over = plan.progress >= self._stop_fraction
        self._give_up([layer for layer in live if is_over or plan.layers[layer.name].to_target])
        for layer in live:
            if layer.name in self._latents:
                self.choose(layer)
                layer.parameter.detach().copy_(self.sparse(layer))

    def prune_to_target(self, layers: Sequence[MaskedWeight]) -> None:
        self._give_up(layers)
        super().prune_to_target(layers)

    def before_step(self, layer: MaskedWeight, gradient: Tensor | None) -> None:
        if layer.name in self._latents:
            layer.parameter.detach().copy_(self.latent(layer))

    def before_closure(self, layer: MaskedWeight) -> None:
        if layer.name not in self._latents:
            return
        weight = layer.parameter.detach()
        has_moved = not torch.equal(weight, self.latent(layer))
        weight.copy_(self.sparse(layer))
        if has_moved:
            raise UsageError(
                f"{type(self.masker.stepping).__name__} moves the weights before it runs its closure, and "
                f"{self.masker.method.name} keeps others for the model to compute with. Take an optimizer that runs "
                "the closure first, as SGD and AdamW do, or another sparse training method."
            )

    def after_steps(self, layers: Sequence[MaskedWeight], *, was_skipped: Skipped) -> None:
        super().after_steps([layer for layer in layers if layer.name in self._latents], was_skipped=was_skipped)
        self.masker.clear_outside([layer for layer in layers if layer.name not in self._latents])

    def after_step(self, layer: MaskedWeight, *, was_skipped: Skipped) -> None:
        if not was_skipped:
            learning_rate = float(self.masker.group_of(layer)["lr"])
            self._latents[layer.name] = self.stepped(layer, layer.parameter.detach(), learning_rate)
        self.clear_idle_state(layer)
        if self.changes_every_step:
            self.choose(layer)
        layer.parameter.detach().copy_(self.sparse(layer))

    def end_step(self, *, was_skipped: Skipped) -> None:
        layers = [layer for layer in self.masker.live if layer.name in self._latents]
        if self.changes_every_step and sum(x.active for x in layers) <= sum(x.target for x in layers):
            self._give_up(layers)

    def take_over(self, layer: MaskedWeight) -> bool:
        if layer.name not in self._latents:
            return False
        weight = layer.parameter.detach()
        sparse = self.sparse(layer).to(weight.dtype)
        written = layer.mask & (weight != sparse)
        if not bool(written.any()):
            return False
        self._latents[layer.name] = torch.where(written, self.latent_of(layer, weight), self.latent(layer))
        return True

    def latent_of(self, layer: MaskedWeight, weight: Tensor) -> Tensor:
        """The latent from which :meth:`sparse` makes an active ``weight``."""
        return weight

    def clear_idle_state(self, layer: MaskedWeight) -> None:
        if layer.name not in self._latents or not self.changes_every_step:
            super().clear_idle_state(layer)

    def adopt(self, layer: MaskedWeight) -> None:
        if layer.name in self._latents:
            self.start(layer)

    def state_dict(self) -> dict[str, Any]:
        # A layer without a latent has an empty entry. So it is seen if one is missing.
        saved = {
            name: self._saved(layer) if name in self._latents else {} for name, layer in self.masker.layers.items()
        }
        return {"latents": saved}

    def check_state(self, state: Mapping[str, Any], masks: Mapping[str, Tensor]) -> None:
        check_entries(state, self.masker.method.name, {"latents": dict})
        check_entries(state["latents"], "the latent weights", dict.fromkeys(masks, dict))
        for name, saved in state["latents"].items():
            if not saved:
                continue
            check_entries(saved, f"the latent weight of {name}", self._ENTRIES)
            for entry, value in saved.items():
                if isinstance(value, Tensor) and value.shape != masks[name].shape:
                    found, own = tuple(value.shape), tuple(masks[name].shape)
                    raise StateMismatch(f"{entry} of the latent {name} in the state has shape {found}, and here {own}.")

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._latents = {}
        for name, saved in state["latents"].items():
            if saved:
                self._load(self.masker.layers[name], saved)

    def _saved(self, layer: MaskedWeight) -> dict[str, Any]:
        """What is saved of a layer with a latent: tensors and primitives."""
        return {"weight": self._latents[layer.name].clone()}

    def _load(self, layer: MaskedWeight, saved: Mapping[str, Any]) -> None:
        self._latents[layer.name] = saved["weight"].detach().to(layer.parameter.detach(), copy=True)

    def _give_up(self, layers: Sequence[MaskedWeight]) -> None:
        """Give up the latents of these layers: from now on their masks stay, at the target's total."""
        layers = [layer for layer in layers if layer.name in self._latents]
        if not layers:
            return
        margins = {layer.name: self.margin(layer) for layer in layers}
        masks = highest_overall(margins, sum(layer.target for layer in layers))
        for layer in layers:
            mask = masks[layer.name]
            layer.parameter.detach().copy_(self.sparse(layer))
            del self._latents[layer.name]
            layer.target, layer.wider = int(mask.sum()), None
            layer.set_mask(mask, layer.target)
            layer.clear_outside()
