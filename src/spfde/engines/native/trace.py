"""The graph that a model computes, free of writes in place: each value is what its node made, for whoever reads it.

The trace runs on a copy of the model whose tensors are fake, so that the model, its buffers and the generators stay as
they were; and what happened to the copy tells what a graph cannot hold: draws, counters, tensors out of nothing. Such a
module stays in PyTorch whole. Then the graph itself runs once on stand-ins: shapes, writes and draws of each node are
seen, not guessed from its name.
"""

from __future__ import annotations

import operator
import random
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from spfde.core.errors import InvalidArgument, Problem
from spfde.core.plain_kernels import PlainKernels, attention_in_products
from spfde.core.torch_private import (
    HOOKS,
    MODULES,
    FakeTensorMode,
    NormBase,
    TorchDispatchMode,
    storage_id,
    tree_leaves,
    tree_map_only,
    version_of,
)
from spfde.engines.native.guards import guards_of, is_same
from spfde.model.sample import Sample, call_arguments, global_generators_restored
from spfde.model.trace import like_the_model
from spfde.model.twin import fake_copy

# fx patches nn.Module while it traces, and the second of two threads would put back the first one's patch.
_PATCHING = threading.RLock()


@dataclass(frozen=True)
class Fact:
    """What a node did when it ran on stand-ins.

    Attributes:
        shape: of its value; None where that is no floating-point tensor.
        storages: of its value's tensors, by identity.
        writes: inputs that it wrote into.
        returned: the input that its value is, itself and not a copy.
        draws: whether it took random numbers.
    """

    shape: tuple[int, ...] | None = None
    storages: frozenset[int] = frozenset()
    writes: tuple[fx.Node, ...] = ()
    returned: fx.Node | None = None
    draws: bool = False


@dataclass(frozen=True)
class Traced:
    """A model's graph.

    Attributes:
        graph: no node reads what another one wrote into, but what that one returned.
        facts: by node.
        shared: nodes that write into memory which others read before; in PyTorch they need a copy of it.
        leaves: why modules that could have been entered were not, by name.
    """

    graph: fx.Graph
    facts: Mapping[fx.Node, Fact]
    shared: Collection[fx.Node]
    leaves: Mapping[str, str]

    def owner(self, node: fx.Node) -> str:
        """Name of the innermost module that runs ``node``; '' is the model."""
        return _owners(node)[-1]


class _Impure(Exception):
    """A module does what no graph holds."""

    def __init__(self, reason: str, module: str | None = None) -> None:
        super().__init__(reason)
        self.reason, self.module = reason, module


def trace(model: nn.Module, sample: Sample, *, training: bool | None = None) -> Traced:
    """Trace a model. Nothing is computed, nothing changes.

    Args:
        model: the model.
        sample: what it is called with.
        training: trace it in this mode; None: as it is.

    Raises:
        InvalidArgument: the model's own ``forward`` cannot be traced.
    """
    leaves: dict[str, str] = {}
    modules = dict(model.named_modules(remove_duplicate=False))
    for _ in range(1 + len(modules)):
        tracer = _Tracer(modules, leaves)
        try:
            fake = FakeTensorMode(allow_non_fake_inputs=True)
            with fake:
                twin, _ = fake_copy(model, fake)
                args, kwargs = tree_map_only(Tensor, like_the_model(model, fake), call_arguments(sample))
            if training is not None:
                twin.train(training)
            with torch.no_grad(), global_generators_restored():
                with _PATCHING, _unchanged(twin):
                    graph = tracer.trace(twin)
                with fake, PlainKernels():
                    facts = _run(graph, twin, args, kwargs, tracer.leaves)
            shared = _functionalise(graph, facts)
        except _Impure as error:
            leaves = tracer.leaves
            name = error.module if error.module is not None else (tracer.stack or [""])[-1]
            if not name:
                raise _refused(model, error.reason) from error
            leaves[name] = error.reason
        except Exception as error:  # a trace runs the user's code on stand-ins: anything may come
            leaves = tracer.leaves
            if not tracer.stack:
                raise _refused(model, _first_line(error)) from error
            leaves[tracer.stack[-1]] = f"cannot be traced: {_first_line(error)}"
        else:
            _drop_unneeded(graph, modules, tracer.leaves)
            return Traced(graph, facts, shared, tracer.leaves)
    raise AssertionError("each attempt makes one more module a leaf")


def check_forward(model: nn.Module) -> None:
    """Raise ``InvalidArgument`` where another forward than the class's was put on the model: the engine replaces it."""
    if _has_own_forward(model):
        raise _refused(model, "the instance has a forward of its own")


def _has_own_forward(module: nn.Module) -> bool:
    own = vars(module).get("forward")
    function = getattr(own, "__func__", None)
    # The engine's own stand-in, or that of a model whose copy this is, computes what the class says.
    return own is not None and function is not type(module).forward and not getattr(function, "is_spfde", False)


def _own_reason(module: nn.Module) -> str | None:
    """Why a module does not compute what its class says, or has someone watch it."""
    if any(getattr(module, name, None) for name in HOOKS):
        return "has hooks"
    if _has_own_forward(module):
        return "has a forward of its own"
    if parametrize.is_parametrized(module):
        return "is parametrized"
    if isinstance(module, NormBase) and not type(module).__module__.startswith("torch.nn"):
        # It would be found to write its statistics: one whole trace for each norm of the model.
        return "keeps statistics by a forward of its own"
    return None


def _refused(model: nn.Module, why: str) -> InvalidArgument:
    return InvalidArgument(
        Problem(
            "model",
            type(model).__name__,
            f"its forward cannot be traced for the native engine ({why})",
            'Use engine="masked", or move what depends on the data, or changes the model, into a submodule.',
        )
    )


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:120]


# --- the graph -------------------------------------------------------------------------------------------------------


class _Proxy(fx.Proxy):
    """Knows of ``x += y``, which else would become ``x = x + y``, unseen by others that hold x."""


def _in_place(function: Callable[[Any, Any], Any]) -> Callable[[fx.Proxy, Any], Any]:
    return lambda self, other: self.tracer.create_proxy("call_function", function, (self, other), {})


_IN_PLACE = (
    *(operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ifloordiv, operator.imod),
    *(operator.ipow, operator.iand, operator.ior, operator.ixor, operator.ilshift, operator.irshift),
)
for _function in _IN_PLACE:
    setattr(_Proxy, f"__{_function.__name__}__", _in_place(_function))


class _Tracer(fx.Tracer):
    """Goes into modules of the user's that can be traced, and into none of PyTorch's."""

    proxy_buffer_attributes = True

    def __init__(self, modules: Mapping[str, nn.Module], leaves: Mapping[str, str]) -> None:
        super().__init__()
        self.modules, self.leaves = modules, dict(leaves)
        self.stack: list[str] = []
        self.thread = threading.get_ident()

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if module_qualified_name in self.leaves:
            return True
        # The copy that is traced has no hooks.
        reason = _own_reason(self.modules[module_qualified_name])
        if reason is not None:
            self.leaves[module_qualified_name] = reason
            return True
        return m.__module__.startswith("torch.nn") and not isinstance(m, (nn.Sequential, nn.ModuleList))

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        # fx traces by patching nn.Module, so that all threads come by here.
        if threading.get_ident() != self.thread:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if threading.get_ident() != self.thread:
            return forward(*args, **kwargs)
        self.stack.append(self.path_of_module(m))
        with _unchanged(m):
            found = super().call_module(m, forward, args, kwargs)
        self.stack.pop()  # on an error it stays, and tells where it was
        return found

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, Tensor) and not isinstance(a, nn.Parameter):
            is_known = self.tensor_attrs.get(a) is not None or any(a is buffer for buffer in self.root.buffers())
            if not is_known:
                raise _Impure("makes a tensor anew in each pass")
        return super().create_arg(a)


@contextmanager
def _unchanged(module: nn.Module) -> Iterator[None]:
    """Refuse what draws random numbers or changes the module in its trace: it would happen once, and never again."""
    drawn, state = _generators(), _state(module)
    yield
    if drawn != _generators():
        raise _Impure("draws random numbers outside of PyTorch's operators")
    if not is_same(state, _state(module)):
        raise _Impure("changes its own attributes")


def _generators() -> tuple[Any, ...]:
    return *_generators_of_python(), torch.get_rng_state().numpy().tobytes()


def _generators_of_python() -> tuple[Any, ...]:
    name, keys, *position = np.random.get_state()  # noqa: NPY002
    return random.getstate(), name, np.asarray(keys).tobytes(), position


def _state(module: nn.Module) -> list[Any]:
    """What of a module itself, not of those inside it, may change in a pass."""
    found = guards_of(module, opaque=set(module.children()))
    for value in vars(module).values():
        if isinstance(value, Tensor):
            found.append(version_of(value))
        elif isinstance(value, torch.Generator):
            found.append(value.get_state().numpy().tobytes().hex())
        elif type(value) in (list, dict, set) and value is not vars(module)[MODULES]:
            found.append(len(value))
            found.extend(value.values() if isinstance(value, dict) else value)
    return found


def _drop_unneeded(graph: fx.Graph, modules: Mapping[str, nn.Module], leaves: Mapping[str, str]) -> None:
    def is_needed(node: fx.Node) -> bool:
        if node.op in ("output", "placeholder") or node.users:
            return True
        # The user's own modules may do more than return something, and norms count what they see.
        name = str(node.target)
        return node.op == "call_module" and (name in leaves or isinstance(modules[name], NormBase))

    graph.eliminate_dead_code(is_needed)


# --- what its nodes do -----------------------------------------------------------------------------------------------


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

    def __init__(self, twin: nn.Module, graph: fx.Graph, leaves: Collection[str], draws: _Draws) -> None:
        super().__init__(twin, garbage_collect_values=False, graph=graph)
        self.leaves, self.draws = leaves, draws
        self.facts: dict[fx.Node, Fact] = {}

    def run_node(self, n: fx.Node) -> Any:
        sources = [(node, value) for node in n.all_input_nodes for value in _tensors(self.env[node])]
        before = [version_of(value) for _, value in sources]
        self.draws.seen = False
        is_opaque = n.op == "call_module" and n.target in self.leaves
        drawn = _generators_of_python() if is_opaque else ()
        result = super().run_node(n)
        writes = [node for (node, value), then in zip(sources, before, strict=True) if version_of(value) != then]
        tensors = _tensors(result)
        self.facts[n] = Fact(
            tuple(result.shape) if isinstance(result, Tensor) and result.is_floating_point() else None,
            frozenset(storage_id(tensor) for tensor in tensors),
            tuple(dict.fromkeys(writes)),
            next((node for node, value in sources if value is result), None),
            self.draws.seen or (is_opaque and drawn != _generators_of_python()),
        )
        return result


def _run(
    graph: fx.Graph, twin: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], leaves: Collection[str]
) -> dict[fx.Node, Fact]:
    given = []
    for position, node in enumerate(node for node in graph.nodes if node.op == "placeholder"):
        default = node.args[0] if node.args else None
        given.append(args[position] if position < len(args) else kwargs.get(str(node.target), default))
    for module in twin.modules():
        if isinstance(module, NormBase):
            module.training = False  # a sample of one image has no statistics
    draws = _Draws()
    interpreter = _Interpreter(twin, graph, leaves, draws)
    with draws:
        interpreter.run(*given, enable_io_processing=False)
    return interpreter.facts


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def _functionalise(graph: fx.Graph, facts: Mapping[fx.Node, Fact]) -> set[fx.Node]:
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
                raise _Impure("writes into its input or its own state", _owner_of_write(node))
            if facts[node].returned is source:
                source.replace_all_uses_with(node, lambda user, at=node: order[user] > order[at])  # type: ignore[misc]
            if any(order[user] > order[node] for alias in aliases for user in alias.users):
                raise _Impure("writes in place what is read otherwise later", _owner_of_write(node))
            if any(user is not node and user not in aliases for alias in aliases for user in alias.users):
                shared.add(node)
    return shared


def _owners(node: fx.Node) -> list[str]:
    return ["", *(name for name, _ in node.meta.get("nn_module_stack", {}).values())]


def _owner_of_write(node: fx.Node) -> str:
    """The module that does not show the write: around a node that is a module itself."""
    return next(name for name in reversed(_owners(node)) if name != node.target)
