"""Loading a library from bytes that have been checked: what runs is what was checked, whatever becomes of the file.

The system maps the file that it loads, so that one which is changed or cut short in place takes the processes with it
that have it loaded. So it is not loaded itself. On Linux its bytes are put into memory that nobody can write to again
(``memfd_create`` with seals); elsewhere, and where that cannot be loaded from, into a file in a folder of this process,
which is removed once it is loaded. Debuggers and profilers find no file to read the kernels' names from.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

_loaded: dict[tuple[str, str], ctypes.CDLL] = {}


def load_bytes(content: bytes, name: str) -> ctypes.CDLL:
    """The library that these bytes are, loaded once in a process.

    Args:
        content: a shared library.
        name: what it is called in the process's list of mappings, and by its ``repr``.

    Raises:
        OSError: it cannot be loaded.
    """
    key = name, hashlib.sha256(content).hexdigest()
    if key not in _loaded:
        library = _from_sealed_memory(content, name) if sys.platform == "linux" else None
        _loaded[key] = library or _from_own_file(content)
        _loaded[key]._name = name
    return _loaded[key]


def _from_sealed_memory(content: bytes, name: str) -> ctypes.CDLL | None:
    """None where the system gives none, or does not load from it."""
    handle = -1
    with suppress(OSError):
        try:
            handle = os.memfd_create(Path(name).name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            with open(handle, "wb", closefd=False) as file:
                file.write(content)
            seals = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
            fcntl.fcntl(handle, fcntl.F_ADD_SEALS, seals)
            # The loader takes a library of the same path for the same one, and numbers of files are used again.
            return ctypes.CDLL(f"/proc/self/fd/{'./' * len(_loaded)}{handle}")
        finally:
            if handle >= 0:
                os.close(handle)
    return None


def _from_own_file(content: bytes) -> ctypes.CDLL:
    with tempfile.TemporaryDirectory(prefix="spfde-kernels-") as folder:
        path = Path(folder, f"kernels-{len(_loaded)}.so")
        path.write_bytes(content)
        return ctypes.CDLL(str(path))
