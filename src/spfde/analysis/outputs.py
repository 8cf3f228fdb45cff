"""What the blocks of a model give out: which module says it, and two ways of listening.

``BlockOutputs`` listens with forward hooks and works for every model. ``output_graph`` is a graph of the same modules
that returns what they give, for the native engine, which takes no hooks: ``native_outputs``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, fx, nn

from spfde.core.errors import InvalidArgument, Problem, Problems, nearest
from spfde.core.generators import GeneratorsRestored
from spfde.core.torch_private import tree_leaves
from spfde.model.blocks import Partition
from spfde.model.sample import Sample, call_arguments, unwrap


def output_modules(model: nn.Module, partition: Partition, sample: Sample) -> list[str | None]:
    """For each block, and the head as the last one, the module whose output is the block's.

    It is the module that the block is built on, if that holds others (a residual block, a transformer layer), and else
    (a layer of a plain chain, with its norm and activation) the one of the block's modules that ends last in a forward
    pass; of a module that runs several times the first time counts. None where no module ran (bare parameters).

    Args:
        model: the model; it runs once on ``sample``, in evaluation mode, and stays as it was.
        partition: its blocks.
        sample: what it is called with; a batch of one will do.

    Example:
        >>> blueprint = spfde.plan(model, torch.zeros(1, 4), spfde.presets.dense, epochs=1, samples=20).blueprint
        >>> spfde.analysis.output_modules(model, blueprint.partition, torch.zeros(1, 4))
        ['1', '3', '4', '5']
    """
    model = unwrap(model)
    wanted = {name for block in (*partition.blocks, partition.head) for name in block.modules}
    ended: list[str] = []
    args, kwargs = call_arguments(sample)
    handles = [
        module.register_forward_hook(lambda *_, name=name: ended.append(name))
        for name, module in model.named_modules()
        if name in wanted
    ]
    try:
        with _evaluating(model):
            model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    place = {name: position for position, name in reversed(list(enumerate(ended)))}
    found: list[str | None] = []
    for block in (*partition.blocks, partition.head):
        ran = [name for name in block.modules if name in place]
        holds_others = block.name in ran and next(model.get_submodule(block.name).children(), None) is not None
        found.append(block.name if holds_others else max(ran, key=place.__getitem__, default=None))
    return found


class BlockOutputs:
    """Runs a model and gives out what some of its modules did; a context manager, which takes its hooks away.

    Called with a batch it returns the outputs by module name, ``(n, …)`` each: the first tensor of each module's output
    the first time that it runs. The model computes in evaluation mode and without gradients; its mode, its
    BatchNorm statistics and the global generators stay as they were.

    Args:
        model: the model.
        modules: qualified names, see :func:`output_modules`.

    Raises:
        InvalidArgument: a name is no module of the model, or (when called) a module did not run or gave no tensor.

    Example:
        >>> with spfde.analysis.BlockOutputs(model, ["0", "3"]) as outputs:
        ...     found = outputs(torch.zeros(2, 4))
        >>> {name: tuple(value.shape) for name, value in found.items()}
        {'0': (2, 8), '3': (2, 8)}
    """

    def __init__(self, model: nn.Module, modules: Sequence[str]) -> None:
        self._model = unwrap(model)
        self._modules = _find(self._model, modules)
        self._found: dict[str, Tensor] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> Self:
        for name, module in self._modules.items():
            self._handles.append(module.register_forward_hook(partial(self._note, name)))
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._found.clear()

    def __call__(self, batch: Sample) -> dict[str, Tensor]:
        args, kwargs = call_arguments(batch)
        self._found = {}  # somebody else may have run the model since
        with _evaluating(self._model):
            self._model(*args, **kwargs)
        found, self._found = self._found, {}  # outputs are large: they go with the caller
        for name in self._modules:
            if name not in found:
                remedy = "Leave it out, or enter the context before calling."
                raise InvalidArgument(Problem("modules", name, "did not run in the forward pass", remedy))
        return {name: found[name] for name in self._modules}

    def _note(self, name: str, _: nn.Module, __: Any, output: Any) -> None:
        if name not in self._found:
            self._found[name] = _tensor_of(name, output)


def output_graph(model: nn.Module, modules: Sequence[str]) -> fx.GraphModule:
    """A graph that returns a tuple of what ``modules`` give out, in evaluation mode; see :func:`native_outputs`.

    It shares the modules with ``model``, so that it follows whatever is loaded into them; call it while the model is in
    evaluation mode. What no output needs, as a head behind the last one, is not computed.
    """
    model = unwrap(model)
    _find(model, modules)
    tracer = _Tracer()
    try:
        with _evaluating(model):
            graph = tracer.trace(model)
        problems = Problems()
        for name in modules:
            if name not in tracer.results:
                problems.add("modules", name, "does not run", "Leave it out.")
        problems.raise_if_any()
        results = [_tensor_of(name, tracer.results[name]) for name in modules]
    except InvalidArgument:
        raise
    except Exception as error:  # a trace runs the user's code on stand-ins: anything may come
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        remedy = "Use BlockOutputs, which works for every model."
        rule = f"its forward cannot be traced ({reason})"
        raise InvalidArgument(Problem("model", type(model).__name__, rule, remedy)) from error
    end = next(node for node in reversed(graph.nodes) if node.op == "output")
    end.args = (tuple(results),)
    made = fx.GraphModule(model, graph)
    made.graph.eliminate_dead_code()
    made.recompile()
    made.training = False  # of the graph alone: the modules in it are the model's
    return made


def native_outputs(
    model: nn.Module, modules: Sequence[str], *, masks: Callable[[], Mapping[str, Tensor]]
) -> Callable[[Tensor], dict[str, Tensor]]:
    """As :class:`BlockOutputs`, computed by the native engine with the active weights alone.

    Args:
        model: in float32 on the CPU, in evaluation mode.
        modules: qualified names.
        masks: gives the masks by parameter name; a mask that changes is another tensor.

    Raises:
        InvalidArgument: a name is no module of the model or does not run, or ``forward`` cannot be traced.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 8, 3))
        >>> masks = {"2.weight": torch.rand(8, 8, 3, 3) < 0.1}
        >>> outputs = spfde.analysis.native_outputs(net, ["0"], masks=lambda: masks)
        >>> tuple(outputs(torch.zeros(2, 3, 8, 8))["0"].shape)
        (2, 8, 6, 6)
    """
    from spfde.engines.native.model import NativeModel

    graph = output_graph(model, modules)
    NativeModel(graph, masks=masks, dense_gradients=frozenset)

    def outputs(batch: Tensor) -> dict[str, Tensor]:
        with torch.no_grad():
            return dict(zip(modules, graph(batch), strict=True))

    return outputs


class _Tracer(fx.Tracer):
    """Notes what each module gives out the first time."""

    def __init__(self) -> None:
        super().__init__()
        self.results: dict[str, Any] = {}

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        found = super().call_module(m, forward, args, kwargs)
        self.results.setdefault(self.path_of_module(m), found)
        return found


def _find(model: nn.Module, names: Sequence[str]) -> dict[str, nn.Module]:
    known = dict(model.named_modules())
    problems = Problems()
    for name in names:
        if name not in known:
            problems.add("modules", name, "is no module of the model", nearest(name, known))
    problems.raise_if_any()
    return {name: known[name] for name in names}


def _tensor_of(name: str, output: Any) -> Any:
    """The first tensor in what a module gives out; of a trace, the node that stands for it."""
    for leaf in tree_leaves(output):
        if isinstance(leaf, Tensor):
            return leaf
        if isinstance(leaf, fx.Proxy):
            return leaf.node
    raise InvalidArgument(Problem("modules", name, "gives out no tensor", "Name the module inside it that does."))


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, without gradients; every module's mode and the global generators are put back."""
    modes = [(module, module.training) for module in model.modules()]
    # Flags alone: a norm in a frozen block remembers what its train() was called with last.
    for module, _ in modes:
        module.training = False
    try:
        with torch.no_grad(), GeneratorsRestored():
            yield
    finally:
        for module, mode in modes:
            module.training = mode
