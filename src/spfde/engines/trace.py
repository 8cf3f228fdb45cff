"""The graph that a model computes, free of writes in place: each value is what its node made, for whoever reads it.

The trace runs on a copy of the model whose tensors are fake, so that the model, its buffers and the generators stay as
they were; and what happened to the copy tells what a graph cannot hold: draws, counters, tensors out of nothing. Such a
module stays in PyTorch whole. Then the graph itself runs once on stand-ins: shapes, writes and draws of each node are
seen, not guessed from its name.
"""

from __future__ import annotations

import inspect
import operator
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from spfde.core.errors import InvalidArgument, Problem
from spfde.core.generators import GeneratorsRestored
from spfde.core.plain_kernels import PlainKernels
from spfde.core.torch_private import (
    HOOKS,
    MODULES,
    FakeTensorMode,
    NormBase,
    tree_map_only,
    version_of,
)
from spfde.engines.facts import Fact, Impure, functionalise, owners, run
from spfde.engines.guards import Reads, is_same, state_of
from spfde.engines.stand_in import has_own_forward, stands_in
from spfde.model.sample import Sample, call_arguments
from spfde.model.trace import like_the_model
from spfde.model.twin import fake_copy

# fx patches nn.Module while it traces, and the second of two threads would put back the first one's patch.
_PATCHING = threading.RLock()
_HINT = "; what depends on the data, or changes the model, belongs in a submodule"


@dataclass(frozen=True)
class Traced:
    """A model's graph.

    Attributes:
        graph: no node reads what another one wrote into, but what that one returned.
        facts: by node.
        shared: nodes that write into memory which others read before; in PyTorch they need a copy of it.
        leaves: why modules that could have been entered were not, by name.
        reads: which attributes were read, by name of the module.
        called: names of PyTorch's own modules that were called.
    """

    graph: fx.Graph
    facts: Mapping[fx.Node, Fact]
    shared: Collection[fx.Node]
    leaves: Mapping[str, str]
    reads: Mapping[str, Collection[str]]
    called: Collection[str]

    def owner(self, node: fx.Node) -> str:
        """Name of the innermost module that runs ``node``; '' is the model."""
        return owners(node)[-1]

    def kind(self, node: fx.Node) -> Literal["tensor", "tensors", "plain"]:
        """Whether the value of ``node`` is one tensor, holds some, or none."""
        fact = self.facts.get(node)
        if fact is None or fact.is_tensor:  # only copies of tensors have no facts
            return "tensor"
        return "tensors" if fact.storages else "plain"


def trace(model: nn.Module, sample: Sample, *, training: bool | None = None) -> Traced:
    """Trace a model. Nothing is computed, nothing changes.

    Args:
        model: the model.
        sample: what it is called with.
        training: trace it in this mode; None: as it is.

    Raises:
        InvalidArgument: the model's own ``forward`` cannot be traced.
    """
    _check_arguments(model)
    leaves: dict[str, str] = {}
    modules = dict(model.named_modules(remove_duplicate=False))
    generators = GeneratorsRestored(watches=False)
    for _ in range(2 + len(modules)):
        tracer = _Tracer(modules, leaves, generators)
        refused: Exception | None = None
        try:
            traced = _follow(model, sample, tracer, training=training)
        except Exception as error:  # a trace runs the user's code on stand-ins: anything may come
            refused = error
        if generators.is_unclear:
            generators = GeneratorsRestored(again=generators)
        elif refused is None:
            return traced
        else:
            leaves = _with_one_more(tracer, model, refused)
            generators = GeneratorsRestored(watches=generators.watches)
    raise AssertionError("each attempt makes one more module a leaf, and one is made again")


def _follow(model: nn.Module, sample: Sample, tracer: _Tracer, *, training: bool | None) -> Traced:
    """One attempt, with the modules as leaves that the tracer knows.

    Raises:
        Impure: a module does what no graph holds.
    """
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with fake:
        twin, _ = fake_copy(model, fake)
        args, kwargs = tree_map_only(Tensor, like_the_model(model, fake), call_arguments(sample))
    if training is not None:
        twin.train(training)
    with torch.no_grad(), tracer.generators:
        with _PATCHING, tracer.noting(twin), _unchanged(twin, tracer.generators):
            graph = tracer.trace(twin)
        with fake, PlainKernels():
            facts = run(graph, twin, args, kwargs, tracer.leaves, tracer.generators)
    shared = functionalise(graph, facts)
    _drop_unneeded(graph, tracer.modules, tracer.leaves)
    return Traced(graph, facts, shared, tracer.leaves, tracer.reads.found, tracer.called - tracer.leaves.keys())


def _with_one_more(tracer: _Tracer, model: nn.Module, error: Exception) -> dict[str, str]:
    """The leaves, and why; with the module where an attempt ended.

    Raises:
        InvalidArgument: it is the model itself.
    """
    is_impure = isinstance(error, Impure)
    why = error.reason if isinstance(error, Impure) else _first_line(error)
    within = tracer.stack[-1] if tracer.stack else ""
    name = error.module if isinstance(error, Impure) and error.module is not None else within
    if not name:
        raise _refused(model, why) from error
    return {**tracer.leaves, name: why if is_impure else f"cannot be traced: {why}"}


def check_forward(model: nn.Module) -> None:
    """Raise ``InvalidArgument`` where another forward than the class's was put on the model: the engine replaces it."""
    if has_own_forward(model):
        raise _refused(model, "the instance has a forward of its own", hint="")


def _own_reason(module: nn.Module) -> str | None:
    """Why a module does not compute what its class says, or has someone watch it."""
    if any(getattr(module, name, None) for name in HOOKS):
        return "has hooks"
    if has_own_forward(module):
        return "has a forward of its own"
    if stands_in(module):
        return "is compiled"
    if parametrize.is_parametrized(module):
        return "is parametrized"
    if isinstance(module, NormBase) and not type(module).__module__.startswith("torch.nn"):
        # It would be found to write its statistics: one whole trace for each norm of the model.
        return "keeps statistics by a forward of its own"
    return None


def _check_arguments(model: nn.Module) -> None:
    """Raise ``InvalidArgument`` where torch.fx cannot give the forward its arguments.

    It reads the parameters of what a decorator wraps. Where some are ``*args``, ``**kwargs`` or by keyword alone it
    rewrites the code of the wrapper to take all of them one by one, which needs a wrapper that has the same.
    """
    forward = type(model).forward
    inner = inspect.unwrap(forward)
    if inner is forward or not inspect.isfunction(forward):
        return
    own, wrapped = (inspect.signature(each, follow_wrapped=False).parameters.values() for each in (forward, inner))
    marks = {"KEYWORD_ONLY": "", "VAR_POSITIONAL": "*", "VAR_KEYWORD": "**"}
    asked = [f"{marks[p.kind.name]}{p.name}" for p in wrapped if p.kind.name in marks]
    if asked and [(p.name, p.kind) for p in own] != [(p.name, p.kind) for p in wrapped]:
        raise _refused(model, f"it is decorated and takes {', '.join(asked)}, which torch.fx cannot follow", hint="")


def _refused(model: nn.Module, why: str, hint: str = _HINT) -> InvalidArgument:
    rule = f"its forward cannot be traced ({why}){hint}"
    return InvalidArgument(Problem("model", type(model).__name__, rule, 'Use engine="masked".'))


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:120]


def copy_shared(traced: Traced, known: Collection[fx.Node] = ()) -> None:
    """What PyTorch writes in place must not be what others still read: whoever reads it may run later.

    Args:
        traced: its graph is changed.
        known: nodes that are not left to PyTorch, and write nothing in place.
    """
    for node in [node for node in traced.graph.nodes if node in traced.shared and node not in known]:
        for source in node.all_input_nodes:
            if traced.facts[source].storages:
                with traced.graph.inserting_before(node):
                    node.replace_input_with(source, traced.graph.call_method("clone", (source,)))


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

    def __init__(
        self, modules: Mapping[str, nn.Module], leaves: Mapping[str, str], generators: GeneratorsRestored
    ) -> None:
        super().__init__()
        self.modules, self.leaves = modules, dict(leaves)
        self.stack: list[str] = []
        self.called: set[str] = set()
        self.thread = threading.get_ident()
        self.generators = generators

    @contextmanager
    def noting(self, twin: nn.Module) -> Iterator[None]:
        """Note in ``reads`` what the copy's forward reads."""
        self.reads = Reads(twin)
        try:
            yield
        finally:
            self.reads.close()

    def create_args_for_root(self, *args: Any, **kwargs: Any) -> Any:
        found = super().create_args_for_root(*args, **kwargs)
        self.reads.notes = True  # the forward pass comes next
        return found

    def path_of_module(self, mod: nn.Module) -> str:
        with self.reads.paused():
            return super().path_of_module(mod)

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
        name = self.path_of_module(m)
        if self.is_leaf_module(m, name):
            self.called.add(name)
        self.stack.append(name)
        with _unchanged(m, self.generators):
            found = super().call_module(m, forward, args, kwargs)
        self.stack.pop()  # on an error it stays, and tells where it was
        return found

    def create_arg(self, a: Any) -> Any:
        with self.reads.paused():
            if isinstance(a, Tensor) and not isinstance(a, nn.Parameter):
                is_known = self.tensor_attrs.get(a) is not None or any(a is buffer for buffer in self.root.buffers())
                if not is_known:
                    raise Impure("makes a tensor anew in each pass")
            return super().create_arg(a)


@contextmanager
def _unchanged(module: nn.Module, generators: GeneratorsRestored) -> Iterator[None]:
    """Refuse what draws random numbers or changes the module in its trace: it would happen once, and never again."""
    mark, state = generators.mark(), _state(module)
    yield
    if generators.has_drawn_since(mark):
        raise Impure("draws random numbers outside of PyTorch's operators")
    if not is_same(state, _state(module)):
        raise Impure("changes its own attributes")


def _state(module: nn.Module) -> list[Any]:
    """What of a module itself, not of those inside it, may change in a pass."""
    found = state_of(module)
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
