"""The kernels as Python functions: places and layouts in, a job on a tape out."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from spfde.engines.native.layout import Layout
from spfde.engines.native.lists import Entries
from spfde.engines.native.tape import Place, Tape

# Rows of a region's table of norms: what each normalises by, and what that comes to as one multiply-add.
MEAN, VARIANCE, INVERSE, SCALE, SHIFT = range(5)
ROWS = 5

ACTIVATIONS = {"none": 0, "relu": 1, "relu6": 2, "silu": 3, "gelu": 4}
Activation = Literal["none", "relu", "relu6", "silu", "gelu"]

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
        for name in ("spfde_abi", "spfde_lanes", "spfde_real_bytes"):
            getattr(library, name).restype = ctypes.c_int64
        self.lanes = int(library.spfde_lanes())
        assert int(library.spfde_real_bytes()) == dtype.itemsize, "the library was built for another real type"

    def tape(self, threads: int) -> KernelTape:
        """A new tape, for so many threads."""
        return KernelTape(self._library, self.dtype, threads)


class KernelTape(Tape):
    """A tape that knows what each kernel is told. Buffers are blocked as their layouts say.

    Args:
        library, dtype: see ``Tape``.
        threads: that each kernel uses.
    """

    def __init__(self, library: ctypes.CDLL, dtype: torch.dtype, threads: int) -> None:
        super().__init__(library, dtype)
        self.threads = threads

    def numbers_after(self, place: Place, n: int) -> Place:
        """The place so many numbers further on."""
        return place.after(n * self.dtype.itemsize)

    def conv(
        self,
        source: Place,
        from_: Layout,
        target: Place,
        to: Layout,
        entries: Entries,
        values: Place,
        *,
        step_x: int = 1,
        step_y: int = 1,
        accumulate: bool = False,
        scale: At | None = None,
        shift: At | None = None,
        residual: Place | None = None,
        residual_layout: Layout | None = None,
        activation: Activation = "none",
        statistics: Place | None = None,
    ) -> None:
        """Convolve; ``step_y`` above 1 writes the rows and columns of the entries' residue only."""
        down, right = entries.origin
        bands = Bands(to, self.threads)
        height, width = -(-(to.height - down) // step_y), -(-(to.width - right) // step_y)
        if height <= 0 or width <= 0:
            return
        rows = bands.rows if step_y == 1 else -(-bands.rows // step_y)
        self.hold(entries)
        self.call(
            "spfde_conv", "ConvJob", source, target, from_.c, to.c, entries.c, values, step_x, step_y, down, right,
            height, width, accumulate, scale, shift, residual, (residual_layout or to).c, ACTIVATIONS[activation],
            statistics, -(-height // rows), rows, self.threads,
        )  # fmt: skip

    def statistics_size(self, to: Layout) -> int:
        """Numbers that ``conv`` writes as statistics."""
        return to.groups * Bands(to, self.threads).n * to.channels * 3 * to.lanes

    def statistics(self, statistics: Place, to: Layout, mean: Place, variance: Place) -> None:
        """Mean and biased variance of each channel from what ``conv`` wrote."""
        bands = Bands(to, self.threads)
        self.call(
            "spfde_statistics",
            "StatisticsJob",
            statistics,
            to.c,
            bands.n,
            bands.rows,
            mean,
            variance,
            self.threads,
        )

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
        self.call(
            "spfde_constants", "ConstantsJob", table, row, channels, mean, variance, weight, bias, before, eps
        )  # fmt: skip

    def conv_weight(
        self, source: Place, from_: Layout, gradient: Place, to: Layout, entries: Entries, out: Place, *, step: int
    ) -> None:
        """Gradient of each entry's weight, in the entries' order."""
        rows = min(to.height, max(1, _WEIGHT_PIXELS // to.width))
        room = self.take_flat(self.threads * entries.n * to.lanes)
        self.hold(entries)
        self.call(
            "spfde_conv_weight", "WeightJob", source, gradient, from_.c, to.c, entries.c, step, out, room,
            -(-to.height // rows), rows, self.threads,
        )  # fmt: skip

    def apply(
        self,
        source: Place,
        from_: Layout,
        target: Place,
        to: Layout,
        *,
        scale: At | None = None,
        shift: At | None = None,
        residual: Place | None = None,
        residual_layout: Layout | None = None,
        activation: Activation = "none",
    ) -> None:
        """target = activation(source * scale + shift + residual)."""
        self.call(
            "spfde_apply", "ApplyJob", source, target, from_.c, to.c, scale, shift, residual,
            (residual_layout or to).c, ACTIVATIONS[activation], self.threads,
        )  # fmt: skip

    def apply_backward(
        self,
        gradient: Place,
        gradient_layout: Layout,
        y: Place,
        y_layout: Layout,
        out: Place | None,
        out_layout: Layout,
        *,
        z: Place | None = None,
        scale: At | None = None,
        shift: At | None = None,
        mean: Place | None = None,
        inverse: Place | None = None,
        scale_gradient: Place | None = None,
        shift_gradient: Place | None = None,
        activation: Activation = "none",
        batch: bool = False,
        keep: bool = False,
    ) -> None:
        """The way back through ``apply``; see ``ApplyBackwardJob``. z has the layout of the gradient."""
        self.call(
            "spfde_apply_backward", "ApplyBackwardJob", gradient, y, z, out,
            gradient_layout.c, y_layout.c, gradient_layout.c, out_layout.c,
            scale, shift, mean, inverse, scale_gradient, shift_gradient,
            ACTIVATIONS[activation], batch, keep, self.threads,
        )  # fmt: skip

    def add(self, source: Place, from_: Layout, target: Place, to: Layout, *, accumulate: bool = True) -> None:
        """target += source, or a copy."""
        self.call("spfde_add", "AddJob", source, target, from_.c, to.c, accumulate, self.threads)

    def channel_sum(
        self, source: Place, layout: Layout, out: Place, *, around: Place | None = None, divisor: int = 1
    ) -> None:
        """Sum of each channel, or of its squared distances from ``around`` [channels]; divided by a number."""
        self.call("spfde_channel_sum", "ChannelSumJob", source, layout.c, around, out, divisor, self.threads)

    def pack(self, tensor: Place, strides: Sequence[int], target: Place, to: Layout) -> None:
        """From a tensor [N, C, H, W] of any strides."""
        self._pack("spfde_pack", tensor, strides, target, to)

    def unpack(self, source: Place, from_: Layout, tensor: Place, strides: Sequence[int]) -> None:
        """Into a tensor [N, C, H, W] of any strides."""
        self._pack("spfde_unpack", tensor, strides, source, from_)

    def _pack(self, kernel: str, tensor: Place, strides: Sequence[int], blocked: Place, layout: Layout) -> None:
        four = (ctypes.c_int64 * 4)(*strides)
        self.call(kernel, "PackJob", tensor, four, blocked, layout.c, self.threads)

    def pack_tokens(self, tokens: Place, n: int, target: Place, to: Layout) -> None:
        """From contiguous tokens [n, C]; what the layout holds beyond them becomes zero."""
        self.call("spfde_pack_tokens", "TokensJob", tokens, n, target, to.c, self.threads)

    def unpack_tokens(self, source: Place, from_: Layout, tokens: Place, n: int) -> None:
        """Into contiguous tokens [n, C]."""
        self.call("spfde_unpack_tokens", "TokensJob", tokens, n, source, from_.c, self.threads)

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

    def max_pool(
        self, source: Place, from_: Layout, target: Place, to: Layout, choice: Place, window: Sequence[Sequence[int]]
    ) -> None:
        """Window maximum; ``choice`` (int32, one a target pixel and lane) keeps the winners."""
        self._pool("spfde_max_pool", source, target, from_, to, window, choice=choice)

    def max_pool_backward(
        self, gradient: Place, to: Layout, target: Place, from_: Layout, choice: Place,
        window: Sequence[Sequence[int]], *, accumulate: bool,
    ) -> None:  # fmt: skip
        self._pool("spfde_max_pool_backward", gradient, target, from_, to, window, choice=choice, accumulate=accumulate)

    def avg_pool(
        self, source: Place, from_: Layout, target: Place, to: Layout, window: Sequence[Sequence[int]], *,
        count_padding: bool,
    ) -> None:  # fmt: skip
        self._pool("spfde_avg_pool", source, target, from_, to, window, count_padding=count_padding)

    def avg_pool_backward(
        self, gradient: Place, to: Layout, target: Place, from_: Layout, window: Sequence[Sequence[int]], *,
        count_padding: bool, accumulate: bool,
    ) -> None:  # fmt: skip
        self._pool(
            "spfde_avg_pool_backward", gradient, target, from_, to, window, count_padding=count_padding,
            accumulate=accumulate,
        )  # fmt: skip

    def _pool(
        self, kernel: str, source: Place, target: Place, input_: Layout, output: Layout,
        window: Sequence[Sequence[int]], *, choice: Place | None = None, count_padding: bool = False,
        accumulate: bool = False,
    ) -> None:  # fmt: skip
        sizes = ((ctypes.c_int64 * 2)(*pair) for pair in window)
        self.call(
            kernel, "PoolJob", source, target, input_.c, output.c, *sizes, choice, count_padding, accumulate,
            self.threads,
        )  # fmt: skip

    def global_pool(self, source: Place, layout: Layout, means: Place) -> None:
        """Mean of each plane into a contiguous [N, C]."""
        self.call("spfde_global_pool", "GlobalPoolJob", source, layout.c, means, False, self.threads)

    def global_pool_backward(self, gradient: Place, target: Place, layout: Layout, *, accumulate: bool) -> None:
        """From a contiguous [N, C]."""
        self.call("spfde_global_pool_backward", "GlobalPoolJob", target, layout.c, gradient, accumulate, self.threads)
