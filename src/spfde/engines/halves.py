"""A traced model in two halves: what its frozen front makes of the inputs, and what becomes of that."""

from __future__ import annotations

import operator
from collections.abc import Collection, Mapping
from typing import NamedTuple

from torch import fx, nn

from spfde.core.torch_private import NormBase
from spfde.engines.trace import Traced


class Halves(NamedTuple):
    """A model in two. ``back(*front(*inputs), *given(*inputs))`` is what the model computes.

    Attributes:
        front: what is fixed: a tuple of tensors, each a function of the inputs and of frozen parameters alone.
        given: those inputs that the back reads itself, as a tuple.
        back: the rest.
    """

    front: fx.GraphModule
    given: fx.GraphModule
    back: fx.GraphModule


def fixed_nodes(traced: Traced, model: nn.Module, frozen: Collection[str], held: Collection[str] = ()) -> set[fx.Node]:
    """What depends on a model's inputs and frozen parameters alone, and is the same each time.

    Args:
        traced: the model's graph.
        model: the model.
        frozen: names of the frozen parameters.
        held: names of modules whose norms are taken to keep their statistics, whatever mode they are in now.
    """
    fixed: set[fx.Node] = set()
    for node in traced.graph.nodes:
        varies = node in traced.facts and traced.facts[node].draws
        if node.op == "call_module":
            name = str(node.target)
            for inner, module in model.get_submodule(name).named_modules(prefix=name):
                varies = varies or (isinstance(module, NormBase) and module.training and inner not in held)
        own = owned(node, model)
        if node.op != "output" and not varies and own <= set(frozen) and fixed.issuperset(node.all_input_nodes):
            fixed.add(node)
    return fixed


def owned(node: fx.Node, model: nn.Module) -> set[str]:
    """Names of the parameters that a node reads itself."""
    name = str(node.target)
    if node.op == "call_module":
        return {f"{name}.{inner}" for inner, _ in model.get_submodule(name).named_parameters()}
    is_read = node.op == "get_attr" and isinstance(operator.attrgetter(name)(model), nn.Parameter)
    return {name} if is_read else set()


def halve(
    traced: Traced, whole: fx.GraphModule, origin: Mapping[fx.Node, fx.Node], fixed: Collection[fx.Node]
) -> Halves | None:
    """Cut a model in two.

    What both halves need and no parameter has a part in, such as sizes and masks, both compute, as they do what the
    inputs have no part in but by their sizes: the back gets no numbers that were rounded for no gain.

    Args:
        traced: the model's graph.
        whole: a graph of the same; the halves share its modules.
        origin: for each node of it the one of ``traced`` that it stands for.
        fixed: see ``fixed_nodes``.

    Returns:
        the halves; None where nothing is computed before the first thing that is not fixed.
    """
    nodes = list(whole.graph.nodes)
    fixed = {node for node in nodes if origin.get(node) in fixed}
    weighed, moving = set[fx.Node](), set[fx.Node]()  # what parameters have a part in, and numbers of the inputs
    for node in nodes:
        if node.op in ("call_module", "get_attr") or not weighed.isdisjoint(node.all_input_nodes):
            weighed.add(node)
        moves = node.op == "placeholder" or not moving.isdisjoint(node.all_input_nodes)
        if moves and (node not in origin or traced.kind(origin[node]) != "plain"):
            moving.add(node)
    border, again = set[fx.Node](), set[fx.Node]()
    waiting = [source for node in nodes if node not in fixed for source in node.all_input_nodes if source in fixed]
    while waiting:
        node = waiting.pop()
        kept = node in moving and node in weighed and traced.kind(origin[node]) == "tensor"
        if node.op == "placeholder" or kept:
            border.add(node)
        elif node not in again:
            again.add(node)
            waiting += node.all_input_nodes
    handed = [node for node in nodes if node in border and node.op != "placeholder"]
    given = [node for node in nodes if node in border and node.op == "placeholder"]
    if not handed:
        return None
    inputs = [node for node in nodes if node.op == "placeholder"]
    return Halves(
        fx.GraphModule(whole, _returning([node for node in nodes if node in fixed], handed)),
        fx.GraphModule(whole, _returning(inputs, given)),
        fx.GraphModule(whole, _behind([node for node in nodes if node not in fixed or node in again], handed + given)),
    )


def _returning(nodes: Collection[fx.Node], outputs: Collection[fx.Node]) -> fx.Graph:
    graph, values = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in nodes:
        values[node] = graph.node_copy(node, lambda n: values[n])
    graph.output(tuple(values[node] for node in outputs))
    return graph


def _behind(nodes: Collection[fx.Node], inputs: Collection[fx.Node]) -> fx.Graph:
    graph = fx.Graph()
    values = {node: graph.placeholder(f"from_front_{node.name}") for node in inputs}
    for node in nodes:
        values[node] = graph.node_copy(node, lambda n: values[n])
    return graph
