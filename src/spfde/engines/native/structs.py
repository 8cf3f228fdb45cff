"""What the kernels are told: ctypes structures, field by field as ``kernels/*.h`` declare them."""

from __future__ import annotations

import ctypes
import functools
import re
from collections.abc import Mapping
from typing import Any

from spfde.engines.native.build import SOURCES

_NUMBERS: Mapping[str, Any] = {"int64_t": ctypes.c_int64, "double": ctypes.c_double}
_DECLARATION = re.compile(r"(?:const )?(?P<type>\w+)(?P<pointer>\*?) (?P<names>[^(]+)")
_NAME = re.compile(r"(\w+)(?:\[(\d+)\])?")


@functools.cache
def struct(name: str) -> type[ctypes.Structure]:
    """The structure of that name: numbers, pointers to anything, other structures, and arrays of these."""
    fields: list[tuple[str, Any]] = []
    for line in _bodies()[name].split(";"):
        declared = _DECLARATION.fullmatch(line.strip())
        if declared is None:  # the fields are over, and methods follow
            break
        kind = ctypes.c_void_p if declared["pointer"] else _NUMBERS.get(declared["type"]) or struct(declared["type"])
        for field, length in _NAME.findall(declared["names"]):
            fields.append((field, kind * int(length) if length else kind))
    return type(name, (ctypes.Structure,), {"_fields_": fields})


@functools.cache
def _bodies() -> dict[str, str]:
    """What stands between the braces of each structure, without comments."""
    sources = "".join(path.read_text() for path in SOURCES.glob("*.h"))
    return dict(re.findall(r"struct (\w+) \{\n(.*?)\n\};", re.sub(r" *//.*", "", sources), re.DOTALL))
