"""Saved states of optimizers, looked at before one is loaded: PyTorch takes any, and fails in a later step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from spfde.core.errors import StateMismatch
from spfde.core.state import check_entries

_ONE_A_PARAMETER = ("step", "eta", "mu", "mu_product")
"""What PyTorch's optimizers keep once for a parameter; all else is kept for each of its elements."""


def check_optimizer(state: Any, optimizer: Optimizer) -> None:
    """Raise ``StateMismatch`` for what is no state of such an optimizer, on such parameters.

    Args:
        state: as ``optimizer.state_dict()`` gives it.
        optimizer: the one that the state is to be loaded into.

    Example:
        >>> from spfde.core.optimizer_states import check_optimizer
        >>> check_optimizer(optimizer.state_dict(), optimizer)
    """
    what = "the optimizer"
    check_entries(state, what, {"state": dict, "param_groups": list})
    mine = optimizer.state_dict()["param_groups"]
    if len(state["param_groups"]) != len(mine):
        raise StateMismatch(f"the state of {what} has {len(state['param_groups'])} groups, not {len(mine)}.")
    for theirs, own in zip(state["param_groups"], mine, strict=True):
        check_entries(theirs, f"a group of {what}", dict.fromkeys(own, (object, bool)))
        if not _are_numbers(theirs["params"]) or theirs["params"] != own["params"]:
            raise StateMismatch(f"a group of {what} has other parameters. The state is damaged.")
        for name, value in own.items():
            if not _is_alike(theirs[name], value):
                raise StateMismatch(f"{name} in the state of {what} cannot be {theirs[name]!r}. It is damaged.")
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, kept in state["state"].items():
        if type(index) is not int or not 0 <= index < len(parameters) or not isinstance(kept, Mapping):
            raise StateMismatch(f"the state of {what} is kept under {index!r}, which is no parameter. It is damaged.")
        for name, value in kept.items():
            if not _fits(name, value, parameters[index]):
                raise StateMismatch(f"{name} in the state of {what} does not fit its parameter. It is damaged.")


def _is_alike(theirs: Any, own: Any) -> bool:
    """Of the same kind; numbers finite, for a rate that is none trains nothing."""
    if isinstance(own, bool) or own is None:
        return isinstance(theirs, bool) or theirs is None
    if isinstance(own, float | int):
        return isinstance(theirs, float | int) and not isinstance(theirs, bool) and math.isfinite(theirs)
    if isinstance(own, list | tuple):
        return isinstance(theirs, list | tuple) and len(theirs) == len(own) and all(map(_is_alike, theirs, own))
    return isinstance(theirs, type(own))


def _are_numbers(indices: Any) -> bool:
    return isinstance(indices, list) and all(type(index) is int for index in indices)


def _fits(name: Any, value: Any, parameter: Tensor) -> bool:
    if name in _ONE_A_PARAMETER:
        return (isinstance(value, float | int) and math.isfinite(value)) or (
            isinstance(value, Tensor) and value.dim() == 0 and bool(value.isfinite())
        )
    if not isinstance(value, Tensor):
        return value is None
    return value.shape == parameter.shape and value.is_floating_point()
