"""Checks of a saved masker state before any of it is used."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from spfde.core.errors import InvalidArgument, StateMismatch
from spfde.core.state import check_entries
from spfde.sparsity.masks import unpack
from spfde.sparsity.weight import MaskedWeight

_KINDS_BY_LAYER = {
    "masks": Tensor,
    "target": int,
    "explored": Tensor,
    "dense_gradient_passes": int,
    "active_over_steps": int,
}
_KINDS = {**dict.fromkeys(_KINDS_BY_LAYER, dict), "steps": int, "optimizer_steps": list, "strategy": dict}


def check_state(
    state: Mapping[str, Any], layers: Mapping[str, MaskedWeight], *, counts_known: bool
) -> dict[str, Tensor]:
    """Unpack the masks of a masker's saved state; raise ``StateMismatch`` where it does not fit the layers.

    Args:
        counts_known: whether the distribution alone says how many weights each layer keeps.
    """
    check_entries(state, "the masks", _KINDS)
    for part, kind in _KINDS_BY_LAYER.items():
        check_entries(state[part], f"the masks' {part}", dict.fromkeys(layers, kind))
    return {name: _checked_mask(state, layer, counts_known=counts_known) for name, layer in layers.items()}


def check_weights(layers: Mapping[str, MaskedWeight], masks: Mapping[str, Tensor]) -> None:
    """Refuse masks that would cut off weights which are not zero: those of another model state."""
    for name, layer in layers.items():
        weight = layer.local.detach()
        found = torch.count_nonzero(weight.masked_fill(layer.own(masks[name]).to(weight.device), 0))
        outside = layer.total(int(found))
        if outside:
            raise StateMismatch(
                f"{name} has {outside} non-zero weights outside the mask of the state. Load the model's and the "
                "optimizer's state_dict before this one, all three from one checkpoint."
            )


def _checked_mask(state: Mapping[str, Any], layer: MaskedWeight, *, counts_known: bool) -> Tensor:
    name, unit, shape = layer.name, layer.unit_size, tuple(layer.parameter.shape)
    target, known = state["target"][name], layer.target * unit
    if counts_known and target != known:
        raise StateMismatch(f"{name} keeps {known} weights by this recipe, and {target} by the state's.")
    if not unit <= target <= layer.numel or target % unit:
        raise StateMismatch(
            f"{name} keeps {target} weights by the state, which is none of the numbers that it can have."
        )
    try:
        mask = unpack(state["masks"][name], shape)
        unpack(state["explored"][name], shape)
    except InvalidArgument as error:
        raise StateMismatch(f"The mask of {name} in the state is damaged: {error}") from error
    count, least = int(mask.sum()), target if counts_known else unit
    if count < least or count % unit:
        rule = f"it has {count} active weights, and this recipe keeps {least} or more, in units of {unit}"
        raise StateMismatch(f"The mask of {name} in the state does not fit: {rule}.")
    return mask
