"""``spfde export`` and ``spfde cite``: what they write and print for a run of the real command."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from helpers import commands
from helpers.commands import Spfde
from spfde.app.train.models import build_model
from spfde.cost import format_bytes
from spfde.export import load

pytestmark = pytest.mark.cli


@pytest.fixture(scope="module")
def trained(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    folder = tmp_path_factory.mktemp("exported")
    words = f"train --data {tiny} --epochs 4 --batch-size 16 --freeze 0.1 --engine masked --out run --quiet".split()
    ended = commands.start(words, log=folder / "log", cwd=folder).end()
    assert ended.code == 0, ended.err
    return folder / "run"


@pytest.fixture
def run(trained: Path, here: Path) -> Path:
    """A copy of the run, in the working folder."""
    shutil.copytree(trained, here / "run")
    return Path("run")


def assert_refused(ended: commands.Outcome, *told: str) -> None:
    assert (ended.code, ended.out) == (2, "")
    assert "Traceback" not in ended.err
    for words in told:
        assert words in ended.err


def outputs(state: dict[str, torch.Tensor]) -> torch.Tensor:
    model = build_model("resnet8", num_classes=3, in_channels=1, image_size=(8, 8)).eval()
    model.load_state_dict(state)
    with torch.no_grad():
        result: torch.Tensor = model(torch.linspace(-1, 1, 4 * 64).view(4, 1, 8, 8))
    return result


def test_both_kinds_of_weights_give_the_outputs_of_the_checkpoint(run: Path, spfde: Spfde) -> None:
    expected = load_file(run / "checkpoints" / "best" / "model.safetensors")
    dense = format_bytes(sum(tensor.nbytes for tensor in expected.values()))
    sizes = {}
    for kind, name in (("dense", "best.safetensors"), ("compressed", "best.compressed.safetensors")):
        ended = spfde("export", run, "--format", kind)
        assert (ended.code, ended.err) == (0, "")
        assert ended.out.startswith(f"run/{name}: ")
        assert f"% of the dense weights' {dense}, from run/checkpoints/best" in ended.out
        found = load(run / name)
        assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())
        assert torch.equal(outputs(found), outputs(expected))
        sizes[kind] = (run / name).stat().st_size
    summary = json.loads((run / "summary.json").read_text())
    assert summary["compressed_weight_bytes"] < 0.16 * summary["dense_weight_bytes"]
    # The best epoch may have been under the soft bound, and the header of a small file counts.
    assert sizes["compressed"] < 0.25 * sizes["dense"]


def test_the_onnx_graph_agrees_with_the_weights(run: Path, spfde: Spfde) -> None:
    runtime = pytest.importorskip("onnxruntime")
    ended = spfde("export", run, "--format", "onnx", "--last", "--out", "net.onnx")
    assert (ended.code, ended.err) == (0, "")
    assert ended.out.startswith("net.onnx: ")
    session = runtime.InferenceSession("net.onnx")
    x = np.linspace(-1, 1, 4 * 64, dtype=np.float32).reshape(4, 1, 8, 8)
    (found,) = session.run(None, {"input": x})
    expected = outputs(load_file(run / "checkpoints" / "latest" / "model.safetensors"))
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-5)


def test_the_last_checkpoint_is_chosen_by_name(run: Path, spfde: Spfde) -> None:
    for which in ("--best", "--last"):
        assert spfde("export", run, which).code == 0
    for which, checkpoint in (("best", "best"), ("last", "latest")):
        found = load(run / f"{which}.compressed.safetensors")
        expected = load_file(run / "checkpoints" / checkpoint / "model.safetensors")
        assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())


def test_mistakes_are_refused_and_nothing_is_written(run: Path, spfde: Spfde, here: Path) -> None:
    before = sorted(here.rglob("*"))
    assert_refused(spfde("export", run, "--format", "compresed"), "--format='compresed'", "Did you mean 'compressed'?")
    assert_refused(spfde("export", run, "--out", "run/config.json"), "--out='run/config.json': exists already")
    assert_refused(spfde("export", run, "--out", "nowhere/x"), "there is no folder nowhere")
    assert_refused(spfde("export", "nothing"), "nothing: is no run folder")
    assert_refused(spfde("export", here), "is no run folder")
    assert sorted(here.rglob("*")) == before


def _no_checkpoints(run: Path) -> None:
    shutil.rmtree(run / "checkpoints")


def _no_best(run: Path) -> None:
    shutil.rmtree(run / "checkpoints" / "best")


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _no_shape(run: Path) -> None:
    config = json.loads((run / "config.json").read_text())
    del config["data"]["image_size"]
    (run / "config.json").write_text(json.dumps(config))


def _other_model(run: Path) -> None:
    config = json.loads((run / "config.json").read_text())
    config["command"]["model"] = "resnet20"
    (run / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (_no_checkpoints, "has no checkpoint yet"),
        (_no_best, "Pass --last"),
        (lambda run: _flip(run / "checkpoints" / "best" / "model.safetensors"), "is damaged"),
        (lambda run: (run / "checkpoints" / "best" / "manifest.json").unlink(), "is damaged"),
        (lambda run: (run / "config.json").write_text("{"), "is damaged"),
        (_no_shape, "does not say the shape of the run's images"),
        (_other_model, "does not hold the weights of the run's model"),
    ],
    ids=["no checkpoints", "no best", "a flipped bit", "no manifest", "half a config", "no shape", "other model"],
)
def test_a_run_that_is_not_whole_is_refused(damage: Any, told: str, run: Path, spfde: Spfde, here: Path) -> None:
    damage(run)
    before = sorted(here.rglob("*"))
    assert_refused(spfde("export", run), told)
    assert sorted(here.rglob("*")) == before


class TestCite:
    def test_a_run_and_its_recipe_file_and_its_preset_are_cited_alike(self, run: Path, spfde: Spfde) -> None:
        printed = spfde("cite", run).out
        assert spfde("cite", run / "recipe.toml").out == printed
        assert spfde("cite", "spfde").out == printed
        for key in ("yuan2021mest", "yuan2022spfde", "toneva2019forgetting", "spfde"):
            assert printed.count(f"{{{key},\n") == 1

    def test_what_is_neither_a_run_nor_a_recipe_is_refused(self, spfde: Spfde, here: Path) -> None:
        assert_refused(spfde("cite", "riggl"), "riggl", "Did you mean 'rigl'?")
        assert_refused(spfde("cite", here), "is no run folder (it has no recipe.toml)")
        (here / "recipe.toml").write_text("[sparsity]\nsparsity = 2\n")
        assert_refused(spfde("cite", here), "recipe.toml: is damaged (sparsity=2")
