"""The schedule of the forward pass through a region.

Its front, where nothing learns and no norm uses the batch, runs for a few groups of images at a time: what a layer
writes is then still in the cache when the next one reads it, and only a few groups' worth of buffers is in use.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from spfde.engines.native.fusion import ConvStep, FusedStep, GlobalPoolStep, PointStep, PoolStep
from spfde.engines.native.geometry import ForwardShape, forward_shape
from spfde.engines.native.kernels import MEAN, SCALE, SHIFT, VARIANCE, At, KernelTape, Made
from spfde.engines.native.layout import Layout
from spfde.engines.native.lists import Entries
from spfde.engines.native.packed import PackedWeights
from spfde.engines.native.region_plan import RegionPlan, is_tracked
from spfde.engines.native.schedule import Given, Schedule
from spfde.engines.native.tape import Buffer, Place


@dataclass
class _Part:
    """Images on their way: all of the batch, or some groups of it.

    Attributes:
        start: which image is the first.
        layouts: of the values of these images.
        values: what has been computed, or can be by its readers, and is still to be read.
        left: by value, how often it is still to be read.
    """

    start: int
    layouts: Mapping[str, Layout]
    values: dict[str, Made]
    left: Counter[str]

    def drop(self, *names: str) -> None:
        """These were read once."""
        for name in names:
            self.left[name] -= 1
            if self.left[name] <= 0:
                self.values.pop(name, None)


class Forward(Schedule):
    """The schedule of the forward pass.

    On the tape are given the region's inputs and outputs, by their names.

    Args:
        plan, weights, tape: see ``Schedule``.
    """

    def __init__(self, plan: RegionPlan, weights: PackedWeights, tape: KernelTape) -> None:
        super().__init__(plan, weights, tape)
        # What the backward pass reads: values, and the winners of the maximum pools that it goes back through.
        self._kept: dict[str, Buffer] = {}
        self._choices: dict[str, Place] = {}
        self._whole: dict[str, Buffer] = {}
        self._weights: dict[str, tuple[Entries, At, ForwardShape]] = {}

    def write(self, coming: Sequence[Given | None]) -> Sequence[Place]:
        plan = self.plan
        batch, front = next(iter(plan.layouts.values())).batch, plan.front
        inputs = list(zip(plan.region.inputs, coming, strict=True))
        if front:
            self._whole = {name: self.tape.take(plan.layouts[name]) for name in plan.handed_on}
            for start in range(0, batch, plan.images_at_once):
                stop = min(start + plan.images_at_once, batch)
                part = _Part(start, plan.layouts_of(stop - start), {}, Counter(plan.uses_in_front))
                self._enter(part, inputs)
                self._run(part, front)
        whole = {name: Made(buffer) for name, buffer in self._whole.items()}
        rest = _Part(0, plan.layouts, whole, Counter(plan.uses_after_front))
        self._whole = {}
        if not front:
            self._enter(rest, inputs)
        self._kept.update((name, rest.values[name].y) for name in plan.saved_names if name in rest.values)
        self._run(rest, plan.steps[len(front) :])
        for norm, step, count in plan.norms:
            if is_tracked(norm):
                self.tape.track(norm, self.in_table(MEAN, step), self.in_table(VARIANCE, step), count)
        kept: list[Place] = [self._kept[name] for name in plan.saved_names]
        return kept + [self._choices[step.y] for step in plan.pools_with_choice]

    def _enter(self, part: _Part, inputs: Sequence[tuple[str, Given | None]]) -> None:
        for name, given in inputs:
            if part.left[name] or name in self._whole:
                assert given is not None, "each input is there"
                at = part.start * given.strides[0] * given.dtype.itemsize
                buffer = self._take(part, name)
                part.values[name] = Made(buffer)
                self.pack(self.tape.bytes_after(self.tape.given(name), at), given, buffer)

    def _take(self, part: _Part, name: str) -> Buffer:
        """A buffer for a value of these images: a piece of the whole batch's where the rest reads it too."""
        layout = part.layouts[name]
        if name not in self._whole:
            return self.tape.take(layout)
        return self.tape.groups_of(self._whole[name], part.start, layout)

    def _stored(self, part: _Part, name: str) -> Buffer:
        """Where a value lies; stored now if nobody has done it."""
        made = part.values[name]
        if made == Made(made.y):
            return made.y
        buffer = self._take(part, name)
        self.tape.apply(made, buffer)
        self._keep(part, name, buffer)
        return buffer

    def _keep(self, part: _Part, name: str, buffer: Buffer) -> None:
        """A value is stored now."""
        part.values[name] = Made(buffer)
        if name in self.plan.saved_names and part.layouts is self.plan.layouts:
            self._kept[name] = buffer

    def _read_by(self, part: _Part, conv: ConvStep) -> tuple[Made, Buffer | None]:
        """What a convolution reads, and the buffer in which it stores that, too."""
        made = part.values[conv.x]
        if made == Made(made.y) or self.plan.made_by_readers.get(conv.x) != conv.y:
            return made, None
        z = self._take(part, conv.x)
        return replace(made, z=z), z

    def _run(self, part: _Part, steps: Sequence[FusedStep]) -> None:
        plan = self.plan
        for step in steps:
            if isinstance(step, ConvStep):
                if step.y in plan.fused:
                    continue  # its pixelwise step's turn is its own
                self._conv(part, step)
            elif isinstance(step, PointStep):
                if step.x in plan.fused:
                    self._conv_fused(part, step)
                else:
                    self._point(part, step)
            elif isinstance(step, PoolStep):
                self._pool(part, step)
            else:
                self._global_pool(part, step)
            part.drop(*plan.reads(step))
            self._leave(part, step.y)

    def _leave(self, part: _Part, name: str) -> None:
        """Hand over a value that was just computed, if the region's outputs have it."""
        plan = self.plan
        if name in part.values and name in plan.region.outputs:
            before = part.start * math.prod(plan.shape_of(name)[1:]) * plan.mode.storage.itemsize
            at = self.tape.bytes_after(self.tape.given(name), before)
            self.unpack(self._stored(part, name), at, plan.mode.storage)
            part.drop(name)

    def _weight(self, step: ConvStep) -> tuple[Entries, At, ForwardShape]:
        if step.y not in self._weights:
            layouts = self.plan.layouts
            entries = self.weights.lists_of(step, layouts[step.x], layouts[step.y]).forward
            shape = forward_shape(step.geometry, layouts[step.x], layouts[step.y], self.weights.vectors)
            weight, tape = step.module.weight, self.tape
            values = tape.gather_once(weight, entries) if self.plan.is_fixed else tape.gather(weight, [entries])
            self._weights[step.y] = entries, values, shape
        return self._weights[step.y]

    def _conv(self, part: _Part, step: ConvStep) -> None:
        tape, reader = self.tape, self.plan.batch_readers.get(step.y)
        out = self._take(part, step.y)
        entries, weight, shape = self._weight(step)
        gathered = None if reader is None else tape.take_flat(tape.statistics_size(out.layout, shape))
        source, z = self._read_by(part, step)
        tape.conv(source, out, entries, weight, shape, shift=step.module.bias, statistics=gathered)
        if z is not None:
            self._keep(part, step.x, z)
        self._keep(part, step.y, out)
        if reader is not None and gathered is not None:
            mean, variance = (self.in_table(row, reader) for row in (MEAN, VARIANCE))
            tape.statistics(gathered, out, shape, mean, variance)

    def _conv_fused(self, part: _Part, point: PointStep) -> None:
        """A convolution with the pixelwise step that follows it."""
        conv = self.plan.maker[point.x]
        assert isinstance(conv, ConvStep)
        self._make_constants(part, point, conv.module.bias)
        scale, shift = self.constants_of(point, SCALE, SHIFT)
        entries, weight, shape = self._weight(conv)
        residual = None if point.residual is None else self._stored(part, point.residual)
        out = self._take(part, point.y)
        source, z = self._read_by(part, conv)
        self.tape.conv(
            source, out, entries, weight, shape, scale=scale, shift=conv.module.bias if shift is None else shift,
            activation=point.activation, residual=residual,
        )  # fmt: skip
        if z is not None:
            self._keep(part, conv.x, z)
        self._keep(part, point.y, out)

    def _point(self, part: _Part, step: PointStep) -> None:
        plan = self.plan
        y = self._stored(part, step.x)
        if plan.uses_batch(step) and not isinstance(plan.maker.get(step.x), ConvStep):
            self._measure(step, y)
        self._make_constants(part, step)
        scale, shift = self.constants_of(step, SCALE, SHIFT)
        residual = None if step.residual is None else self._stored(part, step.residual)
        part.values[step.y] = Made(y, scale, shift, residual, step.activation)
        if step.y not in plan.made_by_readers:
            self._stored(part, step.y)

    def _make_constants(self, part: _Part, step: PointStep, before: Tensor | None = None) -> None:
        """What the step's norm, if it has one, comes to: once, when its first images come."""
        norm, given = step.norm, not self.plan.uses_batch(step)
        if norm is None or part.start:
            return
        assert not given or norm.running_mean is not None, "without running statistics a norm uses the batch"
        self.tape.constants(
            self.in_table(MEAN, step), self.plan.n_channels, norm.num_features,
            mean=norm.running_mean if given else None, variance=norm.running_var if given else None,
            weight=norm.weight, bias=norm.bias, before=before, eps=norm.eps, once=self.plan.is_fixed,
        )  # fmt: skip

    def _measure(self, step: PointStep, y: Buffer) -> None:
        """Mean and biased variance of each channel: in two passes, as the second is taken around the mean."""
        mean, variance = (self.in_table(row, step) for row in (MEAN, VARIANCE))
        count = y.layout.batch * y.layout.height * y.layout.width
        self.tape.channel_sum(y, mean, divisor=count)
        self.tape.channel_sum(y, variance, around=mean, divisor=count)

    def _pool(self, part: _Part, step: PoolStep) -> None:
        source, out, choice = self._stored(part, step.x), self._take(part, step.y), None
        if step.kind == "max_pool":
            to = out.layout
            choice = self.tape.take_flat(to.groups * to.channels * to.height * to.width * to.lanes, torch.int32)
            if self.plan.needs_grad[step.y]:
                self._choices[step.y] = choice
        self.tape.pool(step.kind, source, out, step.window, choice=choice, count_padding=step.count_padding)
        self._keep(part, step.y, out)

    def _global_pool(self, part: _Part, step: GlobalPoolStep) -> None:
        if step.y not in self.plan.region.outputs:
            return  # nobody reads it
        source = self._stored(part, step.x)
        means = self.tape.numbers_after(self.tape.given(step.y), part.start * source.layout.channels)
        self.tape.global_pool(source, means)
