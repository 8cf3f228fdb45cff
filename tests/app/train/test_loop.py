"""The trainer's loop, its steps captured as graphs: on a backend without a GPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import spfde
from helpers.recording import Replays, on_cpu  # noqa: F401  # a fixture
from helpers.stopping import Stopping
from spfde import presets
from spfde.app.train.loop import train
from spfde.app.train.options import TrainOptions

BALANCED = spfde.DataSieving(removed_fraction=0.25, criterion="loss", balanced=True, rescale_loss=True)
RECIPES = {
    "spfde": presets.mest.replace(
        freezing=spfde.ProgressiveFreezing(flops_reduction=0.15), sieving=BALANCED, update_interval_epochs=1
    ),
    "topkast": presets.topkast,
}


def options(tiny: Path, recipe: spfde.Recipe, **changes: Any) -> TrainOptions:
    given = {
        "data": str(tiny),
        "model": "resnet8",
        "epochs": 6,
        "batch_size": 8,
        "device": "cpu",
        "dense_timing_steps": 0,
    }
    return TrainOptions(recipe=recipe.to_dict(), **(given | changes))


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("recipe", [pytest.param(n, marks=pytest.mark.long if n == "topkast" else ()) for n in RECIPES])
def test_captured_steps_train_as_pytorch_does(recipe: str, tiny: Path, tmp_path: Path) -> None:
    for engine in ("masked", "cudagraph"):
        train(options(tiny, RECIPES[recipe], engine=engine), tmp_path / engine)
    assert Replays.newest.replays > 0
    found, expected = rows(tmp_path / "cudagraph"), rows(tmp_path / "masked")
    for mine, other in zip(found, expected, strict=True):
        # The forms of an optimizer round differently, and only so far.
        assert mine["train_loss"] == pytest.approx(other["train_loss"], rel=1e-3)
        for name in ("training_flops", "samples", "frozen_blocks", "saved_tensor_bytes", "sieve_moved"):
            assert mine[name] == other[name], name


@pytest.mark.usefixtures("on_cpu")
def test_a_run_of_captured_steps_that_was_stopped_ends_like_one_that_never_stopped(tiny: Path, tmp_path: Path) -> None:
    given = options(tiny, RECIPES["spfde"], engine="cudagraph")
    whole = train(given, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(given, tmp_path / "stopped", Stopping(3))
    resumed = train(given, tmp_path / "stopped", resume=True)
    timed = {"seconds", "loader_wait_seconds", "peak_memory_bytes"}
    assert {k: v for k, v in resumed.items() if k not in timed} == {k: v for k, v in whole.items() if k not in timed}
    assert [row["train_loss"] for row in rows(tmp_path / "stopped")] == [
        r["train_loss"] for r in rows(tmp_path / "whole")
    ]
