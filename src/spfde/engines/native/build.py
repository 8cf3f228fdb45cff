"""Compiling the kernels on the machine that runs them, once, and loading them.

The library is kept in the user's cache folder under a name that says what it was made of: sources, flags, compiler and
processor. A second process that starts at the same time waits for the first. Where the folder cannot be used, or others
could write to it, the library is built into a temporary folder of this process, and that is said.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from spfde.core.errors import SpfdeError
from spfde.engines.native import library_cache
from spfde.engines.native.loading import load_bytes

SOURCES = Path(__file__).parent / "kernels"
_COMPILERS = ("g++", "c++", "clang++")
# No -ffast-math: a NaN must stay one.
_FLAGS = (
    *("-std=c++17", "-O2", "-fPIC", "-shared", "-fvisibility=hidden"),
    *("-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"),
)
_OPENMP = "-fopenmp"
_MOST_SECONDS = 300
# What a compiler says may be of any encoding.
_TEXT: Mapping[str, Any] = {"encoding": "utf-8", "errors": "replace"}

Real = Literal["float", "double"]

_built_alone: dict[Path, ctypes.CDLL] = {}
"""By the place where they could not be kept."""


class KernelsUnavailable(SpfdeError):
    """The kernels cannot be had here.

    Attributes:
        reason: why, in a few words.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(f'The native engine has no kernels here: {reason}. Use engine="masked" or "auto".')
        self.reason = reason


def available() -> str | None:
    """Why the kernels cannot be had here, as far as can be told without compiling; None where they can."""
    try:
        _compiler()
    except KernelsUnavailable as error:
        return error.reason
    return None


def load(*, real: Real = "float", sanitize: bool = False, on_build: Callable[[str], None] | None = None) -> ctypes.CDLL:
    """The library, built if need be, with the switches of ``$SPFDE_CXXFLAGS`` behind the usual ones.

    Args:
        real: the number type of the kernels; double is for tests.
        sanitize: with AddressSanitizer.
        on_build: called with one line before a compilation, which takes seconds.

    Raises:
        KernelsUnavailable: no compiler, a failed build, or a platform that is not supported.
    """
    compiler = _compiler()
    flags = [*_FLAGS, _machine_flag(), f"-DSPFDE_REAL={real}", f"-DSPFDE_SINGLE={int(real == 'float')}"]
    flags += _words_of("SPFDE_CXXFLAGS")
    if sanitize:
        flags += ["-fsanitize=address", "-g", "-O1", "-DSPFDE_ROLLED"]
    name, tell = f"kernels-{_digest(flags, compiler)}.so", on_build or (lambda line: None)
    build = functools.partial(_compile, compiler, flags, tell)
    place = cache_folder() / name
    try:
        return _kept(place.parent, name, build)
    except (OSError, library_cache.Unusable) as error:
        if place in _built_alone:
            return _built_alone[place]
        tell(f"the kernels are built for this process alone: {error}")
    try:
        with tempfile.TemporaryDirectory(prefix="spfde-kernels-") as folder:
            _built_alone[place] = _kept(Path(folder), name, build)
    except (OSError, library_cache.Unusable) as error:
        raise KernelsUnavailable(f"neither the cache folder nor a temporary one can be used ({error})") from error
    return _built_alone[place]


def _kept(folder: Path, name: str, build: Callable[[Path], None]) -> ctypes.CDLL:
    """The library of that name in a folder, built where it is not there as it was built."""
    library = library_cache.made(folder) / name
    if (found := _usable(library)) is None:
        with library_cache.locked(library):
            if (found := _usable(library)) is None:  # nobody else has built it meanwhile
                library_cache.put(library, build)
                found = _opened(library)
    if found is None:
        raise KernelsUnavailable(f"{library} is changed by others as soon as it is built")
    return found


def cache_folder() -> Path:
    """Folder of built libraries: $SPFDE_CACHE_DIR, or ``spfde`` in the user's cache folder."""
    own = os.environ.get("SPFDE_CACHE_DIR")
    if own:
        return Path(own)
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "spfde"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "spfde"


def _compiler() -> tuple[str, ...]:
    """The compiler that runs here, with what $CXX says besides the program: a cache's name, flags."""
    if sys.platform not in ("linux", "darwin"):
        raise KernelsUnavailable(f"the platform {sys.platform} is not supported")
    own = _words_of("CXX")
    found = next((path for path in map(shutil.which, own[:1] or _COMPILERS) if path), None)
    if found is None:
        told = f"$CXX={shlex.join(own)} is no compiler" if own else f"no C++ compiler ({', '.join(_COMPILERS)})"
        raise KernelsUnavailable(told)
    command = (found, *own[1:])
    _version(command)
    return command


def _words_of(variable: str) -> list[str]:
    """The words of an environment variable, none where it is not set."""
    try:
        return shlex.split(os.environ.get(variable, ""))
    except ValueError as error:  # a quote that does not end
        raise KernelsUnavailable(f"${variable}={os.environ[variable]} cannot be read ({error})") from error


@functools.cache
def _version(command: tuple[str, ...]) -> str:
    try:
        ran = subprocess.run([*command, "--version"], capture_output=True, timeout=30, check=True, **_TEXT)
    except (OSError, subprocess.SubprocessError) as error:
        raise KernelsUnavailable(f"{shlex.join(command)} does not run ({error})") from error
    said: list[str] = ran.stdout.strip().splitlines()
    return said[0] if said else command[0]


def _machine_flag() -> str:
    return "-mcpu=native" if platform.machine() in ("aarch64", "arm64") else "-march=native"


def _digest(flags: list[str], compiler: tuple[str, ...]) -> str:
    digest = hashlib.sha256()
    for source in sorted(path for path in SOURCES.iterdir() if path.suffix in (".cpp", ".h")):
        digest.update(os.fsencode(source.name) + b"\0" + source.read_bytes() + b"\0")
    for part in (*flags, *compiler, _version(compiler), _processor()):
        digest.update(os.fsencode(part) + b"\0")
    return digest.hexdigest()[:20]


@functools.cache
def _processor() -> str:
    """What the compiler's "native" stands for."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(errors="replace").split("\n\n")[0].splitlines()
        told = [
            line for line in lines if line.split("\t")[0].strip() in ("model name", "flags", "Features", "CPU part")
        ]
        if told:
            return "\n".join(told)
    return f"{platform.machine()} {platform.processor()}"


def _usable(library: Path) -> ctypes.CDLL | None:
    """A whole one may not open: where PyTorch, whose OpenMP runtime it takes, has moved. Then it is built anew."""
    try:
        found = _opened(library)
    except KernelsUnavailable:
        return None
    return found if hasattr(found, "spfde_lanes") else None


def _opened(library: Path) -> ctypes.CDLL | None:
    """The library, loaded; None where it is not whole."""
    content = library_cache.read_whole(library)
    return None if content is None else _open(content, library)


def _open(content: bytes, library: Path) -> ctypes.CDLL:
    # PyTorch first, so that both take one OpenMP runtime: two would each start their threads.
    import torch  # noqa: F401

    try:
        return load_bytes(content, str(library))
    except OSError as error:
        raise KernelsUnavailable(f"the built library cannot be loaded ({error})") from error


def _compile(compiler: tuple[str, ...], flags: list[str], tell: Callable[[str], None], target: Path) -> None:
    tell(f"compiling the kernels with {_version(compiler)} (once on this machine: 20 seconds, more on busy cores)")
    failed = None
    for openmp in ([_OPENMP], []):
        failed = _run([*compiler, *flags, *openmp, str(SOURCES / "kernels.cpp"), "-o", str(target), *_runtime(openmp)])
        if failed is None:
            return
    log = target.parent / "failed-build.log"
    log.write_text(str(failed), encoding="utf-8")
    lines = str(failed).strip().splitlines()
    first = next((line for line in lines if "error" in line), lines[0] if lines else "no message")
    raise KernelsUnavailable(f"the build failed ({first.strip()}; all of it in {log})")


def _runtime(openmp: list[str]) -> list[str]:
    """PyTorch's own OpenMP runtime where it brings one under a name of its own."""
    if not openmp or sys.platform != "linux":
        return []
    import torch

    folder = Path(torch.__file__).parent / "lib"
    own = sorted(folder.glob("libgomp-*.so*"))
    return [str(own[0]), f"-Wl,-rpath,{folder}"] if own else []


def _run(command: list[str]) -> str | None:
    """Run a compilation; its messages if it failed."""
    try:
        ran = subprocess.run(command, capture_output=True, timeout=_MOST_SECONDS, check=False, umask=0o022, **_TEXT)
    except (OSError, subprocess.SubprocessError) as error:
        return str(error)
    return None if ran.returncode == 0 else ran.stderr or ran.stdout or f"exit code {ran.returncode}"
