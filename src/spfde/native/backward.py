"""The way back through a program."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from spfde.native.kernels import INVERSE, MEAN, Activation
from spfde.native.layout import Layout
from spfde.native.steps import ConvStep, GlobalPoolStep, PointStep, PoolStep, Step

if TYPE_CHECKING:
    from spfde.native.program import Program


class Backward:
    """One way back through a program: the gradients of values on their way, and those of parameters."""

    def __init__(self, program: Program, table: Tensor, kept: dict[str, Tensor]) -> None:
        self.program, self.table, self.kept = program, table, kept
        self.kernels, self.pool, self.layouts = program.kernels, program.pool, program.layouts
        self.flowing: dict[str, Tensor] = {}
        self.pooled: dict[str, Tensor] = {}
        self.parameters: dict[int, Tensor] = {}

    def enter(self, name: str, gradient: Tensor, maker: Step | None) -> None:
        if isinstance(maker, GlobalPoolStep):
            self.pooled[name] = gradient.reshape(gradient.shape[0], -1).contiguous()
            return
        layout = self.layouts[name]
        self._flow(name, self.program.pack(gradient.to(self.kernels.dtype), self.pool.take(layout), layout))

    def leave(self, name: str) -> Tensor | None:
        buffer = self.flowing.pop(name, None)
        if buffer is None:
            return None
        out = torch.empty(self.program.shape_of(name), dtype=self.kernels.dtype)
        return self.program.unpack(buffer, self.layouts[name], out)

    def conv(self, step: ConvStep) -> None:
        d = self.flowing.pop(step.y, None)
        if d is None:
            return
        program, from_, to = self.program, self.layouts[step.x], self.layouts[step.y]
        weight, bias = step.module.weight, step.module.bias
        if program.trains(weight):
            entries = program.weights.gradient_entries(step, from_, to)
            values = torch.empty(entries.n, dtype=self.kernels.dtype)
            # Fresh memory would be a fault for each of its pages, in every pass; sizes are rounded up, to be shared.
            room = self.pool.take_flat(1 << self.kernels.weight_room(entries).bit_length())
            self.kernels.conv_weight(
                self.value(step.x), from_, d, to, entries, values, step=step.geometry.stride, room=room
            )
            del room
            gradient = torch.zeros_like(weight)
            self.kernels.scatter(values, entries, gradient)
            self._add_parameter(weight, gradient)
        if bias is not None and program.trains(bias):
            gradient = torch.empty_like(bias)
            self.kernels.channel_sum(d, to, gradient)
            self._add_parameter(bias, gradient)
        if not program.needs_grad[step.x]:
            return
        accumulate = step.x in self.flowing
        out = self.flowing[step.x] if accumulate else self.pool.take(from_)
        for part in program.weights.structure(step, from_, to).backward:
            values = self.kernels.gather(weight.detach(), part)
            self.kernels.conv(d, to, out, from_, part, values, step_y=step.geometry.stride, accumulate=accumulate)
        self.flowing[step.x] = out

    def point(self, step: PointStep) -> None:
        d = self.flowing.pop(step.z, None)
        if d is None:
            return
        program, here, before = self.program, self.layouts[step.z], self.layouts[step.y]
        batch, norm = program.uses_batch(step), step.norm
        scale, shift = program.constants_of(step, self.table)
        mean, inverse = self._normalised_by(step)
        to_residual = step.residual is not None and program.needs_grad[step.residual]
        to_source = program.needs_grad[step.y]
        trains_scale = norm is not None and program.trains(norm.weight)
        trains_shift = norm is not None and program.trains(norm.bias)
        residual_is_first = to_residual and step.residual not in self.flowing
        same = here == before
        # d itself goes on to the residual where it can, so the gradient of y then needs a buffer of its own.
        out = None
        if to_source:
            out = d if same and not (residual_is_first and step.residual is not None) else self.pool.take(before)
        sums = [torch.empty(here.channels, dtype=self.kernels.dtype) for _ in range(2)]
        keep = to_residual
        if to_residual and out is d:
            # Another gradient waits at the residual: add to it first, for d is overwritten after.
            self.kernels.apply_backward(
                d, here, *self._source(step, d), None, before, z=self._slope(step), scale=scale, shift=shift,
                activation=step.activation, keep=True,
            )  # fmt: skip
            assert step.residual is not None
            self._flow_copy(step.residual, d, here)
            keep = False
            activation: Activation = "none"
        else:
            activation = step.activation
        self.kernels.apply_backward(
            d, here, *self._source(step, d), out, before,
            z=self._slope(step) if activation != "none" else None, scale=scale, shift=shift, mean=mean, inverse=inverse,
            scale_gradient=sums[0] if trains_scale else None, shift_gradient=sums[1] if trains_shift else None,
            activation=activation, batch=batch, keep=keep,
        )  # fmt: skip
        if norm is not None and trains_scale:
            self._add_parameter(norm.weight, sums[0])
        if norm is not None and trains_shift:
            self._add_parameter(norm.bias, sums[1])
        if to_residual and keep:
            assert step.residual is not None
            if self.layouts[step.residual] == here and step.residual not in self.flowing:
                self.flowing[step.residual] = d
            else:
                self._flow_copy(step.residual, d, here)
        if out is not None:
            self._flow(step.y, out)

    def pool_step(self, step: PoolStep, choice: Tensor | None) -> None:
        d = self.flowing.pop(step.y, None)
        if d is None:
            return
        from_, to = self.layouts[step.x], self.layouts[step.y]
        accumulate = step.x in self.flowing
        out = self.flowing[step.x] if accumulate else self.pool.take(from_)
        if choice is not None:
            self.kernels.max_pool_backward(d, to, out, from_, choice, step.window, accumulate=accumulate)
        else:
            self.kernels.avg_pool_backward(
                d, to, out, from_, step.window, count_padding=step.count_padding, accumulate=accumulate
            )
        self.flowing[step.x] = out

    def global_pool(self, step: GlobalPoolStep) -> None:
        gradient = self.pooled.pop(step.y, None)
        if gradient is None:
            return
        accumulate = step.x in self.flowing
        out = self.flowing[step.x] if accumulate else self.pool.take(self.layouts[step.x])
        self.kernels.global_pool_backward(gradient, out, self.layouts[step.x], accumulate=accumulate)
        self.flowing[step.x] = out

    def value(self, name: str) -> Tensor:
        """A value of the forward pass, kept or computed anew."""
        if name not in self.kept:
            step = self.program.maker[name]
            assert isinstance(step, PointStep)
            assert step.residual is None
            scale, shift = self.program.constants_of(step, self.table)
            out = self.pool.take(self.layouts[name])
            self.kernels.apply(
                self.kept[step.y], self.layouts[step.y], out, self.layouts[name], scale=scale, shift=shift,
                activation=step.activation,
            )  # fmt: skip
            return out
        return self.kept[name]

    def _source(self, step: PointStep, d: Tensor) -> tuple[Tensor, Layout]:
        """The input of the step; where nothing of it is used it was not kept, and the gradient stands in."""
        if step.y in self.kept:
            return self.kept[step.y], self.layouts[step.y]
        return d, self.layouts[step.z]

    def _slope(self, step: PointStep) -> Tensor | None:
        return self.kept[step.z] if step.residual is not None and step.activation != "none" else None

    def _normalised_by(self, step: PointStep) -> tuple[Tensor | None, Tensor | None]:
        if step.norm is None:
            return None, None
        where = self.program.slices[step.z]
        return self.table[MEAN, where], self.table[INVERSE, where]

    def _flow(self, name: str, buffer: Tensor) -> None:
        if name in self.flowing:
            self.kernels.add(buffer, self.layouts[name], self.flowing[name], self.layouts[name])
        else:
            self.flowing[name] = buffer

    def _flow_copy(self, name: str, d: Tensor, layout: Layout) -> None:
        to = self.layouts[name]
        if name in self.flowing:
            self.kernels.add(d, layout, self.flowing[name], to)
        else:
            self.flowing[name] = self.pool.take(to)
            self.kernels.add(d, layout, self.flowing[name], to, accumulate=False)

    def _add_parameter(self, parameter: Tensor, gradient: Tensor) -> None:
        have = self.parameters.get(id(parameter))
        self.parameters[id(parameter)] = gradient if have is None else have.add_(gradient)
