"""What the kernels are told, field by field as ``kernels/*.h`` declare it."""

from __future__ import annotations

import ctypes

from spfde.engines.native.layout import CBlocked
from spfde.engines.native.lists import CStructure

_int, _pointer, _double = ctypes.c_int64, ctypes.c_void_p, ctypes.c_double


class ConvJob(ctypes.Structure):
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


class StatisticsJob(ctypes.Structure):
    _fields_ = [
        ("statistics", _pointer),
        ("layout", CBlocked),
        ("bands", _int),
        ("band_rows", _int),
        ("mean", _pointer),
        ("variance", _pointer),
        ("threads", _int),
    ]


class WeightJob(ctypes.Structure):
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


class ConstantsJob(ctypes.Structure):
    _fields_ = [
        ("table", _pointer),
        ("row", _int),
        ("channels", _int),
        *[(name, _pointer) for name in ("mean", "variance", "weight", "bias", "before")],
        ("eps", _double),
    ]


class ApplyJob(ctypes.Structure):
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


class ApplyBackwardJob(ctypes.Structure):
    _fields_ = [
        *[(name, _pointer) for name in ("gradient", "y", "z", "out")],
        *[(name, CBlocked) for name in ("gradient_layout", "y_layout", "z_layout", "out_layout")],
        *[(name, _pointer) for name in ("scale", "shift", "mean", "inverse", "scale_gradient", "shift_gradient")],
        *[(name, _int) for name in ("activation", "batch", "keep", "threads")],
    ]


class AddJob(ctypes.Structure):
    _fields_ = [
        ("source", _pointer),
        ("target", _pointer),
        ("from_", CBlocked),
        ("to", CBlocked),
        ("accumulate", _int),
        ("threads", _int),
    ]


class ChannelSumJob(ctypes.Structure):
    _fields_ = [
        ("source", _pointer),
        ("layout", CBlocked),
        ("around", _pointer),
        ("out", _pointer),
        ("divisor", _int),
        ("threads", _int),
    ]


class PackJob(ctypes.Structure):
    _fields_ = [
        ("tensor", _pointer),
        ("strides", _int * 4),
        ("blocked", _pointer),
        ("layout", CBlocked),
        ("threads", _int),
    ]


class TokensJob(ctypes.Structure):
    _fields_ = [
        ("tokens", _pointer),
        ("n", _int),
        ("blocked", _pointer),
        ("layout", CBlocked),
        ("threads", _int),
    ]


class IndexJob(ctypes.Structure):
    _fields_ = [
        ("weights", _pointer),
        ("index", _pointer),
        ("n", _int),
        ("values", _pointer),
        ("accumulate", _int),
        ("threads", _int),
    ]


class AccumulateJob(ctypes.Structure):
    _fields_ = [("source", _pointer), ("target", _pointer), ("n", _int)]


class PoolJob(ctypes.Structure):
    _fields_ = [
        ("source", _pointer),
        ("target", _pointer),
        ("input", CBlocked),
        ("output", CBlocked),
        *[(name, _int * 2) for name in ("kernel", "stride", "padding")],
        ("choice", _pointer),
        *[(name, _int) for name in ("count_padding", "accumulate", "threads")],
    ]


class GlobalPoolJob(ctypes.Structure):
    _fields_ = [
        ("blocked", _pointer),
        ("layout", CBlocked),
        ("means", _pointer),
        ("accumulate", _int),
        ("threads", _int),
    ]
