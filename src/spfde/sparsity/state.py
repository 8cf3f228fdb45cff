"""Checks of a saved masker state before any of it is used."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from spfde.core.errors import InvalidArgument, StateMismatch
from spfde.core.state import check_all, check_entries
from spfde.sparsity.masks import unpack

_KINDS = {
    "masks": dict,
    "target": dict,
    "explored": dict,
    "dense_gradient_passes": dict,
    "steps": int,
    "active_over_steps": dict,
    "strategy": dict,
}


@dataclass(frozen=True)
class Bounds:
    """What a saved layer must agree with.

    Attributes:
        shape: of the weight.
        unit_size: weights of an active unit.
        target: active weights by the distribution; None where the method decides by itself.
    """

    shape: tuple[int, ...]
    unit_size: int
    target: int | None


def check_state(state: Mapping[str, Any], bounds: Mapping[str, Bounds]) -> dict[str, Tensor]:
    """Check a saved state of a masker, and unpack its masks.

    Args:
        state: what ``Masker.state_dict`` returned.
        bounds: what each layer must agree with, by name.

    Raises:
        StateMismatch: a part is missing or damaged, or layers, shapes or counts differ.
    """
    check_entries(state, "the masks", _KINDS)
    for part, kind in (("masks", Tensor), ("target", int), ("explored", Tensor), ("active_over_steps", int)):
        check_entries(state[part], f"the masks' {part}", dict.fromkeys(bounds, kind))
    check_all(state["dense_gradient_passes"], "the masks' dense gradient passes", int)
    return {name: _checked_mask(state, name, bound) for name, bound in bounds.items()}


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


def _checked_mask(state: Mapping[str, Any], name: str, bound: Bounds) -> Tensor:
    target = state["target"][name]
    if bound.target is not None and target != bound.target:
        raise StateMismatch(f"{name} keeps {bound.target} weights by this recipe, and {target} by the state's.")
    if not bound.unit_size <= target <= math.prod(bound.shape) or target % bound.unit_size:
        raise StateMismatch(
            f"{name} keeps {target} weights by the state, which is none of the numbers that it can have."
        )
    try:
        mask = unpack(state["masks"][name], bound.shape)
        unpack(state["explored"][name], bound.shape)
    except InvalidArgument as error:
        raise StateMismatch(f"The mask of {name} in the state is damaged: {error}") from error
    count, least = int(mask.sum()), target if bound.target is not None else bound.unit_size
    if count < least or count % bound.unit_size:
        rule = f"it has {count} active weights, and this recipe keeps {least} or more, in units of {bound.unit_size}"
        raise StateMismatch(f"The mask of {name} in the state does not fit: {rule}.")
    return mask
