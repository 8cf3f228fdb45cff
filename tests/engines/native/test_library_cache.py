"""Libraries that lie in a cache: damaged ones heal, and what others could have written is not loaded."""

from __future__ import annotations

import fcntl
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from helpers.libraries import WHOLE, library_path, needs_compiler, start_load
from spfde.engines.native import build, library_cache

PLANTED = WHOLE.replace("return 1", "return 666")
is_root = os.geteuid() == 0


@pytest.fixture(autouse=True)
def opened(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """What was opened, byte for byte; nothing is, as a damaged library would take this process with it."""
    contents: list[bytes] = []

    def note(content: bytes, library: Path) -> Any:
        contents.append(content)
        return SimpleNamespace(_name=str(library), spfde_lanes=lambda: 1)

    monkeypatch.setattr(build, "_open", note)
    return contents


def built(cache: Path, sources: Path) -> Path:
    """The library in the cache."""
    path = library_path()
    assert path.parent == cache
    return path


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 0xFF
    path.write_bytes(content)


@contextmanager
def held(path: Path) -> Iterator[None]:
    """The lock, held as by another process: an flock belongs to its open file."""
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def as_another(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder and what is in it belong to somebody else."""
    if is_root:
        for path in (folder, *folder.iterdir()):
            os.chown(path, 12345, 12345)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: 12345)


@needs_compiler
@pytest.mark.parametrize(
    "damage",
    [
        lambda path: os.truncate(path, path.stat().st_size // 2),
        lambda path: os.truncate(path, 4096),
        lambda path: os.truncate(path, 0),
        lambda path: flip(path, path.stat().st_size // 2),
        lambda path: flip(path, -1),
        lambda path: path.with_name(f"{path.name}.sha256").unlink(),
        lambda path: path.with_name(f"{path.name}.sha256").write_bytes(b"\xff"),
        lambda path: path.unlink(),
    ],
    ids=["half", "a page", "nothing", "a byte", "the last byte", "no checksum", "another checksum", "no library"],
)
def test_a_damaged_library_is_never_opened_and_heals(
    damage: Any, cache: Path, sources: Path, opened: list[bytes]
) -> None:
    path = built(cache, sources)
    whole = path.read_bytes()
    damage(path)
    said: list[str] = []
    assert library_path(on_build=said.append) == path
    assert len(said) == 1, "it is built anew, and that is said"
    assert library_path(on_build=said.append) == path
    assert len(said) == 1
    assert set(opened) == {whole}


@needs_compiler
def test_a_library_that_was_cut_short_kills_no_process(cache: Path, sources: Path) -> None:
    path = built(cache, sources)
    os.truncate(path, path.stat().st_size // 2)
    ended = start_load(sources).end()
    assert (ended.code, ended.out.split()) == (0, [str(path), "1"])


@needs_compiler
def test_a_library_reaches_the_disk_before_its_name(
    cache: Path, sources: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    sync, replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda handle: done.append("sync") or sync(handle))
    monkeypatch.setattr(Path, "replace", lambda self, to: done.append(Path(to).suffix) or replace(self, to))
    library_path()
    assert done[:4] == ["sync", "sync", ".so", ".sha256"]


@needs_compiler
@pytest.mark.parametrize("mode", [0o775, 0o757, 0o777])
def test_a_folder_that_others_can_write_to_is_not_used(mode: int, cache: Path, sources: Path) -> None:
    path = built(cache, sources)
    cache.chmod(mode)
    said: list[str] = []
    assert library_path(on_build=said.append).parent != cache
    assert f"{cache} can be written to by others" in said[0]
    assert path.is_file()


@needs_compiler
def test_a_folder_inside_one_that_others_can_write_to_is_not_used(
    tmp_path: Path, sources: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    monkeypatch.setenv("SPFDE_CACHE_DIR", str(shared / "cache"))
    said: list[str] = []
    assert shared not in library_path(on_build=said.append).parents
    assert f"{shared} can be written to by others" in said[0]
    shared.chmod(0o1777)  # as /tmp: others can add to it, and not rename what is ours
    assert library_path(on_build=said.append).parent == shared / "cache"


@needs_compiler
def test_a_folder_of_somebody_else_is_not_used(cache: Path, sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built(cache, sources)
    as_another(cache, monkeypatch)
    monkeypatch.setattr(library_cache, "untrusted_parent", lambda path: None)  # pytest's own are not another's
    if not is_root:
        with pytest.raises(build.KernelsUnavailable, match="belongs to another user"):
            build.load()
        return
    said: list[str] = []
    assert library_path(on_build=said.append).parent != cache
    assert f"{cache} belongs to another user" in said[0]


@needs_compiler
@pytest.mark.skipif(not is_root, reason="only root can give a file away")
def test_a_library_that_somebody_else_planted_is_not_loaded_but_replaced(
    cache: Path, sources: Path, tmp_path: Path, opened: list[bytes]
) -> None:
    path = built(cache, sources)
    other = tmp_path / "planted.cpp"
    other.write_text(PLANTED)
    assert os.system(f"g++ -shared -fPIC {other} -o {path}") == 0
    path.with_name(f"{path.name}.sha256").write_text(library_cache.checksum(path.read_bytes()))
    os.chown(path, 12345, 12345)
    planted = path.read_bytes()
    assert library_path() == path
    assert path.stat().st_uid == os.geteuid()
    assert planted not in opened


@needs_compiler
@pytest.mark.parametrize("name", ["{}", "{}.sha256"])
def test_a_file_that_others_can_write_to_is_built_anew(name: str, cache: Path, sources: Path) -> None:
    path = built(cache, sources)
    loose = path.with_name(name.format(path.name))
    loose.chmod(0o666)
    said: list[str] = []
    assert library_path(on_build=said.append) == path
    assert said
    assert not stat.S_IMODE(loose.stat().st_mode) & 0o022


@needs_compiler
def test_a_link_in_the_place_of_the_library_is_replaced_and_not_followed(
    cache: Path, sources: Path, tmp_path: Path
) -> None:
    path = built(cache, sources)
    elsewhere = tmp_path / "elsewhere.so"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)
    assert library_path() == path
    assert not path.is_symlink()


@needs_compiler
def test_what_is_built_under_a_loose_umask_is_used_again(cache: Path, sources: Path) -> None:
    said: list[str] = []
    before = os.umask(0o000)
    try:
        first, again = (library_path(on_build=said.append) for _ in range(2))
    finally:
        os.umask(before)
    assert first == again
    assert len(said) == 1
    assert all(not stat.S_IMODE(path.stat().st_mode) & 0o022 for path in (cache, *cache.iterdir()))


@needs_compiler
def test_a_lock_that_is_a_link_is_not_followed(cache: Path, sources: Path, tmp_path: Path) -> None:
    path = built(cache, sources)
    path.unlink()
    precious = tmp_path / "precious"
    precious.write_text("content")
    lock = path.with_name(f"{path.name}.lock")
    lock.unlink()
    lock.symlink_to(precious)
    said: list[str] = []
    assert library_path(on_build=said.append).parent != cache
    assert precious.read_text() == "content"
    assert str(lock) in said[0]


@needs_compiler
def test_a_lock_that_is_a_queue_does_not_hang(cache: Path, sources: Path) -> None:
    path = built(cache, sources)
    path.unlink()
    lock = path.with_name(f"{path.name}.lock")
    lock.unlink()
    os.mkfifo(lock)
    assert library_path().parent != cache


@needs_compiler
def test_a_foreign_lock_is_waited_for_for_a_while_and_then_named(
    cache: Path, sources: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert library_cache.LOCK_SECONDS == 30
    monkeypatch.setattr(library_cache, "LOCK_SECONDS", 0.3)
    path = built(cache, sources)
    path.unlink()
    said: list[str] = []
    with held(path.with_name(f"{path.name}.lock")):
        assert library_path(on_build=said.append).parent != cache
    assert f"{path.name}.lock" in said[0]
    assert "held by another process" in said[0]


@needs_compiler
def test_a_whole_library_is_loaded_while_somebody_holds_the_lock(cache: Path, sources: Path) -> None:
    path = built(cache, sources)
    with held(path.with_name(f"{path.name}.lock")):
        assert library_path() == path
