"""A region made ready for one shape of input and one state of the model.

It plays the tapes of its two passes, and writes another when one does not hold any more.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from spfde.engines.native.backward import Backward
from spfde.engines.native.forward import Forward
from spfde.engines.native.fusion import GlobalPoolStep
from spfde.engines.native.kernels import ROWS, Kernels, KernelTape
from spfde.engines.native.layout import Pool
from spfde.engines.native.packed import PackedWeights
from spfde.engines.native.region_plan import RegionPlan
from spfde.engines.native.schedule import TABLE, Given, Schedule


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
        # Each with what it depends on besides where parameters and buffers lie.
        self._tapes: dict[type[Schedule], tuple[tuple[object, ...], KernelTape]] = {}
        self._table = torch.empty(ROWS, plan.n_channels, dtype=kernels.dtype) if plan.is_fixed else None
        self._moved: list[Tensor] = []  # what the forward tape writes to besides; PyTorch is told
        self._played: tuple[KernelTape | None, object] = None, None  # forward, and what parameters were then

    def forward(self, inputs: Sequence[Tensor], state: object = None) -> list[Tensor]:
        """The region's outputs, the table of its norms [5, channels], then what the backward pass reads.

        Args:
            inputs: the region's.
            state: with the same one parameters and statistics are what they were; None: who knows.
        """
        plan, dtype = self.plan, self.kernels.dtype
        names = plan.region.inputs
        tensors = [self._as_tokens(tensor) for tensor in inputs]
        (played, before), self._played = self._played, (None, None)
        is_still = state is not None and state is before
        tape = self._tape(Forward, [Given.of(tensor) for tensor in tensors], plan.tracking, is_still=is_still)
        table = torch.empty(ROWS, plan.n_channels, dtype=dtype) if self._table is None else self._table
        given: dict[Hashable, Tensor] = {TABLE: table, **dict(zip(names, tensors, strict=True))}
        outputs = []
        for name in plan.region.outputs:
            if name in given:  # an input that is passed on
                outputs.append(inputs[names.index(name)].clone())
            else:
                pooled = isinstance(plan.maker[name], GlobalPoolStep)
                given[name] = torch.empty(plan.shape_of(name), dtype=dtype if pooled else plan.mode.storage)
                outputs.append(given[name])
        kept = tape.play(given, self.pool, again=is_still and tape is played)
        self._played = tape, state
        if self._moved:
            increment_version(self._moved)
        return [*outputs, table, *kept]

    def backward(self, gradients: Sequence[Tensor | None], saved: Sequence[Tensor]) -> list[Tensor | None]:
        """Gradients of the region's inputs, then of its parameters; None where none is needed.

        Args:
            gradients: of the region's outputs.
            saved: what ``forward`` returned after the outputs.
        """
        plan = self.plan
        flowing = [self._flowing(name, d) for name, d in zip(plan.region.outputs, gradients, strict=True)]
        dense = self.weights.dense_among(plan.convolutions)
        tape = self._tape(Backward, [None if d is None else Given.of(d) for d in flowing], dense)
        kept = [TABLE, *(("kept", name) for name in plan.saved_names)]
        kept += [("choice", step.y) for step in plan.pools_with_choice]
        given: dict[Hashable, Tensor] = dict(zip(kept, saved, strict=True))
        given.update({("to", name): d for name, d in zip(plan.region.outputs, flowing, strict=True) if d is not None})
        found: list[Tensor | None] = []
        for name, dtype, wants in zip(plan.region.inputs, plan.mode.dtypes, plan.mode.wants, strict=True):
            if wants:
                make = torch.empty if tape.is_given(("from", name)) else torch.zeros
                given["from", name] = make(plan.shape_of(name), dtype=dtype)
            found.append(given.get(("from", name)))
        for parameter in plan.parameters:
            if plan.trains(parameter):
                given["parameter", id(parameter)] = torch.zeros_like(parameter)
            found.append(given.get(("parameter", id(parameter))))
        tape.play(given, self.pool)
        self.weights.announce(self._masked(given, dense))
        return found

    def _masked(self, given: Mapping[Hashable, Tensor], dense: frozenset[str]) -> dict[str, Tensor]:
        """The gradients of weights of which each use is one of active weights alone, by the parameter's name."""
        found = {}
        for steps in self.plan.trained_convolutions:
            if all(step.name not in dense and self.weights.mask_of(step) is not None for step in steps):
                found[f"{steps[0].name}.weight"] = given["parameter", id(steps[0].module.weight)]
        return found

    def forget(self) -> None:
        """Give up the tapes; others are written when they are wanted."""
        self._tapes.clear()
        self._played = None, None

    def _tape(
        self, schedule: type[Schedule], coming: Sequence[Given | None], *more: object, is_still: bool = False
    ) -> KernelTape:
        """The tape of a pass, written anew where it would be another one now."""
        threads = torch.get_num_threads()
        key = (threads, self.weights.version, *more, *coming)
        written = self._tapes.get(schedule)
        if written is not None and written[0] == key and (is_still or written[1].is_current):
            return written[1]
        tape = self.kernels.tape(threads, keeps=schedule is Forward and any(self.plan.needs_grad.values()))
        tape.finish(schedule(self.plan, self.weights, tape).write(coming))
        if schedule is Forward:
            self._moved = self.plan.moved()
        self._tapes[schedule] = key, tape
        return tape

    def _as_tokens(self, tensor: Tensor) -> Tensor:
        """Tokens [n, C] in one piece, where the region is one of tokens."""
        return tensor.reshape(-1, tensor.shape[-1]).contiguous() if self.plan.region.is_tokens else tensor

    def _flowing(self, name: str, gradient: Tensor | None) -> Tensor | None:
        """The gradient of an output as the tape takes it."""
        if gradient is None or not self.plan.needs_grad[name]:
            return None
        if isinstance(self.plan.maker.get(name), GlobalPoolStep):
            return gradient.to(self.kernels.dtype).reshape(gradient.shape[0], -1).contiguous()
        known = gradient.dtype in (self.kernels.dtype, self.plan.mode.storage)
        return self._as_tokens(gradient if known else gradient.to(self.kernels.dtype))
