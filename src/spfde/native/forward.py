"""The way forward through a program.

Its front, where nothing learns and no norm uses the batch, runs for a few groups of images at a time: what a layer
writes is then still in the cache when the next one reads it, and only a few groups' worth of buffers is in use.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from spfde.native.kernels import MEAN, ROWS, VARIANCE
from spfde.native.layout import Layout
from spfde.native.steps import ConvStep, GlobalPoolStep, PointStep, PoolStep, Step, writes
from spfde.native.structure import Entries

if TYPE_CHECKING:
    from spfde.native.program import Program


@dataclass
class _Part:
    """Images on their way: all of the batch, or some groups of it.

    Attributes:
        start, stop: which images.
        layouts: of the values of these images.
        values: what has been computed and is still to be read.
        left: by value, how often it is still to be read.
    """

    start: int
    stop: int
    layouts: Mapping[str, Layout]
    values: dict[str, Tensor]
    left: Counter[str]

    def drop(self, *names: str) -> None:
        """These were read once."""
        for name in names:
            self.left[name] -= 1
            if self.left[name] <= 0:
                self.values.pop(name, None)


class Forward:
    """One way forward through a program.

    Attributes:
        outputs: of the region.
        table: of the norms, [5, channels].
        kept: values that the backward pass reads.
        choices: winners of the maximum pools that it goes back through.
    """

    def __init__(self, program: Program) -> None:
        self.program, self.kernels, self.pool = program, program.kernels, program.pool
        self.outputs: dict[str, Tensor] = {}
        self.table = torch.empty(ROWS, program.n_channels, dtype=self.kernels.dtype)
        self.kept: dict[str, Tensor] = {}
        self.choices: dict[str, Tensor] = {}
        self._whole: dict[str, Tensor] = {}
        self._weights: dict[str, tuple[Entries, Tensor]] = {}

    def run(self, inputs: Sequence[Tensor]) -> None:
        """Compute everything from the region's inputs."""
        program, names = self.program, self.program.region.inputs
        batch, front = next(iter(program.layouts.values())).batch, program.front
        if front:
            self._whole = {name: self.pool.take(program.layouts[name]) for name in program.handed_on}
            for start in range(0, batch, program.images_at_once):
                stop = min(start + program.images_at_once, batch)
                layouts = program.layouts_of(stop - start)
                part = _Part(start, stop, layouts, {}, Counter(program.uses_in_front))
                for name, tensor in zip(names, inputs, strict=True):
                    self._enter(part, name, tensor[start:stop])
                self._walk(part, front)
        rest = _Part(0, batch, program.layouts, self._whole, Counter(program.uses_after_front))
        self._whole = {}
        if not front:
            for name, tensor in zip(names, inputs, strict=True):
                self._enter(rest, name, tensor)
        self.kept.update((name, rest.values[name]) for name in program.saved_names if name in rest.values)
        self._walk(rest, program.steps[len(front) :])
        for name, tensor in zip(names, inputs, strict=True):
            if name in program.region.outputs:  # an input that is passed on
                self.outputs[name] = tensor.clone()

    def _enter(self, part: _Part, name: str, tensor: Tensor) -> None:
        if part.left[name] or name in self._whole:
            part.values[name] = self.program.pack(tensor.detach(), self._take(part, name), part.layouts[name])

    def _take(self, part: _Part, name: str) -> Tensor:
        """A buffer for a value of these images: a piece of the whole batch's where the rest reads it too."""
        if name not in self._whole:
            return self.pool.take(part.layouts[name])
        layout = part.layouts[name]
        return self._whole[name][part.start // layout.lanes * layout.group :][: layout.numel]

    def _walk(self, part: _Part, steps: Sequence[Step]) -> None:
        program = self.program
        for step in steps:
            if isinstance(step, ConvStep):
                if step.y in program.fused:
                    continue  # its pixelwise step's turn is its own
                self._conv(part, step)
            elif isinstance(step, PointStep):
                if step.y in program.fused:
                    self._conv_fused(part, step)
                else:
                    self._point(part, step)
            elif isinstance(step, PoolStep):
                self._pool(part, step)
            else:
                self._global_pool(part, step)
            part.drop(*program.reads(step))
            self._leave(part, writes(step))

    def _leave(self, part: _Part, name: str) -> None:
        """Keep a value that was just computed, hand it over, or both."""
        program = self.program
        if name not in part.values:
            return
        if name in program.saved_names and part.layouts is program.layouts:
            self.kept[name] = part.values[name]
        if name in program.region.outputs:
            layout = program.layouts[name]
            if name not in self.outputs:
                self.outputs[name] = torch.empty(program.shape_of(name), dtype=self.kernels.dtype)
            out = self.outputs[name]
            if part.layouts is not program.layouts:
                out, layout = out[part.start : part.stop], part.layouts[name]
            program.unpack(part.values[name], layout, out)
            part.drop(name)

    def _weight(self, step: ConvStep) -> tuple[Entries, Tensor]:
        if step.name not in self._weights:
            layouts = self.program.layouts
            entries = self.program.weights.structure(step, layouts[step.x], layouts[step.y]).forward
            self._weights[step.name] = entries, self.kernels.gather(step.module.weight.detach(), entries)
        return self._weights[step.name]

    def _conv(self, part: _Part, step: ConvStep) -> None:
        kernels, to, reader = self.kernels, part.layouts[step.y], self.program.batch_readers.get(step.y)
        gathered = None if reader is None else torch.empty(kernels.statistics_size(to), dtype=kernels.dtype)
        out = self._take(part, step.y)
        entries, weight = self._weight(step)
        bias = step.module.bias
        kernels.conv(
            part.values[step.x], part.layouts[step.x], out, to, entries, weight, step_x=step.geometry.stride,
            shift=None if bias is None else bias.detach(), statistics=gathered,
        )  # fmt: skip
        part.values[step.y] = out
        if reader is not None and gathered is not None:
            where = self.program.slices[reader.z]
            kernels.statistics(gathered, to, self.table[MEAN, where], self.table[VARIANCE, where])

    def _conv_fused(self, part: _Part, point: PointStep) -> None:
        """A convolution with the pixelwise step that follows it."""
        conv = self.program.maker[point.y]
        assert isinstance(conv, ConvStep)
        bias = conv.module.bias
        if point.norm is None:
            scale, shift = None, None if bias is None else bias.detach()
        else:
            if conv.name not in self._weights:
                self._make_constants(point, bias)
            scale, shift = self.program.constants_of(point, self.table)
        entries, weight = self._weight(conv)
        out = self._take(part, point.z)
        self.kernels.conv(
            part.values[conv.x], part.layouts[conv.x], out, part.layouts[point.z], entries, weight,
            step_x=conv.geometry.stride, scale=scale, shift=shift, activation=point.activation,
            residual=None if point.residual is None else part.values[point.residual],
            residual_layout=None if point.residual is None else part.layouts[point.residual],
        )  # fmt: skip
        part.values[point.z] = out

    def _point(self, part: _Part, step: PointStep) -> None:
        program = self.program
        if program.uses_batch(step) and not isinstance(program.maker.get(step.y), ConvStep):
            self._measure(part, step)
        if step.norm is not None:
            self._make_constants(step)
        scale, shift = program.constants_of(step, self.table)
        out = self._take(part, step.z)
        self.kernels.apply(
            part.values[step.y], part.layouts[step.y], out, part.layouts[step.z], scale=scale, shift=shift,
            residual=None if step.residual is None else part.values[step.residual],
            residual_layout=None if step.residual is None else part.layouts[step.residual],
            activation=step.activation,
        )  # fmt: skip
        part.values[step.z] = out

    def _make_constants(self, step: PointStep, bias: Tensor | None = None) -> None:
        norm, where = step.norm, self.program.slices[step.z]
        assert norm is not None
        if not self.program.uses_batch(step):
            assert norm.running_mean is not None, "without running statistics a norm uses the batch"
            assert norm.running_var is not None
            self.table[MEAN, where] = norm.running_mean
            self.table[VARIANCE, where] = norm.running_var
        self.kernels.constants(self.table, where, norm.weight, norm.bias, bias, norm.eps)

    def _measure(self, part: _Part, step: PointStep) -> None:
        """Mean and biased variance of each channel: in two passes, as the second is taken around the mean."""
        y, layout, where = part.values[step.y], part.layouts[step.y], self.program.slices[step.z]
        mean, variance = self.table[MEAN, where], self.table[VARIANCE, where]
        count = layout.batch * layout.height * layout.width
        self.kernels.channel_sum(y, layout, mean)
        mean /= count
        self.kernels.channel_squares(y, layout, mean, variance)
        variance /= count

    def _pool(self, part: _Part, step: PoolStep) -> None:
        from_, to = part.layouts[step.x], part.layouts[step.y]
        out = self._take(part, step.y)
        if step.kind == "max_pool":
            choice = self.pool.take_flat(to.groups * to.channels * to.height * to.width * to.lanes, torch.int32)
            self.kernels.max_pool(part.values[step.x], from_, out, to, choice, step.window)
            if self.program.needs_grad[step.y]:
                self.choices[step.y] = choice
        else:
            self.kernels.avg_pool(part.values[step.x], from_, out, to, step.window, count_padding=step.count_padding)
        part.values[step.y] = out

    def _global_pool(self, part: _Part, step: GlobalPoolStep) -> None:
        whole = self.program.layouts[step.x]
        if step.y not in self.outputs:
            made = torch.empty(whole.batch, whole.channels, dtype=self.kernels.dtype)
            self.outputs[step.y] = made[:, :, None, None] if step.keepdim else made
        out = self.outputs[step.y].view(whole.batch, whole.channels)[part.start : part.stop]
        self.kernels.global_pool(part.values[step.x], part.layouts[step.x], out)
