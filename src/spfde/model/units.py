"""What of a model is never cut, read off its module tree and put in order of execution by a trace."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass

from torch import nn

from spfde.model.trace import Trace, weight_of

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


@dataclass(frozen=True)
class Unit:
    """What is never cut: a module, a bare parameter, or several of them that cannot be separated."""

    names: tuple[str, ...]
    parameters: frozenset[str]  # those that are used
    layers: frozenset[str]  # the weights of layers among them
    first: int  # position of the first operation that reads one
    last: int
    composite: bool  # a module of several layers, hence a block; what is not composite joins one

    @property
    def name(self) -> str:
        return " + ".join(self.names) if len(self.names) <= 3 else f"{self.names[0]} … {self.names[-1]}"

    @property
    def parents(self) -> set[str]:
        return {name.rpartition(".")[0] for name in self.names}

    def named(self, given: Mapping[str, str]) -> str:
        """The prefix that was given for it, or its name."""
        return next((given[name] for name in self.names if given.get(name, name) != name), self.name)

    def __or__(self, other: Unit) -> Unit:
        """The two as one; ``other`` starts later."""
        return Unit(
            self.names + other.names,
            self.parameters | other.parameters,
            self.layers | other.layers,
            self.first,
            max(self.last, other.last),
            self.composite or other.composite,
        )


class Reader:
    """Reads units off the module tree, with the positions of a trace."""

    def __init__(self, model: nn.Module, trace: Trace) -> None:
        self.model = model
        self.names = {id(p): name for name, p in model.named_parameters()}
        self.uses: dict[str, tuple[int, int]] = {}
        for op in trace.ops:
            for name in op.parameters:
                self.uses[name] = (self.uses.get(name, (op.position, 0))[0], op.position)
        self.layers = weighted_layers(model, trace)
        self.first_run = trace.first_run

    def layers_in(self, module: nn.Module, *, recurse: bool = True) -> set[str]:
        return {self.names[id(p)] for p in module.parameters(recurse=recurse)} & self.layers

    def units(
        self, *, opened: Container[str] = (), named: frozenset[str] = frozenset(), by_layer: bool = False
    ) -> list[Unit]:
        """Containers, modules that hold a list of blocks, and those in ``opened`` are opened; others are units.

        Modules in ``named`` are units in any case, and alone are composite; what holds one is opened. ``by_layer``:
        modules of several layers are opened, too, whether they are named or not.
        """
        seen: set[int] = set()
        claimed: set[str] = set()
        found = []

        def add(name: str, parameters: Iterable[nn.Parameter]) -> None:
            # A tied parameter belongs to the first module that holds it; its use elsewhere stretches that unit.
            mine = frozenset(self.names[id(p)] for p in parameters) & (self.uses.keys() - claimed)
            if mine:
                claimed.update(mine)
                layers = mine & self.layers
                first, last = min(self.uses[p][0] for p in mine), max(self.uses[p][1] for p in mine)
                found.append(Unit((name,), mine, layers, first, last, name in named if named else len(layers) >= 2))

        def walk(name: str, module: nn.Module) -> None:
            if id(module) in seen:
                return
            seen.add(id(module))
            holds_named = any(other.startswith(f"{name}.") for other in named)
            is_open = (
                not name
                or holds_named
                or name in opened
                or isinstance(module, _CONTAINERS)
                or self._holds_blocks(module)
                or (by_layer and len(self.layers_in(module)) >= 2)
            )
            if not is_open or (name in named and not by_layer):
                add(name, module.parameters())
                return
            for p in module.parameters(recurse=False):
                add(self.names[id(p)], [p])
            for key, child in module.named_children():
                walk(f"{name}.{key}" if name else key, child)

        walk("", self.model)
        return found

    def _holds_blocks(self, module: nn.Module) -> bool:
        """Is there, at any depth, a container of two or more modules that hold several layers each?

        A sequence of single layers (convolution, norm, activation) is an item of a block, not a block.
        """

        def is_block(child: nn.Module) -> bool:
            is_item = isinstance(child, nn.Sequential) and all(next(part.children(), None) is None for part in child)
            return not is_item and len(self.layers_in(child)) >= 2

        return any(
            sum(map(is_block, inner.children())) >= 2 for inner in module.modules() if isinstance(inner, _CONTAINERS)
        )


def weighted_layers(model: nn.Module, trace: Trace) -> frozenset[str]:
    """Names of the weights of convolutions and matrix products: read by a counted operation, two dimensions or more.

    Of a weight that is computed from several parameters (weight norm) the largest one stands for the layer.
    """
    parameters = dict(model.named_parameters())
    weights = (weight_of(op, parameters) for op in trace.ops if op.flops)
    return frozenset(name for name in weights if name is not None)


def merge(units: list[Unit]) -> list[Unit]:
    """Units in order of execution; those that run interleaved, or share a parameter, become one."""
    merged: list[Unit] = []
    for unit in sorted(units, key=lambda unit: unit.first):
        merged.append(merged.pop() | unit if merged and merged[-1].last >= unit.first else unit)
    return merged
