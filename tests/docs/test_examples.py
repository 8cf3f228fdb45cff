"""The examples run as a reader would run them: in a process of their own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import ROOT

EXAMPLES = ROOT / "examples"

# Small settings, and what the output has to show.
CASES = {
    "in_accelerate.py": (["--samples", "200", "--epochs", "8"], ["epoch 7: 160 samples", "Cost of 8 epochs"]),
    "in_lightning.py": (["--samples", "200", "--epochs", "8"], ["density 0.20", "Cost of 8 epochs"]),
    "in_timm.py": (["--samples", "200", "--epochs", "8"], ["2 blocks frozen", "Cost of 8 epochs"]),
    "in_transformers.py": (["--samples", "200", "--epochs", "8"], ["density 0.20", "Cost of 8 epochs"]),
    "own_criterion.py": ([], ["300 samples in use", "made in Python: loss 0.", "read from TOML: loss 0."]),
    "own_loop.py": (["--samples", "200", "--epochs", "6"], ["stopped after epoch 2", "epoch 5:", "Cost of 6 epochs"]),
    "per_sample_loss.py": (["--samples", "200", "--epochs", "8"], ["150 samples in use", "Cost of 8 epochs"]),
    "segmentation.py": (["--samples", "60", "--epochs", "8"], ["down1, down2, bottom, up2, up1", "Cost of 8 epochs"]),
    "text_transformer.py": (["--samples", "100", "--epochs", "8"], ["encoder.layers.3", "Cost of 8 epochs"]),
    "vision_models.py": (
        ["--model", "mobilenetv3", "--samples", "100", "--epochs", "12"],
        ["blocks: blocks.0.0", "Cost of 12 epochs"],
    ),
    "plan_only.py": (["--model", "resnet8", "--epochs", "20"], ["MEST, 20 % + 20 %", "the most possible is"]),
}


def test_every_example_has_a_case() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(CASES)


LONG = (
    "in_lightning.py",
    "in_transformers.py",
    "vision_models.py",
    "segmentation.py",
    "text_transformer.py",
    "in_timm.py",
    "own_criterion.py",
    "per_sample_loss.py",
    "plan_only.py",
)


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.long if n in LONG else ()) for n in CASES])
def test_the_example_runs_and_leaves_nothing_behind(name: str, tmp_path: Path) -> None:
    arguments, expected = CASES[name]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "always::UserWarning"}
    command = [sys.executable, str(EXAMPLES / name), *arguments]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, encoding="utf-8", check=False
    )
    assert done.returncode == 0, done.stderr
    told = [line for line in done.stderr.splitlines() if re.search(r"\b(examples|spfde)\b.*Warning: ", line)]
    assert not told
    for text in expected:
        assert text in done.stdout
    assert not list(tmp_path.iterdir())
