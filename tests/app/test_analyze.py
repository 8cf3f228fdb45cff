"""Kept checkpoints and ``spfde analyze``, through the real command."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file

from helpers import commands
from helpers.commands import Spfde
from spfde.app.data.datasets import load_data
from spfde.app.runs import kept_checkpoints
from spfde.app.runs.checkpoints import Checkpoints, described
from spfde.app.train.augment import normalise
from spfde.app.train.models import build_model

PLOTS = ("structural-similarity.png", "cka.png", "gradient-norm.png")


def arguments(data: Path, out: str, *more: str) -> list[str]:
    size = ["--epochs", "5", "--freeze", "0.1", "--batch-size", "16", "--keep-every", "2"]
    return ["train", "--data", str(data), *size, "--out", out, *more]


def read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text())
    return content


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("analyze")


@pytest.fixture(scope="module")
def kept_run(tiny: Path, place: Path) -> Path:
    """A finished run of five epochs, kept after the second, the fourth and the last."""
    ended = commands.start(arguments(tiny, "whole"), log=place / "whole", cwd=place).end()
    assert ended.code == 0, ended.err
    return place / "whole"


@pytest.fixture
def copied(kept_run: Path, here: Path) -> Path:
    """A copy of it, to be spoilt."""
    return Path(shutil.copytree(kept_run, here / "run"))


@pytest.mark.cli
class TestKeeping:
    def test_every_so_many_epochs_and_the_last_are_kept(self, kept_run: Path) -> None:
        folder = kept_run / "checkpoints" / "kept"
        assert sorted(path.name for path in folder.iterdir()) == ["epoch-0002", "epoch-0004", "epoch-0005"]
        files = {"manifest.json", "masks.safetensors", "model.safetensors"}
        assert {path.name for path in (folder / "epoch-0002").iterdir()} == files

    def test_the_last_one_is_the_final_model_with_its_masks(self, kept_run: Path) -> None:
        state, masks = kept_checkpoints.read(kept_run / "checkpoints" / "kept" / "epoch-0005")
        final = load_file(kept_run / "checkpoints" / "latest" / "model.safetensors")
        assert state.keys() == final.keys()
        assert all(np.array_equal(state[name].numpy(), final[name]) for name in final)
        assert masks
        for name, mask in masks.items():
            assert not state[name][~mask].any(), "outside its mask a weight is zero"
            assert 0.09 < mask.double().mean() < 0.11

    def test_a_run_that_was_killed_and_resumed_keeps_the_same(self, tiny: Path, place: Path, kept_run: Path) -> None:
        # The third save is that of the third epoch: one checkpoint is kept by then, two are to come.
        argv = arguments(tiny, "killed")
        running = commands.start(argv, log=place / "killed", cwd=place, wait_at="before a checkpoint")
        running.reach()
        running.kill(signal.SIGKILL)
        assert len(list((place / "killed" / "checkpoints" / "kept").iterdir())) == 1
        ended = commands.start(["train", "--resume", "killed"], log=place / "again", cwd=place).end()
        assert ended.code == 0, ended.err
        wanted = {
            path.relative_to(kept_run): path.read_bytes() for path in kept_run.glob("checkpoints/kept/*/*.safetensors")
        }
        assert len(wanted) == 6
        assert {name: (place / "killed" / name).read_bytes() for name in wanted} == wanted

    def test_without_the_option_nothing_is_kept_and_the_run_cannot_be_analysed(
        self, tiny: Path, spfde: Spfde, here: Path
    ) -> None:
        argv = ["--data", tiny, "--recipe", "dense", "--epochs", 1, "--out", "run", "--quiet"]
        assert spfde("train", *argv).code == 0
        assert not (here / "run" / "checkpoints" / "kept").exists()
        ended = spfde("analyze", "run")
        assert ended.code == 2
        assert ended.err.startswith(
            "spfde: run: has 0 kept checkpoints, and two are needed to compare. Train with `spfde"
        )

    def test_a_number_below_one_is_refused_by_its_name(self, tiny: Path, spfde: Spfde, here: Path) -> None:
        ended = spfde("train", "--data", tiny, "--keep-every", 0)
        assert ended.code == 2
        assert ended.err.startswith("spfde: --keep-every=0: ")
        assert not (here / "runs").exists()


@pytest.mark.cli
class TestAnalyze:
    @pytest.fixture(scope="class")
    def found(self, kept_run: Path, place: Path) -> dict[str, Any]:
        argv = ["analyze", "whole", "--batch-size", "20", "--gradient-samples", "50"]
        ended = commands.start(argv, log=place / "analyze", cwd=place).end()
        assert (ended.code, ended.err) == (0, "")
        assert ended.out.splitlines()[-4:] == [f"whole/analysis/{name}" for name in ("analysis.json", *PLOTS)]
        return read(kept_run / "analysis" / "analysis.json")

    def test_it_writes_one_json_and_the_plots_beside_it(self, found: dict[str, Any], kept_run: Path) -> None:
        assert {path.name for path in (kept_run / "analysis").iterdir()} == {"analysis.json", *PLOTS}
        for name in PLOTS:
            with Image.open(kept_run / "analysis" / name) as picture:
                assert picture.format == "PNG"
        assert found["epochs"] == [2, 4, 5]
        assert (found["reference_epoch"], found["run_epochs"], found["fraction"]) == (5, 5, 0.5)
        assert (found["samples"], found["batch_size"], found["gradient_samples"]) == (32, 16, 50)
        assert found["seconds"].keys() == {"cka", "structural_similarity", "gradient_norm"}

    def test_every_block_has_its_curves_and_the_last_checkpoint_is_like_itself(self, found: dict[str, Any]) -> None:
        blocks = {block["name"]: block for block in found["blocks"]}
        assert list(blocks) == ["layer1.0", "layer2.0", "layer3.0", "fc"]
        for block in blocks.values():
            assert len(block["cka"]) == 3
            assert block["cka"][-1] == pytest.approx(1.0)
            assert all(-1.0 <= value <= 1.0 for value in block["cka"])
            for layer in block["layers"]:
                norms, differences = layer["gradient_norm"], layer["gradient_norm_difference"]
                assert min(norms) > 0
                assert differences == [abs(norms[1] - norms[0]), abs(norms[2] - norms[1])]
        masked = [layer for block in blocks.values() for layer in block["layers"] if layer["structural_similarity"]]
        assert all(layer["structural_similarity"][-1] == 1.0 for layer in masked)
        assert blocks["fc"]["structural_similarity"] is None, "the head is dense"
        assert "conv1.weight" not in {layer["name"] for layer in masked}

    def test_structural_similarity_is_what_the_files_say(self, found: dict[str, Any], kept_run: Path) -> None:
        folder = kept_run / "checkpoints" / "kept"
        weights = load_file(folder / "epoch-0002" / "model.safetensors")
        _, final = kept_checkpoints.read(folder / "epoch-0005")
        counts = []
        block = next(block for block in found["blocks"] if block["name"] == "layer3.0")
        for layer in block["layers"]:
            flat, mask = weights[layer["name"]].ravel(), final[layer["name"]].numpy().ravel()
            nonzero = np.flatnonzero(flat)
            largest = nonzero[np.argsort(-np.abs(flat[nonzero]), kind="stable")][: int(len(nonzero) / 2 + 0.5)]
            counts.append((int(mask[largest].sum()), len(largest)))
            assert layer["structural_similarity"][0] == counts[-1][0] / counts[-1][1]
        common, chosen = (sum(column) for column in zip(*counts, strict=True))
        assert block["structural_similarity"][0] == common / chosen

    def test_cka_is_that_of_the_models_in_float64(self, tiny: Path, kept_run: Path, spfde: Spfde) -> None:
        assert spfde("analyze", kept_run, "--gradient-samples", 0, "--out", "found", "--quiet").out == ""
        found = read(Path("found/analysis.json"))
        data = load_data(tiny, root="data")
        x = normalise(data.test.images, data.mean, data.std).double()  # type: ignore[attr-defined]
        logits = []
        for epoch in (2, 5):
            model = build_model("resnet8", num_classes=3, in_channels=1, image_size=8)
            model.load_state_dict(kept_checkpoints.read(kept_run / "checkpoints" / "kept" / f"epoch-000{epoch}")[0])
            with torch.no_grad():
                logits.append(model.eval().double()(x))
        n, ones = len(x), torch.ones(len(x), dtype=torch.float64)

        def hsic(k: torch.Tensor, l: torch.Tensor) -> float:  # noqa: E741
            k, l = (m - m.diag().diag() for m in (k, l))  # noqa: E741
            shared = (ones @ k @ ones) * (ones @ l @ ones) / ((n - 1) * (n - 2)) - 2 / (n - 2) * (ones @ k @ l @ ones)
            return float((k @ l).trace() + shared)

        k, l = (out @ out.T for out in logits)  # noqa: E741
        expected = hsic(k, l) / (hsic(k, k) * hsic(l, l)) ** 0.5
        assert found["blocks"][-1]["name"] == "fc"
        assert found["blocks"][-1]["cka"][0] == pytest.approx(expected, abs=1e-5)
        assert found["blocks"][0]["layers"][0]["gradient_norm"] is None
        assert {path.name for path in Path("found").iterdir()} == {"analysis.json", *PLOTS[:2]}

    def test_both_engines_find_the_same(self, found: dict[str, Any], copied: Path, spfde: Spfde) -> None:
        config = read(copied / "config.json")
        (copied / "config.json").write_text(json.dumps(config | {"engine": "masked"}))
        assert spfde("analyze", copied, "--batch-size", 20, "--gradient-samples", 0).code == 0
        again = read(copied / "analysis" / "analysis.json")
        assert again["engine"] == "masked"
        for mine, theirs in zip(again["blocks"], found["blocks"], strict=True):
            assert mine["cka"] == pytest.approx(theirs["cka"], abs=1e-4)
            assert mine["structural_similarity"] == theirs["structural_similarity"]

    def test_a_dense_run_has_cka_and_no_structural_similarity(self, tiny: Path, spfde: Spfde, here: Path) -> None:
        argv = ["--data", tiny, "--recipe", "dense", "--epochs", 2, "--keep-every", 1, "--out", "run", "--quiet"]
        assert spfde("train", *argv).code == 0
        assert spfde("analyze", "run", "--gradient-samples", 0).code == 0
        assert {path.name for path in (here / "run" / "analysis").iterdir()} == {"analysis.json", "cka.png"}
        assert {block["structural_similarity"] for block in read(here / "run/analysis/analysis.json")["blocks"]} == {
            None
        }


@pytest.mark.cli
class TestMistakes:
    def refused(self, spfde: Spfde, *argv: object) -> str:
        ended = spfde("analyze", *argv)
        assert ended.code == 2
        return ended.err

    def test_a_folder_that_is_no_run(self, spfde: Spfde, here: Path) -> None:
        assert self.refused(spfde, here).startswith(f"spfde: {here}: is no run folder (it has no config.json)")

    def test_one_kept_checkpoint_is_too_few(self, spfde: Spfde, copied: Path) -> None:
        for epoch in (2, 4):
            shutil.rmtree(copied / "checkpoints" / "kept" / f"epoch-000{epoch}")
        assert "has 1 kept checkpoint, and two are needed" in self.refused(spfde, copied)

    def test_a_damaged_checkpoint(self, spfde: Spfde, copied: Path) -> None:
        (copied / "checkpoints" / "kept" / "epoch-0004" / "masks.safetensors").write_bytes(b"")
        assert "epoch-0004: is damaged (masks.safetensors has another checksum" in self.refused(spfde, copied)

    def test_a_checkpoint_of_another_run(self, spfde: Spfde, copied: Path) -> None:
        config = read(copied / "config.json")
        config["command"]["model"] = "resnet20"
        (copied / "config.json").write_text(json.dumps(config))
        said = self.refused(spfde, copied)
        assert "is of another run: there model is 'resnet8', and config.json says 'resnet20'" in said

    def test_weights_that_do_not_fit_the_model(self, spfde: Spfde, copied: Path) -> None:
        checkpoints = Checkpoints(copied / "checkpoints")
        other = build_model("resnet8", num_classes=7, in_channels=1, image_size=8)
        about = described(checkpoints.kept()[5])
        checkpoints.keep(lambda folder: kept_checkpoints.write(folder, other, {}), epoch=5, about=about)
        assert "epoch-0005: does not fit resnet8 (" in self.refused(spfde, copied)

    def test_other_data_of_the_same_shape(self, tiny: Path, spfde: Spfde, copied: Path) -> None:
        with np.load(tiny) as arrays:
            other = {name: 255 - array if name.startswith("x") else array for name, array in arrays.items()}
        np.savez(copied / "other.npz", **other)
        config = read(copied / "config.json")
        config["command"]["data"] = str(copied / "other.npz")
        (copied / "config.json").write_text(json.dumps(config))
        said = self.refused(spfde, copied)
        assert f"is not what the run in {copied} was trained on: mean is" in said

    @pytest.mark.parametrize(("option", "value"), [("--samples", 3), ("--batch-size", 2), ("--gradient-samples", -1)])
    def test_numbers_that_are_too_small(self, spfde: Spfde, kept_run: Path, option: str, value: int) -> None:
        assert self.refused(spfde, kept_run, option, value).startswith(f"spfde: {option}={value}: ")

    def test_a_place_that_cannot_be_written(self, spfde: Spfde, copied: Path, here: Path) -> None:
        (here / "taken").write_text("")
        said = self.refused(spfde, copied, "--out", "taken", "--gradient-samples", 0)
        assert said.startswith("spfde: taken: it cannot be written (File exists).")
