"""Checks of a saved masker state before any of it is used."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from spfde.errors import InvalidArgument, StateMismatch
from spfde.sparsity.masks import unpack

_KEYS = {"masks", "shapes", "target", "pending", "dense_gradient_passes", "generator"}


def check_state(
    state: Mapping[str, Any],
    *,
    shapes: Mapping[str, Sequence[int]],
    target: Mapping[str, int],
    most: Mapping[str, int],
) -> dict[str, Tensor]:
    """The masks of a saved state, if it fits the layers.

    Args:
        state: what ``Masker.state_dict`` returned.
        shapes: shape of each layer's weight.
        target: active weights of each layer by the distribution.
        most: the most active weights that the method ever gives each layer.

    Raises:
        StateMismatch: a part is missing or damaged, or layers, shapes or counts differ.
    """
    if missing := _KEYS - set(state):
        raise StateMismatch(f"The state of the masks lacks {', '.join(sorted(missing))}. It is damaged or not one.")
    masks, saved_shapes = state["masks"], state["shapes"]
    if set(masks) != set(shapes) or set(saved_shapes) != set(shapes):
        other = sorted(set(masks).symmetric_difference(shapes))
        raise StateMismatch(f"The state masks other layers than this model and recipe do: {_few(other)}.")
    loaded = {}
    for name, shape in shapes.items():
        if list(saved_shapes[name]) != list(shape):
            raise StateMismatch(f"{name} has shape {tuple(shape)}, and {tuple(saved_shapes[name])} in the state.")
        if state["target"].get(name) != target[name]:
            saved = state["target"].get(name)
            raise StateMismatch(f"{name} keeps {target[name]} weights by this recipe, and {saved} by the state's.")
        try:
            loaded[name] = unpack(masks[name], shape)
        except (InvalidArgument, AttributeError) as error:
            raise StateMismatch(f"The mask of {name} in the state is damaged: {error}") from error
        count = int(loaded[name].sum())
        if not target[name] <= count <= most[name]:
            rule = f"it has {count} active weights, and this recipe allows {target[name]} to {most[name]}"
            raise StateMismatch(f"The mask of {name} in the state does not fit: {rule}.")
    if other := sorted((set(state["pending"]) | set(state["dense_gradient_passes"])) - set(shapes)):
        raise StateMismatch(f"The state has mutations of layers that are not masked: {_few(other)}.")
    for name, (keep, final) in state["pending"].items():
        if not 0 < keep <= min(final, int(loaded[name].sum())) or final > most[name]:
            raise StateMismatch(f"The pending mutation of {name} in the state does not fit: {keep} to {final} weights.")
    return loaded


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
