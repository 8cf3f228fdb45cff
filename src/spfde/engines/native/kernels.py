"""The kernels as Python functions: places and layouts in, a job on a tape out."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from spfde.engines.native.layout import Layout
from spfde.engines.native.lists import Entries
from spfde.engines.native.tape import Buffer, Place, Tape

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
# Pixels of a band of rows whose gradient of the weight is summed before the next band comes.
_WEIGHT_PIXELS = 32


class Bands:
    """How the rows of a target are cut into the units that threads take, in order: some for each, of whole images if
    that comes out even.
    """

    def __init__(self, layout: Layout, threads: int) -> None:
        height = layout.height
        self.rows = max(1, min(height, -(-height * layout.groups // (_UNITS * threads))))
        self.n = -(-height // self.rows)


class Kernels:
    """The loaded library.

    Args:
        library: from ``build.load``.
        dtype: float32, or float64 for the build that tests use.
    """

    def __init__(self, library: ctypes.CDLL, dtype: torch.dtype = torch.float32) -> None:
        self._library, self.dtype = library, dtype
        self.lanes = int(library.spfde_lanes())
        self._outside = library.spfde_outside
        self._outside.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)

    def has_outside(self, weight: Tensor, mask: Tensor) -> bool:
        """Whether a weight is not zero where its mask, a bool tensor of its shape, has none."""
        if weight.dtype == self.dtype and weight.is_contiguous() and mask.is_contiguous():
            return bool(self._outside(weight.data_ptr(), mask.data_ptr(), weight.numel()))
        return bool(((weight.detach() != 0) & ~mask).any())

    def tape(self, threads: int) -> KernelTape:
        """A new tape, for so many threads."""
        return KernelTape(self._library, self.dtype, threads)


class KernelTape(Tape):
    """A tape that knows what each kernel is told. Buffers are blocked as their layouts say."""

    def conv(
        self, source: Buffer, target: Buffer, entries: Entries, values: Place, *, step_x: int = 1, step_y: int = 1,
        accumulate: bool = False, scale: At | None = None, shift: At | None = None, residual: Buffer | None = None,
        activation: Activation = "none", statistics: Place | None = None,
    ) -> None:  # fmt: skip
        """Convolve; ``step_y`` above 1 writes the rows and columns of the entries' residue only."""
        to, (down, right) = target.layout, entries.origin
        bands = Bands(to, self.threads)
        height, width = -(-(to.height - down) // step_y), -(-(to.width - right) // step_y)
        if height <= 0 or width <= 0:
            return
        rows = bands.rows if step_y == 1 else -(-bands.rows // step_y)
        self.hold(entries)
        self.call(
            "spfde_conv", "ConvJob", source, target, source.layout.c, to.c, entries.c, values, step_x, step_y,
            down, right, height, width, accumulate, scale, shift, residual, (residual or target).layout.c,
            ACTIVATIONS[activation], statistics, -(-height // rows), rows, self.threads,
        )  # fmt: skip

    def statistics_size(self, to: Layout) -> int:
        """Numbers that ``conv`` writes as statistics."""
        return to.groups * Bands(to, self.threads).n * to.channels * 3 * to.lanes

    def statistics(self, statistics: Place, to: Layout, mean: Place, variance: Place) -> None:
        """Mean and biased variance of each channel from what ``conv`` wrote."""
        bands = Bands(to, self.threads)
        self.call(
            "spfde_statistics", "StatisticsJob", statistics, to.c, bands.n, bands.rows, mean, variance, self.threads
        )  # fmt: skip

    def constants(
        self, table: Place, row: int, channels: int, *, mean: Tensor | None, variance: Tensor | None,
        weight: Tensor | None, bias: Tensor | None, before: Tensor | None, eps: float,
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
        """
        self.call("spfde_constants", "ConstantsJob", table, row, channels, mean, variance, weight, bias, before, eps)

    def conv_weight(self, source: Buffer, gradient: Buffer, entries: Entries, out: Place, *, step: int) -> None:
        """Gradient of each entry's weight, in the entries' order."""
        to = gradient.layout
        rows = min(to.height, max(1, _WEIGHT_PIXELS // to.width))
        room = self.take_flat(self.threads * entries.n * to.lanes)
        self.hold(entries)
        self.call(
            "spfde_conv_weight", "WeightJob", source, gradient, source.layout.c, to.c, entries.c, step, out, room,
            -(-to.height // rows), rows, self.threads,
        )  # fmt: skip

    def apply(
        self, source: Buffer, target: Buffer, *, scale: At | None = None, shift: At | None = None,
        residual: Buffer | None = None, activation: Activation = "none",
    ) -> None:  # fmt: skip
        """target = activation(source * scale + shift + residual)."""
        self.call(
            "spfde_apply", "ApplyJob", source, target, source.layout.c, target.layout.c, scale, shift, residual,
            (residual or target).layout.c, ACTIVATIONS[activation], self.threads,
        )  # fmt: skip

    def apply_backward(
        self, gradient: Buffer, y: Buffer, out: Buffer | None, *, z: Buffer | None = None, scale: At | None = None,
        shift: At | None = None, mean: Place | None = None, inverse: Place | None = None,
        scale_gradient: Place | None = None, shift_gradient: Place | None = None, activation: Activation = "none",
        batch: bool = False, keep: bool = False,
    ) -> None:  # fmt: skip
        """The way back through ``apply``; see ``ApplyBackwardJob``."""
        self.call(
            "spfde_apply_backward", "ApplyBackwardJob", gradient, y, z, out,
            gradient.layout.c, y.layout.c, (z or gradient).layout.c, (out or y).layout.c,
            scale, shift, mean, inverse, scale_gradient, shift_gradient,
            ACTIVATIONS[activation], batch, keep, self.threads,
        )  # fmt: skip

    def add(self, source: Buffer, target: Buffer, *, accumulate: bool = True) -> None:
        """target += source, or a copy."""
        self.call("spfde_add", "AddJob", source, target, source.layout.c, target.layout.c, accumulate, self.threads)

    def channel_sum(self, source: Buffer, out: Place, *, around: Place | None = None, divisor: int = 1) -> None:
        """Sum of each channel, or of its squared distances from ``around`` [channels]; divided by a number."""
        self.call(
            "spfde_channel_sum", "ChannelSumJob", source, source.layout.c, around, out, divisor, self.threads
        )  # fmt: skip

    def copy(self, way: Way, tensor: Place, strides: Sequence[int], blocked: Buffer) -> None:
        """From a tensor [N, C, H, W] of any strides into a buffer, or back."""
        four = (ctypes.c_int64 * 4)(*strides)
        self.call(f"spfde_{way}", "PackJob", tensor, four, blocked, blocked.layout.c, self.threads)

    def copy_tokens(self, way: Way, tokens: Place, n: int, blocked: Buffer) -> None:
        """The same of contiguous tokens [n, C]; what the buffer holds beyond them becomes zero."""
        self.call(f"spfde_{way}_tokens", "TokensJob", tokens, n, blocked, blocked.layout.c, self.threads)

    def gather(self, weight: Tensor, entries: Entries) -> Place:
        """The entries' weights, in their order."""
        values = self.take_flat(entries.n)
        self._index("spfde_gather", weight, entries, values)
        return values

    def scatter(self, values: Place, entries: Entries, weight: Place, *, accumulate: bool) -> None:
        """Put values where the entries' weights are, or add them there."""
        self._index("spfde_scatter", weight, entries, values, accumulate=accumulate)

    def _index(self, kernel: str, weight: At, entries: Entries, values: Place, *, accumulate: bool = False) -> None:
        self.hold(entries)
        at = entries.index.data_ptr()
        self.call(kernel, "IndexJob", weight, at, entries.n, values, accumulate, self.threads)

    def accumulate(self, source: Place, target: Place, n: int) -> None:
        """target += source, n numbers."""
        self.call("spfde_accumulate", "AccumulateJob", source, target, n)

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
        self.call(
            f"spfde_{kernel}", "PoolJob", source, target, input_.layout.c, output.layout.c, *sizes, choice,
            count_padding, accumulate, self.threads,
        )  # fmt: skip

    def global_pool(self, source: Buffer, means: Place) -> None:
        """Mean of each plane into a contiguous [N, C]."""
        self.call("spfde_global_pool", "GlobalPoolJob", source, source.layout.c, means, False, self.threads)

    def global_pool_backward(self, gradient: Place, target: Buffer, *, accumulate: bool) -> None:
        """From a contiguous [N, C]."""
        self.call(
            "spfde_global_pool_backward", "GlobalPoolJob", target, target.layout.c, gradient, accumulate, self.threads
        )  # fmt: skip
