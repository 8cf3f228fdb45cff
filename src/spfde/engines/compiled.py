"""Blocks compiled one by one by ``torch.compile``: each kind of block once, however deep the model is."""

from __future__ import annotations

import types
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from spfde.core.say import say
from spfde.core.torch_private import recompile_limit, tree_leaves
from spfde.engines.stand_in import has_own_forward, put_on, take_off

BACKEND: str | Callable[..., Any] = "inductor"
"""What ``torch.compile`` is asked for."""

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


class CompiledBlocks:
    """Compiles modules of a model in place; nothing is registered on them.

    ``torch.compile`` keeps what it compiled by the code of a function, which all blocks of a class share, and gives up
    when there is too much of it. So each kind (a class, its settings, the shapes of its parameters) has code of its
    own, and is compiled once for each mode and shape that it is called in.

    Args:
        model: the model.
        names: of modules; those of a class that there is more than one of are compiled as well. A layer alone, and a
            module with another forward than its class's, are left as they are.

    Attributes:
        n_kinds: kinds of blocks.
        names: of the modules that are compiled.
    """

    def __init__(self, model: nn.Module, names: Iterable[str]) -> None:
        kinds: dict[tuple[Any, ...], _Kind] = {}
        self._blocks: list[_Block] = []
        self.names: list[str] = []
        for name, module in _repeated(model, names):
            if has_own_forward(module) or not isinstance(type(module).forward, types.FunctionType):
                continue
            kind = kinds.setdefault(_key(module), _Kind(type(module)))
            self._blocks.append(_Block(module, kind))
            self.names.append(name)
        self.n_kinds = len(kinds)

    def detach(self) -> None:
        """Let the modules compute as their classes say."""
        for block in self._blocks:
            take_off(block.model, block)

    def describe(self) -> list[str]:
        """A line for ``print(session)``."""
        return [f"compiled: {len(self.names)} blocks of {self.n_kinds} kinds, by torch.compile"]


class _Kind:
    """Blocks that are compiled alike."""

    def __init__(self, owner: type[nn.Module]) -> None:
        self.owner = owner
        self.plain: Callable[..., Any] = owner.forward
        self._compiled: Callable[..., Any] = torch.compile(
            _with_own_code(owner.forward), dynamic=False, backend=BACKEND
        )
        self._met: set[tuple[Any, ...]] = set()
        self._is_full = False

    def best(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[..., Any]:
        """The compiled function, unless PyTorch would give up on it: then the plain one."""
        call = _mode(module, args, kwargs)
        if call in self._met:
            return self._compiled
        name, limit = recompile_limit()
        if len(self._met) < limit:
            self._met.add(call)
            return self._compiled
        if not self._is_full:
            self._is_full = True
            say(
                f"compile: {self.owner.__name__} is called in more than {limit} modes and shapes; further ones run "
                f"as they are (raise {name} for more)"
            )
        return self.plain


class _Block:
    """Stands in for one block's forward pass."""

    name = "compiled"

    def __init__(self, module: nn.Module, kind: _Kind) -> None:
        self.model, self._kind = module, kind
        put_on(self.model, self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._kind.best(self.model, args, kwargs)(self.model, *args, **kwargs)


def _repeated(model: nn.Module, names: Iterable[str]) -> Iterator[tuple[str, nn.Module]]:
    """Modules with others inside: those of these names, and those of a class that there is more than one of.

    Of modules inside one another the outermost. A layer alone gains nothing.
    """
    asked = set(names)
    composite = {name: module for name, module in model.named_modules() if name and any(module.children())}
    counts = Counter(type(module) for module in composite.values() if not isinstance(module, _CONTAINERS))
    taken = ""
    for name, module in composite.items():
        if taken and name.startswith(f"{taken}."):
            continue
        if name in asked or counts[type(module)] > 1:
            taken = name
            yield name, module


def _with_own_code(function: Any) -> Callable[..., Any]:
    made = types.FunctionType(
        function.__code__.replace(),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    made.__kwdefaults__ = function.__kwdefaults__
    return made


def _key(module: nn.Module) -> tuple[Any, ...]:
    tensors = (*module.named_parameters(), *module.named_buffers())
    return type(module), repr(module), tuple((name, tuple(t.shape), t.dtype, t.stride()) for name, t in tensors)


def _mode(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """What ``torch.compile`` compiles anew for."""
    given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    device = given[0].device.type if given else "cpu"
    return (
        tuple((tuple(t.shape), t.dtype, t.stride(), t.requires_grad) for t in given),
        torch.is_grad_enabled(),
        torch.is_autocast_enabled(device),
        torch.get_autocast_dtype(device),
        torch.is_autocast_cache_enabled(),
        tuple(inner.training for inner in module.modules()),
        tuple(parameter.requires_grad for parameter in module.parameters()),
    )
