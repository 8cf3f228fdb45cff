"""The schedule of the backward pass through a region.

Gradients are stored where convolutions write them. What comes of one in a pixelwise step (a slope, a normalisation, the
way back to a residual) is noted, and made by the convolution that reads it. Where the one that writes it takes the
sums of a norm, the slope behind that norm is in what is stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from spfde.engines.native.fusion import ConvStep, GlobalPoolStep, PointStep, PoolStep
from spfde.engines.native.geometry import gradient_shape
from spfde.engines.native.kernels import (
    MEAN,
    SCALE,
    SHIFT,
    KernelTape,
    Made,
    NormSums,
    PoolKernel,
    Sloped,
    WeightGradient,
)
from spfde.engines.native.lists import Entries
from spfde.engines.native.packed import PackedWeights
from spfde.engines.native.region_plan import RegionPlan
from spfde.engines.native.schedule import TABLE, Given, Schedule
from spfde.engines.native.tape import Buffer, Place


class Backward(Schedule):
    """The schedule of the backward pass.

    On the tape are given the gradients of the region's outputs, as ("to", name), and of its inputs, as ("from", name);
    values of the forward pass, as ("kept", name), and its winners of maximum pools, as ("choice", name); the gradients
    of parameters, as ("parameter", id), which are added to.

    Args:
        plan, weights, tape: see ``Schedule``.
    """

    def __init__(self, plan: RegionPlan, weights: PackedWeights, tape: KernelTape) -> None:
        super().__init__(plan, weights, tape)
        self.layouts = plan.layouts
        self.flowing: dict[str, list[Sloped]] = {}  # parts of values' gradients
        self.made: dict[str, Sloped] = {}  # gradients of what convolutions wrote, to be made by them
        self.pooled: dict[str, Place] = {}
        self.sums: dict[str, NormSums] = {}  # by the output of the step that needs them

    def write(self, coming: Sequence[Given | None]) -> Sequence[Place]:
        for name, given in zip(self.plan.region.outputs, coming, strict=True):
            if given is not None:
                self._enter(name, given)
        for step in reversed(self.plan.steps):
            if isinstance(step, GlobalPoolStep):
                self._global_pool(step)
            elif isinstance(step, ConvStep):
                gradient = self.made.pop(step.y, None) or self._collapsed(step.y)
                if gradient is not None:
                    self._conv(step, gradient)
            elif (gradient := self._collapsed(step.y)) is not None:
                if isinstance(step, PointStep):
                    self._point(step, gradient)
                else:
                    self._pool(step, gradient)
        for name, dtype in zip(self.plan.region.inputs, self.plan.mode.dtypes, strict=True):
            if (gradient := self._collapsed(name)) is not None:
                self.unpack(self._stored(gradient), self.tape.given(("from", name)), dtype)
        return ()

    def _enter(self, name: str, given: Given) -> None:
        place = self.tape.given(("to", name))
        if isinstance(self.plan.maker.get(name), GlobalPoolStep):
            self.pooled[name] = place
            return
        buffer = self.tape.take(self.layouts[name])
        self.pack(place, given, buffer)
        self._flow(name, Sloped(buffer))

    # --- steps ---------------------------------------------------------------------------------------------------

    def _conv(self, step: ConvStep, gradient: Sloped) -> None:
        plan, from_, to = self.plan, self.layouts[step.x], self.layouts[step.y]
        module = step.module
        wants_weight, wants_source = plan.trains(module.weight), plan.needs_grad[step.x]
        shape = gradient_shape(step.geometry, from_, to, self.weights.vectors)
        weight = bias = target = added = norm = values = None
        accumulate = False
        entries: tuple[Entries, ...] = ()
        if wants_weight:
            wanted = self.weights.gradient_entries(step, from_, to)
            weight = WeightGradient(wanted, self._gradient_of(module.weight))
        if module.bias is not None and plan.trains(module.bias):
            bias = self.tape.take_flat(self.tape.threads * to.channels)
        if wants_source:
            target = self._own_part(step.x, gradient)
            accumulate = target is not None
            added = self._taken_along(step.x)
            if target is None:
                target = self._room_for(step.x, added, gradient)
            norm = self._sums_of(step) if not self.flowing.get(step.x) else None
            entries = self.weights.lists_of(step, from_, to).gradient
            values = self.tape.gather(module.weight, entries)
        self.tape.conv_gradient(
            gradient, self._value(step.x) if wants_weight else Made(self._like(step.x)), shape, target=target,
            entries=entries, values=values, accumulate=accumulate, added=added, norm=norm, weight=weight, bias=bias,
        )  # fmt: skip
        if bias is not None and module.bias is not None:
            self.tape.sum_rows(bias, self._gradient_of(module.bias), to.channels)
        if target is not None:
            self._flow(step.x, Sloped(target))

    def _point(self, step: PointStep, gradient: Sloped) -> None:
        plan, norm, residual = self.plan, step.norm, step.residual
        # A convolution that has summed it up for the norm has taken it through the activation, too.
        if step.activation != "none" and step.y not in self.sums:
            gradient = Sloped(self._stored(gradient), z=self._slope(step), activation=step.activation)
        if residual is not None and plan.needs_grad[residual]:
            self._flow(residual, gradient)
        scale, shift = self.constants_of(step, SCALE, SHIFT)
        gradient = replace(gradient, scale=scale, shift=shift, k1=scale)
        is_read = plan.uses_batch(step) or (gradient.activation != "none" and gradient.z is None)
        if is_read:
            gradient = replace(gradient, y=self._kept(step.x))
        if norm is not None:
            constants = self._norm(step, gradient)
            if constants is not None:
                k3 = self.tape.numbers_after(constants, norm.num_features)
                gradient = replace(gradient, k2=constants, k3=k3)
        if not plan.needs_grad[step.x]:
            return
        if isinstance(plan.maker.get(step.x), ConvStep) and plan.is_read_once(step.x):
            self.made[step.x] = gradient
        else:
            self._flow(step.x, Sloped(self._stored(gradient)))

    def _norm(self, step: PointStep, gradient: Sloped) -> Place | None:
        """Gradients of a norm's weight and bias; where it uses the batch, what they bring to its input's gradient."""
        plan, norm, layout = self.plan, step.norm, self.layouts[step.x]
        assert norm is not None
        trained = [
            self._gradient_of(parameter) if parameter is not None and plan.trains(parameter) else None
            for parameter in (norm.weight, norm.bias)
        ]
        if not plan.uses_batch(step) and trained == [None, None]:
            return None
        sums = self.sums.pop(step.y, None)
        if sums is None:
            sums = self._new_sums(step, gradient)
            self.tape.norm_sums(gradient.d, sums)
        constants = self.tape.take_flat(2 * norm.num_features) if plan.uses_batch(step) else None
        count = layout.batch * layout.height * layout.width
        self.tape.norm_gradient(
            sums.sums, self.in_table(MEAN, step), plan.n_channels, norm.num_features, weight=trained[0],
            bias=trained[1], constants=constants, count=count,
        )  # fmt: skip
        return constants

    def _new_sums(self, step: PointStep, gradient: Sloped) -> NormSums:
        """Room for the sums that a step's norm needs of a gradient of its output."""
        assert step.norm is not None
        room = self.tape.take_flat(self.tape.threads * 2 * step.norm.num_features, torch.float64)
        scale, shift, mean = self.constants_of(step, SCALE, SHIFT, MEAN)
        # Where nothing of its input is used it was not kept, and the gradient stands in.
        y = self._kept(step.x) if step.x in self.plan.saved_names else gradient.d
        return NormSums(room, y, gradient.z, scale, shift, mean, gradient.activation)

    def _sums_of(self, conv: ConvStep) -> NormSums | None:
        """What the convolution can sum up for the norm that made what it reads: all of the gradient is there then."""
        plan, maker = self.plan, self.plan.maker.get(conv.x)
        if not isinstance(maker, PointStep) or maker.norm is None or plan.first_readers[conv.x] is not conv:
            return None
        if not plan.uses_batch(maker) and not any(map(plan.trains, maker.parameters)):
            return None
        if maker.x not in plan.saved_names:
            return None
        z = self._slope(maker) if maker.activation != "none" else None
        kept = Sloped(self._kept(maker.x), z=z, activation=maker.activation)
        self.sums[conv.x] = sums = self._new_sums(maker, kept)
        return sums

    def _pool(self, step: PoolStep, gradient: Sloped) -> None:
        d = self._stored(gradient)
        out, accumulate = self._to(step.x, Sloped(d))
        choice = self.tape.given(("choice", step.y)) if step.kind == "max_pool" else None
        kernel: PoolKernel = "avg_pool_backward" if choice is None else "max_pool_backward"
        self.tape.pool(
            kernel, d, out, step.window, choice=choice, count_padding=step.count_padding, accumulate=accumulate
        )  # fmt: skip
        self._flow(step.x, Sloped(out))

    def _global_pool(self, step: GlobalPoolStep) -> None:
        gradient = self.pooled.pop(step.y, None)
        if gradient is None:
            return
        out, accumulate = self._to(step.x)
        self.tape.global_pool_backward(gradient, out, accumulate=accumulate)
        self._flow(step.x, Sloped(out))

    # --- values of the forward pass ------------------------------------------------------------------------------

    def _like(self, name: str) -> Buffer:
        """A place that nobody reads, for the sake of its layout."""
        return Buffer(self.tape.given(TABLE).slot, layout=self.layouts[name])

    def _kept(self, name: str) -> Buffer:
        return Buffer(self.tape.given(("kept", name)).slot, layout=self.layouts[name])

    def _value(self, name: str) -> Made:
        """A value of the forward pass, kept or made anew."""
        if name in self.plan.saved_names:
            return Made(self._kept(name))
        step = self.plan.maker[name]
        assert isinstance(step, PointStep)
        assert step.residual is None
        scale, shift = self.constants_of(step, SCALE, SHIFT)
        return Made(self._kept(step.x), scale, shift, activation=step.activation)

    def _slope(self, step: PointStep) -> Buffer | None:
        """Where the slope of the step's activation is read: off its output with a residual, else off its input."""
        return self._kept(step.y) if step.residual is not None else None

    # --- gradients -----------------------------------------------------------------------------------------------

    def _gradient_of(self, parameter: Tensor) -> Place:
        return self.tape.given(("parameter", id(parameter)))

    def _flow(self, name: str, part: Sloped) -> None:
        self.flowing.setdefault(name, []).append(part)

    def _to(self, name: str, *reading: Sloped) -> tuple[Buffer, bool]:
        """Where more of a value's gradient goes, and whether it is added to what is there, which ``reading`` is not."""
        own = self._own_part(name, *reading)
        return (self.tape.take(self.layouts[name]), False) if own is None else (own, True)

    def _own_part(self, name: str, *reading: Sloped) -> Buffer | None:
        """A part of a value's gradient that may be added to while that is read."""
        parts = self.flowing.get(name, [])
        for at, part in enumerate(parts):
            if part == Sloped(part.d) and self._is_free(part.d, *reading, *parts[:at], *parts[at + 1 :], besides=name):
                del parts[at]
                return part.d
        return None

    def _room_for(self, name: str, added: Sloped | None, gradient: Sloped) -> Buffer:
        """Where a convolution writes a value's gradient: over what it adds, each number over its own, if that is free.

        The convolution itself reads the gradient of its output around each pixel.
        """
        return added.d if added is not None and self._is_free(added.d, gradient) else self.tape.take(self.layouts[name])

    def _is_free(self, buffer: Buffer, *reading: Sloped, besides: str | None = None) -> bool:
        """Whether nobody reads a buffer: neither these nor what is noted for later, but for the parts of one value."""
        parts = (part for name, parts in self.flowing.items() if name != besides for part in parts)
        read = {noted.d.slot for noted in (*reading, *self.made.values(), *parts)}
        return buffer.slot not in read | {sums.y.slot for sums in self.sums.values()}

    def _taken_along(self, name: str) -> Sloped | None:
        """A part of the value's gradient that a convolution adds to what it writes."""
        parts = self.flowing.get(name)
        return parts.pop() if parts else None

    def _collapsed(self, name: str) -> Sloped | None:
        """The gradient of a value, all parts added; None where there is none."""
        parts = self.flowing.get(name, [])
        if len(parts) <= 1:
            self.flowing.pop(name, None)
            return parts[0] if parts else None
        buffer, accumulate = self._to(name)
        for part in self.flowing.pop(name):
            self.tape.apply_backward(part, buffer, accumulate=accumulate)
            accumulate = True
        return Sloped(buffer)

    def _stored(self, gradient: Sloped) -> Buffer:
        """Where a gradient lies; stored now if it is only noted."""
        if gradient == Sloped(gradient.d):
            return gradient.d
        buffer = self.tape.take(gradient.d.layout)
        self.tape.apply_backward(gradient, buffer)
        return buffer
