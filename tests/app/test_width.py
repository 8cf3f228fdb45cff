"""``--width``: every command builds the model of the run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from helpers.commands import Spfde
from helpers.stopping import stopped_run
from spfde.app.train.models import build_model

pytestmark = pytest.mark.cli


def test_a_run_of_another_width_is_planned_resumed_exported_and_analysed(tiny: Path, spfde: Spfde, here: Path) -> None:
    stopped_run(tiny, here / "run", after=2, epochs=4, width=0.25, keep_every=2)
    assert spfde("train", "--resume", "run", "--quiet").code == 0
    summary = json.loads(Path("run/summary.json").read_text())
    words = ["--data", tiny, "--recipe", "mest", "--epochs", 4, "--batch-size", 32, "--width", 0.25]
    planned = json.loads(spfde("plan", "--json", *words).out)
    assert planned["training_flops"] == summary["training_flops"]
    assert spfde("export", "run", "--format", "dense", "--out", "weights.safetensors").code == 0
    model = build_model("resnet8", num_classes=3, in_channels=1, image_size=8, width=0.25)
    model.load_state_dict(load_file("weights.safetensors"))
    analysed = spfde("analyze", "run", "--quiet", "--samples", 8, "--gradient-samples", 0)
    assert (analysed.code, analysed.err) == (0, "")
    assert spfde("report", "run").code == 0
    assert "resnet8, width 0.25" in Path("report.html").read_text()


def test_a_new_folder_says_the_width(tiny: Path, spfde: Spfde) -> None:
    ended = spfde("train", "--data", tiny, "--recipe", "dense", "--epochs", 1, "--width", 0.5)
    assert "run folder: runs/tiny-resnet8-width-0.5-dense-seed0" in ended.out
    assert "resnet8, width 0.5" in " ".join(ended.out.split())


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
