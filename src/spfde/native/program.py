"""A region made ready for one shape of input and one state of the model: what to run, what to keep, what to free.

The forward pass keeps for the backward pass what cannot be had again: the input of each normalisation, and outputs that
a residual went into. What follows from those in one cheap pass is computed anew, so that the two sides of a
normalisation are never both kept.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import operator
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from spfde.native.backward import Backward
from spfde.native.forward import Forward
from spfde.native.graph import Region
from spfde.native.kernels import ROWS, SCALE, SHIFT, Kernels, KernelTape
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
from spfde.native.tape import Place
from spfde.native.weights import Weights

# Of a value, what may be on its way through the front at a time: a few such fit into the caches.
AT_ONCE_BYTES = 3 << 20

TABLE = "table of norms"  # under which a tape is given it; no value has such a name


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


@dataclass(frozen=True)
class Written:
    """A tape, and what it was written for.

    Attributes:
        tape: ready to be played.
        key: what it depends on besides the masks, and the addresses of parameters and buffers.
        masks: of the convolutions then.
        keep: buffers that are wanted afterwards.
    """

    tape: KernelTape
    key: tuple[object, ...]
    masks: Sequence[Tensor | None]
    keep: Sequence[Place]

    def holds(self, key: tuple[object, ...], masks: Sequence[Tensor | None]) -> bool:
        """Would it be written the same way now?"""
        return self.key == key and all(map(operator.is_, self.masks, masks)) and self.tape.is_current


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
        self.batch_readers = {step.y: step for step in steps if isinstance(step, PointStep) and self.uses_batch(step)}
        self.fused = self._find_fused()
        self.saved_names = self._find_saved()
        self.slices, self.n_channels = self._place_statistics()
        self.front, self.images_at_once = self._find_front()
        self.uses_in_front = self._count_uses(self.front)
        self.uses_after_front = self._count_uses(self.steps[len(self.front) :])
        made = [*region.inputs, *(writes(step) for step in self.front)]
        self.handed_on = tuple(name for name in made if self.front and self.uses_after_front[name])
        self._layouts_of: dict[int, dict[str, Layout]] = {}
        self.convolutions = tuple(step.name for step in self.steps if isinstance(step, ConvStep))
        self._output_shapes = self.output_shapes()
        self._forward: Written | None = None
        self._backward: Written | None = None

    def _place_statistics(self) -> tuple[dict[str, slice], int]:
        """Where the statistics of each normalising step lie, by its output."""
        slices, at = {}, 0
        for step in self.steps:
            if isinstance(step, PointStep) and step.norm is not None:
                slices[step.z] = slice(at, at + step.norm.num_features)
                at += step.norm.num_features
        return slices, at

    @functools.cached_property
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

    def _find_front(self) -> tuple[tuple[Step, ...], int]:
        """The leading steps that can run for some images at a time, and for how many at once; none for few images."""
        if self.region.is_tokens:
            return (), 0
        front = tuple(itertools.takewhile(self._is_free, self.steps))
        names = {name for step in front for name in (*self.reads(step), writes(step)) if name in self.layouts}
        largest = max((self.layouts[name] for name in names), key=lambda layout: layout.group, default=None)
        if largest is None:
            return (), 0
        groups = max(1, AT_ONCE_BYTES // (largest.group * self.kernels.dtype.itemsize))
        return (front if groups < largest.groups else ()), groups * largest.lanes

    def _is_free(self, step: Step) -> bool:
        """Does nothing of the step tie the images of a batch together, or wait for the backward pass?"""
        if isinstance(step, ConvStep) and step.y in self.batch_readers:
            return False
        return not self.needs_grad[writes(step)] and not (isinstance(step, PointStep) and self.uses_batch(step))

    def reads(self, step: Step) -> tuple[str, ...]:
        """What the step reads when its turn comes: a fused convolution runs at the turn of its pixelwise step."""
        if isinstance(step, ConvStep) and step.y in self.fused:
            return ()
        if isinstance(step, PointStep) and step.y in self.fused:
            conv = self.maker[step.y]
            assert isinstance(conv, ConvStep)
            return (conv.x,) if step.residual is None else (conv.x, step.residual)
        return reads(step)

    def _count_uses(self, steps: Sequence[Step]) -> Counter[str]:
        """How often these steps read each value; that one of theirs leaves the region counts too."""
        made = {writes(step) for step in steps}
        uses = Counter(value for step in steps for value in self.reads(step))
        uses.update(name for name in self.region.outputs if name in made)
        return uses

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
        tensors = [self._as_tokens(tensor.detach()) for tensor in inputs]
        strides = [tensor.stride() for tensor in tensors]
        written = self._forward_tape(strides)
        table = torch.empty(ROWS, self.n_channels, dtype=self.kernels.dtype)
        given: dict[Hashable, Tensor] = {TABLE: table, **dict(zip(self.region.inputs, tensors, strict=True))}
        outputs = []
        for name, shape in zip(self.region.outputs, self._output_shapes, strict=False):
            if name in given:  # an input that is passed on
                outputs.append(inputs[self.region.inputs.index(name)].clone())
            else:
                given[name] = torch.empty(shape, dtype=self.kernels.dtype)
                outputs.append(given[name])
        return [*outputs, table, *written.tape.play(given, self.pool, written.keep)]

    def _forward_tape(self, strides: Sequence[tuple[int, ...]]) -> Written:
        threads = torch.get_num_threads()
        key, masks = (threads, *strides), self.weights.masks_of(self.convolutions)
        if self._forward is None or not self._forward.holds(key, masks):
            tape = self.kernels.tape(threads)
            walk = Forward(self, tape, strides)
            walk.write()
            tape.finish()
            keep = [walk.kept[name] for name in self.saved_names]
            keep += [walk.choices[step.y] for step in self.pools_with_choice]
            self._forward = Written(tape, key, masks, keep)
        return self._forward

    def _backward_tape(self, strides: Sequence[tuple[int, ...] | None]) -> KernelTape:
        threads = torch.get_num_threads()
        key = (threads, self.weights.dense_among(self.convolutions), *strides)
        masks = self.weights.masks_of(self.convolutions)
        if self._backward is None or not self._backward.holds(key, masks):
            tape = self.kernels.tape(threads)
            Backward(self, tape).write(strides)
            tape.finish()
            self._backward = Written(tape, key, masks, ())
        return self._backward.tape

    def _as_tokens(self, tensor: Tensor) -> Tensor:
        """Tokens [n, C] in one piece, where the region is one of tokens."""
        return tensor.reshape(-1, tensor.shape[-1]).contiguous() if self.region.is_tokens else tensor

    def layouts_of(self, images: int) -> dict[str, Layout]:
        """The layouts of the values of so many images."""
        if images not in self._layouts_of:
            self._layouts_of[images] = {
                name: dataclasses.replace(layout, batch=images) for name, layout in self.layouts.items()
            }
        return self._layouts_of[images]

    def in_table(self, tape: KernelTape, row: int, step: PointStep) -> Place:
        """Where a row of the table of norms has the numbers of the step's norm."""
        return tape.numbers_after(tape.given(TABLE), row * self.n_channels + self.slices[step.z].start)

    def constants_of(self, tape: KernelTape, step: PointStep) -> tuple[Place | None, Place | None]:
        """Scale and shift that the step's norm came to; None for no norm."""
        if step.norm is None:
            return None, None
        return self.in_table(tape, SCALE, step), self.in_table(tape, SHIFT, step)

    def pack(self, tape: KernelTape, tensor: Place, strides: Sequence[int], buffer: Place, layout: Layout) -> None:
        """Fill a buffer from a tensor."""
        if self.region.is_tokens:
            tape.pack_tokens(tensor, self.n_tokens, buffer, layout)
        else:
            tape.pack(tensor, strides, buffer, layout)

    def unpack(self, tape: KernelTape, buffer: Place, layout: Layout, tensor: Place, name: str) -> None:
        """Fill a contiguous tensor, of the value of this name, from a buffer."""
        if self.region.is_tokens:
            tape.unpack_tokens(buffer, layout, tensor, self.n_tokens)
        else:
            _, channels, height, width = self.shape_of(name)
            tape.unpack(buffer, layout, tensor, (channels * height * width, height * width, width, 1))

    @property
    def n_tokens(self) -> int:
        """Tokens of a region of tokens."""
        return math.prod(self.mode.shapes[0][:-1])

    def shape_of(self, name: str) -> tuple[int, ...]:
        """Shape of a value as a tensor."""
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
                shapes.append(self.shape_of(name))
        shapes.append((ROWS, self.n_channels))
        shapes += [(self.layouts[name].numel,) for name in self.saved_names]
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
        flowing = [self._flowing(name, d) for name, d in zip(self.region.outputs, gradients, strict=True)]
        strides = [None if d is None else d.stride() for d in flowing]
        tape, n = self._backward_tape(strides), 1 + len(self.saved_names)
        given: dict[Hashable, Tensor] = {TABLE: saved[0]}
        given.update({("kept", name): kept for name, kept in zip(self.saved_names, saved[1:n], strict=True)})
        given.update({("choice", step.y): c for step, c in zip(self.pools_with_choice, saved[n:], strict=True)})
        given.update({("to", name): d for name, d in zip(self.region.outputs, flowing, strict=True) if d is not None})
        found: list[Tensor | None] = []
        for name in self.region.inputs:
            if tape.is_given(("from", name)):
                given["from", name] = torch.empty(self.shape_of(name), dtype=self.kernels.dtype)
            found.append(given.get(("from", name)))
        for parameter in self.parameters:
            if tape.is_given(("parameter", id(parameter))):
                given["parameter", id(parameter)] = torch.zeros_like(parameter)
            found.append(given.get(("parameter", id(parameter))))
        tape.play(given, self.pool)
        return found

    def _flowing(self, name: str, gradient: Tensor | None) -> Tensor | None:
        """The gradient of an output as the tape takes it."""
        if gradient is None or not self.needs_grad[name]:
            return None
        if isinstance(self.maker.get(name), GlobalPoolStep):
            return gradient.reshape(gradient.shape[0], -1).contiguous()
        return self._as_tokens(gradient.to(self.kernels.dtype))
