"""A region made ready for one shape of input and one state of the model: what to run, what to keep, what to free.

The forward pass keeps for the backward pass what cannot be had again: the input of each normalisation, and outputs that
a residual went into. What follows from those in one cheap pass is computed anew, so that the two sides of a
normalisation are never both kept.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from spfde.native.backward import Backward
from spfde.native.graph import Region
from spfde.native.kernels import MEAN, ROWS, SCALE, SHIFT, VARIANCE, Kernels
from spfde.native.layout import Layout, Pool
from spfde.native.steps import (
    ConvStep,
    GlobalPoolStep,
    PointStep,
    PoolStep,
    Step,
    layouts_of,
    parameters_of,
    reads,
    writes,
)
from spfde.native.weights import Weights


@dataclass(frozen=True)
class Mode:
    """What a program is made for.

    Attributes:
        shapes: of the region's inputs, each [N, C, H, W].
        wants: whether each input needs a gradient.
        trains: parameters that need a gradient, by identity; empty where gradients are off.
        batch_norms: norms that use the statistics of the batch, by identity.
    """

    shapes: tuple[tuple[int, ...], ...]
    wants: tuple[bool, ...]
    trains: frozenset[int]
    batch_norms: frozenset[int]


class Program:
    """Runs a region forward and backward.

    Args:
        region: what to compute.
        steps: from ``steps_of``.
        mode: shapes and flags.
        weights: the lists and values of the convolutions.
        kernels: the loaded library.
        pool: where buffers come from.
    """

    def __init__(
        self, region: Region, steps: Sequence[Step], mode: Mode, *, weights: Weights, kernels: Kernels, pool: Pool
    ) -> None:
        self.region, self.steps, self.mode = region, tuple(steps), mode
        self.weights, self.kernels, self.pool = weights, kernels, pool
        self.layouts = layouts_of(region, steps, mode.shapes, kernels.lanes)
        self.needs_grad = self._needs_grad()
        self.parameters = parameters_of(steps)
        self._uses = Counter(value for step in self.steps for value in reads(step))
        self._uses.update(region.outputs)
        self.maker = {writes(step): step for step in self.steps}
        self._batch_readers = {step.y: step for step in steps if isinstance(step, PointStep) and self.uses_batch(step)}
        self._fused = self._find_fused()
        self._saved_names = self._find_saved()
        self.slices, self.n_channels = self._place_statistics()

    def _place_statistics(self) -> tuple[dict[str, slice], int]:
        """Where the statistics of each normalising step lie, by its output."""
        slices, at = {}, 0
        for step in self.steps:
            if isinstance(step, PointStep) and step.norm is not None:
                slices[step.z] = slice(at, at + step.norm.num_features)
                at += step.norm.num_features
        return slices, at

    @property
    def norms(self) -> list[tuple[nn.BatchNorm2d, slice, int]]:
        """Norms that use the batch, where their statistics lie, and of how many numbers a channel they are."""
        found = []
        for step in self.steps:
            if isinstance(step, PointStep) and step.norm is not None and self.uses_batch(step):
                layout = self.layouts[step.y]
                found.append((step.norm, self.slices[step.z], layout.batch * layout.height * layout.width))
        return found

    # --- what is needed ----------------------------------------------------------------------------------------------

    def trains(self, parameter: Tensor | None) -> bool:
        return parameter is not None and id(parameter) in self.mode.trains

    def uses_batch(self, step: PointStep) -> bool:
        return step.norm is not None and id(step.norm) in self.mode.batch_norms

    def _needs_grad(self) -> dict[str, bool]:
        needs = dict(zip(self.region.inputs, self.mode.wants, strict=True))
        for step in self.steps:
            own: tuple[Tensor | None, ...] = ()
            if isinstance(step, ConvStep):
                own = (step.module.weight, step.module.bias)
            elif isinstance(step, PointStep) and step.norm is not None:
                own = (step.norm.weight, step.norm.bias)
            needs[writes(step)] = any(needs[value] for value in reads(step)) or any(map(self.trains, own))
        return needs

    def _find_fused(self) -> dict[str, PointStep]:
        """Pixelwise steps that their convolution does on the fly, by its output: no gradient comes back there."""
        fused = {}
        for step in self.steps:
            if isinstance(step, PointStep) and not self.needs_grad[step.z] and not self.uses_batch(step):
                maker = self.maker.get(step.y)
                if isinstance(maker, ConvStep) and self._uses[step.y] == 1:
                    fused[step.y] = step
        # The residual must be there when the convolution runs, so the convolution waits for its pixelwise step's turn.
        return fused

    def _find_saved(self) -> tuple[str, ...]:
        """Names of the values that the backward pass reads."""
        saved: dict[str, None] = {}
        for step in self.steps:
            if not self.needs_grad[writes(step)]:
                continue
            if isinstance(step, PointStep):
                scaled = step.norm is not None and (self.uses_batch(step) or self.trains(step.norm.weight))
                if step.activation != "none" and step.residual is not None:
                    saved[step.z] = None
                if scaled or (step.activation != "none" and step.residual is None):
                    saved[step.y] = None
            elif isinstance(step, ConvStep) and self.trains(step.module.weight) and not self._can_recompute(step.x):
                saved[step.x] = None
        return tuple(saved)

    def _can_recompute(self, value: str) -> bool:
        """Is the value one cheap pass from another that is kept?"""
        maker = self.maker.get(value)
        if not isinstance(maker, PointStep) or maker.residual is not None or not self.needs_grad[value]:
            return False
        scaled = maker.norm is not None and (self.uses_batch(maker) or self.trains(maker.norm.weight))
        return scaled or maker.activation != "none"

    # --- forward -----------------------------------------------------------------------------------------------------

    def forward(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """The region's outputs, the table of its norms [5, channels], then what the backward pass reads."""
        values: dict[str, Tensor] = {}
        outputs: dict[str, Tensor] = {}
        table = torch.empty(ROWS, self.n_channels, dtype=self.kernels.dtype)
        choices: dict[str, Tensor] = {}
        left = Counter(self._uses)
        for name, tensor in zip(self.region.inputs, inputs, strict=True):
            values[name] = self.pack(name, tensor.detach())
        kept = {name: values[name] for name in self._saved_names if name in values}
        for step in self.steps:
            if isinstance(step, ConvStep):
                if step.y not in self._fused:
                    self._conv(step, values, table)
            elif isinstance(step, PointStep):
                if step.y in self._fused:
                    conv = self.maker[step.y]
                    assert isinstance(conv, ConvStep)
                    self._conv_fused(conv, step, values, table)
                    _drop(values, (conv.x,), left)
                else:
                    self._point(step, values, table)
            elif isinstance(step, PoolStep):
                self._pool(step, values, choices)
            else:
                outputs[step.y] = self._global_pool(step, values)
            written = writes(step)
            if written in self._saved_names and written in values:
                kept[written] = values[written]
            if not (isinstance(step, ConvStep) and step.y in self._fused):
                _drop(values, [value for value in reads(step) if value not in self._fused], left)
            if written in self.region.outputs and written in values:
                outputs[written] = self.unpack(written, values[written])
                _drop(values, (written,), left)
        for name in self.region.outputs:
            if name not in outputs:  # an input that is passed on
                outputs[name] = inputs[self.region.inputs.index(name)].clone()
        saved = [kept[name] for name in self._saved_names]
        return [*(outputs[name] for name in self.region.outputs), table, *saved, *choices.values()]

    def _conv(self, step: ConvStep, values: dict[str, Tensor], table: Tensor) -> None:
        kernels, from_, to = self.kernels, self.layouts[step.x], self.layouts[step.y]
        entries = self.weights.structure(step, from_, to).forward
        reader = self._batch_readers.get(step.y)
        gathered = None if reader is None else torch.empty(kernels.statistics_size(to), dtype=kernels.dtype)
        out = values[step.y] = self.pool.take(to)
        weight = kernels.gather(step.module.weight.detach(), entries)
        shift = None if step.module.bias is None else step.module.bias.detach()
        kernels.conv(
            values[step.x],
            from_,
            out,
            to,
            entries,
            weight,
            step_x=step.geometry.stride,
            shift=shift,
            statistics=gathered,
        )
        if reader is not None and gathered is not None:
            where = self.slices[reader.z]
            kernels.statistics(gathered, to, table[MEAN, where], table[VARIANCE, where])

    def _conv_fused(self, conv: ConvStep, point: PointStep, values: dict[str, Tensor], table: Tensor) -> None:
        from_, to = self.layouts[conv.x], self.layouts[point.z]
        entries = self.weights.structure(conv, from_, self.layouts[conv.y]).forward
        bias = conv.module.bias
        if point.norm is None:
            scale, shift = None, None if bias is None else bias.detach()
        else:
            self._make_constants(point, table, bias)
            scale, shift = self.constants_of(point, table)
        values[point.z] = self.pool.take(to)
        self.kernels.conv(
            values[conv.x], from_, values[point.z], to, entries,
            self.kernels.gather(conv.module.weight.detach(), entries), step_x=conv.geometry.stride,
            scale=scale, shift=shift, activation=point.activation,
            residual=None if point.residual is None else values[point.residual],
            residual_layout=None if point.residual is None else self.layouts[point.residual],
        )  # fmt: skip

    def _point(self, step: PointStep, values: dict[str, Tensor], table: Tensor) -> None:
        if self.uses_batch(step) and not isinstance(self.maker.get(step.y), ConvStep):
            where, y = self.slices[step.z], self.layouts[step.y]
            _measure(self.kernels, values[step.y], y, table[MEAN, where], table[VARIANCE, where])
        if step.norm is not None:
            self._make_constants(step, table)
        scale, shift = self.constants_of(step, table)
        values[step.z] = self.pool.take(self.layouts[step.z])
        self.kernels.apply(
            values[step.y], self.layouts[step.y], values[step.z], self.layouts[step.z], scale=scale, shift=shift,
            residual=None if step.residual is None else values[step.residual],
            residual_layout=None if step.residual is None else self.layouts[step.residual],
            activation=step.activation,
        )  # fmt: skip

    def _make_constants(self, step: PointStep, table: Tensor, bias: Tensor | None = None) -> None:
        norm = step.norm
        assert norm is not None
        if not self.uses_batch(step):
            assert norm.running_mean is not None, "without running statistics a norm uses the batch"
            assert norm.running_var is not None
            table[MEAN, self.slices[step.z]] = norm.running_mean
            table[VARIANCE, self.slices[step.z]] = norm.running_var
        self.kernels.constants(table, self.slices[step.z], norm.weight, norm.bias, bias, norm.eps)

    def constants_of(self, step: PointStep, table: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Scale and shift that the step's norm came to; None for no norm."""
        if step.norm is None:
            return None, None
        where = self.slices[step.z]
        return table[SCALE, where], table[SHIFT, where]

    def _pool(self, step: PoolStep, values: dict[str, Tensor], choices: dict[str, Tensor]) -> None:
        from_, to = self.layouts[step.x], self.layouts[step.y]
        values[step.y] = self.pool.take(to)
        if step.kind == "max_pool":
            choice = self.pool.take_flat(to.groups * to.channels * to.height * to.width * to.lanes, torch.int32)
            self.kernels.max_pool(values[step.x], from_, values[step.y], to, choice, step.window)
            if self.needs_grad[step.y]:
                choices[step.y] = choice
        else:
            self.kernels.avg_pool(
                values[step.x], from_, values[step.y], to, step.window, count_padding=step.count_padding
            )

    def _global_pool(self, step: GlobalPoolStep, values: dict[str, Tensor]) -> Tensor:
        layout = self.layouts[step.x]
        out = torch.empty(layout.batch, layout.channels, dtype=self.kernels.dtype)
        self.kernels.global_pool(values[step.x], layout, out)
        return out[:, :, None, None] if step.keepdim else out

    def pack(self, name: str, tensor: Tensor) -> Tensor:
        """A value's buffer from its tensor."""
        layout = self.layouts[name]
        buffer = self.pool.take(layout)
        if self.region.is_tokens:
            self.kernels.pack_tokens(tensor.reshape(-1, layout.channels).contiguous(), buffer, layout)
        else:
            self.kernels.pack(tensor, buffer, layout)
        return buffer

    def unpack(self, name: str, buffer: Tensor) -> Tensor:
        """A value's tensor from its buffer."""
        layout, out = self.layouts[name], torch.empty(self._shape(name), dtype=self.kernels.dtype)
        if self.region.is_tokens:
            self.kernels.unpack_tokens(buffer, layout, out.view(-1, layout.channels))
        else:
            self.kernels.unpack(buffer, layout, out)
        return out

    def _shape(self, name: str) -> tuple[int, ...]:
        layout = self.layouts[name]
        if self.region.is_tokens:
            return (*self.mode.shapes[0][:-1], layout.channels)
        return layout.batch, layout.channels, layout.height, layout.width

    def output_shapes(self) -> list[tuple[int, ...]]:
        """Shapes of what ``forward`` returns, for fake tensors."""
        shapes: list[tuple[int, ...]] = []
        for name in self.region.outputs:
            maker = self.maker.get(name)
            if isinstance(maker, GlobalPoolStep):
                from_ = self.layouts[maker.x]
                shapes.append((from_.batch, from_.channels) + ((1, 1) if maker.keepdim else ()))
            else:
                shapes.append(self._shape(name))
        shapes.append((ROWS, self.n_channels))
        shapes += [(self.layouts[name].numel,) for name in self._saved_names]
        for step in self.pools_with_choice:
            to = self.layouts[step.y]
            shapes.append((to.groups * to.channels * to.height * to.width * to.lanes,))
        return shapes

    @property
    def wanted(self) -> tuple[bool, ...]:
        """Which inputs, then which ``parameters``, need a gradient."""
        return (*self.mode.wants, *(id(parameter) in self.mode.trains for parameter in self.parameters))

    @property
    def pools_with_choice(self) -> list[PoolStep]:
        """Maximum pools whose winners the backward pass reads; they come last among what is saved."""
        pools = [step for step in self.steps if isinstance(step, PoolStep)]
        return [step for step in pools if step.kind == "max_pool" and self.needs_grad[step.y]]

    # --- backward ----------------------------------------------------------------------------------------------------

    def backward(self, gradients: Sequence[Tensor | None], saved: Sequence[Tensor]) -> list[Tensor | None]:
        """Gradients of the region's inputs, then of ``parameters``; None where none is needed.

        Args:
            gradients: of the region's outputs.
            saved: what ``forward`` returned after the outputs.
        """
        n = len(self._saved_names)
        walk = Backward(self, saved[0], dict(zip(self._saved_names, saved[1 : 1 + n], strict=True)))
        choices = {s.y: c for s, c in zip(self.pools_with_choice, saved[1 + n :], strict=True)}
        for name, gradient in zip(self.region.outputs, gradients, strict=True):
            if gradient is not None and self.needs_grad[name]:
                walk.enter(name, gradient, self.maker.get(name))
        for step in reversed(self.steps):
            if not self.needs_grad[writes(step)]:
                continue
            if isinstance(step, ConvStep):
                walk.conv(step)
            elif isinstance(step, PointStep):
                walk.point(step)
            elif isinstance(step, PoolStep):
                walk.pool_step(step, choices.get(step.y))
            else:
                walk.global_pool(step)
        into = [
            walk.leave(name) if wants else None for name, wants in zip(self.region.inputs, self.mode.wants, strict=True)
        ]
        return [*into, *(walk.parameters.get(id(parameter)) for parameter in self.parameters)]


def _measure(kernels: Kernels, y: Tensor, layout: Layout, mean: Tensor, variance: Tensor) -> None:
    """Mean and biased variance of each channel: in two passes, as the second is taken around the mean."""
    count = layout.batch * layout.height * layout.width
    kernels.channel_sum(y, layout, mean)
    mean /= count
    kernels.channel_squares(y, layout, mean, variance)
    variance /= count


def _drop(values: dict[str, Tensor], names: Sequence[str], left: Counter[str]) -> None:
    for name in names:
        left[name] -= 1
        if left[name] <= 0:
            values.pop(name, None)
