"""The kernels as Python functions: tensors and layouts in, nothing else."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from spfde.native.layout import CBlocked, Layout
from spfde.native.structure import CStructure, Entries

# Rows of a region's table of norms: what each normalises by, and what that comes to as one multiply-add.
MEAN, VARIANCE, INVERSE, SCALE, SHIFT = range(5)
ROWS = 5

ACTIVATIONS = {"none": 0, "relu": 1, "relu6": 2, "silu": 3, "gelu": 4}
Activation = Literal["none", "relu", "relu6", "silu", "gelu"]

_int, _pointer = ctypes.c_int64, ctypes.c_void_p


class _ConvJob(ctypes.Structure):
    _fields_ = [
        ("source", _pointer),
        ("target", _pointer),
        ("from_", CBlocked),
        ("to", CBlocked),
        ("structure", CStructure),
        ("values", _pointer),
        *[(name, _int) for name in ("step_x", "step_y", "origin_h", "origin_w", "height", "width", "accumulate")],
        ("scale", _pointer),
        ("shift", _pointer),
        ("residual", _pointer),
        ("residual_layout", CBlocked),
        ("activation", _int),
        ("statistics", _pointer),
        *[(name, _int) for name in ("bands", "band_rows", "threads")],
    ]


class _WeightJob(ctypes.Structure):
    _fields_ = [
        ("source", _pointer),
        ("gradient", _pointer),
        ("from_", CBlocked),
        ("to", CBlocked),
        ("structure", CStructure),
        ("step_x", _int),
        ("out", _pointer),
        ("partial", _pointer),
        *[(name, _int) for name in ("bands", "band_rows", "threads")],
    ]


class _ApplyJob(ctypes.Structure):
    _fields_ = [
        ("source", _pointer),
        ("target", _pointer),
        ("from_", CBlocked),
        ("to", CBlocked),
        ("scale", _pointer),
        ("shift", _pointer),
        ("residual", _pointer),
        ("residual_layout", CBlocked),
        ("activation", _int),
        ("threads", _int),
    ]


class _ApplyBackwardJob(ctypes.Structure):
    _fields_ = [
        *[(name, _pointer) for name in ("gradient", "y", "z", "out")],
        *[(name, CBlocked) for name in ("gradient_layout", "y_layout", "z_layout", "out_layout")],
        *[(name, _pointer) for name in ("scale", "shift", "mean", "inverse", "scale_gradient", "shift_gradient")],
        *[(name, _int) for name in ("activation", "batch", "keep", "threads")],
    ]


class _PoolJob(ctypes.Structure):
    _fields_ = [
        ("source", _pointer),
        ("target", _pointer),
        ("input", CBlocked),
        ("output", CBlocked),
        *[(name, _int * 2) for name in ("kernel", "stride", "padding")],
        ("choice", _pointer),
        *[(name, _int) for name in ("count_padding", "accumulate", "threads")],
    ]


class Bands:
    """How the rows of a target are cut into the units that threads take, whatever the number of threads."""

    def __init__(self, layout: Layout, *, rows: int | None = None) -> None:
        height = layout.height
        wanted = rows if rows is not None else -(-height * layout.groups // 32)
        self.rows = max(1, min(height, wanted))
        self.n = -(-height // self.rows)


class Kernels:
    """The loaded library. All tensors are of its real type and on the CPU; buffers are blocked as their layouts say.

    Args:
        library: from ``build.load``.
        dtype: float32, or float64 for the build that tests use.
    """

    def __init__(self, library: ctypes.CDLL, dtype: torch.dtype = torch.float32) -> None:
        self._lib, self.dtype = library, dtype
        for name in ("spfde_abi", "spfde_lanes", "spfde_real_bytes"):
            getattr(library, name).restype = _int
        self.lanes = int(library.spfde_lanes())
        assert int(library.spfde_real_bytes()) == dtype.itemsize, "the library was built for another real type"

    def conv(
        self,
        source: Tensor,
        from_: Layout,
        target: Tensor,
        to: Layout,
        entries: Entries,
        values: Tensor,
        *,
        step_x: int = 1,
        step_y: int = 1,
        accumulate: bool = False,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
        residual: Tensor | None = None,
        residual_layout: Layout | None = None,
        activation: Activation = "none",
        statistics: Tensor | None = None,
    ) -> None:
        """Convolve; ``step_y`` above 1 writes the rows and columns of the entries' residue only."""
        down, right = entries.origin
        bands = Bands(to)
        height, width = -(-(to.height - down) // step_y), -(-(to.width - right) // step_y)
        if height <= 0 or width <= 0:
            return
        rows = bands.rows if step_y == 1 else -(-bands.rows // step_y)
        job = _ConvJob(
            source.data_ptr(), target.data_ptr(), from_.c, to.c, entries.c, values.data_ptr(),
            step_x, step_y, down, right, height, width, accumulate,
            _at(scale), _at(shift), _at(residual), (residual_layout or to).c, ACTIVATIONS[activation],
            _at(statistics), -(-height // rows), rows, _threads(),
        )  # fmt: skip
        self._lib.spfde_conv(ctypes.byref(job))

    def statistics_size(self, to: Layout) -> int:
        """Numbers that ``conv`` writes as statistics."""
        return to.groups * Bands(to).n * to.channels * 3 * self.lanes

    def statistics(self, statistics: Tensor, to: Layout, mean: Tensor, variance: Tensor) -> None:
        """Mean and biased variance of each channel from what ``conv`` wrote."""
        bands = Bands(to)
        self._lib.spfde_statistics(
            _p(statistics),
            ctypes.byref(to.c),
            _int(bands.n),
            _int(bands.rows),
            _p(mean),
            _p(variance),
            _int(_threads()),
        )

    def constants(
        self, table: Tensor, where: slice, weight: Tensor | None, bias: Tensor | None, before: Tensor | None, eps: float
    ) -> None:
        """Inverse deviation, scale and shift of the channels ``where`` of a table [5, channels].

        ``before`` is the bias of the convolution that the norm is folded into.
        """
        self._lib.spfde_constants(
            _p(table), _int(table.shape[1]), _int(where.start), _int(where.stop - where.start),
            _pointer(_at(weight)), _pointer(_at(bias)), _pointer(_at(before)), ctypes.c_double(eps),
        )  # fmt: skip

    def weight_room(self, entries: Entries) -> int:
        """Numbers that ``conv_weight`` needs room for."""
        return _threads() * entries.n * self.lanes

    def conv_weight(
        self, source: Tensor, from_: Layout, gradient: Tensor, to: Layout, entries: Entries, out: Tensor, *, step: int,
        room: Tensor,
    ) -> None:  # fmt: skip
        """Gradient of each entry's weight, in the entries' order; ``room`` is ``weight_room`` numbers, aligned."""
        bands = Bands(to, rows=max(1, 32 // to.width))
        threads = _threads()
        job = _WeightJob(
            source.data_ptr(), gradient.data_ptr(), from_.c, to.c, entries.c, step, out.data_ptr(), room.data_ptr(),
            bands.n, bands.rows, threads,
        )  # fmt: skip
        self._lib.spfde_conv_weight(ctypes.byref(job))

    def apply(
        self,
        source: Tensor,
        from_: Layout,
        target: Tensor,
        to: Layout,
        *,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
        residual: Tensor | None = None,
        residual_layout: Layout | None = None,
        activation: Activation = "none",
    ) -> None:
        """target = activation(source * scale + shift + residual)."""
        job = _ApplyJob(
            source.data_ptr(), target.data_ptr(), from_.c, to.c, _at(scale), _at(shift), _at(residual),
            (residual_layout or to).c, ACTIVATIONS[activation], _threads(),
        )  # fmt: skip
        self._lib.spfde_apply(ctypes.byref(job))

    def apply_backward(
        self,
        gradient: Tensor,
        gradient_layout: Layout,
        y: Tensor,
        y_layout: Layout,
        out: Tensor | None,
        out_layout: Layout,
        *,
        z: Tensor | None = None,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
        mean: Tensor | None = None,
        inverse: Tensor | None = None,
        scale_gradient: Tensor | None = None,
        shift_gradient: Tensor | None = None,
        activation: Activation = "none",
        batch: bool = False,
        keep: bool = False,
    ) -> None:
        """The way back through ``apply``; see ``ApplyBackwardJob``. z has the layout of the gradient."""
        job = _ApplyBackwardJob(
            gradient.data_ptr(), y.data_ptr(), _at(z), _at(out),
            gradient_layout.c, y_layout.c, gradient_layout.c, out_layout.c,
            _at(scale), _at(shift), _at(mean), _at(inverse), _at(scale_gradient), _at(shift_gradient),
            ACTIVATIONS[activation], batch, keep, _threads(),
        )  # fmt: skip
        self._lib.spfde_apply_backward(ctypes.byref(job))

    def add(self, source: Tensor, from_: Layout, target: Tensor, to: Layout, *, accumulate: bool = True) -> None:
        """target += source, or a copy."""
        self._lib.spfde_add(
            _p(source), ctypes.byref(from_.c), _p(target), ctypes.byref(to.c), _int(accumulate), _int(_threads())
        )

    def channel_sum(self, source: Tensor, layout: Layout, out: Tensor) -> None:
        """Sum of each channel."""
        self._lib.spfde_channel_sum(_p(source), ctypes.byref(layout.c), None, _p(out), _int(_threads()))

    def channel_squares(self, source: Tensor, layout: Layout, around: Tensor, out: Tensor) -> None:
        """Sum of the squared distances of each channel from ``around`` [channels]."""
        self._lib.spfde_channel_sum(_p(source), ctypes.byref(layout.c), _p(around), _p(out), _int(_threads()))

    def pack(self, source: Tensor, target: Tensor, to: Layout) -> None:
        """From a tensor [N, C, H, W] of any strides."""
        self._lib.spfde_pack(_p(source), _strides(source), _p(target), ctypes.byref(to.c), _int(_threads()))

    def unpack(self, source: Tensor, from_: Layout, target: Tensor) -> None:
        """Into a tensor [N, C, H, W] of any strides."""
        self._lib.spfde_unpack(_p(source), ctypes.byref(from_.c), _p(target), _strides(target), _int(_threads()))

    def pack_tokens(self, source: Tensor, target: Tensor, to: Layout) -> None:
        """From contiguous tokens [T, C]; what the layout holds beyond T becomes zero."""
        self._lib.spfde_pack_tokens(_p(source), _int(source.shape[0]), _p(target), ctypes.byref(to.c), _int(_threads()))

    def unpack_tokens(self, source: Tensor, from_: Layout, target: Tensor) -> None:
        """Into contiguous tokens [T, C]."""
        self._lib.spfde_unpack_tokens(
            _p(source), ctypes.byref(from_.c), _p(target), _int(target.shape[0]), _int(_threads())
        )

    def gather(self, weight: Tensor, entries: Entries) -> Tensor:
        """The entries' weights, in their order."""
        values = torch.empty(entries.n, dtype=self.dtype)
        self._lib.spfde_gather(_p(weight), _p(entries.index), _int(entries.n), _p(values), _int(_threads()))
        return values

    def scatter(self, values: Tensor, entries: Entries, weight: Tensor) -> None:
        """Put values where the entries' weights are."""
        self._lib.spfde_scatter(_p(values), _p(entries.index), _int(entries.n), _p(weight), _int(_threads()))

    def max_pool(
        self, source: Tensor, from_: Layout, target: Tensor, to: Layout, choice: Tensor, window: Sequence[Sequence[int]]
    ) -> None:
        """Window maximum; ``choice`` (int32, one a target pixel and lane) keeps the winners."""
        self._pool("spfde_max_pool", source, target, from_, to, window, choice=choice)

    def max_pool_backward(
        self, gradient: Tensor, to: Layout, target: Tensor, from_: Layout, choice: Tensor,
        window: Sequence[Sequence[int]], *, accumulate: bool,
    ) -> None:  # fmt: skip
        self._pool("spfde_max_pool_backward", gradient, target, from_, to, window, choice=choice, accumulate=accumulate)

    def avg_pool(
        self, source: Tensor, from_: Layout, target: Tensor, to: Layout, window: Sequence[Sequence[int]], *,
        count_padding: bool,
    ) -> None:  # fmt: skip
        self._pool("spfde_avg_pool", source, target, from_, to, window, count_padding=count_padding)

    def avg_pool_backward(
        self, gradient: Tensor, to: Layout, target: Tensor, from_: Layout, window: Sequence[Sequence[int]], *,
        count_padding: bool, accumulate: bool,
    ) -> None:  # fmt: skip
        self._pool(
            "spfde_avg_pool_backward", gradient, target, from_, to, window, count_padding=count_padding,
            accumulate=accumulate,
        )  # fmt: skip

    def global_pool(self, source: Tensor, layout: Layout, out: Tensor) -> None:
        """Mean of each plane into a contiguous [N, C]."""
        self._lib.spfde_global_pool(_p(source), ctypes.byref(layout.c), _p(out), _int(_threads()))

    def global_pool_backward(self, gradient: Tensor, target: Tensor, layout: Layout, *, accumulate: bool) -> None:
        self._lib.spfde_global_pool_backward(
            _p(gradient), _p(target), ctypes.byref(layout.c), _int(accumulate), _int(_threads())
        )

    def _pool(
        self, name: str, source: Tensor, target: Tensor, input_: Layout, output: Layout,
        window: Sequence[Sequence[int]], *, choice: Tensor | None = None, count_padding: bool = False,
        accumulate: bool = False,
    ) -> None:  # fmt: skip
        kernel, stride, padding = ((_int * 2)(*pair) for pair in window)
        job = _PoolJob(
            source.data_ptr(), target.data_ptr(), input_.c, output.c, kernel, stride, padding, _at(choice),
            count_padding, accumulate, _threads(),
        )  # fmt: skip
        getattr(self._lib, name)(ctypes.byref(job))


def _threads() -> int:
    return torch.get_num_threads()


def _at(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _p(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def _strides(tensor: Tensor) -> ctypes.Array[ctypes.c_int64]:
    return (_int * 4)(*tensor.stride())
