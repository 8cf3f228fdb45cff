"""What a run that decodes its images waits for, and what it does not decode."""

from __future__ import annotations

import io
import json
import time
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

import spfde
from spfde.app.data import folders
from spfde.app.train import evaluated
from spfde.app.train.display import ConsoleDisplay, waited_line
from spfde.app.train.events import Display
from spfde.app.train.loop import train
from spfde.app.train.options import TrainOptions
from spfde.app.train.waits import Waits

PLAIN: dict[str, Any] = {"batch_size": 12, "workers": 0, "device": "cpu", "dense_timing_steps": 0, "engine": "masked"}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 + 8 images in two classes."""
    root, noise = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for part, count in (("train", 24), ("val", 4)):
        for label in ("dark", "light"):
            (root / part / label).mkdir(parents=True)
            for number in range(count):
                pixels = noise.integers(0, 100, (8, 8, 3), dtype=np.uint8) + 100 * (label == "light")
                Image.fromarray(pixels.astype(np.uint8)).save(root / part / label / f"{number}.png")
    return root


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    clock = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    return clock


def test_waits_are_what_passes_between_asking_and_getting(now: list[float]) -> None:
    def batches() -> Iterator[int]:
        for number, took in enumerate((3.0, 1.0)):
            now[0] += took
            yield number

    waits = Waits()
    assert (waits.seconds, waits.share) == (0.0, 0.0)
    for _ in range(2):  # each pass counts anew
        for number in waits.over(batches()):
            assert (waits.seconds, waits.share) == [(3.0, 1.0), (4.0, 4 / 5)][number]
            now[0] += (1.0, 3.0)[number]
        assert (waits.seconds, waits.share) == (4.0, 0.5)


def test_a_loader_that_holds_the_run_up_is_told_with_what_helps() -> None:
    assert "waited 43% of the time for data: more --workers (now 2, on 16 cores)" in waited_line(
        0.43, workers=2, cores=16
    )
    assert "more --workers" not in waited_line(0.43, workers=16, cores=16)


@pytest.mark.parametrize(
    ("in_memory", "augment", "is_work"),
    [(False, "auto", True), (True, "auto", False), (True, "random-resized-crop", True)],
)
def test_waits_are_in_the_metrics_and_said_where_images_are_decoded(
    in_memory: bool, augment: str, is_work: bool, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow(path: str, at_least: Any = None, decode: Any = folders.decode) -> Any:
        time.sleep(0.01)
        return decode(path, at_least)

    monkeypatch.setattr(folders, "decode", slow)
    load = partial(folders.load_folder, in_memory_bytes=2**20 if in_memory else 0)
    shown = io.StringIO()
    options = TrainOptions(**PLAIN, data=str(photos), recipe=spfde.presets.dense.to_dict(), epochs=1, augment=augment)
    train(options, tmp_path / "run", ConsoleDisplay(Console(file=shown)), load=lambda data, **_: load(data))
    assert ("of the time for data" in shown.getvalue()) == is_work
    row = json.loads((tmp_path / "run" / "metrics.jsonl").read_text())
    assert (row["loader_wait_seconds"] >= 48 * 0.01) == is_work


@pytest.mark.parametrize(("limit", "times"), [(2**20, 1), (0, 2)])
def test_images_to_estimate_norms_on_are_decoded_once_while_there_is_room(
    limit: int, times: int, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[str] = []
    usual = folders.decode
    data = folders.load_folder(str(photos), in_memory_bytes=0)
    monkeypatch.setattr(folders, "decode", lambda path, **more: decoded.append(path) or usual(path, **more))
    monkeypatch.setattr(evaluated, "KEPT_BYTES", limit)
    drawn, before = evaluated.Drawn(data, 30, TrainOptions(**PLAIN)), torch.get_rng_state()
    first, second = list(drawn), list(drawn)
    assert len(decoded) == 30 * times
    assert [len(images) for images in first] == [15, 15]
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    assert torch.equal(torch.get_rng_state(), before)
    in_workers = list(evaluated.Drawn(data, 30, TrainOptions(**(PLAIN | {"workers": 2}))))
    assert all(torch.equal(one, other) for one, other in zip(first, in_workers, strict=True))
    assert len(decoded) == 30 * times, "the workers have done it"


def test_samples_that_are_sieved_out_are_not_decoded(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each epoch decodes the samples of its partial set, each once, and no other."""
    decoded: list[str] = []
    by_epoch: list[Counter[str]] = []

    def noted(path: str, at_least: Any = None, decode: Any = folders.decode) -> Any:
        decoded.append(path)
        return decode(path, at_least)

    class Epochs(Display):
        def started(self, run: Any) -> None:
            decoded.clear()

        def epoch_done(self, run: Any, row: dict[str, Any]) -> None:
            by_epoch.append(Counter(path for path in decoded if "/train/" in path))
            decoded.clear()

    monkeypatch.setattr(folders, "decode", noted)
    recipe = spfde.Recipe(
        sieving=spfde.DataSieving(removed_fraction=0.25, criterion="random"), update_interval_epochs=1
    )
    options = TrainOptions(
        data=str(photos),
        recipe=recipe.to_dict(),
        epochs=3,
        batch_size=12,
        workers=0,
        device="cpu",
        dense_timing_steps=0,
    )
    load = partial(folders.load_folder, image_size=8, in_memory_bytes=0)
    train(options, tmp_path / "run", Epochs(), load=lambda data, **_: load(data))

    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [len(each) for each in by_epoch] == [row["partial_samples"] for row in rows] == [36, 36, 36]
    assert all(set(each.values()) == {1} for each in by_epoch)
    assert len({frozenset(each) for each in by_epoch}) > 1, "samples have moved"
