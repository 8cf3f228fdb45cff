"""What of a model the engine can take: a symbolic trace, cut into regions."""

from __future__ import annotations

import functools
import operator
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import fx, nn

from spfde.engines.facts import Fact
from spfde.engines.guards import Guards, ModeGuards
from spfde.engines.halves import Halves, fixed_nodes, halve
from spfde.engines.native.attention import IN_PLACE_OF
from spfde.engines.native.ops import Op, read
from spfde.engines.trace import Traced, copy_shared, trace
from spfde.model.sample import Sample

_REGION = "spfde_region_"


def region_name(index: int) -> str:
    """Name of a region in the graph modules of a ``Capture``."""
    return f"{_REGION}{index}"


@dataclass(frozen=True)
class Region:
    """Operations that run together; only its inputs and outputs are PyTorch tensors.

    Attributes:
        inputs: names of the values that come in, each [N, C, H, W]; of tokens, [..., C].
        ops: in an order in which they can run.
        outputs: names of the values that something outside reads.
    """

    inputs: tuple[str, ...]
    ops: tuple[Op, ...]
    outputs: tuple[str, ...]

    @functools.cached_property
    def is_tokens(self) -> bool:
        """Whether its values are tokens, for linear layers, and not images."""
        return any(op.kind == "linear" for op in self.ops)


@dataclass(frozen=True)
class Capture:
    """A model, cut.

    Attributes:
        graph_module: calls the regions by ``region_name`` and, for the rest, the model's own modules.
            The regions are to be filled in with ``add_submodule``. None: the model stays in PyTorch as it is.
        left: what stayed in PyTorch, with the reason where there is one.
        guards: the state of the model that this holds for.
        regions: what was taken.
        plain: each region once more, in PyTorch, for inputs that the kernels do not take.
        draws: what takes random numbers, by name, with the name of the module that runs it.
        halves: with ``frozen``, the same in two, which share their modules with ``graph_module``. None where nothing is
            computed before the first layer that learns.
    """

    graph_module: fx.GraphModule | None
    left: tuple[str, ...]
    guards: Guards | ModeGuards
    regions: tuple[Region, ...] = ()
    plain: tuple[nn.Module, ...] = ()
    draws: Mapping[str, str] = field(default_factory=dict)
    halves: Halves | None = None

    @property
    def is_current(self) -> bool:
        """Is the model as it was?"""
        return self.guards.hold


def capture(
    model: nn.Module,
    sample: Sample,
    sparse: Collection[str] = (),
    frozen: Collection[str] | None = None,
    *,
    training: bool | None = None,
) -> Capture:
    """Trace a model and cut it into regions. Nothing runs, nothing changes.

    Args:
        model: the model.
        sample: what it is called with, a batch of any size: the shapes of its values decide what is taken.
        sparse: names of the masked parameters; a linear layer is taken only if its weight is one, for PyTorch's dense
            product needs no change of layout.
        frozen: names of the frozen parameters, to have the model in two halves; a region is then in one of them.
        training: in this mode; None: as the model is.

    Raises:
        InvalidArgument: the model's own ``forward`` cannot be traced.
    """
    traced = trace(model, sample, training=training)
    graph = traced.graph
    _skip_identities(traced, model, training)
    known, why = _read_all(traced, model, sparse)
    tokens = _leave_without_source(graph, known)
    _leave_by_shape(traced.facts, known, tokens, why)
    copy_shared(traced, known)
    fixed = set() if frozen is None else fixed_nodes(traced, model, frozen)
    groups = _group(graph, known, {node: (is_tokens, node in fixed) for node, is_tokens in tokens.items()})
    regions = tuple(_region(group, known) for group in groups)
    graph_module, origin = _cut(model, graph, groups, regions)
    halves = None
    if frozen is not None:
        halves = halve(traced, graph_module, origin, fixed)
    return Capture(
        graph_module,
        _left(graph, {node for group in groups for node in group}, model, why),
        Guards(model, traced.reads, traced.called),
        regions,
        tuple(_plain(model, traced.facts, group, region) for group, region in zip(groups, regions, strict=True)),
        {node.name: traced.owner(node) for node, fact in traced.facts.items() if fact.draws},
        halves,
    )


def _skip_identities(traced: Traced, model: nn.Module, training: bool | None) -> None:
    """Take out what hands its input on: identities, and dropout that does not drop."""
    for node in list(traced.graph.nodes):
        if node.op != "call_module" or str(node.target) in traced.leaves or len(node.args) != 1 or node.kwargs:
            continue
        module = model.get_submodule(str(node.target))
        is_dropout = isinstance(module, (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d))
        keeps_all = is_dropout and (module.p == 0 or not (module.training if training is None else training))
        if (type(module) is nn.Identity or keeps_all) and isinstance(node.args[0], fx.Node):
            node.replace_all_uses_with(node.args[0])
            traced.graph.erase_node(node)


def _read_all(
    traced: Traced, model: nn.Module, sparse: Collection[str]
) -> tuple[dict[fx.Node, Op], dict[fx.Node, str]]:
    """What the kernels know, and why they do not know the rest."""
    known, why = {}, {}
    for node in traced.graph.nodes:
        found = read(node, model, traced.leaves, sparse, lambda source: traced.facts[source].shape)
        if isinstance(found, Op) and node.users:
            known[node] = found
        elif isinstance(found, str):
            why[node] = found
    return known, why


# --- cutting ---------------------------------------------------------------------------------------------------------


def _leave_without_source(graph: fx.Graph, known: dict[fx.Node, Op]) -> dict[fx.Node, bool]:
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


def _leave_by_shape(
    facts: Mapping[fx.Node, Fact], known: dict[fx.Node, Op], tokens: dict[fx.Node, bool], why: dict[fx.Node, str]
) -> None:
    """Leave what reads something else than [N, C, H, W] (tokens: [..., C]), or adds values of different shapes."""
    for node in list(known):
        shapes = [facts[source].shape for source in node.all_input_nodes]
        fits = [shape is not None and (len(shape) >= 2 if tokens[node] else len(shape) == 4) for shape in shapes]
        if not all(fits):
            why[node] = f"reads {' and '.join(map(str, shapes))}"
        elif len(set(shapes)) > 1:
            why[node] = "adds values of different shapes"
        else:
            continue
        del known[node], tokens[node]


def _group(
    graph: fx.Graph, known: Mapping[fx.Node, Op], kind: Mapping[fx.Node, tuple[bool, bool]]
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
    model: nn.Module, graph: fx.Graph, groups: list[list[fx.Node]], regions: Sequence[Region]
) -> tuple[fx.GraphModule, dict[fx.Node, fx.Node]]:
    """The new graph, and for each of its nodes one of the trace that it stands for."""
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
                    values[at] = made = new.node_copy(at, lambda n: values[n])
                    made.target = IN_PLACE_OF.get(made.target, made.target)
                else:
                    called.add(index)
                    _call_region(new, index, regions[index], by_name, values)

    for node in graph.nodes:
        if node not in group_of or node.name in regions[group_of[node]].outputs:
            emit(node)
    new.lint()
    origin = {made: node for node, made in values.items()}
    for index, region in enumerate(regions):
        call = next(node for node in new.nodes if node.target == region_name(index))
        origin[call] = by_name[region.outputs[0]]
    return _module(model, new), origin


def _module(model: nn.Module, graph: fx.Graph) -> fx.GraphModule:
    """The graph with the model's modules and tensors, and identities for the regions."""
    targets: dict[str, Any] = {}
    for node in graph.nodes:
        if node.op in ("call_module", "get_attr"):
            name = str(node.target)
            targets[name] = nn.Identity() if name.startswith(_REGION) else operator.attrgetter(name)(model)
    return fx.GraphModule(targets, graph)


def _plain(model: nn.Module, facts: Mapping[fx.Node, Fact], group: list[fx.Node], region: Region) -> fx.GraphModule:
    """A region's operations in PyTorch; one that writes in place gets a copy, for others may read its input."""
    graph, inside = fx.Graph(), set(group)
    sources = {source.name: source for node in group for source in node.all_input_nodes if source not in inside}
    values = {sources[name]: graph.placeholder(name) for name in region.inputs}
    for node in group:
        if facts[node].writes:
            values.update({source: graph.call_method("clone", (values[source],)) for source in node.all_input_nodes})
        values[node] = graph.node_copy(node, lambda n: values[n])
    made = {node.name: values[node] for node in group}
    outputs = tuple(made[name] for name in region.outputs)
    graph.output(outputs[0] if len(outputs) == 1 else outputs)
    return _module(model, graph)


def _call_region(
    new: fx.Graph, index: int, region: Region, by_name: Mapping[str, fx.Node], values: dict[fx.Node, fx.Node]
) -> None:
    call = new.call_module(region_name(index), tuple(values[by_name[name]] for name in region.inputs))
    if len(region.outputs) == 1:
        values[by_name[region.outputs[0]]] = call
        return
    for position, name in enumerate(region.outputs):
        values[by_name[name]] = new.call_function(operator.getitem, (call, position))


def _region(group: list[fx.Node], known: Mapping[fx.Node, Op]) -> Region:
    inside = set(group)
    inputs = _unique(source.name for node in group for source in node.all_input_nodes if source not in inside)
    outputs = tuple(node.name for node in group if any(user not in inside for user in node.users))
    return Region(inputs, tuple(known[node] for node in group), outputs)


def _left(graph: fx.Graph, taken: Collection[fx.Node], model: nn.Module, why: Mapping[fx.Node, str]) -> tuple[str, ...]:
    left = []
    for node in graph.nodes:
        if node in taken or node.op in ("placeholder", "output", "get_attr"):
            continue
        if node.op == "call_module":
            name = str(node.target)
            kind = type(model.get_submodule(name)).__name__
            left.append(f"{name} ({kind}{'; ' + why[node] if node in why else ''})")
        else:
            name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "function")
            left.append(f"{name} ({why[node]})" if node in why else name)
    return _unique(left)


def _unique(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(names))
