"""Checks of a saved masker state before any of it is used."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from spfde.core.errors import InvalidArgument, StateMismatch
from spfde.sparsity.masks import unpack

_KEYS = {
    "masks",
    "shapes",
    "target",
    "explored",
    "pending",
    "dense_gradient_passes",
    "steps",
    "active_over_steps",
    "latents",
    "smoothed",
    "memory",
    "running",
    "generator",
}


@dataclass(frozen=True)
class Bounds:
    """What a saved layer must agree with.

    Attributes:
        shape: of the weight.
        unit_size: weights of an active unit.
        target: active weights by the distribution.
        least: the fewest active weights that the method ever gives it.
        most: the most.
    """

    shape: tuple[int, ...]
    unit_size: int
    target: int
    least: int
    most: int


def check_state(state: Mapping[str, Any], *, bounds: Mapping[str, Bounds], counts_known: bool) -> dict[str, Tensor]:
    """The masks of a saved state, if it fits the layers.

    Args:
        state: what ``Masker.state_dict`` returned.
        bounds: what each layer must agree with.
        counts_known: whether each layer's target must be that of the state; otherwise their sum.

    Raises:
        StateMismatch: a part is missing or damaged, or layers, shapes or counts differ.
    """
    if missing := _KEYS - set(state):
        raise StateMismatch(f"The state of the masks lacks {', '.join(sorted(missing))}. It is damaged or not one.")
    masks, saved_shapes = state["masks"], state["shapes"]
    for part in (masks, saved_shapes, state["target"], state["explored"], state["active_over_steps"]):
        if set(part) != set(bounds):
            other = sorted(set(part).symmetric_difference(bounds))
            raise StateMismatch(f"The state masks other layers than this model and recipe do: {_few(other)}.")
    loaded = {name: _checked_mask(state, name, bound, counts_known) for name, bound in bounds.items()}
    wanted = sum(bound.target // bound.unit_size for bound in bounds.values())
    total = sum(state["target"][name] // bound.unit_size for name, bound in bounds.items())
    if total != wanted:
        raise StateMismatch(f"All layers together keep {wanted} weights by this recipe, and {total} by the state's.")
    parts = ("pending", "dense_gradient_passes", "latents", "smoothed")
    if other := sorted({name for part in parts for name in state[part]} - set(bounds)):
        raise StateMismatch(f"The state has mutations of layers that are not masked: {_few(other)}.")
    for name, (keep, final) in state["pending"].items():
        size = bounds[name].unit_size
        if not 0 < keep <= min(final, int(loaded[name].sum()) // size) or final * size > bounds[name].most:
            raise StateMismatch(f"The pending mutation of {name} in the state does not fit: {keep} to {final} weights.")
    return loaded


def _checked_mask(state: Mapping[str, Any], name: str, bound: Bounds, counts_known: bool) -> Tensor:
    saved_shape, saved_target = state["shapes"][name], state["target"][name]
    if list(saved_shape) != list(bound.shape):
        raise StateMismatch(f"{name} has shape {bound.shape}, and {tuple(saved_shape)} in the state.")
    if counts_known and saved_target != bound.target:
        raise StateMismatch(f"{name} keeps {bound.target} weights by this recipe, and {saved_target} by the state's.")
    try:
        mask = unpack(state["masks"][name], bound.shape)
        unpack(state["explored"][name], bound.shape)
    except (InvalidArgument, AttributeError) as error:
        raise StateMismatch(f"The mask of {name} in the state is damaged: {error}") from error
    count = int(mask.sum())
    if not bound.least <= count <= bound.most or count % bound.unit_size:
        rule = f"it has {count} active weights, and this recipe allows {bound.least} to {bound.most}"
        raise StateMismatch(f"The mask of {name} in the state does not fit: {rule}.")
    return mask


def check_weights(weights: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> None:
    """Refuse masks that would cut off weights which are not zero: those of another model state.

    Raises:
        StateMismatch: a weight outside its mask is not zero.
    """
    for name, weight in weights.items():
        outside = torch.count_nonzero(weight.detach().masked_fill(masks[name].to(weight.device), 0))
        if outside:
            raise StateMismatch(
                f"{name} has {int(outside)} non-zero weights outside the mask of the state. Load the model's and the "
                "optimizer's state_dict before this one, all three from one checkpoint."
            )


def _few(names: Sequence[str], limit: int = 6) -> str:
    return ", ".join(names[:limit]) + (", …" if len(names) > limit else "")
