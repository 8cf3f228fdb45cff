"""ImageNet by its name: priced without its images, trained on where they lie."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from helpers.commands import Spfde
from spfde.app.data.datasets import DATASETS, describe_data, load_data
from spfde.core.errors import DataError

# Evci et al. (2020), table 2, and Kusupati et al. (2020): 8.2e9 FLOPs for an image, three times that to train on it.
DENSE_FLOPS = 3 * 8.2e9 * 1.28e6 * 100


def folders_in(root: Path) -> Path:
    """Two images of each of two classes in each part."""
    for part in ("train", "val"):
        for label in ("n01", "n02"):
            (root / part / label).mkdir(parents=True)
            for number in range(2):
                Image.new("RGB", (8, 8), (number, 0, 0)).save(root / part / label / f"{number}.JPEG")
    return root


@pytest.fixture
def small_imagenet(monkeypatch: pytest.MonkeyPatch) -> None:
    """The set has two classes, four images to train on and four to test on, of 16 pixels."""
    named = DATASETS["imagenet"]
    spec = replace(named.spec, num_classes=2, train_samples=4, test_samples=4, image_size=(16, 16))
    monkeypatch.setitem(DATASETS, "imagenet", replace(named, spec=spec))


def test_imagenet_is_read_from_train_and_val_below_the_root(small_imagenet: None, tmp_path: Path) -> None:
    (folders_in(tmp_path) / "test").mkdir()  # where the images without labels lie
    data = load_data("imagenet", root=tmp_path)
    assert data.spec == describe_data("imagenet")
    assert not data.in_memory
    assert [round(value, 3) for value in data.mean.tolist()] == [0.485, 0.456, 0.406]
    assert data.train[0][0].shape == (3, 16, 16)
    assert load_data("imagenet", root=tmp_path, image_size=320).train[0][0].shape == (3, 320, 320)


def test_an_imagenet_that_is_not_whole_is_refused_with_what_is_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"which is no folder.*--data-root DIR"):
        load_data("imagenet", root=tmp_path / "none")
    with pytest.raises(DataError, match=r"needs a train folder and a val folder in "):
        load_data("imagenet", root=tmp_path)
    folders_in(tmp_path)
    with pytest.raises(DataError) as caught:
        load_data("imagenet", root=tmp_path)
    assert "has 2 classes, 4 images in train and 4 in val" in str(caught.value)
    assert "not 1,000 classes, 1,281,167 images in train and 50,000 in val" in str(caught.value)
    assert f"--data {tmp_path}" in str(caught.value)


def test_a_plan_prices_a_resnet50_as_the_literature_does(spfde: Spfde) -> None:
    pytest.importorskip("timm")
    argv = ["plan", "--data", "imagenet", "--model", "timm:resnet50", "--epochs", 100, "--sparsity", 0.9, "--json"]
    bill = json.loads(spfde(*argv).out)
    assert bill["dense_training_flops"] == pytest.approx(DENSE_FLOPS, rel=0.02)
    assert bill["training_flops"] < 0.2 * bill["dense_training_flops"]


def test_training_on_imagenet_without_its_images_ends_in_one_line(spfde: Spfde, here: Path) -> None:
    ended = spfde("train", "--data", "imagenet", "--data-root", "nowhere", "--recipe", "dense")
    assert ended.code == 2
    assert ended.err.startswith(f"spfde: --data='imagenet': is looked for in {here / 'nowhere'}, which is no folder")
    assert not (here / "runs").exists()


def test_a_run_on_imagenet_trains_and_is_evaluated_where_its_images_lie(
    small_imagenet: None, spfde: Spfde, here: Path, tmp_path: Path
) -> None:
    folders_in(here / "images")
    argv = ["--data", "imagenet", "--data-root", "images", "--recipe", "dense", "--batch-size", 2, "--workers", 0]
    ended = spfde("train", *argv, "--epochs", 2, "--out", tmp_path / "run", "--quiet")
    assert ended.code == 0, ended.err
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["command"]["data_root"] == str(here / "images")
    assert (config["data"]["name"], config["data"]["image_size"]) == ("imagenet", [16, 16])
    evaluated = spfde("evaluate", tmp_path / "run", "--json")
    assert evaluated.code == 0, evaluated.err
