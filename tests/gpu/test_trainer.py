"""The trainer on a GPU: what is chosen, images on the device, the profile, and resuming. Skipped without CUDA."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from spfde import presets
from spfde.app.data.images import DataSpec, ImageArray, ImageData
from spfde.app.train.augment import BatchAugment
from spfde.app.train.events import Display
from spfde.app.train.feed import DeviceFeed, HostFeed
from spfde.app.train.loop import train
from spfde.app.train.options import TrainOptions
from spfde.app.train.profile import Profile
from spfde.app.train.setup import TrainingRun
from spfde.app.train.tally import Tally
from spfde.core.numbers import mix

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


class Listening(Display):
    """Keeps what a run tells, and stops it after some epochs."""

    def __init__(self, epochs: int | None = None) -> None:
        self.left, self.choices, self.profiles = epochs, list[str](), list[Profile]()

    def started(self, run: Any) -> None:
        self.choices = run.choices

    def profiled(self, run: Any, found: Profile) -> None:
        self.profiles.append(found)

    def epoch_done(self, run: Any, row: dict[str, Any]) -> None:
        if self.left is not None:
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt


class Seeds:
    caches_prefix, epoch = False, 3

    def augmentation_seeds(self, indices: torch.Tensor) -> torch.Tensor:
        return mix(indices, 7, self.epoch, 0)


def options(**changes: Any) -> TrainOptions:
    given = {"recipe": presets.mest.to_dict(), "epochs": 3, "batch_size": 128, "engine": "masked", "device": "cuda"}
    return TrainOptions(**(given | changes))


def test_crops_and_flips_are_those_of_a_cpu() -> None:
    images = torch.randint(0, 256, (500, 3, 9, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    part = ImageArray(images, torch.arange(500) % 10)
    spec = DataSpec("made", 10, 3, (9, 8), 500, 500)
    data = ImageData(spec, part, part, torch.zeros(3), torch.ones(3), "crop+flip")
    ids, batches = torch.randperm(500), []
    for device in (CPU, GPU):
        augment = BatchAugment("crop+flip", torch.Generator(), padding=4)
        feed = DeviceFeed(data, device, augment, options(), by_sample=True)
        batches.append([part.cpu() for part in feed.batch(ids, Seeds())])  # type: ignore[arg-type]
        tested = [torch.cat(column).cpu() for column in zip(*feed.evaluation_batches("test"), strict=True)]
        assert torch.equal(tested[0], images)
    assert torch.equal(batches[0][0], batches[1][0])
    assert torch.equal(batches[0][1], batches[1][1])


def test_the_first_command_on_a_gpu_is_the_fast_one_and_leaves_no_switch_behind(tmp_path: Path) -> None:
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before, heard = (matmul.allow_tf32, cudnn.allow_tf32), Listening()
    summary = train(options(epochs=1, engine="auto"), tmp_path / "run", heard)
    assert summary["test_accuracy"] > 0.2
    assert (matmul.allow_tf32, cudnn.allow_tf32) == before
    command = json.loads((tmp_path / "run" / "config.json").read_text())["command"]
    has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    assert command["precision"] == ("bf16" if has_bf16 else "fp32")
    assert command["augment_draws"] == "sample"
    assert any("in the memory of cuda:0" in line for line in heard.choices)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_stopped_run_goes_on_with_the_same_images_wherever_they_lie(
    precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bytes] = []
    usual = TrainingRun.batch

    def batch(run: TrainingRun, handed: Any) -> tuple[torch.Tensor, torch.Tensor]:
        x, y = usual(run, handed)
        seen.append(hashlib.sha256(x.cpu().numpy().tobytes() + y.cpu().numpy().tobytes()).digest())
        return x, y

    monkeypatch.setattr(TrainingRun, "batch", batch)
    train(options(precision=precision), tmp_path / "whole")
    whole, seen[:] = list(seen), []
    with pytest.raises(KeyboardInterrupt):
        train(options(precision=precision), tmp_path / "stopped", Listening(2))
    summary = train(options(data_on="host"), tmp_path / "stopped", resume=True)
    assert seen == whole
    assert len(set(seen)) == len(seen) == 3 * 79
    assert summary["epochs"] == 3
    assert json.loads((tmp_path / "stopped" / "config.json").read_text())["command"]["precision"] == precision


def test_a_profile_tells_how_busy_the_gpu_was(tmp_path: Path) -> None:
    heard = Listening()
    train(options(epochs=1, profile=20), tmp_path / "run", heard)
    [found] = heard.profiles
    print(f"GPU busy {found.gpu_busy:.1%} of {found.gpu_seconds} s")
    assert found.steps == 20
    assert found.gpu_busy is not None
    assert 0.0 < found.gpu_busy <= 1.0
    assert found.gpu_seconds is not None
    assert found.gpu_seconds > 0.0


def test_a_glance_waits_for_nothing_and_a_reading_is_exact() -> None:
    tally, logits, y = Tally(GPU), torch.tensor([[0.0, 1.0]], device=GPU), torch.tensor([1], device=GPU)
    tally.add(torch.tensor(3.0, device=GPU), logits, y)
    assert tally.glance() is None
    tally.add(torch.tensor(5.0, device=GPU), logits, y)
    torch.cuda.synchronize()
    assert tally.glance() == 3.0, "as it was at the glance before"
    assert (tally.read().loss, tally.read().accuracy) == (4.0, 1.0)


def test_no_step_of_the_data_path_waits_for_the_gpu() -> None:
    images = torch.zeros(256, 3, 8, 8, dtype=torch.uint8)
    part = ImageArray(images, torch.zeros(256, dtype=torch.int64))
    data = ImageData(DataSpec("made", 2, 3, (8, 8), 256, 256), part, part, torch.zeros(3), torch.ones(3), "crop+flip")
    feed = DeviceFeed(data, GPU, BatchAugment("crop+flip", torch.Generator()), options(), by_sample=True)
    seeds = Seeds()
    feed.batch(torch.arange(64), seeds)  # type: ignore[arg-type]  # the epoch's crops and flips, and the first buffers
    torch.cuda.set_sync_debug_mode("error")
    try:
        for start in (0, 64, 128):
            feed.batch(torch.arange(start, start + 64), seeds)  # type: ignore[arg-type]
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_images_that_stay_on_the_host_cross_over_pinned() -> None:
    part = ImageArray(torch.zeros(8, 1, 4, 4, dtype=torch.uint8), torch.zeros(8, dtype=torch.int64))
    data = ImageData(DataSpec("made", 2, 1, (4, 4), 8, 8), part, part, torch.zeros(1), torch.ones(1), "none")
    feed = HostFeed(data, GPU, BatchAugment("none", torch.Generator()), options(), by_sample=True)
    images, labels = next(iter(feed.loader))
    assert images.is_pinned()
    assert labels.is_pinned()
    assert feed.plain((images, labels))[0].device == GPU
