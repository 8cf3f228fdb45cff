from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

import spfde
from helpers.libraries import library_path, needs_compiler, start_load
from helpers.training import make_parts
from spfde.engines.native import build
from spfde.engines.native.engine import NativeEngine


@needs_compiler
def test_a_library_is_built_once_and_says_so_before(cache: Path, sources: Path) -> None:
    said: list[str] = []
    first = library_path(on_build=said.append)
    again = library_path(on_build=said.append)
    assert first == again
    assert first.parent == cache
    assert len(said) == 1
    assert "compiling the kernels" in said[0]
    assert build.load().spfde_lanes() == 1


@needs_compiler
def test_another_source_or_number_type_is_another_library(cache: Path, sources: Path) -> None:
    first = library_path()
    assert library_path(real="double") != first
    (sources / "extra.h").write_text("// new\n")
    assert library_path() != first


@needs_compiler
def test_a_damaged_library_is_built_anew(cache: Path, sources: Path) -> None:
    path = Path(start_load(sources).end().out.split()[0])
    path.write_bytes(b"not a library")
    said: list[str] = []
    assert library_path(on_build=said.append) == path
    assert said
    assert build.load().spfde_lanes() == 1


@needs_compiler
def test_a_failing_build_gives_the_compilers_words_and_keeps_the_log(cache: Path, sources: Path) -> None:
    (sources / "kernels.cpp").write_text("int main( {")
    with pytest.raises(build.KernelsUnavailable, match="the build failed") as caught:
        library_path()
    assert "error" in caught.value.reason
    assert 'engine="masked"' in str(caught.value)
    [log] = cache.glob("*.log")
    assert "error" in log.read_text()
    assert not list(cache.glob("*.so")), "nothing half-built is left"


@needs_compiler
def test_two_processes_at_once_build_one_library(cache: Path, sources: Path) -> None:
    running = [start_load(sources) for _ in range(2)]
    told = [process.end().out.split() for process in running]
    assert sorted(count for _, count in told) == ["0", "1"]
    assert told[0][0] == told[1][0]


@needs_compiler
def test_where_the_cache_cannot_be_written_to_the_process_has_its_own_and_leaves_nothing(
    tmp_path: Path, sources: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    occupied, temporary = tmp_path / "file", tmp_path / "temporary"
    occupied.write_text("in the way")
    temporary.mkdir()
    monkeypatch.setenv("SPFDE_CACHE_DIR", str(occupied / "cache"))
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    told: list[str] = []
    library = build.load(on_build=told.append)
    assert "spfde-kernels-" in library._name
    assert not list(temporary.iterdir())
    assert build.load(on_build=told.append) is library
    assert [line for line in told if "alone" in line] == told[:1], "it is built once"


def test_without_a_compiler_the_reason_is_given(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    reason = build.available()
    assert reason is not None
    assert "no C++ compiler" in reason


def test_a_compiler_that_was_named_and_is_none_is_an_error(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert build.available() == "$CXX=no-such-compiler is no compiler"


@needs_compiler
def test_the_named_compiler_is_used(
    cache: Path, sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = next(filter(None, map(shutil.which, ("g++", "c++", "clang++"))))
    mine = tmp_path / "my-compiler"
    mine.write_text(f'#!/bin/sh\ntouch {tmp_path}/was-used\nexec {real} "$@"\n')
    mine.chmod(0o755)
    monkeypatch.setenv("CXX", str(mine))
    library_path()
    assert (tmp_path / "was-used").exists()


@needs_compiler
def test_further_switches_make_another_library(cache: Path, sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usual = library_path()
    monkeypatch.setenv("SPFDE_CXXFLAGS", "-DSPFDE_NOTHING '-DSPFDE_WORDS=a b'")
    assert library_path() != usual
    monkeypatch.setenv("SPFDE_CXXFLAGS", "-fno-such-switch")
    with pytest.raises(build.KernelsUnavailable):
        build.load()
    monkeypatch.setenv("SPFDE_CXXFLAGS", "'")
    with pytest.raises(build.KernelsUnavailable, match="SPFDE_CXXFLAGS=' cannot be read"):
        build.load()


def test_the_named_compiler_may_come_with_arguments(
    cache: Path, sources: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "g++ -DSPFDE_NOTHING")
    assert build.available() is None
    first = library_path()
    monkeypatch.setenv("CXX", "g++")
    assert library_path() != first
    monkeypatch.setenv("CXX", "no-such-compiler -O2")
    assert build.available() == "$CXX=no-such-compiler -O2 is no compiler"


def test_an_unknown_platform_is_named(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    assert build.available() == "the platform win32 is not supported"


@needs_compiler
@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's /proc")
def test_kernels_and_pytorch_share_one_openmp_runtime(tmp_path: Path) -> None:
    code = (
        "import ctypes, torch; from spfde.engines.native import build; build.load();"
        "print(len({line.split()[-1] for line in open('/proc/self/maps') if 'gomp' in line or 'libomp' in line}))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ)
    assert ran.stdout.strip() == "1"


@pytest.mark.parametrize(
    ("told", "part"),
    [('"g++', "cannot be read"), ("\udcff", "is no compiler"), ("/", "is no compiler")],
    ids=["a quote without an end", "no text", "a folder"],
)
def test_a_compiler_that_cannot_be_named_so_is_a_reason(
    told: str, part: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", told)
    reason = build.available()
    assert reason is not None
    assert part in reason


@pytest.mark.parametrize("at", ["--version", "compiling"])
@pytest.mark.parametrize(
    "does",
    ["exit 1", "printf 'error: \\377\\376' >&2; exit 1", "exit 0", "kill -9 $$"],
    ids=["fails", "says no text", "does nothing", "dies"],
)
def test_a_compiler_that_does_not_work_is_a_reason_and_auto_goes_without(
    does: str, at: str, cache: Path, sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = tmp_path / "my-compiler"
    answer = does if at == "--version" else "printf 'mine \\377'; exit 0"
    mine.write_text(f'#!/bin/sh\nif [ "$1" = "--version" ]; then {answer}; fi\n{does}\n')
    mine.chmod(0o755)
    monkeypatch.setenv("CXX", str(mine))
    if build.available() is None:
        with pytest.raises(build.KernelsUnavailable):
            build.load()
    monkeypatch.setattr(NativeEngine, "expected_speed", lambda job: 0.1)
    parts = make_parts()
    recipe = spfde.Recipe(sparsity=spfde.MEST(sparsity=0.8), update_interval_epochs=2)
    session = spfde.attach(parts.model, parts.optimizer, parts.loader, recipe, epochs=4, engine="auto")
    assert session.engine == "masked"
    assert "the native engine cannot work here" in str(session)


@pytest.mark.long
@pytest.mark.skipif(
    shutil.which("aarch64-linux-gnu-g++") is None, reason="no compiler for NEON (g++-aarch64-linux-gnu)"
)
@pytest.mark.parametrize("real", ["float", "double"])
def test_the_kernels_compile_for_neon_too(real: str, tmp_path: Path) -> None:
    flags = [*build._FLAGS, f"-DSPFDE_REAL={real}", f"-DSPFDE_SINGLE={int(real == 'float')}"]
    command = ["aarch64-linux-gnu-g++", *flags, str(build.SOURCES / "kernels.cpp"), "-o", str(tmp_path / "kernels.so")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
