"""What the nodes of a graph do, seen while it runs once on stand-ins: shapes, writes, draws."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from spfde.core.generators import GeneratorsRestored
from spfde.core.plain_kernels import attention_in_products
from spfde.core.torch_private import NormBase, TorchDispatchMode, storage_id, tree_leaves, version_of


@dataclass(frozen=True)
class Fact:
    """What a node did when it ran on stand-ins.

    Attributes:
        shape: of its value; None where that is no floating-point tensor.
        storages: of its value's tensors, by identity.
        writes: inputs that it wrote into.
        returned: the input that its value is, itself and not a copy.
        draws: whether it took random numbers.
        is_tensor: whether its value is one tensor.
    """

    shape: tuple[int, ...] | None = None
    storages: frozenset[int] = frozenset()
    writes: tuple[fx.Node, ...] = ()
    returned: fx.Node | None = None
    draws: bool = False
    is_tensor: bool = False


class Impure(Exception):
    """A module does what no graph holds."""

    def __init__(self, reason: str, module: str | None = None) -> None:
        super().__init__(reason)
        self.reason, self.module = reason, module


class _Draws(TorchDispatchMode):
    """Notes whether an operator took random numbers."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags:
            products = attention_in_products(func, args, kwargs or {})
            if products is None:
                self.seen = True
            else:  # a fused attention draws where it drops out
                with self:
                    products()
        return func(*args, **(kwargs or {}))


class _Interpreter(fx.Interpreter):
    """Runs a graph, keeps every value, and notes what each node did."""

    def __init__(
        self, twin: nn.Module, graph: fx.Graph, leaves: Collection[str], draws: _Draws, generators: GeneratorsRestored
    ) -> None:
        super().__init__(twin, garbage_collect_values=False, graph=graph)
        self.leaves, self.draws, self.generators = leaves, draws, generators
        self.facts: dict[fx.Node, Fact] = {}

    def run_node(self, n: fx.Node) -> Any:
        sources = [(node, value) for node in n.all_input_nodes for value in _tensors(self.env[node])]
        before = [version_of(value) for _, value in sources]
        self.draws.seen = False
        is_opaque = n.op == "call_module" and n.target in self.leaves
        mark = self.generators.mark() if is_opaque else ()
        result = super().run_node(n)
        writes = [node for (node, value), then in zip(sources, before, strict=True) if version_of(value) != then]
        tensors = _tensors(result)
        self.facts[n] = Fact(
            tuple(result.shape) if isinstance(result, Tensor) and result.is_floating_point() else None,
            frozenset(storage_id(tensor) for tensor in tensors),
            tuple(dict.fromkeys(writes)),
            next((node for node, value in sources if value is result), None),
            self.draws.seen or (is_opaque and self.generators.has_drawn_since(mark)),
            isinstance(result, Tensor),
        )
        return result


def run(
    graph: fx.Graph,
    twin: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    leaves: Collection[str],
    generators: GeneratorsRestored,
) -> dict[fx.Node, Fact]:
    given = []
    for position, node in enumerate(node for node in graph.nodes if node.op == "placeholder"):
        default = node.args[0] if node.args else None
        given.append(args[position] if position < len(args) else kwargs.get(str(node.target), default))
    for module in twin.modules():
        if isinstance(module, NormBase):
            module.training = False  # a sample of one image has no statistics
    draws = _Draws()
    interpreter = _Interpreter(twin, graph, leaves, draws, generators)
    with draws:
        interpreter.run(*given, enable_io_processing=False)
    return interpreter.facts


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def functionalise(graph: fx.Graph, facts: Mapping[fx.Node, Fact]) -> set[fx.Node]:
    """Let whoever reads a value after it was written into read what the writing node returned.

    Returns:
        the nodes that write into memory which others read before.
    """
    order = {node: position for position, node in enumerate(graph.nodes)}
    shared = set()
    for node in graph.nodes:
        for source in facts[node].writes:
            aliases = [
                other
                for other in graph.nodes
                if order[other] < order[node] and facts[other].storages & facts[source].storages
            ]
            if any(alias.op in ("placeholder", "get_attr") for alias in aliases):
                raise Impure("writes into its input or its own state", _owner_of_write(node))
            if facts[node].returned is source:
                source.replace_all_uses_with(node, lambda user, at=node: order[user] > order[at])  # type: ignore[misc]
            if any(order[user] > order[node] for alias in aliases for user in alias.users):
                raise Impure("writes in place what is read otherwise later", _owner_of_write(node))
            if any(user is not node and user not in aliases for alias in aliases for user in alias.users):
                shared.add(node)
    return shared


def owners(node: fx.Node) -> list[str]:
    return ["", *(name for name, _ in node.meta.get("nn_module_stack", {}).values())]


def _owner_of_write(node: fx.Node) -> str:
    """The module that does not show the write: around a node that is a module itself."""
    return next(name for name in reversed(owners(node)) if name != node.target)
