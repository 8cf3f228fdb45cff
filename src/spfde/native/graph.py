"""What of a model the engine can take: a symbolic trace, cut into regions."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.utils import parametrize

from spfde.errors import InvalidArgument, Problem

Kind = Literal["conv", "norm", "act", "add", "max_pool", "avg_pool", "global_pool"]


@dataclass(frozen=True)
class Node:
    """One operation that the kernels know.

    Attributes:
        kind: which.
        name: of its value, unique in the graph.
        inputs: names of the values that it reads.
        module: qualified name of its module in the model; None for a function.
        options: the rest: ``act``; ``kernel``, ``stride``, ``padding``, ``count_include_pad``; ``keepdim``.
    """

    kind: Kind
    name: str
    inputs: tuple[str, ...]
    module: str | None
    options: Mapping[str, Any]


@dataclass(frozen=True)
class Region:
    """Operations that run together; only its inputs and outputs are PyTorch tensors.

    Attributes:
        inputs: names of the values that come in, each [N, C, H, W].
        nodes: in an order in which they can run.
        outputs: names of the values that something outside reads.
    """

    inputs: tuple[str, ...]
    nodes: tuple[Node, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class Capture:
    """A model, cut.

    Attributes:
        graph_module: calls ``region_0``, ``region_1``, … and, for the rest, the model's own modules.
            The regions are to be filled in with ``add_submodule``.
        regions: what was taken.
        left: what stayed in PyTorch, with the reason where there is one.
    """

    graph_module: fx.GraphModule
    regions: tuple[Region, ...]
    left: tuple[str, ...]


def capture(model: nn.Module) -> Capture:
    """Trace a model and cut it into regions, in its present training mode. Nothing runs, nothing changes.

    Raises:
        InvalidArgument: the model's own ``forward`` cannot be traced.
    """
    graph, reasons = _trace(model)
    _skip_identities(graph, model, reasons)
    nodes = {node: _read(node, model, reasons) for node in graph.nodes}
    known = {node: found for node, found in nodes.items() if found is not None}
    _leave_without_source(graph, known)
    groups = _group(graph, known)
    return _cut(model, graph, known, groups, reasons)


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


# --- reading one node ------------------------------------------------------------------------------------------------

_ACT_MODULES: dict[type[nn.Module], str] = {nn.ReLU: "relu", nn.ReLU6: "relu6", nn.SiLU: "silu", nn.GELU: "gelu"}
_ACT_FUNCTIONS: dict[Any, str] = {
    F.relu: "relu", torch.relu: "relu", torch.relu_: "relu", F.relu_: "relu", F.relu6: "relu6", F.silu: "silu",
    F.gelu: "gelu", "relu": "relu", "relu_": "relu",
}  # fmt: skip
_ADDS = (operator.add, operator.iadd, torch.add, "add", "add_")
_IN_PLACE = (operator.iadd, torch.relu_, F.relu_, "add_", "relu_")


def _read(node: fx.Node, model: nn.Module, reasons: Mapping[str, str]) -> Node | None:
    """The operation as the kernels know it, or None."""
    if node.op == "call_module":
        return _read_module(node, model, reasons)
    if node.op not in ("call_function", "call_method"):
        return None
    if node.target in _ADDS:
        return _read_add(node)
    if node.target in _ACT_FUNCTIONS:
        return _read_act(node)
    return _read_pool_function(node)


def _read_module(node: fx.Node, model: nn.Module, reasons: Mapping[str, str]) -> Node | None:
    name = str(node.target)
    module = model.get_submodule(name)
    if name in reasons or len(node.args) != 1 or node.kwargs or not isinstance(node.args[0], fx.Node):
        return None
    source, kind = (node.args[0].name,), type(module)
    if isinstance(module, nn.Conv2d) and kind is nn.Conv2d and _takes_conv(module):
        return Node("conv", node.name, source, name, {})
    if kind is nn.BatchNorm2d:
        return Node("norm", node.name, source, name, {})
    if kind in _ACT_MODULES and getattr(module, "approximate", "none") == "none":
        if getattr(module, "inplace", False) and _is_read_later(node):
            return None
        return Node("act", node.name, source, name, {"act": _ACT_MODULES[kind]})
    if isinstance(module, nn.AdaptiveAvgPool2d) and module.output_size in (1, (1, 1)):
        return Node("global_pool", node.name, source, name, {"keepdim": True})
    if (
        isinstance(module, nn.MaxPool2d)
        and module.dilation in (1, (1, 1))
        and not module.ceil_mode
        and not module.return_indices
    ):
        return Node("max_pool", node.name, source, name, _window(module.kernel_size, module.stride, module.padding))
    if isinstance(module, nn.AvgPool2d) and not module.ceil_mode and module.divisor_override is None:
        window = _window(module.kernel_size, module.stride, module.padding)
        return Node("avg_pool", node.name, source, name, {**window, "count_include_pad": module.count_include_pad})
    return None


def _takes_conv(conv: nn.Conv2d) -> bool:
    if (
        conv.padding_mode != "zeros"
        or conv.stride[0] != conv.stride[1]
        or conv.weight.dtype
        not in (
            torch.float32,
            torch.float64,
        )
    ):
        return False
    if conv.padding == "same":
        return all((k - 1) * d % 2 == 0 for k, d in zip(conv.kernel_size, conv.dilation, strict=True))
    return True


def _read_add(node: fx.Node) -> Node | None:
    if (
        len(node.args) != 2
        or not all(isinstance(arg, fx.Node) for arg in node.args)
        or node.kwargs.get("alpha", 1) != 1
    ):
        return None
    if set(node.kwargs) - {"alpha"} or (node.target in _IN_PLACE and _is_read_later(node)):
        return None
    return Node("add", node.name, tuple(arg.name for arg in node.args if isinstance(arg, fx.Node)), None, {})


def _read_act(node: fx.Node) -> Node | None:
    options = dict(node.kwargs)
    in_place = (
        bool(options.pop("inplace", False))
        or node.target in _IN_PLACE
        or (len(node.args) == 2 and node.args[1] is True)
    )
    if options.pop("approximate", "none") != "none" or options:
        return None
    if not isinstance(node.args[0], fx.Node) or len(node.args) > 2 or (in_place and _is_read_later(node)):
        return None
    return Node("act", node.name, (node.args[0].name,), None, {"act": _ACT_FUNCTIONS[node.target]})


def _read_pool_function(node: fx.Node) -> Node | None:
    args, options = node.args, dict(node.kwargs)
    if not args or not isinstance(args[0], fx.Node):
        return None
    source = (args[0].name,)
    if node.target is F.adaptive_avg_pool2d and not options and args[1:] in (((1, 1),), (1,)):
        return Node("global_pool", node.name, source, None, {"keepdim": True})
    if node.target in ("mean", torch.mean):
        dim: Any = args[1] if len(args) > 1 else options.pop("dim", None)
        keepdim = args[2] if len(args) > 2 else options.pop("keepdim", False)
        if not options and isinstance(dim, (tuple, list)) and tuple(dim) in ((2, 3), (-2, -1), (3, 2), (-1, -2)):
            return Node("global_pool", node.name, source, None, {"keepdim": bool(keepdim)})
        return None
    if node.target in (F.max_pool2d, F.avg_pool2d, torch.max_pool2d):
        return _read_window_function(node, source)
    return None


def _read_window_function(node: fx.Node, source: tuple[str, ...]) -> Node | None:
    is_max = node.target is not F.avg_pool2d
    names = ("kernel_size", "stride", "padding", "dilation" if is_max else "ceil_mode", "ceil_mode" if is_max else "_")
    options = dict(zip(names, node.args[1:], strict=False)) | dict(node.kwargs)
    include = options.pop("count_include_pad", True)
    if options.pop("ceil_mode", False) or options.pop("dilation", 1) not in (1, (1, 1), [1, 1]):
        return None
    if options.pop("return_indices", False) or options.pop("divisor_override", None) is not None or "_" in options:
        return None
    window = _window(options.pop("kernel_size"), options.pop("stride", None), options.pop("padding", 0))
    if options or any(isinstance(value, fx.Node) for pair in window.values() for value in pair):
        return None
    return Node(
        "max_pool" if is_max else "avg_pool", node.name, source, None, {**window, "count_include_pad": bool(include)}
    )


def _window(kernel: Any, stride: Any, padding: Any) -> dict[str, tuple[Any, Any]]:
    return {"kernel": _pair(kernel), "stride": _pair(stride or kernel), "padding": _pair(padding)}


def _pair(value: Any) -> tuple[Any, Any]:
    if isinstance(value, (tuple, list)):
        return (value[0], value[0]) if len(value) == 1 else (value[0], value[1])
    return value, value


def _is_read_later(node: fx.Node) -> bool:
    """Would someone else see what this node does to its input in place?"""
    source = node.args[0]
    return isinstance(source, fx.Node) and any(user is not node and node < user for user in source.users)


# --- cutting ---------------------------------------------------------------------------------------------------------


def _leave_without_source(graph: fx.Graph, known: dict[fx.Node, Node]) -> None:
    """Leave what may not be four-dimensional: only convolutions, norms and pools can start a region."""
    for node in graph.nodes:
        found = known.get(node)
        if found is None:
            continue
        inside = [source in known and known[source].kind != "global_pool" for source in node.all_input_nodes]
        pooled = any(source in known and known[source].kind == "global_pool" for source in node.all_input_nodes)
        starts = found.kind in ("conv", "norm", "max_pool")
        if pooled or (not starts and not all(inside)):
            del known[node]


def _group(graph: fx.Graph, known: Mapping[fx.Node, Node]) -> list[list[fx.Node]]:
    """Connected nodes that no way through PyTorch leads out of and back in, each group with a convolution.

    A node's stage is the number of times that a way to it from the inputs leaves known nodes for others. Nodes of one
    stage can run together.
    """
    stage: dict[fx.Node, int] = {}
    for node in graph.nodes:
        sources = node.all_input_nodes
        if node in known:
            stage[node] = max((stage[source] for source in sources), default=0)
        else:
            stage[node] = max((stage[source] + (source in known) for source in sources), default=0)
    parent = {node: node for node in known}

    def root(node: fx.Node) -> fx.Node:
        while parent[node] is not node:
            parent[node] = parent[parent[node]]
            node = parent[node]
        return node

    for node in known:
        for source in node.all_input_nodes:
            if source in known and stage[source] == stage[node]:
                parent[root(source)] = root(node)
    groups: dict[fx.Node, list[fx.Node]] = {}
    for node in known:
        groups.setdefault(root(node), []).append(node)
    return [group for group in groups.values() if any(known[node].kind == "conv" for node in group)]


def _cut(
    model: nn.Module,
    graph: fx.Graph,
    known: Mapping[fx.Node, Node],
    groups: list[list[fx.Node]],
    reasons: Mapping[str, str],
) -> Capture:
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
    return Capture(fx.GraphModule(targets, new), regions, _left(graph, group_of, model, reasons))


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
