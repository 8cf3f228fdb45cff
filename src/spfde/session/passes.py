"""What was really computed: the forward passes of the model in training, and the shapes that they had.

A hook before the model's forward pass looks up its arguments' shapes and counts. What a shape costs is measured once,
at the end of an epoch, on fake tensors; shapes that differ in the batch alone cost the same a sample.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from spfde.core.errors import InvalidArgument, StateMismatch
from spfde.core.hooks import is_silent, mark
from spfde.core.state import check_entries
from spfde.core.torch_private import compiled_inside, tree_leaves, tree_map_only
from spfde.cost.flops import ModelCost, model_cost
from spfde.model.sample import Sample, call_arguments
from spfde.model.trace import trace

MOST_SHAPES = 32
"""How many shapes are measured; others cost as much as the nearest one, by the number of elements."""

Shapes = tuple[torch.Size, ...]


class Passes:
    """Counts forward passes with gradients, by the shapes of their tensors.

    In training mode each one counts; in evaluation mode those that a backward pass follows, for an evaluation may have
    forgotten to switch gradients off.

    Args:
        given: the model as attached. What is compiled inside it is not counted: its caller is.
        model: the user's own module.
        cost: of the model on ``sample``.
        sample: what the model is called with, as far as is known.
        is_known: whether the model could be traced.

    Attributes:
        samples: samples that went through the model, as the first dimension of its first tensor counts them.
        estimated: samples whose shape was not measured.
        is_called: whether the model was called in this epoch, in whichever mode.
        unseen: optimizer steps of all epochs so far without a pass that was seen before them.
        heard: called with the shapes of each pass that counts; None: nobody wants to know.
    """

    def __init__(
        self, given: nn.Module, model: nn.Module, cost: ModelCost, sample: Sample | None, *, is_known: bool
    ) -> None:
        self._model, self._cost, self._is_known = model, cost, is_known
        self._forward = list(cost.forward)
        self._usual = None if sample is None else _kind(_shapes(call_arguments(sample)))
        self._counts: dict[Shapes, int] = {}
        self._calls: dict[Shapes, Any] = {}  # arguments on no device, of shapes that have not been measured
        self._measured: dict[str, tuple[int, list[int]]] = {}  # elements and FLOPs of a sample, by kind
        hooked = given if compiled_inside(given) is not None else model
        self._handle = hooked.register_forward_pre_hook(mark(_Count(self)), with_kwargs=True)
        self.heard: Callable[[Shapes], None] | None = None
        self.unseen = 0
        self.clear()

    def clear(self) -> None:
        """Begin to count anew."""
        self._counts.clear()
        self.samples, self.estimated = 0, 0
        self._ahead = 0  # passes in this epoch without a step behind them
        self.is_called = False
        self._maybe: list[Shapes] = []  # of passes in evaluation mode that no backward pass has followed yet
        self._is_usual = True
        self._flops = [0] * len(self._forward)

    def count(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """A forward pass in training mode with these arguments begins."""
        self._maybe.clear()
        self.add(self._look_up(args, kwargs))

    def wait(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """A forward pass in evaluation mode begins, which may be trained on."""
        self._maybe.append(self._look_up(args, kwargs))

    def on_backward(self, parameter: Tensor) -> None:
        """A backward pass runs."""
        for shapes in self._maybe:
            self.add(shapes)
        self._maybe.clear()

    def _look_up(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Shapes:
        """The shapes of these arguments; of new ones the arguments are kept, to be measured."""
        if not kwargs and len(args) == 1 and type(args[0]) is Tensor:
            shapes: Shapes = (args[0].shape,)
        else:
            shapes = _shapes((args, kwargs))
        is_known = shapes in self._counts or shapes in self._calls or len(self._calls) >= MOST_SHAPES
        if shapes and not is_known and _kind(shapes) not in self._measured:
            on_meta = tree_map_only(Tensor, lambda tensor: tensor.detach().to("meta"), (args, dict(kwargs)))
            self._calls[shapes] = on_meta
        return shapes

    def add(self, shapes: Shapes) -> None:
        """A pass in training, with tensors of these shapes."""
        if self.heard is not None:
            self.heard(shapes)
        self._ahead += 1
        self._counts[shapes] = self._counts.get(shapes, 0) + 1

    def on_step(self) -> None:
        """The optimizer has taken a step: a pass came before it, or several; none where there is no gradient."""
        if self._ahead:
            self._ahead -= 1
        elif any(parameter.grad is not None for parameter in self._model.parameters()):
            self.unseen += 1

    def settle(self) -> None:
        """Price what was counted since the last time."""
        for shapes, passes in self._counts.items():
            rows = passes * _rows(shapes)
            kind = _kind(shapes)
            self.samples += rows
            if kind == self._usual or not self._is_known or not shapes:
                flops = self._forward
            else:
                self._is_usual = False
                flops = self._cost_of(shapes, kind, rows)
            for index, of_layer in enumerate(flops):
                self._flops[index] += rows * of_layer
        self._counts.clear()
        self._calls.clear()

    def total(self) -> int:
        """Samples that went through the model, with those that are not settled."""
        return self.samples + sum(passes * _rows(shapes) for shapes, passes in self._counts.items())

    @property
    def flops(self) -> list[int] | None:
        """Dense forward FLOPs of what was counted, per layer; None where every sample had the usual shape."""
        return None if self._is_usual else list(self._flops)

    @property
    def dense_flops(self) -> list[int]:
        """The same, in any case."""
        return list(self._flops)

    def _cost_of(self, shapes: Shapes, kind: str, rows: int) -> list[int]:
        """Forward FLOPs of one sample of these shapes, per layer."""
        if kind not in self._measured and len(self._measured) < MOST_SHAPES and shapes in self._calls:
            with contextlib.suppress(InvalidArgument):
                measured = model_cost(trace(self._model, self._calls[shapes], training=False, calls=True), self._model)
                self._measured[kind] = _elements(shapes), self._as_layers(measured)
        if kind in self._measured:
            return self._measured[kind][1]
        self.estimated += rows
        size = _elements(shapes)
        known = [*self._measured.values()]
        if not known:
            return self._forward
        nearest, flops = min(known, key=lambda own: abs(own[0] - size))
        return [(2 * of_layer * size + nearest) // (2 * nearest) if nearest else of_layer for of_layer in flops]

    def _as_layers(self, measured: ModelCost) -> list[int]:
        """FLOPs of another trace, for the layers of the first; what only the other has joins the last layer."""
        index_of = {layer.name: index for index, layer in enumerate(self._cost.layers)}
        flops = [0] * len(index_of)
        for layer in measured.layers:
            # The products of a loop are numbered; a longer loop has more of them.
            index = index_of.get(layer.name, index_of.get(layer.name.partition("#")[0], len(flops) - 1))
            if index >= 0:
                flops[index] += layer.forward_flops
        return flops

    def remove(self) -> None:
        """Take the hook off."""
        self._handle.remove()

    # --- state -------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """What was counted, in primitives."""
        self.settle()
        return {
            "samples": self.samples,
            "estimated": self.estimated,
            "unseen": self.unseen,
            "is_usual": self._is_usual,
            "flops": list(self._flops),
            "measured": [[kind, size, list(flops)] for kind, (size, flops) in self._measured.items()],
        }

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Raise ``StateMismatch`` for a state that cannot be loaded."""
        kinds = {"samples": int, "estimated": int, "unseen": int, "is_usual": bool, "flops": list, "measured": list}
        check_entries(state, "the counts of the bill", kinds)
        measured = state["measured"]
        is_whole = all(isinstance(own, (list, tuple)) and len(own) == 3 for own in measured)
        of_layers = [state["flops"], *(own[2] for own in measured)] if is_whole else []
        sound = is_whole and all(type(own[0]) is str and type(own[1]) is int for own in measured)
        if not sound or any(not self._fits(flops) for flops in of_layers):
            raise StateMismatch("the counts in the state of the bill are damaged, or of another model.")

    def _fits(self, flops: Any) -> bool:
        return isinstance(flops, list) and len(flops) == len(self._forward) and all(type(f) is int for f in flops)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state."""
        self.clear()
        self.samples, self.estimated, self.unseen = state["samples"], state["estimated"], state["unseen"]
        self._is_usual, self._flops = state["is_usual"], list(state["flops"])
        self._measured = {kind: (size, list(flops)) for kind, size, flops in state["measured"]}


class _Count:
    """The hook. A copied or pickled model has one that does nothing, and needs no package to be loaded."""

    def __init__(self, passes: Passes) -> None:
        self._passes = passes

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling() or is_silent(self._passes):
            return
        self._passes.is_called = True
        if torch.is_grad_enabled():
            note = self._passes.count if module.training else self._passes.wait
            note(args, kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (contextlib.nullcontext(), "__exit__")  # takes three arguments and returns None


def _shapes(arguments: Any) -> Shapes:
    return tuple(leaf.shape for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor))


def _rows(shapes: Sequence[torch.Size]) -> int:
    return int(shapes[0][0]) if shapes and shapes[0] else 0


def _kind(shapes: Shapes) -> str:
    """The shapes without the batch, which is the first dimension of the first tensor."""
    rows = _rows(shapes)
    return repr([["N", *shape[1:]] if shape and shape[0] == rows else [*shape] for shape in shapes])


def _elements(shapes: Shapes) -> int:
    """Elements of a sample, in the first tensor."""
    return shapes[0].numel() // max(1, _rows(shapes))
