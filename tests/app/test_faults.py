"""Faults of the machine end a run with a line that says what to do, and the run goes on as if nothing had been."""

from __future__ import annotations

import itertools
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from helpers.commands import Outcome, Spfde
from spfde.app.data import folders
from spfde.app.train import display, loop
from spfde.app.train.events import Display

MEASURED = ("seconds", "loader_wait_seconds", "peak_memory_bytes")
RUN = ("--recipe", "mest", "--epochs", 3, "--interval", 1, "--batch-size", 16, "--engine", "masked", "--quiet")


def rows(folder: Path) -> list[dict[str, Any]]:
    """The epochs of a run, without what was measured."""
    lines = (json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines())
    return [{name: value for name, value in line.items() if name not in MEASURED} for line in lines]


def weights(folder: Path) -> bytes:
    return (folder / "checkpoints" / "latest" / "model.safetensors").read_bytes()


def told(ended: Outcome) -> str:
    """The one line that a command ended with."""
    assert (ended.code, ended.out) == (2, "")
    [line] = ended.err.splitlines()
    return line


def at_step(number: int, then: Callable[[], object]) -> Callable[..., Any]:
    """``train_step``, before whose n-th call something happens."""
    usual, calls = loop.train_step, itertools.count(1)

    def step(*given: Any) -> Any:
        if next(calls) == number:
            then()
        return usual(*given)

    return step


@pytest.fixture
def whole(tiny: Path, spfde: Spfde, here: Path) -> Path:
    """A run that nothing befell."""
    assert spfde("train", "--data", tiny, *RUN, "--out", "whole").code == 0
    return here / "whole"


def fail_with(error: Exception) -> Callable[[], None]:
    def fail() -> None:
        raise error

    return fail


class TestMemory:
    @pytest.mark.parametrize(
        ("error", "where", "advice"),
        [
            (MemoryError(), "the machine", "smaller --batch-size (it was 16)"),
            pytest.param(
                RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 1 B"),
                "the machine",
                "--model",
                marks=pytest.mark.long,
            ),
            (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "the device", "--data-on host"),
        ],
        ids=["python", "host", "device"],
    )
    def test_a_run_without_memory_ends_with_advice_and_goes_on_later(
        self,
        error: Exception,
        where: str,
        advice: str,
        tiny: Path,
        whole: Path,
        spfde: Spfde,
        here: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(loop, "train_step", at_step(9, fail_with(error)))  # in the second epoch
            line = told(spfde("train", "--data", tiny, *RUN, "--out", "run"))
        assert line.startswith(f"spfde: {where} has no memory left")
        assert advice in line
        assert "--resume run" in line
        assert spfde("train", "--resume", "run", "--quiet").code == 0
        assert rows(here / "run") == rows(whole)
        assert weights(here / "run") == weights(whole)

    def test_before_anything_is_trained_no_folder_is_left(
        self, tiny: Path, spfde: Spfde, here: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("spfde.app.train.setup.load_data", lambda *_, **__: fail_with(MemoryError())())
        line = told(spfde("train", "--data", tiny, *RUN, "--out", "run"))
        assert "no memory left" in line
        assert "--resume" not in line
        assert not (here / "run").exists()

    def test_another_error_is_no_lack_of_memory(
        self, tiny: Path, monkeypatch: pytest.MonkeyPatch, spfde: Spfde
    ) -> None:
        monkeypatch.setattr(loop, "train_step", at_step(1, fail_with(RuntimeError("shapes differ"))))
        with pytest.raises(RuntimeError, match="shapes differ"):
            spfde("train", "--data", tiny, *RUN)


class TestTheClock:
    def test_a_clock_that_jumps_changes_nothing(
        self, tiny: Path, whole: Path, spfde: Spfde, here: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        jumps, usual = itertools.cycle([0.0, -1e9, 1e9, 86_400.0]), time.time
        monkeypatch.setattr(time, "time", lambda: usual() + next(jumps))
        assert spfde("train", "--data", tiny, *RUN, "--out", "run").code == 0
        assert rows(here / "run") == rows(whole)
        summary = json.loads((here / "run" / "summary.json").read_text())
        assert 0 <= summary["seconds"] < 1e4


class Removing(Display):
    """Removes a file or a folder when the first epoch is over."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def epoch_done(self, run: Any, row: dict[str, Any]) -> None:
        if self._path.is_dir():
            shutil.rmtree(self._path)
        self._path.unlink(missing_ok=True)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A folder of 24 + 6 images in 3 classes, too many to be kept in memory."""
    draw = pytest.importorskip("PIL.Image")
    random = np.random.default_rng(0)
    for part, count in (("train", 8), ("test", 2)):
        for name in "abc":
            (tmp_path / "images" / part / name).mkdir(parents=True)
            for number in range(count):
                pixels = random.integers(0, 256, (8, 8, 3), dtype=np.uint8)
                draw.fromarray(pixels).save(tmp_path / "images" / part / name / f"{number}.png")
    return tmp_path / "images"


class TestData:
    @pytest.mark.parametrize(
        ("gone", "workers"),
        [
            ("train/b/3.png", 0),
            pytest.param("train/b/3.png", 1, marks=pytest.mark.long),
            pytest.param("train/b", 0, marks=pytest.mark.long),
            pytest.param("test/a/1.png", 0, marks=pytest.mark.long),
        ],
    )
    def test_images_that_vanish_are_named_and_once_they_are_back_the_run_goes_on(
        self, gone: str, workers: int, images: Path, here: Path, spfde: Spfde, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(folders.load_folder.__kwdefaults__, "in_memory_bytes", 0)
        shutil.copytree(images, here / "kept")
        argv = ["train", "--data", images, *RUN, "--batch-size", 4, "--workers", workers]
        with monkeypatch.context() as patch:
            patch.setattr(display, "ConsoleDisplay", lambda _: Removing(images / gone))
            line = told(spfde(*argv, "--out", "run"))
        assert str(images / gone) in line
        shutil.copytree(here / "kept", images, dirs_exist_ok=True)
        assert spfde("train", "--resume", "run", "--quiet").code == 0
        assert spfde(*argv, "--out", "whole").code == 0
        assert weights(here / "run") == weights(here / "whole")

    def test_a_run_whose_data_are_gone_is_not_resumed_and_stays_as_it_is(
        self, tiny: Path, whole: Path, spfde: Spfde, here: Path
    ) -> None:
        (whole / "summary.json").unlink()
        config = json.loads((whole / "config.json").read_text())
        config["command"]["data"] = str(here / "gone.npz")
        (whole / "config.json").write_text(json.dumps(config))
        before = weights(whole)
        assert "gone.npz" in told(spfde("train", "--resume", "whole"))
        assert weights(whole) == before
