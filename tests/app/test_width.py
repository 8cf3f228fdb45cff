"""``--width``: every command builds the model of the run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from helpers.commands import Spfde
from helpers.stopping import stopped_run
from spfde.app.cli import _new_folder
from spfde.app.data.datasets import load_data
from spfde.app.runs.kept_model import CheckpointedModel
from spfde.app.train.models import build_model
from spfde.app.train.options import TrainOptions

pytestmark = pytest.mark.cli


def test_a_run_of_another_width_is_planned_resumed_exported_and_analysed(tiny: Path, spfde: Spfde, here: Path) -> None:
    stopped_run(tiny, here / "run", after=2, epochs=4, width=0.25, keep_every=2)
    ended = spfde("train", "--resume", "run")
    assert ended.code == 0
    assert "resnet8, width 0.25" in " ".join(ended.out.split())
    summary = json.loads(Path("run/summary.json").read_text())
    words = ["--data", tiny, "--recipe", "mest", "--epochs", 4, "--batch-size", 32, "--width", 0.25]
    planned = json.loads(spfde("plan", "--json", *words).out)
    assert planned["training_flops"] == summary["training_flops"]
    assert spfde("export", "run", "--format", "dense", "--out", "weights.safetensors").code == 0
    model = build_model("resnet8", num_classes=3, in_channels=1, image_size=8, width=0.25)
    model.load_state_dict(load_file("weights.safetensors"))
    options = TrainOptions.from_config(json.loads(Path("run/config.json").read_text()), Path("config.json"))
    analysed = CheckpointedModel(options, load_data(tiny, root="unused"), native=False)
    analysed.load(Path("run/checkpoints/kept/epoch-0004"))
    assert sum(weight.numel() for weight in analysed.module.parameters()) == sum(w.numel() for w in model.parameters())


def test_a_new_folder_says_the_width() -> None:
    assert str(_new_folder(TrainOptions(data="tiny.npz", width=0.5))) == "runs/tiny-resnet8-width-0.5-spfde-seed0"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--width 0", "spfde: --width=0.0: input should be greater than 0"),
        ("--width 33", "spfde: --width=33.0: input should be less than or equal to 32"),
        ("--width 2 --model timm:resnet18", "spfde: --width=2.0: is for built-in models"),
    ],
)
def test_a_width_that_a_model_cannot_have_is_refused(words: str, told: str, spfde: Spfde, here: Path) -> None:
    ended = spfde("train", *words.split())
    assert (ended.code, ended.out, len(ended.err.splitlines())) == (2, "", 1)
    assert ended.err.startswith(told)
    assert list(here.iterdir()) == []
