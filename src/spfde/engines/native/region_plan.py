"""What of a region is needed for one shape of input and one state of the model: which values are kept, which steps run
together, and what needs a gradient.

The forward pass keeps for the backward pass what cannot be had again: the input of each normalisation, and outputs that
a residual went into. What follows from those in one cheap pass is computed anew, so that the two sides of a
normalisation are never both kept.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from spfde.engines.native.fusion import (
    ConvStep,
    FusedStep,
    GlobalPoolStep,
    PointStep,
    PoolStep,
    layouts_of,
    parameters_of,
)
from spfde.engines.native.graph import Region
from spfde.engines.native.grid import best_grid
from spfde.engines.native.layout import Layout

# Of a value, what may be on its way through the front at a time: a few such fit into the caches.
AT_ONCE_BYTES = 3 << 20


@dataclass(frozen=True)
class Mode:
    """What a plan is for.

    Attributes:
        shapes: of the region's inputs, each [N, C, H, W].
        dtypes: of the region's inputs.
        storage: what values are stored as.
        wants: whether each input needs a gradient.
        trains: parameters that need a gradient, by identity; empty where gradients are off.
        batch_norms: norms that use the statistics of the batch, by identity.
    """

    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[torch.dtype, ...]
    storage: torch.dtype
    wants: tuple[bool, ...]
    trains: frozenset[int]
    batch_norms: frozenset[int]


def is_tracked(norm: nn.BatchNorm2d) -> bool:
    """Do its running statistics follow the batches now?"""
    return norm.training and norm.track_running_stats and norm.running_mean is not None


class RegionPlan:
    """What of a region is needed for one mode.

    Args:
        region: what is computed.
        steps: from ``fuse``.
        mode: shapes and flags.
        lanes: images to a vector.
        threads: that kernels are cut for; with another number they come to the same.
        cells: few images may be cut into cells where nothing learns, see ``grid.py``.

    Attributes:
        is_fixed: nothing learns, and no norm uses the batch: weights and norms are what they are.
        layouts: of all values.
        needs_grad: whether a gradient comes back to a value.
        parameters: of all steps.
        maker: the step that writes a value.
        batch_readers: normalising steps that use the batch, by what they read.
        fused: what pixelwise steps read that their convolution does on the fly.
        saved_names: values that the backward pass reads.
        slices, n_channels: where the statistics of each normalising step lie, by its output, and how many there are.
        front, images_at_once: leading steps that run for some images at a time, and for how many.
        handed_on: values of the front that are read behind it.
        made_by_readers: what pixelwise steps come to that convolutions make while they read it, with the one that also
            stores it, by its output; None: nobody does.
        first_readers: by value, the first step that a gradient comes back from.
        convolutions: names.
    """

    def __init__(
        self, region: Region, steps: Sequence[FusedStep], mode: Mode, *, lanes: int, threads: int, cells: bool = False
    ) -> None:
        self.region, self.steps, self.mode, self._threads = region, tuple(steps), mode, threads
        whole = layouts_of(region, steps, mode.shapes, lanes, mode.storage)
        self.needs_grad = self._needs_grad()
        self.parameters = parameters_of(steps)
        self._uses = Counter(value for step in self.steps for value in step.reads)
        self._uses.update(region.outputs)
        self.maker = {step.y: step for step in self.steps}
        self.batch_readers = {step.x: step for step in steps if isinstance(step, PointStep) and self.uses_batch(step)}
        self.fused = self._find_fused()
        self.saved_names = self._find_saved()
        self.is_fixed = all(map(self._is_free, steps))
        grid = best_grid(steps, whole) if cells and self.is_fixed and not region.is_tokens else (1, 1)
        self.layouts = {name: layout.cut(grid) for name, layout in whole.items()}
        self.slices, self.n_channels = self._place_statistics()
        self.front, self.images_at_once = self._find_front()
        self.uses_in_front = self._count_uses(self.front)
        self.uses_after_front = self._count_uses(self.steps[len(self.front) :])
        made = [*region.inputs, *(step.y for step in self.front)]
        self.handed_on = tuple(name for name in made if self.front and self.uses_after_front[name])
        self.made_by_readers = self._find_made_by_readers()
        self.first_readers = {
            value: step for step in reversed(self.steps) if self.needs_grad[step.y] for value in step.reads
        }
        self.convolutions = tuple(step.name for step in self.steps if isinstance(step, ConvStep))
        self._layouts_of: dict[int, dict[str, Layout]] = {}

    def _place_statistics(self) -> tuple[dict[str, slice], int]:
        """Where the statistics of each normalising step lie, by its output."""
        slices, at = {}, 0
        for step in self.steps:
            if isinstance(step, PointStep) and step.norm is not None:
                slices[step.y] = slice(at, at + step.norm.num_features)
                at += step.norm.num_features
        return slices, at

    @functools.cached_property
    def norms(self) -> list[tuple[nn.BatchNorm2d, PointStep, int]]:
        """Norms that use the batch, each with its step and of how many numbers a channel its statistics are."""
        found = []
        for step in self.steps:
            if isinstance(step, PointStep) and step.norm is not None and self.uses_batch(step):
                layout = self.layouts[step.x]
                found.append((step.norm, step, layout.batch * layout.height * layout.width))
        return found

    @property
    def tracking(self) -> tuple[tuple[object, ...], ...]:
        """By norm, what decides how its running statistics move."""
        norms = [norm for norm, *_ in self.norms]
        return tuple(
            (n.training, n.track_running_stats, None if n.momentum is None else float(n.momentum)) for n in norms
        )

    def moved(self) -> list[Tensor]:
        """The running statistics that a forward pass moves."""
        kept = ((n.running_mean, n.running_var, n.num_batches_tracked) for n, *_ in self.norms if is_tracked(n))
        return [tensor for tensors in kept for tensor in tensors if tensor is not None]

    @functools.cached_property
    def trained_convolutions(self) -> list[list[ConvStep]]:
        """Convolutions with a weight that learns, those of the same weight together."""
        found: dict[int, list[ConvStep]] = {}
        for step in self.steps:
            if isinstance(step, ConvStep) and self.trains(step.module.weight):
                found.setdefault(id(step.module.weight), []).append(step)
        return list(found.values())

    # --- what is needed ----------------------------------------------------------------------------------------------

    def trains(self, parameter: Tensor | None) -> bool:
        return parameter is not None and id(parameter) in self.mode.trains

    def is_read_once(self, value: str) -> bool:
        """Does one step of the region read the value, and nobody outside?"""
        return self._uses[value] == 1

    def uses_batch(self, step: PointStep) -> bool:
        return step.norm is not None and id(step.norm) in self.mode.batch_norms

    def _needs_grad(self) -> dict[str, bool]:
        needs = dict(zip(self.region.inputs, self.mode.wants, strict=True))
        for step in self.steps:
            needs[step.y] = any(needs[value] for value in step.reads) or any(map(self.trains, step.parameters))
        return needs

    def _find_fused(self) -> frozenset[str]:
        """What convolutions write that do their pixelwise step on the fly: no gradient comes back there."""
        # The residual must be there when the convolution runs, so the convolution waits for its pixelwise step's turn.
        return frozenset(
            step.x
            for step in self.steps
            if isinstance(step, PointStep) and not self.needs_grad[step.y] and not self.uses_batch(step)
            if isinstance(self.maker.get(step.x), ConvStep) and self._uses[step.x] == 1
        )

    def _find_saved(self) -> tuple[str, ...]:
        """Names of the values that the backward pass reads."""
        saved: dict[str, None] = {}
        for step in self.steps:
            if not self.needs_grad[step.y]:
                continue
            if isinstance(step, PointStep):
                scaled = step.norm is not None and (self.uses_batch(step) or self.trains(step.norm.weight))
                if step.activation != "none" and step.residual is not None:
                    saved[step.y] = None
                if scaled or (step.activation != "none" and step.residual is None):
                    saved[step.x] = None
            elif isinstance(step, ConvStep) and self.trains(step.module.weight) and not self._can_recompute(step.x):
                saved[step.x] = None
        return tuple(saved)

    def _find_front(self) -> tuple[tuple[FusedStep, ...], int]:
        """The leading steps that can run for some images at a time, and for how many at once; none for few images."""
        if self.region.is_tokens:
            return (), 0
        front = tuple(itertools.takewhile(self._is_free, self.steps))
        names = {name for step in front for name in (*self.reads(step), step.y) if name in self.layouts}
        largest = max((self.layouts[name] for name in names), key=lambda layout: layout.group, default=None)
        if largest is None:
            return (), 0
        groups = max(1, AT_ONCE_BYTES // (largest.group * largest.itemsize))
        if groups > self._threads:  # each thread has as many, so that none waits and no image is cut
            groups -= groups % self._threads
        return (front if groups < largest.groups else ()), groups * largest.images

    def _is_free(self, step: FusedStep) -> bool:
        """Does nothing of the step tie the images of a batch together, or wait for the backward pass?"""
        if isinstance(step, ConvStep) and step.y in self.batch_readers:
            return False
        return not self.needs_grad[step.y] and not (isinstance(step, PointStep) and self.uses_batch(step))

    def reads(self, step: FusedStep) -> tuple[str, ...]:
        """What the step reads when its turn comes: a fused convolution runs at the turn of its pixelwise step."""
        if isinstance(step, ConvStep) and step.y in self.fused:
            return ()
        if isinstance(step, PointStep) and step.x in self.fused:
            conv = self.maker[step.x]
            assert isinstance(conv, ConvStep)
            return (conv.x,) if step.residual is None else (conv.x, step.residual)
        return step.reads

    def _count_uses(self, steps: Sequence[FusedStep]) -> Counter[str]:
        """How often these steps read each value; that one of theirs leaves the region counts too."""
        made = {step.y for step in steps}
        uses = Counter(value for step in steps for value in self.reads(step))
        uses.update(name for name in self.region.outputs if name in made)
        return uses

    def _find_made_by_readers(self) -> dict[str, str | None]:
        """What need not be stored by a pass of its own: its readers are convolutions, which can make it."""
        readers: dict[str, list[ConvStep | None]] = {}  # in the order in which they run
        for step in self.steps:
            for value in self.reads(step):
                runs = self.maker[step.x] if isinstance(step, PointStep) and step.x in self.fused else step
                conv = runs if isinstance(runs, ConvStep) and runs.x == value else None
                readers.setdefault(value, []).append(conv)
        found: dict[str, str | None] = {}
        for step in self.steps:
            value = step.y
            if not isinstance(step, PointStep) or step.x in self.fused or value in self.region.outputs:
                continue
            reading = readers.get(value, [])
            if not reading or value in self.handed_on:
                continue
            if None not in reading and step.residual is None and value not in self.saved_names:
                found[value] = None
            elif (first := reading[0]) is not None and first.geometry.reads_every_row(self.layouts[value].height):
                found[value] = first.y
        return found

    def _can_recompute(self, value: str) -> bool:
        """Is the value one cheap pass from another that is kept?"""
        maker = self.maker.get(value)
        if not isinstance(maker, PointStep) or maker.residual is not None or not self.needs_grad[value]:
            return False
        scaled = maker.norm is not None and (self.uses_batch(maker) or self.trains(maker.norm.weight))
        return scaled or maker.activation != "none"

    # --- shapes ------------------------------------------------------------------------------------------------------

    def layouts_of(self, images: int) -> dict[str, Layout]:
        """The layouts of the values of so many images."""
        if images not in self._layouts_of:
            self._layouts_of[images] = {
                name: dataclasses.replace(layout, batch=images) for name, layout in self.layouts.items()
            }
        return self._layouts_of[images]

    @property
    def n_tokens(self) -> int:
        """Tokens of a region of tokens."""
        return math.prod(self.mode.shapes[0][:-1])

    def shape_of(self, name: str) -> tuple[int, ...]:
        """Shape of a value as a tensor."""
        maker = self.maker.get(name)
        if isinstance(maker, GlobalPoolStep):
            pooled = self.layouts[maker.x]
            return (pooled.batch, pooled.channels, 1, 1) if maker.keepdim else (pooled.batch, pooled.channels)
        layout = self.layouts[name]
        if self.region.is_tokens:
            return (*self.mode.shapes[0][:-1], layout.channels)
        return layout.batch, layout.channels, *layout.plane

    @functools.cached_property
    def pools_with_choice(self) -> list[PoolStep]:
        """Maximum pools whose winners the backward pass reads; they come last among what is saved."""
        pools = [step for step in self.steps if isinstance(step, PoolStep)]
        return [step for step in pools if step.kind == "max_pool" and self.needs_grad[step.y]]
