"""What a region does, as few passes over memory as can be: convolutions, and everything between two of them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import nn

from spfde.engines.native.geometry import Geometry
from spfde.engines.native.graph import Region
from spfde.engines.native.kernels import Activation
from spfde.engines.native.layout import TOKEN_COLUMNS, Layout
from spfde.engines.native.lists import offsets_fit
from spfde.engines.native.ops import Op


class Unsupported(Exception):
    """Inputs of shapes that the kernels do not take; PyTorch does."""


# With a residual the slope is read off the output, which these two let us do.
_AFTER_RESIDUAL = ("relu", "relu6")


@dataclass(frozen=True)
class _Step:
    """Computes the value y from the value x."""

    x: str
    y: str

    @property
    def reads(self) -> tuple[str, ...]:
        """Names of the values that it reads."""
        return (self.x,)

    @property
    def parameters(self) -> tuple[nn.Parameter, ...]:
        """What it computes with."""
        return ()


@dataclass(frozen=True)
class ConvStep(_Step):
    """y = conv(x); a linear layer on tokens is a convolution of single pixels."""

    name: str
    module: nn.Conv2d | nn.Linear
    geometry: Geometry

    @property
    def parameters(self) -> tuple[nn.Parameter, ...]:
        return _weight_and_bias(self.module)


@dataclass(frozen=True)
class PointStep(_Step):
    """y = activation(norm(x) + residual), pixel by pixel."""

    norm: nn.BatchNorm2d | None = None
    residual: str | None = None
    activation: Activation = "none"

    @property
    def reads(self) -> tuple[str, ...]:
        return (self.x,) if self.residual is None else (self.x, self.residual)

    @property
    def parameters(self) -> tuple[nn.Parameter, ...]:
        return () if self.norm is None else _weight_and_bias(self.norm)


@dataclass(frozen=True)
class PoolStep(_Step):
    """y = the maximum or average of windows of x; kernel, stride and padding; the size of y where that was given."""

    kind: Literal["max_pool", "avg_pool"]
    window: tuple[tuple[int, int], tuple[int, int], tuple[int, int]]
    count_padding: bool = False
    size: tuple[int, int] | None = None


@dataclass(frozen=True)
class GlobalPoolStep(_Step):
    """y = the mean of each plane of x, [N, C] or [N, C, 1, 1]; y is a PyTorch tensor."""

    keepdim: bool


def _weight_and_bias(module: nn.Module) -> tuple[nn.Parameter, ...]:
    return tuple(p for p in (module.weight, module.bias) if isinstance(p, nn.Parameter))


FusedStep = ConvStep | PointStep | PoolStep | GlobalPoolStep


def fuse(region: Region, modules: Mapping[str, nn.Module]) -> tuple[FusedStep, ...]:
    """The steps of a region in an order in which they can run.

    Args:
        region: from ``graph.capture``.
        modules: the model's modules by qualified name.
    """
    uses = Counter(value for op in region.ops for value in op.inputs)
    uses.update(region.outputs)
    readers = {value: (i, op) for i, op in enumerate(region.ops) for value in op.inputs}
    fused: set[int] = set()
    steps: dict[int, FusedStep] = {}
    for position, op in enumerate(region.ops):
        if position in fused:
            continue
        step, last = _step_of(op, modules), position
        while isinstance(step, PointStep) and uses[step.y] == 1 and step.y in readers:
            at, reader = readers[step.y]
            longer = None if at in fused else _with(step, reader)
            if longer is None:
                break
            step, last = longer, at
            fused.add(at)
        steps[last] = step
    return tuple(step for _, step in sorted(steps.items(), key=lambda item: item[0]))


def _step_of(op: Op, modules: Mapping[str, nn.Module]) -> FusedStep:
    """The operation alone."""
    source, options = op.inputs[0], op.options
    if op.kind == "add":
        return PointStep(source, op.name, residual=op.inputs[1])
    if op.kind == "act":
        return PointStep(source, op.name, activation=options["act"])
    if op.kind == "global_pool":
        return GlobalPoolStep(source, op.name, options["keepdim"])
    if op.kind in ("max_pool", "avg_pool"):
        window = (options["kernel"], options["stride"], options["padding"])
        count = bool(options.get("count_include_pad", False))
        return PoolStep(source, op.name, op.kind, window, count, options.get("size"))
    assert op.module is not None, "what has weights has a module"
    module = modules[op.module]
    if isinstance(module, nn.BatchNorm2d):
        return PointStep(source, op.name, norm=module)
    assert isinstance(module, (nn.Conv2d, nn.Linear))
    return ConvStep(source, op.name, op.module, module, Geometry.of(module))


def _with(step: PointStep, op: Op) -> PointStep | None:
    """The pixelwise step with one more operation, which reads what it writes; None where the kernels cannot do both."""
    if step.activation != "none":
        return None
    if op.kind == "add" and step.residual is None and op.inputs[0] != op.inputs[1]:
        return replace(step, y=op.name, residual=next(value for value in op.inputs if value != step.y))
    if op.kind == "act" and (step.residual is None or op.options["act"] in _AFTER_RESIDUAL):
        return replace(step, y=op.name, activation=op.options["act"])
    return None


def parameters_of(steps: Sequence[FusedStep]) -> tuple[nn.Parameter, ...]:
    """The parameters of all steps, each once."""
    return tuple({id(p): p for step in steps for p in step.parameters}.values())


def layouts_of(
    region: Region, steps: Sequence[FusedStep], shapes: Sequence[Sequence[int]], lanes: int, dtype: torch.dtype
) -> dict[str, Layout]:
    """Layout of each value.

    Raises:
        Unsupported: shapes that the kernels do not take.
    """
    sizes: dict[str, tuple[int, int, int]] = {}
    batches = set()
    for name, shape in zip(region.inputs, shapes, strict=True):
        if region.is_tokens:
            groups = -(-math.prod(shape[:-1]) // (lanes * TOKEN_COLUMNS))
            batches.add(groups * lanes)
            sizes[name] = (shape[-1], 1, TOKEN_COLUMNS)
        else:
            batches.add(shape[0])
            sizes[name] = (shape[1], shape[2], shape[3])
    for step in steps:
        if isinstance(step, ConvStep):
            _, height, width = sizes[step.x]
            sizes[step.y] = (step.geometry.out_channels, *step.geometry.output_size(height, width))
        elif isinstance(step, PointStep):
            sizes[step.y] = sizes[step.x]
            if step.residual is not None and sizes[step.residual] != sizes[step.x]:
                raise Unsupported(f"adds values of different sizes, {sizes[step.x]} and {sizes[step.residual]}")
        elif isinstance(step, PoolStep):
            channels, *size = sizes[step.x]
            rows, columns = ((n + 2 * p - k) // s + 1 for n, k, s, p in zip(size, *step.window, strict=True))
            fits = step.size is None or (step.size == (rows, columns) and step.window[0] == step.window[1])
            if not fits or any(n % k for n, k in zip(size, step.window[0], strict=True) if step.size is not None):
                raise Unsupported(f"pools images of {size[0]}x{size[1]} pixels to {step.size}")
            sizes[step.y] = (channels, rows, columns)
    if len(batches) != 1 or 0 in batches:
        raise Unsupported(f"got batches of {' and '.join(map(str, sorted(batches)))}")
    if any(size <= 0 for _, *plane in sizes.values() for size in plane):
        raise Unsupported("an image has no pixels left")
    batch = batches.pop()
    layouts = {name: Layout(batch, c, h, w, lanes, dtype) for name, (c, h, w) in sizes.items()}
    convolutions = [step for step in steps if isinstance(step, ConvStep)]
    if not all(offsets_fit(step.geometry, layouts[step.x], layouts[step.y]) for step in convolutions):
        raise Unsupported("images are too large for offsets of 32 bits")
    return layouts
