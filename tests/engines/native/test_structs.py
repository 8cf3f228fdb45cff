"""What the kernels are told is what their headers declare."""

from __future__ import annotations

import ctypes

from spfde.engines.native.structs import struct


def test_numbers_pointers_arrays_and_structures_are_told_apart() -> None:
    kinds = dict(struct("PoolJob")._fields_)  # type: ignore[arg-type]
    assert kinds["source"] is kinds["choice"] is ctypes.c_void_p
    assert kinds["input"] is kinds["output"] is struct("Blocked")
    assert (kinds["kernel"]._type_, kinds["kernel"]._length_) == (ctypes.c_int64, 2)
    assert kinds["threads"] is ctypes.c_int64
    assert dict(struct("ConstantsJob")._fields_)["eps"] is ctypes.c_double  # type: ignore[arg-type]


def test_methods_are_no_fields() -> None:
    names = [name for name, *_ in struct("Blocked")._fields_]
    assert names == ["groups", "channels", "height", "width", "batch", "down", "right"]
    assert ctypes.sizeof(struct("Blocked")) == 7 * 8
