"""``spfde predict``: its lines are what the run's weights give for images that were brought in as its own were."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from helpers.commands import Outcome, Spfde
from helpers.native import NATIVE
from spfde import presets
from spfde.app.data.datasets import load_data
from spfde.app.predict import _grey
from spfde.app.train.augment import normalise
from spfde.app.train.loop import train
from spfde.app.train.models import build_model
from spfde.app.train.options import TrainOptions
from spfde.app.train.saving import load_weights

pytestmark = pytest.mark.cli
N = 70


@pytest.fixture(scope="module")
def data(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny set with more test images."""
    arrays = dict(np.load(tiny))
    x, y = (np.concatenate([arrays[f"{name}_test"]] * 3)[:N] for name in ("x", "y"))
    path = tmp_path_factory.mktemp("predicted") / "set.npz"
    np.savez(path, **(arrays | {"x_test": x, "y_test": y}))
    return path


@pytest.fixture(scope="module")
def trained(data: Path) -> Path:
    """A sparse run."""
    options: Any = {"recipe": presets.static.to_dict(), "epochs": 4, "batch_size": 16, "lr": 0.1, "engine": "masked"}
    train(TrainOptions(data=str(data), device="cpu", dense_timing_steps=0, **options), data.parent / "run")
    return data.parent / "run"


@pytest.fixture(scope="module")
def shares(trained: Path, data: Path) -> torch.Tensor:
    """Probabilities of the test images by the last weights, computed here."""
    whole = load_data(data, root="unused")
    model = build_model("resnet8", num_classes=3, in_channels=1, image_size=8).eval()
    load_weights(trained / "checkpoints" / "latest", model)
    with torch.no_grad():
        found: torch.Tensor = model(normalise(whole.test.images, whole.mean, whole.std)).softmax(1)  # type: ignore[attr-defined]
    return found


@pytest.fixture
def files(data: Path, here: Path) -> Path:
    """The test images as files, in two folders; in the order of their names."""
    folder = here / "images"
    for number, image in enumerate(np.load(data)["x_test"][:6]):
        path = folder / ("a/b" if number < 3 else "c") / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    return Path("images")


def rows_of(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(text.splitlines()))


def said(ended: Outcome) -> list[dict[str, str]]:
    assert (ended.code, ended.err) == (0, "")
    return rows_of(ended.out)


def refused(ended: Outcome, *told: str) -> None:
    assert (ended.code, ended.out) == (2, "")
    for words in told:
        assert words in ended.err


def probabilities(rows: list[dict[str, str]], column: str = "probability") -> torch.Tensor:
    return torch.tensor([float(row[column]) for row in rows])


def test_grey_is_pillow_s() -> None:
    random = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    random[0, 0] = (255, 0, 0)
    found = _grey(torch.from_numpy(random).permute(2, 0, 1))
    assert int(found[0, 0, 0]) == 76  # 0.299 * 255
    assert np.array_equal(found[0].numpy(), np.asarray(Image.fromarray(random).convert("L")))


@pytest.mark.parametrize("engine", ["masked", NATIVE, "auto"])
def test_the_images_of_an_archive_get_the_class_and_probability_that_the_weights_give(
    engine: str, trained: Path, data: Path, shares: torch.Tensor, spfde: Spfde
) -> None:
    rows = said(spfde("predict", trained, data, "--last", "--engine", engine, "--batch-size", 32, "--top", 2))
    assert [row["index"] for row in rows] == [str(number) for number in range(N)]
    best = shares.topk(2)
    for place, suffix in enumerate(("", "_2")):
        torch.testing.assert_close(
            probabilities(rows, f"probability{suffix}"), best.values[:, place], rtol=0, atol=2e-6
        )
    assert [int(row["label"]) for row in rows] == shares.argmax(1).tolist()


def test_files_get_what_the_archive_gets_in_the_order_of_their_names(
    trained: Path, files: Path, shares: torch.Tensor, spfde: Spfde
) -> None:
    rows = said(spfde("predict", trained, files, "--last", "--batch-size", 4))
    assert [row["file"] for row in rows] == [f"images/{'a/b' if n < 3 else 'c'}/{n}.png" for n in range(6)]
    torch.testing.assert_close(probabilities(rows), shares[:6].amax(1), rtol=0, atol=2e-6)
    (one,) = said(spfde("predict", trained, files / "c" / "4.png", "--last"))
    assert one == rows[4]


def test_images_of_another_size_are_scaled_and_cut_at_their_centre(trained: Path, spfde: Spfde, here: Path) -> None:
    wide = np.full((24, 40), 255, np.uint8)
    wide[:, 4:36] = 100  # the square at the centre, 8 … 32, and what scaling reads beside it
    Image.fromarray(wide).save("wide.png")
    np.savez("wide.npz", images=wide[None])
    np.savez("grey.npz", x=np.full((1, 8, 8), 100, np.uint8))
    found = [said(spfde("predict", trained, name, "--last"))[0] for name in ("wide.png", "wide.npz", "grey.npz")]
    assert len({(row["label"], row["probability"]) for row in found}) == 1


def test_what_cannot_be_read_is_named_and_the_others_get_their_lines(trained: Path, files: Path, spfde: Spfde) -> None:
    (files / "a" / "broken.png").write_text("no image")
    (files / "c" / "gone.png").symlink_to("nowhere")
    ended = spfde("predict", trained, files, "--last", "--batch-size", 2)
    assert ended.code == 2
    assert len(rows_of(ended.out)) == 6
    assert "images/a/broken.png" in ended.err
    assert "images/c/gone.png: is no plain file" in ended.err
    assert "2 of 8 images could not be read" in ended.err


def test_a_file_of_lines_is_written_whole_and_none_is_replaced(
    trained: Path, files: Path, spfde: Spfde, here: Path
) -> None:
    ended = spfde("predict", trained, files, "--out", "labels.csv")
    assert (ended.code, ended.err) == (0, "")
    assert ended.out.startswith("labels.csv: 6 images, resnet8, best weights (epoch ")
    assert ended.out.endswith("), masked engine, fp32 on cpu\n")  # too few for the kernels
    assert rows_of((here / "labels.csv").read_text()) == said(spfde("predict", trained, files))
    refused(spfde("predict", trained, files, "--out", "labels.csv"), "--out='labels.csv': exists already")
    refused(spfde("predict", trained, files, "--out", "nowhere/x"), "there is no folder nowhere")


def test_classes_have_the_names_that_the_run_noted(trained: Path, files: Path, spfde: Spfde, here: Path) -> None:
    shutil.copytree(trained, here / "run")
    config = json.loads((here / "run" / "config.json").read_text())
    assert config["data"]["class_names"] is None
    numbers = [row["label"] for row in said(spfde("predict", "run", files))]
    config["data"]["class_names"] = ["left", "middle", "right, or so"]
    (here / "run" / "config.json").write_text(json.dumps(config))
    names = [row["label"] for row in said(spfde("predict", "run", files))]
    assert names == [config["data"]["class_names"][int(number)] for number in numbers]
    config["data"]["class_names"] = ["left"]
    (here / "run" / "config.json").write_text(json.dumps(config))
    refused(spfde("predict", "run", files), "does not name the run's 3 classes")


def test_mistakes_are_refused_before_anything_is_written(trained: Path, files: Path, spfde: Spfde, here: Path) -> None:
    (here / "empty").mkdir()
    np.savez("coloured.npz", x=np.zeros((2, 8, 8, 3), np.uint8))
    np.savez("labels.npz", y=np.zeros(2))
    np.savez("bright.npz", x=np.full((2, 8, 8), 255.0, np.float32))
    (here / "broken.png").write_bytes(b"no image")
    refused(spfde("predict", "nothing", files), "nothing: is no run folder")
    refused(spfde("predict", trained, "nothing"), "IMAGES='nothing': does not exist")
    refused(spfde("predict", trained, "empty"), "IMAGES='empty': holds no image")
    refused(spfde("predict", trained, "coloured.npz"), "has images of 3 channels, and the run's have 1")
    refused(spfde("predict", trained, "labels.npz"), "has no x_test, x or images (it has y)")
    refused(spfde("predict", trained, "bright.npz"), "has numbers up to 255", "divide by 255")
    refused(spfde("predict", trained, "broken.png", "--out", "found.csv"), "none of the images can be read")
    assert not (here / "found.csv").exists()
    refused(spfde("predict", trained, files, "--top", 4), "--top=4: is more than the run's 3 classes")
    refused(spfde("predict", trained, files, "--engine", "nativ"), "--engine='nativ'", "'masked' or 'native'")


@pytest.mark.long
def test_a_pipe_that_is_closed_ends_it_quietly(trained: Path, data: Path) -> None:
    command = [sys.executable, "-m", "spfde", "predict", str(trained), str(data), "--batch-size", "1"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "index,label,probability\n"
    process.stdout.close()
    assert process.stderr is not None
    assert process.stderr.read() == ""
    assert process.wait() != 0
