"""Going on from a state in the order of trainers: weights first, then ``attach(state=...)``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from spfde.core.optimizers import Optimizers
from spfde.session.session import Session


class Kept:
    """Weights and their optimizer state as they were before a session zeroed them under masks of its own.

    Args:
        optimizers: whose state is kept.
        parameters: the weights that are masked.
    """

    def __init__(self, optimizers: Optimizers, parameters: Iterable[nn.Parameter]) -> None:
        tensors = [
            tensor
            for parameter in parameters
            for tensor in (
                parameter.detach(),
                *(
                    v
                    for state in optimizers.states_of(parameter)
                    for v in state.values()
                    if isinstance(v, torch.Tensor)
                ),
            )
        ]
        self._pairs = [(tensor, tensor.clone()) for tensor in tensors]

    def put_back(self) -> None:
        """Write all of it where it was."""
        for tensor, copy in self._pairs:
            tensor.copy_(copy)


def resume(session: Session, state: Mapping[str, Any], kept: Kept) -> None:
    """Have a fresh session go on from a state, under the weights that were there before it.

    Raises:
        StateMismatch: the state does not fit. The session is detached, and the weights are as they were.
    """
    kept.put_back()
    try:
        session.load_state_dict(state, trust_weights=True)
    except BaseException:
        session.detach()
        raise
