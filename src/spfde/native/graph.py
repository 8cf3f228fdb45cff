"""What of a model the engine can take: a symbolic trace, cut into regions."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx, nn
from torch.nn.utils import parametrize

from spfde.errors import InvalidArgument, Problem
from spfde.native.nodes import Node, read


@dataclass(frozen=True)
class Region:
    """Operations that run together; only its inputs and outputs are PyTorch tensors.

    Attributes:
        inputs: names of the values that come in, each [N, C, H, W]; of tokens, [..., C].
        nodes: in an order in which they can run.
        outputs: names of the values that something outside reads.
    """

    inputs: tuple[str, ...]
    nodes: tuple[Node, ...]
    outputs: tuple[str, ...]

    @property
    def is_tokens(self) -> bool:
        """Whether its values are tokens, for linear layers, and not images."""
        return any(node.kind == "linear" for node in self.nodes)


@dataclass(frozen=True)
class Capture:
    """A model, cut.

    Attributes:
        graph_module: calls ``region_0``, ``region_1``, … and, for the rest, the model's own modules.
            The regions are to be filled in with ``add_submodule``.
        regions: what was taken.
        left: what stayed in PyTorch, with the reason where there is one.
        halves: with ``frozen``, the same in two: what the frozen layers compute, as a tuple, and what becomes of that.
            They share their modules with ``graph_module``. None where nothing is computed before the first layer that
            learns.
    """

    graph_module: fx.GraphModule
    regions: tuple[Region, ...]
    left: tuple[str, ...]
    halves: tuple[fx.GraphModule, fx.GraphModule] | None = None


def capture(model: nn.Module, sparse: Collection[str] = (), frozen: Collection[str] | None = None) -> Capture:
    """Trace a model and cut it into regions, in its present training mode. Nothing runs, nothing changes.

    Args:
        model: the model.
        sparse: names of the masked parameters; a linear layer is taken only if its weight is one, for PyTorch's dense
            product needs no change of layout.
        frozen: names of the frozen parameters, to have the model in two halves; a region is then in one of them.

    Raises:
        InvalidArgument: the model's own ``forward`` cannot be traced.
    """
    graph, reasons = _trace(model)
    _skip_identities(graph, model, reasons)
    nodes = {node: read(node, model, reasons, sparse) for node in graph.nodes}
    known = {node: found for node, found in nodes.items() if found is not None}
    tokens = _leave_without_source(graph, known)
    fixed = set() if frozen is None else _fixed(graph, model, frozen)
    groups = _group(graph, known, {node: (is_tokens, node in fixed) for node, is_tokens in tokens.items()})
    captured, origin = _cut(model, graph, known, groups, reasons)
    if frozen is None:
        return captured
    halves = _halve(captured.graph_module, {node for node, source in origin.items() if source in fixed})
    return dataclasses.replace(captured, halves=halves)


# --- tracing ---------------------------------------------------------------------------------------------------------


class _Tracer(fx.Tracer):
    """Goes into modules of the user's that can be traced, and into none of PyTorch's."""

    def __init__(self, leaves: Mapping[str, str]) -> None:
        super().__init__()
        self.leaves = dict(leaves)
        self.stack: list[str] = []

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if module_qualified_name in self.leaves:
            return True
        reason = _own_reason(m)
        if reason is not None:
            self.leaves[module_qualified_name] = reason
            return True
        return m.__module__.startswith("torch.nn") and not isinstance(m, (nn.Sequential, nn.ModuleList))

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        self.stack.append(self.path_of_module(m))
        found = super().call_module(m, forward, args, kwargs)
        self.stack.pop()  # on an error it stays, and tells where it was
        return found


def _own_reason(module: nn.Module) -> str | None:
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    if any(getattr(module, name, None) for name in hooks):
        return "has hooks"
    if "forward" in vars(module):
        return "has a forward of its own"
    if parametrize.is_parametrized(module):
        return "is parametrized"
    return None


def _trace(model: nn.Module) -> tuple[fx.Graph, dict[str, str]]:
    """The graph, and why modules that could have been entered were not."""
    leaves: dict[str, str] = {}
    for _ in range(1 + sum(1 for _ in model.modules())):
        tracer = _Tracer(leaves)
        try:
            graph = tracer.trace(model)
        except Exception as error:  # a trace runs the user's code on stand-ins: anything may come
            leaves = tracer.leaves
            if not tracer.stack:
                raise InvalidArgument(
                    Problem(
                        "model",
                        type(model).__name__,
                        f"its forward cannot be traced for the native engine ({_first_line(error)})",
                        'Use engine="masked", or move what depends on the data into a submodule.',
                    )
                ) from error
            leaves[tracer.stack[-1]] = f"cannot be traced: {_first_line(error)}"
        else:
            graph.eliminate_dead_code(lambda node: node.op in ("output", "placeholder") or not node.users)
            return graph, tracer.leaves
    raise AssertionError("each attempt makes one more module a leaf")


def _skip_identities(graph: fx.Graph, model: nn.Module, reasons: Mapping[str, str]) -> None:
    """Take out what hands its input on: identities, and dropout that never drops."""
    for node in list(graph.nodes):
        if node.op != "call_module" or str(node.target) in reasons or len(node.args) != 1 or node.kwargs:
            continue
        module = model.get_submodule(str(node.target))
        never_drops = isinstance(module, (nn.Dropout, nn.Dropout2d)) and module.p == 0
        if (type(module) is nn.Identity or never_drops) and isinstance(node.args[0], fx.Node):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:120]


# --- cutting ---------------------------------------------------------------------------------------------------------


def _leave_without_source(graph: fx.Graph, known: dict[fx.Node, Node]) -> dict[fx.Node, bool]:
    """Leave what may have another shape than the kernels take; say of the others whether they work on tokens.

    Convolutions, norms and maximum pools start on images whatever they read, linear layers on tokens. The rest must
    stand behind one of these.
    """
    tokens: dict[fx.Node, bool] = {}
    for node in graph.nodes:
        found = known.get(node)
        if found is None:
            continue
        is_linear = found.kind == "linear"
        if is_linear or found.kind in ("conv", "norm", "max_pool"):
            read_pooled = any(
                source in known and known[source].kind == "global_pool" for source in node.all_input_nodes
            )
            takes = is_linear or not read_pooled
            tokens[node] = is_linear
        else:
            spaces = {tokens.get(source) for source in node.all_input_nodes}
            takes = len(spaces) == 1 and None not in spaces and (found.kind in ("act", "add") or spaces == {False})
            takes = takes and not any(known[source].kind == "global_pool" for source in node.all_input_nodes)
            tokens[node] = spaces == {True}
        if not takes:
            del known[node], tokens[node]
    return tokens


def _fixed(graph: fx.Graph, model: nn.Module, frozen: Collection[str]) -> set[fx.Node]:
    """What depends on the model's inputs and frozen parameters alone."""
    fixed: set[fx.Node] = set()
    for node in graph.nodes:
        own: list[str] = []
        if node.op == "call_module":
            module, name = model.get_submodule(str(node.target)), str(node.target)
            own = [f"{name}.{inner}" for inner, _ in module.named_parameters()]
        elif node.op == "get_attr":
            own = [str(node.target)] if isinstance(_attribute(model, str(node.target)), nn.Parameter) else []
        if node.op != "output" and set(own) <= set(frozen) and fixed.issuperset(node.all_input_nodes):
            fixed.add(node)
    return fixed


def _group(
    graph: fx.Graph, known: Mapping[fx.Node, Node], kind: Mapping[fx.Node, tuple[bool, bool]]
) -> list[list[fx.Node]]:
    """Connected nodes that no way through PyTorch leads out of and back in, each group with a layer that has weights.

    A node's stage is the number of times that a way to it from the inputs leaves known nodes of one kind (images or
    tokens, fixed or not) for something else. Nodes of one stage can run together.
    """
    stage: dict[fx.Node, int] = {}
    for node in graph.nodes:
        leaves = [source in known and kind[source] != kind.get(node) for source in node.all_input_nodes]
        steps = zip(node.all_input_nodes, leaves, strict=True)
        stage[node] = max((stage[source] + left for source, left in steps), default=0)
    parent = {node: node for node in known}

    def root(node: fx.Node) -> fx.Node:
        while parent[node] is not node:
            parent[node] = parent[parent[node]]
            node = parent[node]
        return node

    for node in known:
        for source in node.all_input_nodes:
            if source in known and stage[source] == stage[node] and kind[source] == kind[node]:
                parent[root(source)] = root(node)
    groups: dict[fx.Node, list[fx.Node]] = {}
    for node in known:
        groups.setdefault(root(node), []).append(node)
    return [group for group in groups.values() if any(known[node].kind in ("conv", "linear") for node in group)]


def _cut(
    model: nn.Module,
    graph: fx.Graph,
    known: Mapping[fx.Node, Node],
    groups: list[list[fx.Node]],
    reasons: Mapping[str, str],
) -> tuple[Capture, dict[fx.Node, fx.Node]]:
    """The new graph, and for each of its nodes one of the trace that it stands for."""
    regions = tuple(_region(group, known) for group in groups)
    group_of = {node: index for index, group in enumerate(groups) for node in group}
    by_name = {node.name: node for node in graph.nodes}
    new, values, called = fx.Graph(), dict[fx.Node, fx.Node](), set[int]()

    def emit(node: fx.Node) -> None:
        """Write ``node``, and what it needs, once."""
        waiting = [node]
        while waiting:
            at = waiting[-1]
            index = group_of.get(at)
            sources = at.all_input_nodes if index is None else [by_name[name] for name in regions[index].inputs]
            missing = [source for source in sources if source not in values]
            if at in values or (index is not None and index in called):
                waiting.pop()
            elif missing:
                waiting.extend(missing)
            else:
                waiting.pop()
                if index is None:
                    values[at] = new.node_copy(at, lambda n: values[n])
                else:
                    called.add(index)
                    _call_region(new, index, regions[index], by_name, values)

    for node in graph.nodes:
        if node not in group_of or node.name in regions[group_of[node]].outputs:
            emit(node)
    new.lint()
    targets: dict[str, Any] = {f"region_{index}": nn.Identity() for index in range(len(regions))}
    for node in new.nodes:
        if node.op in ("call_module", "get_attr") and node.target not in targets:
            targets[str(node.target)] = _attribute(model, str(node.target))
    captured = Capture(fx.GraphModule(targets, new), regions, _left(graph, group_of, model, reasons))
    origin = {made: node for node, made in values.items()}
    for index, region in enumerate(regions):
        call = next(node for node in new.nodes if node.target == f"region_{index}")
        origin[call] = by_name[region.outputs[0]]
    return captured, origin


def _halve(whole: fx.GraphModule, fixed: set[fx.Node]) -> tuple[fx.GraphModule, fx.GraphModule] | None:
    """The nodes in ``fixed``, and the others, which read what the former hand over."""
    inputs = [node for node in whole.graph.nodes if node.op == "placeholder"]
    border = [node for node in whole.graph.nodes if node in fixed and any(user not in fixed for user in node.users)]
    if not set(border) - set(inputs):
        return None
    front, back = fx.Graph(), fx.Graph()
    values: dict[fx.Node, fx.Node] = {}
    for node in whole.graph.nodes:
        if node in fixed:
            values[node] = front.node_copy(node, lambda n: values[n])
    front.output(tuple(values[node] for node in border))
    values = {node: back.placeholder(f"from_front_{node.name}") for node in border}
    for node in whole.graph.nodes:
        if node not in fixed:
            values[node] = back.node_copy(node, lambda n: values[n])
    return fx.GraphModule(whole, front), fx.GraphModule(whole, back)


def _call_region(
    new: fx.Graph, index: int, region: Region, by_name: Mapping[str, fx.Node], values: dict[fx.Node, fx.Node]
) -> None:
    call = new.call_module(f"region_{index}", tuple(values[by_name[name]] for name in region.inputs))
    if len(region.outputs) == 1:
        values[by_name[region.outputs[0]]] = call
        return
    for position, name in enumerate(region.outputs):
        values[by_name[name]] = new.call_function(operator.getitem, (call, position))


def _region(group: list[fx.Node], known: Mapping[fx.Node, Node]) -> Region:
    inside = set(group)
    inputs = _unique(source.name for node in group for source in node.all_input_nodes if source not in inside)
    outputs = tuple(node.name for node in group if any(user not in inside for user in node.users))
    return Region(inputs, tuple(known[node] for node in group), outputs)


def _attribute(model: nn.Module, name: str) -> Any:
    found: Any = model
    for part in name.split("."):
        found = getattr(found, part)
    return found


def _left(
    graph: fx.Graph, taken: Mapping[fx.Node, int], model: nn.Module, reasons: Mapping[str, str]
) -> tuple[str, ...]:
    left = []
    for node in graph.nodes:
        if node in taken or node.op in ("placeholder", "output", "get_attr"):
            continue
        if node.op == "call_module":
            name = str(node.target)
            kind = type(model.get_submodule(name)).__name__
            left.append(f"{name} ({kind}{'; ' + reasons[name] if name in reasons else ''})")
        else:
            left.append(node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "function"))
    return _unique(left)


def _unique(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(names))
