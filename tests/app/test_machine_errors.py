"""What the machine does to a command ends in one line, whichever command it is."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import stat
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch

from helpers.commands import Outcome, Spfde
from helpers.stopping import stopped_run
from spfde.app.data.images import ImageArray
from spfde.app.machine_errors import machine_error
from spfde.app.runs import checkpoints
from spfde.app.runs.checkpoints import Checkpoints
from spfde.app.runs.folder import RunFolder
from spfde.app.train import loop

needs_proc = pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs Linux's /proc")


@pytest.fixture(scope="module")
def trained(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped after two of three epochs."""
    return stopped_run(tiny, tmp_path_factory.mktemp("trained") / "run", after=2, epochs=3)


@pytest.fixture
def run(trained: Path, here: Path) -> Path:
    shutil.copytree(trained, here / "run")
    return Path("run")


def assert_plain(ended: Outcome, *told: str) -> None:
    assert ended.code == 2, ended.err
    assert "Traceback" not in ended.err
    assert all(line.startswith("spfde: ") for line in ended.err.splitlines())
    for words in told:
        assert words in ended.err


COMMANDS = [["train", "--resume", "run"], ["export", "run", "--last"], ["report", "run"], ["cite", "run"]]


@needs_proc
@pytest.mark.parametrize("name", ["session.pt", "optimizer.pt", "model.safetensors", "manifest.json"])
@pytest.mark.parametrize("command", COMMANDS[:2], ids=["resume", "export"])
def test_a_file_of_a_checkpoint_that_cannot_be_read_is_named(
    command: list[str], name: str, run: Path, spfde: Spfde
) -> None:
    path = run / "checkpoints" / "latest" / name
    path.unlink()
    path.symlink_to("/proc/self/mem")  # reading it is an error of the device
    assert_plain(spfde(*command), name, os.strerror(errno.EIO))


@pytest.mark.usefixtures("few_plots")
@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl", "recipe.toml", "checkpoints/latest/manifest.json"])
@pytest.mark.parametrize("command", COMMANDS, ids=[command[0] for command in COMMANDS])
def test_a_queue_in_the_place_of_a_file_is_not_waited_for(
    command: list[str], name: str, run: Path, spfde: Spfde
) -> None:
    (run / name).unlink()
    os.mkfifo(run / name)
    ended = spfde(*command)
    assert ended.code == 0 or assert_plain(ended) is None


@pytest.mark.parametrize("command", COMMANDS, ids=[command[0] for command in COMMANDS])
@pytest.mark.parametrize("text", ['{"a": ' + "[" * 100_000 + "]" * 100_000 + "}", "[" * 900 + "]" * 900])
def test_json_without_end_is_damage(text: str, command: list[str], run: Path, spfde: Spfde) -> None:
    for name in ("config.json", "checkpoints/latest/manifest.json", "checkpoints/best/manifest.json"):
        (run / name).write_text(text)
    ended = spfde(*command)
    assert ended.code == 0 if command[0] == "cite" else assert_plain(ended, "is damaged") is None


def test_a_run_s_name_that_is_no_text_is_refused_before_any_work(tiny: Path, spfde: Spfde, here: Path) -> None:
    name = os.fsdecode(b"run-\xff\xfe")
    assert_plain(spfde("train", "--data", tiny, "--epochs", 1, "--out", name), "run-??", "is no text in UTF-8")
    assert list(here.iterdir()) == []


@pytest.mark.usefixtures("few_plots")
def test_a_run_that_was_given_a_name_that_is_no_text_is_reported(run: Path, spfde: Spfde, here: Path) -> None:
    name = os.fsdecode(b"run-\xff\xfe")
    run.rename(name)
    for command in (["report", name], ["cite", name]):
        ended = spfde(*command)
        assert (ended.code, ended.err) == (0, "")
    assert (here / "report.html").stat().st_size > 1000
    for command in (["export", name], ["train", "--resume", name]):
        assert_plain(spfde(*command), "UTF-8")


def test_values_that_are_too_large_or_no_text_are_reported_as_far_as_they_go(run: Path, spfde: Spfde) -> None:
    config = json.loads((run / "config.json").read_text())
    config["command"] |= {"lr": 10**400, "model": "\ud800"}
    config["plan"]["block_names"] = ["\udfff"] * 5
    (run / "config.json").write_text(json.dumps(config))
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        row |= {"test_accuracy": 10**400, "seconds": -1e308, "training_flops": 1e308, "samples": 10**30}
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    ended = spfde("report", run)
    assert (ended.code, ended.err) == (0, "")


@needs_proc
@pytest.mark.parametrize("kind", ["dense", "compressed", "onnx"])
def test_an_export_to_where_nothing_can_be_written_is_one_line(kind: str, run: Path, spfde: Spfde) -> None:
    assert_plain(spfde("export", run, "--last", "--format", kind, "--out", "/proc/x"), "/proc/x: ", "cannot be written")


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES])
def test_an_export_in_a_read_only_run_folder_is_one_line(
    code: int, run: Path, spfde: Spfde, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = os.open

    def refuse(path: Any, flags: int, *rest: Any, **named: Any) -> int:
        if flags & os.O_CREAT:
            raise OSError(code, os.strerror(code), path)
        return usual(path, flags, *rest, **named)

    monkeypatch.setattr(os, "open", refuse)
    assert_plain(spfde("export", run, "--last"), os.strerror(code))


def test_a_loader_s_worker_that_is_killed_is_one_line(
    tiny: Path, spfde: Spfde, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = ImageArray.__getitems__

    def die(self: ImageArray, indices: Any) -> Any:
        if torch.utils.data.get_worker_info() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return usual(self, indices)

    monkeypatch.setattr(ImageArray, "__getitems__", die)
    ended = spfde("train", "--data", tiny, "--epochs", 1, "--workers", 1, "--engine", "masked", "--out", "run")
    assert_plain(ended, "worker process was killed", "--workers")


def test_a_command_without_memory_says_so_in_a_line() -> None:
    told = machine_error(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"))
    assert told is not None
    assert "not enough memory (CUDA out of memory" in told


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (MemoryError(), "the machine has no memory left"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "the device has no memory left"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "the machine has no memory left"),
        (PermissionError(errno.EACCES, "Permission denied", "a/b"), "a/b: permission denied"),
        (OSError(errno.EIO, "Input/output error"), "input/output error"),
    ],
)
def test_what_the_machine_lacks_is_advice_and_no_traceback(
    error: Exception, told: str, tiny: Path, spfde: Spfde, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> NoReturn:
        raise error

    monkeypatch.setattr(loop, "train_step", fail)
    ended = spfde("train", "--data", tiny, "--epochs", 1, "--engine", "masked", "--out", "run", "--quiet")
    assert_plain(ended, told)


def test_a_fault_of_the_program_keeps_its_traceback() -> None:
    for error in (
        RuntimeError("expected scalar type Float"),
        ValueError("x"),
        BrokenPipeError(errno.EPIPE, "Broken pipe"),
    ):
        assert machine_error(error) is None


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_files_have_the_umask_s_mode(umask: int, tiny: Path, spfde: Spfde, here: Path) -> None:
    before = os.umask(umask)
    try:
        made = spfde("train", "--data", tiny, "--epochs", 1, "--batch-size", 32, "--engine", "masked", "--out", "run")
        assert made.code == 0, made.err
        for kind in ("dense", "compressed"):
            assert spfde("export", "run", "--format", kind).code == 0
    finally:
        os.umask(before)
    modes = {str(path): stat.S_IMODE(path.stat().st_mode) for path in here.rglob("*") if path.is_file()}
    modes = {path: mode for path, mode in modes.items() if not path.endswith(".lock")}
    assert len(modes) > 15
    assert set(modes.values()) == {0o666 & ~umask}, modes


class TestReadingWhileItIsReplaced:
    @pytest.fixture
    def kept(self, tmp_path: Path) -> Checkpoints:
        kept = Checkpoints(tmp_path / "checkpoints")
        self.save(kept, 1)
        return kept

    def save(self, kept: Checkpoints, epoch: int) -> None:
        def write(draft: Path) -> None:
            (draft / "model.safetensors").write_text(str(epoch))

        kept.save(write, epoch=epoch, best=True, about={})

    def test_at_each_moment_the_best_or_the_one_before_it_is_whole(
        self, kept: Checkpoints, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        seen: list[str] = []

        def look(act: Any) -> Any:
            def looking(*given: Any, **named: Any) -> Any:
                found = next((path for path in (kept.best, kept.best_before) if path.is_dir()), None)
                assert found is not None, "there is none"
                checkpoints.check_whole(found)
                seen.append((found / "model.safetensors").read_text())
                return act(*given, **named)

            return looking

        monkeypatch.setattr(Path, "rename", look(Path.rename))
        monkeypatch.setattr(shutil, "rmtree", look(shutil.rmtree))
        self.save(kept, 2)
        assert set(seen) == {"1", "2"}

    def test_export_takes_the_one_before_while_the_best_is_replaced(self, run: Path, spfde: Spfde) -> None:
        best = RunFolder(run).checkpoints
        best.best.rename(best.best_before)
        ended = spfde("export", run)
        assert (ended.code, ended.err) == (0, "")

    def test_what_changes_while_it_is_read_is_read_again(self, kept: Checkpoints) -> None:
        times: list[str] = []

        def read(path: Path) -> str:
            if not times:
                self.save(kept, 2)
            times.append((path / "model.safetensors").read_text())
            return times[-1]

        assert kept.read(lambda: kept.best, read) == "2"
        assert len(times) == 2

    def test_what_is_replaced_without_end_is_said_so(self, kept: Checkpoints) -> None:
        epochs = iter(range(2, 100))
        with pytest.raises(Exception, match="replaced faster"):
            kept.read(lambda: kept.best, lambda path: self.save(kept, next(epochs)))

    def test_a_best_one_that_a_killed_process_put_aside_comes_back(self, kept: Checkpoints) -> None:
        kept.best.rename(kept.best_before)
        kept.remove_drafts()
        assert (kept.best / "model.safetensors").read_text() == "1"
        assert not kept.best_before.exists()
