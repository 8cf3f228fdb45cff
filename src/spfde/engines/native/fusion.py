"""What a region does, as few passes over memory as can be: convolutions, and everything between two of them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from spfde.engines.native.graph import Region
from spfde.engines.native.kernels import Activation
from spfde.engines.native.layout import TOKEN_COLUMNS, Layout
from spfde.engines.native.lists import Geometry
from spfde.engines.native.ops import Node

_MOST = 2**31 - 1  # numbers of a group of images: offsets are int32


class Unsupported(Exception):
    """Inputs of shapes that the kernels do not take; PyTorch does."""


# With a residual the slope is read off the output, which these two let us do.
_AFTER_RESIDUAL = ("relu", "relu6")


@dataclass(frozen=True)
class ConvStep:
    """y = conv(x); a linear layer on tokens is a convolution of single pixels."""

    x: str
    y: str
    name: str
    module: nn.Conv2d | nn.Linear
    geometry: Geometry


@dataclass(frozen=True)
class PointStep:
    """z = activation(norm(y) + residual), pixel by pixel."""

    y: str
    z: str
    norm: nn.BatchNorm2d | None = None
    residual: str | None = None
    activation: Activation = "none"


@dataclass(frozen=True)
class PoolStep:
    """y = the maximum or average of windows of x; kernel, stride and padding; the size of y where that was given."""

    x: str
    y: str
    kind: str
    window: tuple[tuple[int, int], tuple[int, int], tuple[int, int]]
    count_padding: bool = False
    size: tuple[int, int] | None = None


@dataclass(frozen=True)
class GlobalPoolStep:
    """y = the mean of each plane of x, [N, C] or [N, C, 1, 1]; y is a PyTorch tensor."""

    x: str
    y: str
    keepdim: bool


Step = ConvStep | PointStep | PoolStep | GlobalPoolStep


@dataclass
class _Chain:
    """A pixelwise step that may still grow."""

    y: str
    z: str
    norm: nn.BatchNorm2d | None = None
    residual: str | None = None
    activation: Activation = "none"

    def takes(self, node: Node) -> bool:
        if self.activation != "none":
            return False
        if node.kind == "add":
            return self.residual is None and node.inputs[0] != node.inputs[1]
        if node.kind == "act":
            return self.residual is None or node.options["act"] in _AFTER_RESIDUAL
        return False

    def take(self, node: Node) -> None:
        if node.kind == "add":
            self.residual = next(value for value in node.inputs if value != self.z)
        else:
            self.activation = node.options["act"]
        self.z = node.name


def steps_of(region: Region, modules: Mapping[str, nn.Module]) -> tuple[Step, ...]:
    """The steps of a region in an order in which they can run.

    Args:
        region: from ``graph.capture``.
        modules: the model's modules by qualified name.
    """
    nodes = region.nodes
    uses = Counter(value for node in nodes for value in node.inputs)
    uses.update(region.outputs)
    readers = {value: (i, node) for i, node in enumerate(nodes) for value in node.inputs}
    fused: set[int] = set()
    steps: dict[int, Step] = {}
    for position, node in enumerate(nodes):
        if position in fused:
            continue
        if node.kind in ("norm", "add", "act"):
            chain = _start(node, modules)
            last = position
            while uses[chain.z] == 1 and chain.z in readers:
                at, reader = readers[chain.z]
                if at in fused or not chain.takes(reader):
                    break
                chain.take(reader)
                fused.add(at)
                last = at
            steps[last] = PointStep(chain.y, chain.z, chain.norm, chain.residual, chain.activation)
        else:
            steps[position] = _single(node, modules)
    return tuple(step for _, step in sorted(steps.items(), key=lambda item: item[0]))


def _start(node: Node, modules: Mapping[str, nn.Module]) -> _Chain:
    if node.kind == "add":
        return _Chain(node.inputs[0], node.name, residual=node.inputs[1])
    if node.kind == "act":
        return _Chain(node.inputs[0], node.name, activation=node.options["act"])
    assert node.module is not None, "a norm has a module"
    norm = modules[node.module]
    assert isinstance(norm, nn.BatchNorm2d)
    return _Chain(node.inputs[0], node.name, norm=norm)


def _single(node: Node, modules: Mapping[str, nn.Module]) -> Step:
    options: Mapping[str, Any] = node.options
    if node.kind in ("conv", "linear"):
        assert node.module is not None, "what has weights has a module"
        conv = modules[node.module]
        assert isinstance(conv, (nn.Conv2d, nn.Linear))
        return ConvStep(node.inputs[0], node.name, node.module, conv, Geometry.of(conv))
    if node.kind == "global_pool":
        return GlobalPoolStep(node.inputs[0], node.name, options["keepdim"])
    window = (options["kernel"], options["stride"], options["padding"])
    count = bool(options.get("count_include_pad", False))
    return PoolStep(node.inputs[0], node.name, node.kind, window, count, options.get("size"))


def reads(step: Step) -> tuple[str, ...]:
    if isinstance(step, PointStep):
        return (step.y,) if step.residual is None else (step.y, step.residual)
    return (step.x,)


def writes(step: Step) -> str:
    return step.z if isinstance(step, PointStep) else step.y


def parameters_of(steps: Sequence[Step]) -> tuple[nn.Parameter, ...]:
    found: dict[int, nn.Parameter] = {}
    for step in steps:
        module = step.module if isinstance(step, ConvStep) else step.norm if isinstance(step, PointStep) else None
        if module is not None:
            found.update({id(p): p for p in (module.weight, module.bias) if isinstance(p, nn.Parameter)})
    return tuple(found.values())


def layouts_of(region: Region, steps: Sequence[Step], shapes: Sequence[Sequence[int]], lanes: int) -> dict[str, Layout]:
    """Layout of each value; values of one size share their halo, so that a gradient can take its neighbour's buffer.

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
    halos: dict[tuple[int, int], int] = {}
    for step in steps:
        if isinstance(step, ConvStep):
            _, height, width = sizes[step.x]
            out = step.geometry.output_size(height, width)
            inside, outside = step.geometry.halos(height, width)
            halos[height, width] = max(halos.get((height, width), 0), inside)
            halos[out] = max(halos.get(out, 0), outside)
            sizes[step.y] = (step.geometry.out_channels, *out)
        elif isinstance(step, PointStep):
            sizes[step.z] = sizes[step.y]
            if step.residual is not None and sizes[step.residual] != sizes[step.y]:
                raise Unsupported(f"adds values of different sizes, {sizes[step.y]} and {sizes[step.residual]}")
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
    layouts = {name: Layout(batch, c, h, w, halos.get((h, w), 0), lanes) for name, (c, h, w) in sizes.items()}
    if any(layout.numel // layout.groups > _MOST for layout in layouts.values()):
        raise Unsupported("images are too large for offsets of 32 bits")
    return layouts
