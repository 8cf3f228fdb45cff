"""Libraries run from bytes that were checked: what becomes of the file does not matter to those that have it loaded."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.commands import start_code
from helpers.libraries import WHOLE, needs_compiler
from spfde.engines.native import library_cache
from spfde.engines.native.loading import load_bytes

# More pages than the loader touches: those that are read first after the file has changed are read from where it was.
PAGES = WHOLE + (
    "#define EIGHT(x) x, x, x, x, x, x, x, x\n"
    "#define MANY(x) EIGHT(EIGHT(EIGHT(EIGHT(EIGHT(x)))))\n"
    "static const int numbers[] = {MANY(7)};\n"
    'extern "C" __attribute__((visibility("default"))) int spfde_number(int i) { return numbers[i]; }\n'
)

LOAD = """
import os, sys
from pathlib import Path
from spfde.engines.native import build
if sys.argv[2] == "file":  # as where the system refuses it
    os.memfd_create = lambda *_: os.open("/", os.O_WRONLY)
build.SOURCES = Path(sys.argv[1])
library = build.load()
path = Path(library._name)
{change}
assert [library.spfde_number(i) for i in range(0, 32768, 512)] == [7] * 64
assert library.spfde_lanes() == 1
child = os.fork()
if not child:
    os._exit(library.spfde_number(32767))
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
print(build.load().spfde_lanes(), path.stat().st_size > 100000)
"""


@needs_compiler
@pytest.mark.parametrize(
    ("change", "memory"),
    [
        ("os.truncate(path, 0)", "sealed"),
        ("path.write_bytes(bytes(path.stat().st_size))", "file"),
        pytest.param("os.truncate(path, 0)", "file", marks=pytest.mark.long),
        pytest.param("path.write_bytes(bytes(path.stat().st_size))", "sealed", marks=pytest.mark.long),
    ],
    ids=["cut short", "overwritten", "cut short, without sealed memory", "overwritten, with sealed memory"],
)
def test_a_file_that_is_changed_after_it_was_loaded_changes_nothing_and_is_built_anew(
    change: str, memory: str, cache: Path, sources: Path
) -> None:
    (sources / "kernels.cpp").write_text(PAGES)
    ended = start_code(LOAD.format(change=change), str(sources), memory, folder=sources.parent).end()
    assert (ended.code, ended.out.split()) == (0, ["1", "True"]), ended.err


def compiled(folder: Path, answer: int) -> bytes:
    source, library = folder / f"{answer}.cpp", folder / f"{answer}.so"
    source.write_text(WHOLE.replace("return 1", f"return {answer}"))
    compiler = os.environ.get("CXX", "c++")
    subprocess.run([compiler, "-shared", "-fPIC", str(source), "-o", str(library)], check=True)
    return library.read_bytes()


@needs_compiler
@pytest.mark.parametrize("has_memory", [True, False])
def test_each_library_is_its_own_and_is_loaded_once(
    tmp_path: Path, has_memory: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not has_memory:
        monkeypatch.setattr(sys, "platform", "darwin")
    contents = {answer: compiled(tmp_path, answer) for answer in (3, 4, 5)}
    loaded = {answer: load_bytes(content, f"{tmp_path}/{answer}") for answer, content in contents.items()}
    assert [library.spfde_lanes() for library in loaded.values()] == [3, 4, 5]
    assert all(load_bytes(contents[answer], f"{tmp_path}/{answer}") is library for answer, library in loaded.items())


@needs_compiler
def test_what_runs_is_what_was_checked_even_where_the_file_is_changed_in_between(tmp_path: Path) -> None:
    def write(draft: Path, content: bytes) -> None:
        draft.write_bytes(content)

    path = tmp_path / "kernels.so"
    library_cache.put(path, lambda draft: write(draft, compiled(tmp_path, 6)))
    content = library_cache.read_whole(path)
    assert content is not None
    path.write_bytes(compiled(tmp_path, 7))
    assert load_bytes(content, str(path)).spfde_lanes() == 6
    assert library_cache.read_whole(path) is None


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's /proc")
@needs_compiler
def test_nobody_can_write_to_the_memory_that_is_run(tmp_path: Path) -> None:
    load_bytes(compiled(tmp_path, 8), f"{tmp_path}/kernels-eight.so")
    mapped = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if "kernels-eight" in line]
    assert mapped
    assert all("memfd:" in line[5] and "s" not in line[1] for line in mapped)  # private, and of no file
    assert not list(tmp_path.glob("kernels-eight*"))
