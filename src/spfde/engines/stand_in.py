"""How an engine takes the place of a model's forward pass: on the instance, with nothing registered on it."""

from __future__ import annotations

import types
import warnings
from collections.abc import Callable, Iterator
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


def put_on(module: nn.Module, computes: Any, *, held: str = HELD, by: Callable[..., Any] | None = None) -> None:
    """Let a function of module level compute a module from now on, in the place of its forward pass.

    Args:
        module: the module.
        computes: what the function finds under ``held`` in the module, as ``Held.computes``.
        held: name of an attribute.
        by: the function; by default ``forward``, which asks ``Computes``.
    """
    setattr(module, held, Held(computes))
    module.forward = types.MethodType(forward if by is None else by, module)


def take_off(module: nn.Module, computes: Any, *, held: str = HELD, by: Callable[..., Any] | None = None) -> bool:
    """Give a module its forward pass back; returns whether it was this one that stood there."""
    found = vars(module).get(held)
    if found is None or found.computes is not computes:
        return False
    delattr(module, held)
    # What someone put around it since stays; the stand-in inside computes as the module's class from now on.
    if getattr(vars(module).get(FORWARD), "__func__", None) is (forward if by is None else by):
        del module.forward
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


class Held:
    """Keeps what computes for as long as its module lives. Copies and pickles of the module have none."""

    def __init__(self, computes: Any) -> None:
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


def stands_in(module: nn.Module) -> bool:
    """Whether something computes a module in the place of its class's forward, put there by ``put_on``."""
    held = vars(module).get(HELD)
    return held is not None and held.computes.model is module
