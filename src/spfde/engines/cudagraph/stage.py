"""One stage of a model: its forward and backward pass for one frozen front, shape and mode, recorded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from spfde.core.errors import UsageError
from spfde.core.torch_private import PARAMETERS, tree_flatten, tree_unflatten
from spfde.engines.base import Parts
from spfde.engines.cudagraph.backend import Backend, Recording
from spfde.engines.cudagraph.call import Call
from spfde.engines.cudagraph.computation import Computation
from spfde.engines.cudagraph.gradients import FlatGradients
from spfde.engines.cudagraph.restoring import as_before


class Token:
    """A forward pass whose backward pass may come; gone with its outputs.

    Attributes:
        is_done: its backward pass has come.
    """

    def __init__(self) -> None:
        self.is_done = False


class Stage:
    """Replays one kind of call of a model.

    Args:
        model: the model; afterwards as it was, generators included.
        what: its own forward pass, or a half of it.
        call: a call of this kind.
        backend: records.
        parts: see ``engines.base``; gradients come masked but for those that it wants dense.

    Attributes:
        passes: forward passes that were replayed.
        with_graph: positions of the outputs that depend on a parameter that learns.
        gradients: of the parameters that learn and are reached; None in a call that wants none.

    Raises:
        RuntimeError: the passes do what cannot be recorded.
    """

    with_graph: list[int]
    gradients: FlatGradients | None = None

    def __init__(self, model: nn.Module, what: Computation, call: Call, backend: Backend, parts: Parts) -> None:
        self._compute, self._call, self._parts = what.run, call, parts
        self._modules = set(chain.from_iterable(module.modules() for module in (model, *what.modules)))
        self._masked = frozenset(parts.masks()) - parts.dense_gradients()
        self._device = backend.device
        self._inputs = [tensor.detach().clone() for tensor in call.tensors]
        self._learning = {name: p for name, p in model.named_parameters() if p.requires_grad} if call.learns else {}
        self._live: list[Tensor] = []  # the outputs of a pass that runs or is recorded, with their autograd graph
        self._leaves: list[Tensor] = []  # what that one reads in the place of parameters
        self._arriving: list[Tensor] = []  # gradients of the outputs that have one
        self._backward: Recording | None = None
        self.passes = 0
        with as_before(model, self._device):
            backend.warm_up(self._run)
            self._forward = backend.record(self._run_forward, pool="learning" if call.learns else "evaluation")
            if call.learns:
                self._backward = backend.record(self._run_backward, pool="learning")
        self._live, self._leaves = [], []

    # --- what is recorded --------------------------------------------------------------------------------------------

    def _run(self) -> None:
        self._run_forward()
        if self._learning:
            self._arriving = [torch.zeros_like(self._live[at], requires_grad=False) for at in self.with_graph]
            self._check_leaves()
            self._run_backward()

    def _check_leaves(self) -> None:
        """Are all parameters read from where modules keep them? Some modules hold them in a list beside it."""
        outputs, parameters = [self._live[at] for at in self.with_graph], self._learning.values()
        kept = torch.autograd.grad(outputs, list(parameters), self._arriving, allow_unused=True, retain_graph=True)
        name = next((name for name, found in zip(self._learning, kept, strict=True) if found is not None), None)
        if name is not None:
            raise RuntimeError(f"it reads {name} from elsewhere than its module's parameters")

    def _run_forward(self) -> Sequence[Tensor]:
        args, kwargs = self._call.with_tensors(self._inputs)
        with self._call.modes(), self._own_leaves():
            leaves, self._spec = tree_flatten(self._compute(*args, **kwargs))
        strange = next((leaf for leaf in leaves if not isinstance(leaf, Tensor)), None)
        if strange is not None:
            raise RuntimeError(f"it returns a {type(strange).__name__} beside tensors")
        self._live = leaves
        self.with_graph = [at for at, leaf in enumerate(leaves) if leaf.requires_grad]
        if self._learning and not self.with_graph:
            raise RuntimeError("nothing that it returns depends on a parameter that learns")
        return [leaf.detach() for leaf in leaves]

    @contextmanager
    def _own_leaves(self) -> Iterator[None]:
        """Others of the same memory stand in for the parameters that learn.

        What accumulates a parameter's gradient stays on the stream on which the parameter was first used, and a
        recording that meets that stream fails.
        """
        leaves = {id(p): nn.Parameter(p.detach()) for p in self._learning.values()}
        self._leaves = [leaves[id(p)] for p in self._learning.values()]
        tables = [vars(module)[PARAMETERS] for module in self._modules]
        places = [(table, name, p) for table in tables for name, p in table.items() if id(p) in leaves]
        for table, name, parameter in places:
            table[name] = leaves[id(parameter)]
        try:
            yield
        finally:
            for table, name, parameter in places:
                table[name] = parameter

    def _run_backward(self) -> Sequence[Tensor]:
        outputs = [self._live[at] for at in self.with_graph]
        with torch.autocast(self._device.type, enabled=False):
            found = torch.autograd.grad(outputs, self._leaves, self._arriving, allow_unused=True)
        reached = {name: g for name, g in zip(self._learning, found, strict=True) if g is not None}
        if self.gradients is None:
            self.gradients = FlatGradients({name: self._learning[name] for name in reached}, self._masked)
        with torch.no_grad():
            return self.gradients.gather(reached)

    # --- replays -----------------------------------------------------------------------------------------------------

    def __call__(self, call: Call, token: Token) -> Any:
        """What the model returns for a call of this kind; ``token`` lives for as long as the backward pass may come."""
        with torch.no_grad():
            for mine, given in zip(self._inputs, call.tensors, strict=True):
                mine.copy_(given, non_blocking=True)
        learning = self._learning.values()
        leaves = _Replay.apply(self, token, *learning) if learning else self.forward()
        return tree_unflatten(list(leaves), self._spec)

    def forward(self) -> tuple[Tensor, ...]:
        """Replay the forward pass: its outputs, in memory of their own."""
        self._forward.replay()
        self.passes += 1
        return tuple(output.clone() for output in self._forward.outputs)

    def backward(self, arriving: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Replay the backward pass: the gradients of the parameters that learn, from those of all outputs."""
        assert self._backward is not None, "it was recorded for a model that learns"
        assert self.gradients is not None, "as it ran"
        for at, mine in zip(self.with_graph, self._arriving, strict=True):
            given = arriving[at]
            if given is None:
                mine.zero_()
            else:
                mine.copy_(given)
        self.gradients.follow(self._parts.masks())
        self._backward.replay()
        found = self.gradients.split(self._backward.outputs)
        masked = self.gradients.masked - self._parts.dense_gradients()
        self._parts.masked_already({name: found[name] for name in masked})
        return [found.get(name) for name in self._learning]


class _Replay(torch.autograd.Function):
    """A stage between the parameters of a model and its outputs."""

    @staticmethod
    def forward(ctx: Any, stage: Stage, token: Token, *parameters: Tensor) -> tuple[Tensor, ...]:
        outputs = stage.forward()
        ctx.stage, ctx.token, ctx.number = stage, token, stage.passes
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*[out for at, out in enumerate(outputs) if at not in stage.with_graph])
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *arriving: Tensor | None) -> tuple[Tensor | None, ...]:
        if ctx.number != ctx.stage.passes:
            raise UsageError(
                "the model has run since the forward pass of this backward pass, and what that one kept is "
                'overwritten. Run backward first, or attach with engine="masked".'
            )
        ctx.token.is_done = True
        return (None, None, *ctx.stage.backward(arriving))
