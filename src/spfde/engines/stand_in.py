"""How an engine takes the place of a model's forward pass: on the instance, with nothing registered on it."""

from __future__ import annotations

import types
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import nn

from spfde.core.torch_private import is_recorded, run_while_compiling
from spfde.engines.guards import FORWARD, HELD


class Computes(Protocol):
    """What computes a model in its place."""

    name: str
    model: nn.Module

    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...


def put_on(computes: Computes) -> None:
    """Let it compute its model from now on."""
    setattr(computes.model, HELD, _Held(computes))
    computes.model.forward = types.MethodType(forward, computes.model)


def take_off(computes: Computes) -> bool:
    """Give the model its forward pass back; returns whether it was this one that stood there."""
    model = computes.model
    held = vars(model).get(HELD)
    if held is None or held.computes is not computes:
        return False
    delattr(model, HELD)
    # What someone put around it since stays; the stand-in inside computes as the model's class from now on.
    if getattr(vars(model).get(FORWARD), "__func__", None) is forward:
        del model.forward
    return True


@contextmanager
def bypassed(model: nn.Module) -> Iterator[None]:
    """The model computes as its class says."""
    replaced = vars(model).pop(FORWARD, None)
    try:
        yield
    finally:
        if replaced is not None:
            model.forward = replaced


class _Held:
    """Keeps the engine for as long as its model lives. Copies and pickles of the model have none."""

    def __init__(self, computes: Computes) -> None:
        self.computes = computes

    def __deepcopy__(self, memo: object) -> None:
        return None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()


@run_while_compiling
def _say_compiled() -> bool:
    if not getattr(torch.compiler, "is_exporting", bool)():
        warnings.warn(
            "The model was compiled after spfde.attach: the compiled code computes it, masked weights as zeros, and "
            'the engine of the session does not. Attach with engine="masked", or leave torch.compile out.',
            stacklevel=2,
        )
    return True


# Copied and pickled by its name, as bound methods are: a copy of the model has no engine, and computes as its class.
def forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Stands in for ``module.forward`` while an engine is attached."""
    if torch.compiler.is_compiling() and _say_compiled():
        return type(module).forward(module, *args, **kwargs)
    held = vars(module).get(HELD)
    if held is None or held.computes.model is not module or is_recorded():
        return type(module).forward(module, *args, **kwargs)
    return held.computes(*args, **kwargs)


forward.is_spfde = True  # type: ignore[attr-defined]


def has_own_forward(module: nn.Module) -> bool:
    """Whether another forward than the class's was put on the module."""
    own = vars(module).get(FORWARD)
    function = getattr(own, "__func__", None)
    # An engine's stand-in, or that of a model whose copy this is, computes what the class says.
    return own is not None and function is not type(module).forward and not getattr(function, "is_spfde", False)
