"""Attaching in the trainers' order, in which the weights are loaded first."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from spfde.session.attach import attach
from spfde.session.session import Session


def attach_with(
    model: Any, optimizer: Any, loader: Any, recipe: Any, state: Mapping[str, Any] | None, **how: Any
) -> Session:
    """A new session, or one that goes on from a saved state of weights that the model has already."""
    if state is None:
        return attach(model, optimizer, loader, recipe, **how)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    session = attach(model, optimizer, loader, recipe, **how)
    model.load_state_dict(weights)
    session.load_state_dict(state)
    return session
