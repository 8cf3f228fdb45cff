"""The kernels as Python functions: places and layouts in, a job on a tape out."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from spfde.engines.native.geometry import ForwardShape, GradientShape, Vectors
from spfde.engines.native.layout import Layout
from spfde.engines.native.lists import Entries
from spfde.engines.native.structs import struct
from spfde.engines.native.tape import Buffer, Place, Tape
from spfde.engines.native.upkeep import Outside

# Rows of a region's table of norms: what each normalises by, and what that comes to as one multiply-add.
MEAN, VARIANCE, INVERSE, SCALE, SHIFT = range(5)
ROWS = 5

ACTIVATIONS = {"none": 0, "relu": 1, "relu6": 2, "silu": 3, "gelu": 4}
Activation = Literal["none", "relu", "relu6", "silu", "gelu"]
PoolKernel = Literal["max_pool", "avg_pool", "max_pool_backward", "avg_pool_backward"]
Way = Literal["pack", "unpack"]

# Where numbers lie: a place, or a tensor that stays where it is.
At = Place | Tensor

# Units of a convolution that a thread takes, so that some whole rows more or less for one of them are little.
_UNITS = 4

_FOLDED = 4  # lanes in which the gradient of a weight is summed


class Bands:
    """How ``height`` rows of each group are cut into the units that threads take, in order.

    Whole images if that comes out even, else some bands for each thread, of a multiple of ``step`` rows.
    """

    def __init__(self, groups: int, height: int, threads: int, step: int) -> None:
        each = height if groups % threads == 0 else -(-height * groups // (_UNITS * threads))
        self.rows = max(step, -(-min(each, height) // step) * step)
        self.n = -(-height // self.rows)


@dataclass(frozen=True)
class Made:
    """A value: stored as ``y``, or activation(y * scale + shift + residual), made by whoever reads it.

    Attributes:
        z: where the reader also writes it.
    """

    y: Buffer
    scale: At | None = None
    shift: At | None = None
    residual: Buffer | None = None
    activation: Activation = "none"
    z: Buffer | None = None

    def c(self) -> tuple[object, ...]:
        """As the kernels take it."""
        layout = self.y.layout.c
        return self.y, layout, self.scale, self.shift, self.residual, self.z, ACTIVATIONS[self.activation]


@dataclass(frozen=True)
class Sloped:
    """A gradient: ``d`` times the slope of an activation, through a normalisation; see ``Slope`` of window.h."""

    d: Buffer
    y: Buffer | None = None
    z: Buffer | None = None
    scale: At | None = None
    shift: At | None = None
    k1: At | None = None
    k2: Place | None = None
    k3: Place | None = None
    activation: Activation = "none"

    def c(self) -> tuple[object, ...]:
        """As the kernels take it."""
        constants = (self.scale, self.shift, self.k1, self.k2, self.k3)
        return self.d, self.d.layout.c, self.y, self.z, *constants, ACTIVATIONS[self.activation]


@dataclass(frozen=True)
class NormSums:
    """The sums that a normalisation's backward pass needs of a gradient; see ``NormSums`` of gradient.h.

    Attributes:
        sums: float64 [threads, 2, channels].
    """

    sums: Place
    y: Buffer
    z: Buffer | None
    scale: Place | None
    shift: Place | None
    mean: Place | None
    activation: Activation

    def c(self) -> tuple[object, ...]:
        """As the kernels take it."""
        return self.sums, self.y, self.z, self.scale, self.shift, self.mean, ACTIVATIONS[self.activation]


_NO_SUMS = (None, None, None, None, None, None, 0)
_NO_ENTRIES = (0, 0, 0, 0, None, None, None, None, None)


@dataclass(frozen=True)
class WeightGradient:
    """What is wanted of the gradient of a weight: the entries, and the place of the parameter's gradient."""

    entries: Entries
    place: Place


class Kernels:
    """The loaded library.

    Args:
        library: from ``build.load``.
        dtype: float32, or float64 for the build that tests use.
    """

    def __init__(self, library: ctypes.CDLL, dtype: torch.dtype = torch.float32) -> None:
        self._library, self.dtype = library, dtype
        self.lanes = int(library.spfde_lanes())
        self.vectors = Vectors(self.lanes, int(library.spfde_registers()), bool(library.spfde_has_pairs()))

    def outside(self, tensors: Sequence[Tensor], masks: Sequence[Tensor]) -> Outside | None:
        """The numbers of tensors where their masks, bool tensors of their shapes, have nothing.

        None where the kernels cannot read one of the tensors as it lies.
        """
        if not all(map(self._reads, tensors, masks)):
            return None
        return Outside(self._library, tensors, masks)

    def _reads(self, tensor: Tensor, mask: Tensor) -> bool:
        is_dense = tensor.is_contiguous() or (
            tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
        )
        is_here = tensor.is_cpu and mask.is_cpu
        return tensor.dtype == self.dtype and is_here and is_dense and tensor.stride() == mask.stride()

    def tape(self, threads: int, *, keeps: bool = True) -> KernelTape:
        """A new tape, for so many threads; see ``Tape``."""
        return KernelTape(self._library, self.dtype, threads, keeps=keeps)


class KernelTape(Tape):
    """A tape that knows what each kernel is told. Buffers are blocked as their layouts say."""

    def conv(
        self, source: Made, target: Buffer, entries: Entries, values: At, shape: ForwardShape, *,
        scale: At | None = None, shift: At | None = None, residual: Buffer | None = None,
        activation: Activation = "none", statistics: Place | None = None,
    ) -> None:  # fmt: skip
        """Convolve; scale to activation are the last thing that happens to a value."""
        to = target.layout
        bands = self._bands(to, shape)
        self.hold(entries)
        self._on(
            to, "spfde_conv", "ConvJob", source.c(), target, to.c, shape.window.c, shape.tile.c, entries.c, values,
            shape.step, scale, shift, residual, ACTIVATIONS[activation], statistics, bands.n, bands.rows, self.threads,
        )  # fmt: skip

    def _bands(self, to: Layout, shape: ForwardShape) -> Bands:
        return Bands(to.groups, to.height, self.threads, shape.step)

    def statistics_size(self, to: Layout, shape: ForwardShape) -> int:
        """Numbers that ``conv`` writes as statistics."""
        return to.groups * self._bands(to, shape).n * to.channels * 3 * to.lanes

    def statistics(self, statistics: Place, of: Buffer, shape: ForwardShape, mean: Place, variance: Place) -> None:
        """Mean and biased variance of each channel from what ``conv`` wrote."""
        to = of.layout
        bands = self._bands(to, shape)
        self._on(
            to, "spfde_statistics", "StatisticsJob", statistics, of, to.c, bands.n, bands.rows, mean, variance,
            self.threads,
        )  # fmt: skip

    def conv_gradient(
        self, gradient: Sloped, source: Made, shape: GradientShape, *, target: Buffer | None = None,
        entries: Sequence[Entries] = (), values: Place | None = None, accumulate: bool = False,
        added: Sloped | None = None, norm: NormSums | None = None, weight: WeightGradient | None = None,
        bias: Place | None = None,
    ) -> None:  # fmt: skip
        """Both gradients of a convolution.

        Args:
            gradient: of the output.
            source: the input.
            shape: see there.
            target: where the gradient of the input goes; None: nowhere.
            entries, values: for it, by residue; the values one after another.
            accumulate: add to the target.
            added: a gradient times a slope at a stored value, which is added, too.
            norm: sums to be taken of what is written, which is behind its activation then.
            weight: the gradient of the weight, which is added to.
            bias: where the sums of the gradient of the output go, [threads, channels]; None: nowhere.
        """
        layout = gradient.d.layout
        bands = Bands(layout.groups, shape.height, self.threads, shape.step)
        lists = (struct("Entries") * len(entries))(*(one.c for one in entries))
        self.hold((lists, tuple(entries), weight))
        n = 0 if weight is None else weight.entries.n
        room = (None, None, None, None, None) if weight is None else (
            weight.entries.index.ctypes.data, weight.place, self.take_flat(self.threads * n * _FOLDED),
            self.take_flat(self.threads * n), bias,
        )  # fmt: skip
        self._on(
            layout, "spfde_conv_gradient", "GradientJob", gradient.c(), source.c(), target, accumulate,
            (None, None, 0) if added is None else (added.d, added.z, ACTIVATIONS[added.activation]),
            _NO_SUMS if norm is None else norm.c(), shape.window.c, shape.source.c, shape.tile.c,
            ctypes.addressof(lists) if target else None, values, weight.entries.c if weight else _NO_ENTRIES,
            *(shape.weight if weight else (0, 0)), *room[:4], bias, shape.step, shape.height, bands.n, bands.rows,
            self.threads,
        )  # fmt: skip

    def sum_rows(self, rows: Place, target: Place, n: int) -> None:
        """target += the sum of rows [threads, n]."""
        self.call("spfde_sum_rows", "RowsJob", rows, target, n, self.threads)

    def constants(
        self, table: Place, row: int, channels: int, *, mean: Tensor | None, variance: Tensor | None,
        weight: Tensor | None, bias: Tensor | None, before: Tensor | None, eps: float, once: bool = False,
    ) -> None:  # fmt: skip
        """Inverse deviation, scale and shift of a norm's channels.

        Args:
            table: the first row of the table [5, ``row``], at the norm's first channel.
            row: length of a row.
            channels: of the norm.
            mean, variance: what it normalises by; None: what the table holds.
            weight, bias: of the norm.
            before: the bias of the convolution that the norm is folded into.
            eps: of the norm.
            once: see ``call``; the table must stay where it is.
        """
        self.call(
            "spfde_constants", "ConstantsJob", table, row, channels, mean, variance, weight, bias, before, eps,
            once=once,
        )  # fmt: skip

    def apply(self, source: Made, target: Buffer) -> None:
        """Store a value."""
        self._on(target.layout, "spfde_apply", "ApplyJob", source.c(), target, self.threads)

    def apply_backward(self, gradient: Sloped, target: Buffer, *, accumulate: bool = False) -> None:
        """Store a gradient, or add it."""
        self._on(
            target.layout, "spfde_apply_backward", "ApplyBackwardJob", gradient.c(), target, accumulate, self.threads
        )  # fmt: skip

    def norm_sums(self, d: Buffer, norm: NormSums) -> None:
        """The sums of a gradient that no convolution has taken."""
        self._on(d.layout, "spfde_norm_sums", "NormSumsJob", d, d.layout.c, norm.c(), self.threads)

    def norm_gradient(
        self, sums: Place, table: Place, row: int, channels: int, *, weight: Place | None, bias: Place | None,
        constants: Place | None, count: int,
    ) -> None:  # fmt: skip
        """Add the gradients of a norm's weight and bias; k2 and k3 of its input's gradient, one behind the other.

        Args:
            sums: of ``norm_sums``.
            table, row, channels: as of ``constants``.
            weight, bias: where gradients are added.
            constants: [2, channels], where the norm uses the batch.
            count: numbers of a channel.
        """
        self.call(
            "spfde_norm_gradient", "NormGradientJob", sums, table, row, channels, weight, bias, constants, count,
            self.threads,
        )  # fmt: skip

    def track(self, norm: nn.BatchNorm2d, mean: Place, variance: Place, count: int) -> None:
        """Move a norm's running statistics towards those of a batch, as ``nn.BatchNorm2d`` does.

        Args:
            norm: keeps such statistics.
            mean, variance: of the batch, [channels]; the latter is biased.
            count: numbers of a channel.
        """
        assert norm.running_mean is not None
        assert norm.running_var is not None
        share = math.nan if norm.momentum is None else float(norm.momentum)
        self.call(
            "spfde_track", "TrackJob", norm.running_mean, norm.running_var, norm.num_batches_tracked, mean, variance,
            norm.num_features, share, count / (count - 1),
        )  # fmt: skip

    def channel_sum(self, source: Buffer, out: Place, *, around: Place | None = None, divisor: int = 1) -> None:
        """Sum of each channel, or of its squared distances from ``around`` [channels]; divided by a number."""
        layout = source.layout
        self._on(layout, "spfde_channel_sum", "ChannelSumJob", source, layout.c, around, out, divisor, self.threads)

    def _on(self, layout: Layout, kernel: str, job: str, *values: object) -> None:
        """A kernel that is there for each kind of storage."""
        self.call(kernel + ("_bf16" if layout.dtype == torch.bfloat16 else ""), job, *values)

    def copy(self, way: Way, tensor: Place, dtype: torch.dtype, strides: Sequence[int], blocked: Buffer) -> None:
        """From a tensor [N, C, H, W] of any strides into a buffer, or back."""
        four, half, layout = (ctypes.c_int64 * 4)(*strides), dtype == torch.bfloat16, blocked.layout
        self._on(layout, f"spfde_{way}", "PackJob", tensor, half, four, blocked, layout.c, self.threads)

    def copy_tokens(self, way: Way, tokens: Place, dtype: torch.dtype, n: int, blocked: Buffer) -> None:
        """The same of contiguous tokens [n, C]; what the buffer holds beyond them becomes zero."""
        half, layout = dtype == torch.bfloat16, blocked.layout
        self._on(layout, f"spfde_{way}_tokens", "TokensJob", tokens, half, n, blocked, layout.c, self.threads)

    def gather(self, weight: Tensor, lists: Sequence[Entries]) -> Place:
        """The entries' weights, in their order, of one list behind another."""
        values = self.take_flat(max(1, sum(entries.n for entries in lists)))
        at = values
        for entries in lists:
            together = self.take_flat(self._room_together(entries)) if entries.is_paired else None
            self._gather(weight, entries, together, at)
            at = self.numbers_after(at, entries.n)
        return values

    def gather_once(self, weight: Tensor, entries: Entries) -> Tensor:
        """The same of one list, in memory of the tape's own; see ``call``."""
        values = torch.empty(max(1, entries.n), dtype=self.dtype)
        together = torch.empty(self._room_together(entries), dtype=self.dtype) if entries.is_paired else None
        self._gather(weight, entries, together, values, once=True)
        return values

    def _room_together(self, entries: Entries) -> int:
        """Numbers that hold so many of half the size, in whole vectors."""
        return entries.active.size // 2 + 64

    def _gather(self, weight: Tensor, entries: Entries, together: At | None, values: At, *, once: bool = False) -> None:
        self.hold(entries)
        active = entries.active.ctypes.data if entries.is_paired else None
        self.call(
            "spfde_gather", "GatherJob", weight, active, entries.active.size, together, entries.index.ctypes.data,
            entries.n, values, self.threads, once=once,
        )  # fmt: skip

    def pool(
        self, kernel: PoolKernel, source: Buffer, target: Buffer, window: Sequence[Sequence[int]], *,
        choice: Place | None = None, count_padding: bool = False, accumulate: bool = False,
    ) -> None:  # fmt: skip
        """Maximum or average of windows, or the way back, which reads the gradient of the output.

        Args:
            kernel: which.
            source, target: what is read and written.
            window: its size, stride and padding.
            choice: of a maximum the winners (int32, one a pixel and lane of the output): written, and read on the way
                back.
            count_padding: an average counts the padding.
            accumulate: add to the target.
        """
        input_, output = (target, source) if kernel.endswith("backward") else (source, target)
        sizes = ((ctypes.c_int64 * 2)(*pair) for pair in window)
        self._on(
            source.layout, f"spfde_{kernel}", "PoolJob", source, target, input_.layout.c, output.layout.c, *sizes,
            choice, count_padding, accumulate, self.threads,
        )  # fmt: skip

    def global_pool(self, source: Buffer, means: Place) -> None:
        """Mean of each plane into a contiguous [N, C]."""
        layout = source.layout
        self._on(layout, "spfde_global_pool", "GlobalPoolJob", source, layout.c, means, False, self.threads)

    def global_pool_backward(self, gradient: Place, target: Buffer, *, accumulate: bool) -> None:
        """From a contiguous [N, C]."""
        layout = target.layout
        self._on(
            layout, "spfde_global_pool_backward", "GlobalPoolJob", target, layout.c, gradient, accumulate, self.threads
        )  # fmt: skip
