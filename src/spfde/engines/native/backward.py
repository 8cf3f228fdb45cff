"""The schedule of the backward pass through a region."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from spfde.engines.native.fusion import ConvStep, GlobalPoolStep, PointStep, PoolStep
from spfde.engines.native.kernels import INVERSE, MEAN, SCALE, SHIFT, KernelTape, PoolKernel
from spfde.engines.native.packed import PackedWeights
from spfde.engines.native.region_plan import RegionPlan
from spfde.engines.native.schedule import Schedule, Strides
from spfde.engines.native.tape import Buffer, Place


class Backward(Schedule):
    """The schedule of the backward pass.

    On the tape are given the gradients of the region's outputs, as ("to", name), and of its inputs, as ("from", name);
    values of the forward pass, as ("kept", name), and its winners of maximum pools, as ("choice", name); the gradients
    of parameters, as ("parameter", id).

    Args:
        plan, weights, tape: see ``Schedule``.
    """

    def __init__(self, plan: RegionPlan, weights: PackedWeights, tape: KernelTape) -> None:
        super().__init__(plan, weights, tape)
        self.layouts = plan.layouts
        self.flowing: dict[str, Buffer] = {}
        self.pooled: dict[str, Place] = {}
        self.parameters: dict[int, Place] = {}

    def write(self, strides: Sequence[Strides]) -> Sequence[Place]:
        for name, of_gradient in zip(self.plan.region.outputs, strides, strict=True):
            if of_gradient is not None:
                self._enter(name, of_gradient)
        for step in reversed(self.plan.steps):
            if isinstance(step, GlobalPoolStep):
                self._global_pool(step)
                continue
            d = self.flowing.pop(step.y, None)
            if d is None:
                continue
            if isinstance(step, ConvStep):
                self._conv(step, d)
            elif isinstance(step, PointStep):
                self._point(step, d)
            else:
                self._pool(step, d)
            del d
        for name in self.plan.region.inputs:
            if name in self.flowing:
                self.unpack(self.flowing[name], self.tape.given(("from", name)))
        return ()

    def _enter(self, name: str, strides: Sequence[int]) -> None:
        given = self.tape.given(("to", name))
        if isinstance(self.plan.maker.get(name), GlobalPoolStep):
            self.pooled[name] = given
            return
        buffer = self.tape.take(self.layouts[name])
        self.pack(given, strides, buffer)
        self._flow(name, buffer)

    def _conv(self, step: ConvStep, d: Buffer) -> None:
        plan, from_, to = self.plan, self.layouts[step.x], self.layouts[step.y]
        weight, bias = step.module.weight, step.module.bias
        if plan.trains(weight):
            entries = self.weights.gradient_entries(step, from_, to)
            values = self.tape.take_flat(entries.n)
            self.tape.conv_weight(self._value(step.x), d, entries, values, step=step.geometry.stride)
            seen = id(weight) in self.parameters
            self.parameters[id(weight)] = gradient = self.tape.given(("parameter", id(weight)))
            self.tape.scatter(values, entries, gradient, accumulate=seen)
            del values
        if bias is not None and plan.trains(bias):
            sums = self._sink(bias)
            self.tape.channel_sum(d, sums)
            self._add_gradient(bias, sums)
        if not plan.needs_grad[step.x]:
            return
        out, accumulate = self._to(step.x)
        for part in self.weights.lists_of(step, from_, to).backward:
            values = self.tape.gather(weight, part)
            self.tape.conv(d, out, part, values, step_y=step.geometry.stride, accumulate=accumulate)
        self.flowing[step.x] = out

    def _to(self, name: str) -> tuple[Buffer, bool]:
        """Where the gradient of a value goes, and whether it is added to what is there."""
        there = self.flowing.get(name)
        return (self.tape.take(self.layouts[name]), False) if there is None else (there, True)

    def _point(self, step: PointStep, d: Buffer) -> None:
        plan, before, norm, residual = self.plan, self.layouts[step.x], step.norm, step.residual
        scale, shift = self.constants_of(step, SCALE, SHIFT)
        mean, inverse = self.constants_of(step, MEAN, INVERSE)
        to_residual = residual is not None and plan.needs_grad[residual]
        # d itself goes on to the residual where it can, so the gradient of y then needs a buffer of its own.
        out = None
        if plan.needs_grad[step.x]:
            waits = not to_residual or residual in self.flowing
            out = d if d.layout == before and waits else self.tape.take(before)
        trained = [] if norm is None else [norm.weight, norm.bias]
        sums = [self._sink(parameter) if plan.trains(parameter) else None for parameter in trained] or [None, None]
        keep, activation, source = to_residual, step.activation, self._source(step, d)
        if residual is not None and to_residual and out is d:
            # Another gradient waits at the residual: add to it first, for d is overwritten after.
            self.tape.apply_backward(
                d, source, None, z=self._slope(step), scale=scale, shift=shift, activation=activation, keep=True
            )  # fmt: skip
            self._flow_copy(residual, d)
            keep, activation = False, "none"
        self.tape.apply_backward(
            d, source, out, z=self._slope(step) if activation != "none" else None, scale=scale, shift=shift, mean=mean,
            inverse=inverse, scale_gradient=sums[0], shift_gradient=sums[1], activation=activation,
            batch=plan.uses_batch(step), keep=keep,
        )  # fmt: skip
        for parameter, written in zip(trained, sums, strict=False):
            if written is not None:
                self._add_gradient(parameter, written)
        if residual is not None and keep:
            if self.layouts[residual] == d.layout and residual not in self.flowing:
                self.flowing[residual] = d
            else:
                self._flow_copy(residual, d)
        if out is not None:
            self._flow(step.x, out)

    def _pool(self, step: PoolStep, d: Buffer) -> None:
        out, accumulate = self._to(step.x)
        choice = self.tape.given(("choice", step.y)) if step.kind == "max_pool" else None
        kernel: PoolKernel = "avg_pool_backward" if choice is None else "max_pool_backward"
        self.tape.pool(
            kernel, d, out, step.window, choice=choice, count_padding=step.count_padding, accumulate=accumulate
        )  # fmt: skip
        self.flowing[step.x] = out

    def _global_pool(self, step: GlobalPoolStep) -> None:
        gradient = self.pooled.pop(step.y, None)
        if gradient is None:
            return
        out, accumulate = self._to(step.x)
        self.tape.global_pool_backward(gradient, out, accumulate=accumulate)
        self.flowing[step.x] = out

    def _kept(self, name: str) -> Buffer:
        return Buffer(self.tape.given(("kept", name)).slot, layout=self.layouts[name])

    def _value(self, name: str) -> Buffer:
        """A value of the forward pass, kept or computed anew."""
        if name in self.plan.saved_names:
            return self._kept(name)
        step = self.plan.maker[name]
        assert isinstance(step, PointStep)
        assert step.residual is None
        scale, shift = self.constants_of(step, SCALE, SHIFT)
        out = self.tape.take(self.layouts[name])
        self.tape.apply(self._kept(step.x), out, scale=scale, shift=shift, activation=step.activation)
        return out

    def _source(self, step: PointStep, d: Buffer) -> Buffer:
        """The input of the step; where nothing of it is used it was not kept, and the gradient stands in."""
        return self._kept(step.x) if step.x in self.plan.saved_names else d

    def _slope(self, step: PointStep) -> Buffer | None:
        return self._kept(step.y) if step.residual is not None and step.activation != "none" else None

    def _flow(self, name: str, buffer: Buffer) -> None:
        if name in self.flowing:
            self.tape.add(buffer, self.flowing[name])
        else:
            self.flowing[name] = buffer

    def _flow_copy(self, name: str, d: Buffer) -> None:
        target, accumulate = self._to(name)
        self.tape.add(d, target, accumulate=accumulate)
        self.flowing[name] = target

    def _sink(self, parameter: Tensor) -> Place:
        """Where a gradient of the parameter may be written: its own place, or beside it if one is there already."""
        if id(parameter) in self.parameters:
            return self.tape.take_flat(parameter.numel())
        self.parameters[id(parameter)] = place = self.tape.given(("parameter", id(parameter)))
        return place

    def _add_gradient(self, parameter: Tensor, written: Place) -> None:
        """Add what was written beside the parameter's own place to it."""
        if written is not self.parameters[id(parameter)]:
            self.tape.accumulate(written, self.parameters[id(parameter)], parameter.numel())
