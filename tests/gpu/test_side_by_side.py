"""Runs side by side on a real GPU, each with a stream and graphs: what tests/app/train shows on a CPU."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import spfde
from spfde import presets
from spfde.app.runs.checkpoints import described
from spfde.app.train import models
from spfde.app.train.events import Display
from spfde.app.train.loop import Summary, train
from spfde.app.train.machine import switches
from spfde.app.train.options import TrainOptions
from spfde.app.train.side_by_side import Job, train_side_by_side

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
DEVICE = "cuda"
RECIPE = spfde.Recipe(sparsity=spfde.MEST(sparsity=0.8), update_interval_epochs=1)


def dropping(num_classes: int, in_channels: int) -> nn.Module:
    """Its results are the same each time that they are computed, and dropout draws on the device in each step."""
    layers: list[nn.Module] = [nn.Flatten(), nn.Linear(784 * in_channels, 256)]
    for _ in range(3):
        layers += [nn.ReLU(), nn.Dropout(0.3), nn.Linear(256, 256)]
    return nn.Sequential(*layers, nn.ReLU(), nn.Linear(256, num_classes))


@pytest.fixture(autouse=True)
def _models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(models.MODELS, "dropping", dropping)


def options(**changes: Any) -> TrainOptions:
    given = {"recipe": RECIPE.to_dict(), "model": "dropping", "epochs": 3, "batch_size": 500, "device": DEVICE}
    return TrainOptions(**(given | {"engine": "cudagraph", "precision": "fp32", "dense_timing_steps": 0} | changes))


class Looks(Display):
    """Looks at a run that is ready, and at the end of each of its epochs."""

    def __init__(self, ready: Callable[[Any], object], epoch: Callable[[Any], object] = lambda run: None) -> None:
        self._ready, self._epoch = ready, epoch

    def started(self, run: Any) -> None:
        self._ready(run)

    def epoch_done(self, run: Any, row: dict[str, Any]) -> None:
        self._epoch(run)


def left_by(folder: Path) -> tuple[Any, ...]:
    """Losses and accuracies of all epochs, and the checksums of what was saved at the end."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    names = ("train_loss", "train_accuracy", "test_loss", "test_accuracy", "density", "removed_samples")
    latest = folder / "checkpoints" / "latest"
    assert described(latest)
    weights = next(path for path in (latest / "model.safetensors", latest / "model.pt") if path.is_file())
    generators = torch.load(latest / "generators.pt", weights_only=True)
    on_device = generators["cuda"].tolist()
    return [[row[name] for name in names] for row in rows], weights.read_bytes(), on_device


def beside(jobs: list[Any]) -> list[Summary | Exception]:
    """Train them, and look whether stream, switches and generators are as they were."""

    def now() -> tuple[Any, ...]:
        generators = torch.get_rng_state().tolist(), torch.cuda.get_rng_state().tolist()
        return torch.cuda.current_device(), torch.cuda.current_stream(), switches(), generators

    before = now()
    found = train_side_by_side(jobs)
    assert now() == before
    return found


def summaries(found: list[Summary | Exception]) -> list[Summary]:
    for each in found:
        if isinstance(each, Exception):
            raise each
    return [each for each in found if isinstance(each, dict)]


@pytest.mark.parametrize("engine", ["masked", "cudagraph"])
def test_runs_that_draw_on_the_device_come_to_what_each_comes_to_alone(engine: str, tmp_path: Path) -> None:
    asked = [options(engine=engine, seed=1), options(engine=engine, seed=2, epochs=4, batch_size=400)]
    for number, each in enumerate(asked):
        train(each, tmp_path / f"alone-{number}")
    train(asked[0], tmp_path / "again")
    alone = [left_by(tmp_path / f"alone-{number}") for number in range(2)]
    assert left_by(tmp_path / "again") == alone[0], "this card and model compute the same each time"
    found = beside([(each, tmp_path / f"beside-{number}") for number, each in enumerate(asked)])
    assert [each["engine"] for each in summaries(found)] == [engine] * 2
    for number in range(2):
        assert left_by(tmp_path / f"beside-{number}") == alone[number], number
    assert alone[0][2] != alone[1][2], "each has a generator of its own"


def test_each_has_a_stream_and_they_read_the_same_images(tmp_path: Path) -> None:
    streams, images = set[int](), set[int]()

    def ready(run: Any) -> None:
        streams.add(torch.cuda.current_stream().cuda_stream)
        images.add(run.feed._train[0].data_ptr())

    def epoch(run: Any) -> None:
        streams.add(torch.cuda.current_stream().cuda_stream)

    asked = [options(seed=seed) for seed in range(4)]
    jobs = [Job(each, tmp_path / str(number), Looks(ready, epoch)) for number, each in enumerate(asked)]
    summaries(beside(jobs))
    assert len(streams) == 4
    assert torch.cuda.default_stream().cuda_stream not in streams
    assert len(images) == 1


def test_runs_in_fp32_and_in_bf16_keep_their_switches(tmp_path: Path) -> None:
    told: dict[str, set[Any]] = {"fp32": set(), "bf16": set()}

    def note(run: Any) -> None:
        told[run.machine.precision].add(switches())

    before = switches()
    jobs = [Job(options(precision=each), tmp_path / each, Looks(note, note)) for each in ("bf16", "fp32")]
    summaries(beside(jobs))
    assert told == {"fp32": {before}, "bf16": {(True, True)}}


def test_networks_with_frozen_blocks_learn_side_by_side(tmp_path: Path) -> None:
    recipe = presets.spfde.to_dict()
    asked = [
        options(model="resnet8", recipe=recipe, epochs=8, batch_size=100, seed=seed, precision="auto")
        for seed in range(3)
    ]
    found = summaries(beside([(each, tmp_path / str(number)) for number, each in enumerate(asked)]))
    print([(each["test_accuracy"], each["frozen_blocks"], each["seconds"]) for each in found])
    assert all(each["test_accuracy"] > 0.3 for each in found)


def test_one_that_runs_out_of_memory_ends_alone_and_can_be_resumed(tmp_path: Path) -> None:
    def takes_all(run: Any) -> None:
        torch.empty(1 << 46, dtype=torch.uint8, device="cuda")

    train(options(seed=1), tmp_path / "alone")
    jobs = [
        Job(options(seed=1), tmp_path / "greedy", Looks(lambda run: None, takes_all)),
        Job(options(seed=1), tmp_path / "good"),
    ]
    failed, good = beside(jobs)
    assert isinstance(failed, torch.OutOfMemoryError)
    assert isinstance(good, dict)
    assert left_by(tmp_path / "good") == left_by(tmp_path / "alone")
    train(options(seed=1), tmp_path / "greedy", resume=True)
    assert left_by(tmp_path / "greedy")[0] == left_by(tmp_path / "alone")[0]
