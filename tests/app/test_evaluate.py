"""``spfde evaluate``: what it says of a run's weights is what the run has said, and what one works out by hand."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from helpers.commands import Outcome, Spfde
from helpers.stopping import stopped_run
from spfde import presets
from spfde.app.data.datasets import load_data
from spfde.app.runs.best import best_epoch
from spfde.app.train.augment import normalise
from spfde.app.train.loop import train
from spfde.app.train.models import build_model
from spfde.app.train.options import TrainOptions, choose_recipe
from spfde.app.train.saving import load_weights

pytestmark = pytest.mark.cli
CLASSES = 7


def archive(path: Path, *, classes: int = CLASSES, side: int = 8, seed: int = 0) -> Path:
    """112 + 60 noisy images, told apart by a bright column; of the last class no test image."""
    random, arrays = np.random.default_rng(seed), {}
    for part, count in (("train", 112), ("test", 60)):
        labels = np.arange(count) % (classes if part == "train" else classes - 1)
        images = random.integers(0, 150, (count, side, side), dtype=np.uint8)
        for image, label in zip(images, labels, strict=True):
            image[:, label] += 100
        arrays |= {f"x_{part}": images, f"y_{part}": labels}
    np.savez(path, **arrays)
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return archive(tmp_path_factory.mktemp("seven") / "seven.npz")


def options(data: Path, **changes: Any) -> TrainOptions:
    recipe = choose_recipe("spfde", soft_bound=False).to_dict()
    given = {"recipe": recipe, "epochs": 6, "batch_size": 16, "lr": 0.05, "device": "cpu", "dense_timing_steps": 0}
    return TrainOptions(data=str(data), **(given | changes))


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run by the engine that is taken by itself, without a validation set."""
    folder = tmp_path_factory.mktemp("evaluated") / "run"
    train(options(data), folder)
    return folder


def said(ended: Outcome) -> dict[str, Any]:
    assert (ended.code, ended.err) == (0, "")
    found: dict[str, Any] = json.loads(ended.out)
    return found


def summary_of(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "summary.json").read_text())
    return found


def rows_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def logits_of(run: Path, checkpoint: str, data: Path) -> tuple[torch.Tensor, torch.Tensor]:
    whole = load_data(data, root="unused")
    model = build_model("resnet8", num_classes=CLASSES, in_channels=1, image_size=8).eval()
    load_weights(run / "checkpoints" / checkpoint, model)
    with torch.no_grad():
        return model(normalise(whole.test.images, whole.mean, whole.std)), whole.test.labels  # type: ignore[attr-defined]


def test_it_says_what_the_summary_says(trained: Path, spfde: Spfde) -> None:
    found, rows = said(spfde("evaluate", trained, "--json")), rows_of(trained)
    best = best_epoch(rows)
    assert best is not None
    assert found["last"]["top1"] == summary_of(trained)["test_accuracy"]
    assert found["best"]["top1"] == rows[best]["test_accuracy"]
    assert (found["last"]["epoch"], found["best"]["epoch"]) == (5, best)
    # The engine's kernels round differently.
    assert found["last"]["loss"] == pytest.approx(rows[-1]["test_loss"], rel=1e-5)
    assert found["best"]["loss"] == pytest.approx(rows[best]["test_loss"], rel=1e-5)
    assert (found["chosen_by"], found["is_own"], found["finished"], found["samples"]) == ("test", True, True, 60)
    assert (found["model"], found["width"], found["precision"], found["device"]) == ("resnet8", 1, "fp32", "cpu")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_of_a_validated_run_too_in_its_own_precision(precision: str, data: Path, spfde: Spfde, here: Path) -> None:
    changes = {"recipe": presets.dense.to_dict(), "engine": "masked", "precision": precision, "epochs": 3}
    train(options(data, validation_share=0.25, width=0.5, **changes), here / "run")
    found, summary = said(spfde("evaluate", "run", "--json")), summary_of(here / "run")
    assert found["precision"] == precision
    assert found["last"]["top1"] == summary["test_accuracy"]
    assert found["best"]["top1"] == summary["best_test_accuracy"]
    assert found["best"]["epoch"] == summary["best_epoch"]
    assert found["chosen_by"] == "validation"


def test_figures_are_those_that_one_works_out_by_hand(trained: Path, data: Path, spfde: Spfde) -> None:
    found = said(spfde("evaluate", trained, "--json", "--batch-size", 7))
    for which, checkpoint in (("last", "latest"), ("best", "best")):
        logits, labels = logits_of(trained, checkpoint, data)
        order = logits.argsort(1, descending=True)
        assert found[which]["top1"] == float((order[:, 0] == labels).double().mean())
        assert found[which]["top5"] == float((order[:, :5] == labels[:, None]).any(1).double().mean())
        loss = -logits.double().log_softmax(1)[torch.arange(60), labels].mean()
        assert found[which]["loss"] == pytest.approx(float(loss), rel=1e-6)
        for label, row in enumerate(found["classes"][:-1]):
            of_class = labels == label
            assert (row["name"], row["n"]) == (str(label), 10)
            assert row[which] == float((order[of_class, 0] == label).double().mean())
    assert found["classes"][-1] == {"name": "6", "n": 0, "last": None, "best": None}


def test_people_get_a_table_in_eighty_columns(trained: Path, spfde: Spfde, here: Path) -> None:
    shutil.copytree(trained, here / "run")
    ended = spfde("evaluate", "run")
    lines = ended.out.splitlines()
    assert max(map(len, lines[1:])) <= 80
    assert lines[0].startswith("run: 60 test images of ")
    assert "The best weights were chosen by test accuracy, which flatters them." in lines
    assert [line.split()[0] for line in lines if line.startswith(("last", "best"))] == ["last", "best"]
    assert lines[-1].split() == ["6", "0", "–", "–"]


def test_with_five_classes_or_fewer_it_says_that_there_is_no_top_5(tiny: Path, spfde: Spfde, here: Path) -> None:
    """A run that is not finished, too, which has no best checkpoint any more."""
    stopped_run(tiny, here / "run", after=1, epochs=3)
    assert said(spfde("evaluate", "run", "--json"))["last"]["top5"] is None
    shutil.rmtree(here / "run" / "checkpoints" / "best")
    lines = spfde("evaluate", "run").out.splitlines()
    assert lines[0].startswith("run, which is not finished: 32 test images of ")
    assert "There is no top-5: the data have 3 classes." in lines
    assert "best    there is no best checkpoint" in lines
    assert said(spfde("evaluate", "run", "--json"))["best"] is None


def test_other_data_are_normalised_as_the_run_s_own(trained: Path, spfde: Spfde, here: Path) -> None:
    other = archive(here / "other.npz", seed=1)
    whole, own = load_data(other, root="unused"), json.loads((trained / "config.json").read_text())["data"]
    found = said(spfde("evaluate", trained, "--data", "other.npz", "--json"))
    model = build_model("resnet8", num_classes=CLASSES, in_channels=1, image_size=8).eval()
    load_weights(trained / "checkpoints" / "latest", model)
    x = normalise(whole.test.images, torch.tensor(own["mean"]), torch.tensor(own["std"]))  # type: ignore[attr-defined]
    with torch.no_grad():
        hits = model(x).argmax(1) == whole.test.labels  # type: ignore[attr-defined]
    assert found["last"]["top1"] == float(hits.double().mean())
    assert (found["data"], found["is_own"]) == ("other.npz", False)
    assert "flatters" not in spfde("evaluate", trained, "--data", "other.npz").out
    archive(here / "large.npz", side=16)
    assert spfde("evaluate", trained, "--data", "large.npz", "--image-size", 8).code == 0


def folder_of_images(root: Path, *names: str) -> Path:
    for part, label in ((part, label) for part in ("train", "test") for label in names):
        (root / part / label).mkdir(parents=True)
        Image.new("RGB", (8, 8), (40 * names.index(label), 9, 9)).save(root / part / label / "1.png")
    return root


def test_classes_are_named_where_the_data_name_them_and_others_are_refused(spfde: Spfde, here: Path) -> None:
    folder_of_images(here / "own", "cat", "dog")
    given = {"recipe": presets.dense.to_dict(), "batch_size": 1, "epochs": 1, "engine": "masked"}
    train(options(here / "own", **given), here / "run")
    assert [row["name"] for row in said(spfde("evaluate", "run", "--json"))["classes"]] == ["cat", "dog"]
    assert spfde("evaluate", "run", "--data", folder_of_images(here / "like", "cat", "dog")).code == 0
    folder_of_images(here / "unlike", "bird", "dog")
    ended = spfde("evaluate", "run", "--data", "unlike")
    assert (ended.code, ended.out) == (2, "")
    assert "spfde: --data='unlike': has class 'bird' where the run's data have 'cat'" in ended.err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--data large.npz", "--data='large.npz': has images of 1 x 16 x 16 (channels, height, width), and the run's"),
        ("--data nine.npz --image-size 8", "--data='nine.npz': has 9 classes, and the run's data 7"),
        ("--data gone.npz", "--data='gone.npz': does not exist"),
        ("--image-size 9", "--image-size=9: the run's own data have their size"),
        ("--batch-size 0", "--batch-size=0: "),
        ("--device cudaa", "--device='cudaa': is no device"),
    ],
)
def test_what_does_not_fit_is_refused(words: str, told: str, trained: Path, spfde: Spfde, here: Path) -> None:
    archive(here / "large.npz", side=16)
    archive(here / "nine.npz", classes=9, side=9)
    ended = spfde("evaluate", trained, *words.split())
    assert (ended.code, ended.out, len(ended.err.splitlines())) == (2, "", 1)
    assert told in ended.err


def test_a_run_without_a_checkpoint_or_with_other_data_or_files_is_refused(
    trained: Path, spfde: Spfde, here: Path
) -> None:
    shutil.copytree(trained, here / "run")
    config = json.loads(Path("run/config.json").read_text())
    for name, value, told in (
        ("mean", None, "does not say what the run's images were normalised by"),
        ("mean", [0.9], "is not what the run in run was trained on: mean is"),
        ("num_classes", "many", "does not say the shape of the run's images"),
    ):
        Path("run/config.json").write_text(json.dumps(config | {"data": config["data"] | {name: value}}))
        ended = spfde("evaluate", "run")
        assert (ended.code, ended.out) == (2, "")
        assert told in ended.err
    Path("run/config.json").write_text(json.dumps(config))
    shutil.rmtree("run/checkpoints")
    ended = spfde("evaluate", "run")
    assert (ended.code, ended.out) == (2, "")
    assert ended.err.startswith("spfde: run: has no checkpoint yet. Wait for its first epoch, or go on with")
    assert "is no run folder" in spfde("evaluate", "nothing").err
