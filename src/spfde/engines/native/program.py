"""A region made ready for one shape of input and one state of the model.

It plays the tapes of its two passes, and writes another when one does not hold any more.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spfde.engines.native.backward import Backward
from spfde.engines.native.forward import Forward
from spfde.engines.native.fusion import GlobalPoolStep
from spfde.engines.native.kernels import ROWS, Kernels, KernelTape
from spfde.engines.native.layout import Pool
from spfde.engines.native.packed import PackedWeights
from spfde.engines.native.region_plan import RegionPlan
from spfde.engines.native.schedule import TABLE
from spfde.engines.native.tape import Place


@dataclass(frozen=True)
class Written:
    """A tape, and what it was written for.

    Attributes:
        tape: ready to be played.
        key: what it depends on besides where parameters and buffers lie.
        keep: buffers that are wanted afterwards.
    """

    tape: KernelTape
    key: tuple[object, ...]
    keep: Sequence[Place] = ()

    def holds(self, key: tuple[object, ...]) -> bool:
        """Would it be written the same way now?"""
        return self.key == key and self.tape.is_current


class Program:
    """Runs a region forward and backward.

    Args:
        plan: of the region.
        weights: the lists of the convolutions.
        kernels: the loaded library.
        pool: where buffers come from.
    """

    def __init__(self, plan: RegionPlan, *, weights: PackedWeights, kernels: Kernels, pool: Pool) -> None:
        self.plan, self.weights, self.kernels, self.pool = plan, weights, kernels, pool
        self._forward: Written | None = None
        self._backward: Written | None = None

    def forward(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """The region's outputs, the table of its norms [5, channels], then what the backward pass reads."""
        plan, dtype = self.plan, self.kernels.dtype
        names = plan.region.inputs
        tensors = [self._as_tokens(tensor.detach()) for tensor in inputs]
        written = self._forward_tape([tensor.stride() for tensor in tensors])
        table = torch.empty(ROWS, plan.n_channels, dtype=dtype)
        given: dict[Hashable, Tensor] = {TABLE: table, **dict(zip(names, tensors, strict=True))}
        outputs = []
        for name, shape in zip(plan.region.outputs, plan.output_shapes, strict=False):
            if name in given:  # an input that is passed on
                outputs.append(inputs[names.index(name)].clone())
            else:
                given[name] = torch.empty(shape, dtype=dtype)
                outputs.append(given[name])
        return [*outputs, table, *written.tape.play(given, self.pool, written.keep)]

    def backward(self, gradients: Sequence[Tensor | None], saved: Sequence[Tensor]) -> list[Tensor | None]:
        """Gradients of the region's inputs, then of its parameters; None where none is needed.

        Args:
            gradients: of the region's outputs.
            saved: what ``forward`` returned after the outputs.
        """
        plan = self.plan
        flowing = [self._flowing(name, d) for name, d in zip(plan.region.outputs, gradients, strict=True)]
        tape = self._backward_tape([None if d is None else d.stride() for d in flowing])
        kept = [TABLE, *(("kept", name) for name in plan.saved_names)]
        kept += [("choice", step.y) for step in plan.pools_with_choice]
        given: dict[Hashable, Tensor] = dict(zip(kept, saved, strict=True))
        given.update({("to", name): d for name, d in zip(plan.region.outputs, flowing, strict=True) if d is not None})
        found: list[Tensor | None] = []
        for name in plan.region.inputs:
            if tape.is_given(("from", name)):
                given["from", name] = torch.empty(plan.shape_of(name), dtype=self.kernels.dtype)
            found.append(given.get(("from", name)))
        for parameter in plan.parameters:
            if tape.is_given(("parameter", id(parameter))):
                given["parameter", id(parameter)] = torch.zeros_like(parameter)
            found.append(given.get(("parameter", id(parameter))))
        tape.play(given, self.pool)
        return found

    def forget(self) -> None:
        """Give up the tapes; others are written when they are wanted."""
        self._forward = self._backward = None

    def _forward_tape(self, strides: Sequence[tuple[int, ...]]) -> Written:
        plan, threads = self.plan, torch.get_num_threads()
        key = (threads, self.weights.version, *strides)
        if self._forward is None or not self._forward.holds(key):
            tape = self.kernels.tape(threads)
            schedule = Forward(plan, self.weights, tape, strides)
            schedule.write()
            tape.finish()
            keep: list[Place] = [schedule.kept[name] for name in plan.saved_names]
            keep += [schedule.choices[step.y] for step in plan.pools_with_choice]
            self._forward = Written(tape, key, keep)
        return self._forward

    def _backward_tape(self, strides: Sequence[tuple[int, ...] | None]) -> KernelTape:
        plan, threads = self.plan, torch.get_num_threads()
        key = (threads, self.weights.version, self.weights.dense_among(plan.convolutions), *strides)
        if self._backward is None or not self._backward.holds(key):
            tape = self.kernels.tape(threads)
            Backward(plan, self.weights, tape).write(strides)
            tape.finish()
            self._backward = Written(tape, key)
        return self._backward.tape

    def _as_tokens(self, tensor: Tensor) -> Tensor:
        """Tokens [n, C] in one piece, where the region is one of tokens."""
        return tensor.reshape(-1, tensor.shape[-1]).contiguous() if self.plan.region.is_tokens else tensor

    def _flowing(self, name: str, gradient: Tensor | None) -> Tensor | None:
        """The gradient of an output as the tape takes it."""
        if gradient is None or not self.plan.needs_grad[name]:
            return None
        if isinstance(self.plan.maker.get(name), GlobalPoolStep):
            return gradient.reshape(gradient.shape[0], -1).contiguous()
        return self._as_tokens(gradient.to(self.kernels.dtype))
