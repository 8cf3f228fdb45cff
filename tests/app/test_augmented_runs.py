"""Random resized crops, RandAugment, mixup, CutMix and --crop-share by the command line."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from helpers.commands import Spfde, start_together
from helpers.stopping import stopped_run
from spfde.app.data.datasets import load_data
from spfde.app.evaluate import EvaluateOptions, evaluate_run
from spfde.app.train.loop import train
from spfde.app.train.options import TrainOptions

ALL = ["--augment", "random-resized-crop", "--randaugment", "9", "--mixup", "0.2", "--cutmix", "1"]
ASKED: dict[str, Any] = {"augment": "random-resized-crop", "randaugment": 9, "mixup": 0.2, "cutmix": 1.0}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 + 8 images of 20 x 14 pixels in two classes."""
    root, random = tmp_path_factory.mktemp("data") / "photos", np.random.default_rng(0)
    for (part, count), label in itertools.product((("train", 12), ("test", 4)), ("cat", "dog")):
        folder = root / part / label
        folder.mkdir(parents=True)
        for number in range(count):
            pixels = random.integers(0, 120 if label == "cat" else 250, (14, 20, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{number}.png")
    return root


def argv(data: Path, out: str, *more: object) -> list[object]:
    short = ["--recipe", "mest", "--epochs", 3, "--batch-size", 8, "--width", 0.5, "--engine", "masked", "--quiet"]
    return ["train", "--data", data, "--out", out, *short, *more]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / "latest" / "model.safetensors")


def equal(one: Path, other: Path) -> bool:
    mine, theirs = weights(one), weights(other)
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_a_run_is_the_same_with_any_workers_and_when_it_is_resumed(photos: Path, spfde: Spfde, here: Path) -> None:
    """Validated, so that the files that are trained on are a part of the set's."""
    asked = ["--image-size", 12, "--validation-share", 0.2, *ALL]
    for out, workers in (("one", 0), ("two", 2)):
        ended = spfde(*argv(photos, out, "--workers", workers, *asked))
        assert ended.code == 0, ended.err
    assert equal(here / "one", here / "two")
    options = {"recipe": json.loads((here / "one" / "config.json").read_text())["command"]["recipe"]}
    options |= {"epochs": 3, "batch_size": 8, "width": 0.5, "image_size": 12, "validation_share": 0.2, **ASKED}
    stopped_run(photos, here / "stopped", after=2, workers=2, recipe_name="mest", **options)
    assert spfde("train", "--resume", "stopped", "--workers", 0, "--quiet").code == 0
    assert equal(here / "one", here / "stopped")
    command = json.loads((here / "one" / "config.json").read_text())["command"]
    assert {name: command[name] for name in ASKED} == ASKED
    assert command["crop_share"] == 1.0


@pytest.mark.parametrize("asked", [ALL[:2], ALL[2:4], ALL[4:6], ALL[6:]], ids=lambda asked: asked[0])
def test_each_changes_what_is_trained_and_the_device_makes_no_difference(
    asked: Sequence[str], tiny: Path, spfde: Spfde, here: Path
) -> None:
    plain = ["--augment", "none", "--epochs", 1]
    assert spfde(*argv(tiny, "plain", *plain)).code == 0
    ended = spfde(*argv(tiny, "augmented", *plain, "--workers", 0, *asked))
    assert ended.code == 0, ended.err
    assert not equal(here / "plain", here / "augmented")
    if asked[0] != "--randaugment":
        ended = spfde(*argv(tiny, "on-device", *plain, *asked, "--data-on", "device"))
        assert ended.code == 0, ended.err
        assert equal(here / "augmented", here / "on-device")


@pytest.mark.parametrize("criterion", ["forgetting", "loss", "el2n"])
def test_mixed_images_are_sieved_by_every_criterion(criterion: str, tiny: Path, spfde: Spfde, here: Path) -> None:
    sieving = ["--recipe", "dense", "--sieve", 0.3, "--sieve-criterion", criterion, "--interval", 2, "--epochs", 5]
    ended = spfde(*argv(tiny, "run", *sieving, "--mixup", 0.4, "--cutmix", 1, "--batch-size", 16))
    assert ended.code == 0, ended.err
    rows = [json.loads(line) for line in (here / "run" / "metrics.jsonl").read_text().splitlines()]
    assert sum(row["sieve_moved"] for row in rows) > 0
    assert all(0 <= row["train_accuracy"] <= 1 for row in rows)


@pytest.mark.long
def test_two_processes_train_a_run_that_can_be_resumed(photos: Path, here: Path) -> None:
    words = [str(word) for word in argv(photos, "run", "--image-size", 12, *ALL, "--workers", 1)]
    ended = [each.end() for each in start_together(words, log=here / "whole", cwd=here)]
    assert [each.code for each in ended] == [0, 0], ended
    words[words.index("run")] = "stopped"
    commands = start_together(words, log=here / "log", cwd=here, wait_at={0: "before a checkpoint"})
    commands[0].reach()
    for each in commands:
        each.kill(9)
    resumed = start_together(["train", "--resume", "stopped", "--workers", "0"], log=here / "again", cwd=here)
    ended = [each.end() for each in resumed]
    assert [each.code for each in ended] == [0, 0], ended
    assert equal(here / "run", here / "stopped")


# --- how much a cut at the centre leaves out -------------------------------------------------------------------------


def test_a_cut_at_the_centre_leaves_out_what_the_share_says(tmp_path: Path) -> None:
    """Rings of 40 pixels: with a share of 0.8 the outermost four of each side are not seen."""
    pixels = np.zeros((40, 60, 3), np.uint8)
    pixels[4:36, 14:46] = 200
    for part, label in itertools.product(("train", "val"), ("one", "two")):
        (tmp_path / part / label).mkdir(parents=True)
        Image.fromarray(pixels).save(tmp_path / part / label / "a.png")
    cut = load_data(tmp_path, root="nowhere", image_size=16, crop_share=0.8).test[0][0]
    whole = load_data(tmp_path, root="nowhere", image_size=16).test[0][0]
    assert int(cut[:, 1:-1, 1:-1].min()) == 200
    assert int(whole[0, 0].max()) < 100
    assert int(whole[0, 8, 8]) == 200


def test_images_in_memory_are_cut_by_the_share_at_their_own_size(tmp_path: Path) -> None:
    images = np.zeros((4, 16, 16), np.uint8)
    images[:, 4:12, 4:12] = 200
    labels = np.arange(4) % 2
    np.savez(tmp_path / "a.npz", x_train=images, y_train=labels, x_test=images, y_test=labels)
    data = load_data(tmp_path / "a.npz", root="nowhere", crop_share=0.5)
    assert data.spec.image_size == (16, 16)
    assert int(data.test[0][0][0, 1:-1, 1:-1].min()) > 150


def test_a_run_is_evaluated_as_it_was_trained(photos: Path, here: Path) -> None:
    given = {"image_size": 8, "crop_share": 0.6, "epochs": 1, "batch_size": 8, "width": 0.5, "dense_timing_steps": 0}
    summary = train(TrainOptions(data=str(photos), engine="masked", device="cpu", **given), here / "run")
    evaluated = evaluate_run(here / "run", EvaluateOptions(device="cpu"))
    assert evaluated.last.top1 == summary["test_accuracy"]
    same = evaluate_run(here / "run", EvaluateOptions(device="cpu", data=str(photos), image_size=8))
    assert same.last == evaluated.last


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        (["--augment", "random-resized"], "augment='random-resized': "),
        (["--randaugment", 31], "randaugment=31: "),
        (["--randaugment-ops", 3], "--randaugment-ops=3: is of no use without RandAugment. Give --randaugment too"),
        (["--mixup", -1], "mixup=-1.0: "),
        (["--cutmix", 101], "cutmix=101.0: "),
        (["--crop-share", 0.2], "--crop-share=0.2: "),
        (["--mixup", 0.2, "--batch-size", 1], "mixup=0.2: has nothing to mix an image with in batches of 1"),
        (["--cutmix", 1, "--recipe", "spfde", "--cache-variants", 2], "cutmix=1.0: makes other images of each batch"),
        (
            ["--randaugment", 9, "--recipe", "spfde", "--epochs", 20, "--cache-variants", 2],
            "--cache-variants=2: does not work, as RandAugment changes each image by itself",
        ),
        (["--randaugment", 9, "--data-on", "device"], "--data-on='device': RandAugment changes each image by itself"),
    ],
)
def test_a_mistake_is_told_and_leaves_nothing(
    asked: Sequence[object], told: str, tiny: Path, spfde: Spfde, here: Path
) -> None:
    ended = spfde(*argv(tiny, "run", *asked))
    assert (ended.code, told in " ".join(ended.err.split())) == (2, True), ended.err
    assert not (here / "run").exists()


def test_images_that_randaugment_cannot_change_are_refused(spfde: Spfde, here: Path) -> None:
    labels = np.arange(16) % 2
    for name, shape, kind in (("two", (16, 8, 8, 2), np.uint8), ("float", (16, 8, 8), np.float32)):
        images = np.ones(shape, kind)
        np.savez(here / f"{name}.npz", x_train=images, y_train=labels, x_test=images, y_test=labels)
    for name, told in (("two", "needs images with 1 or 3 channels"), ("float", "needs images of 8 bits")):
        ended = spfde(*argv(here / f"{name}.npz", "run", "--randaugment", 9))
        assert (ended.code, told in ended.err) == (2, True), ended.err
        assert not (here / "run").exists()


def test_without_torchvision_randaugment_says_what_to_install(
    tiny: Path, spfde: Spfde, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torchvision", None)
    ended = spfde(*argv(tiny, "run", "--randaugment", 9))
    assert (ended.code, "pip install 'spfde[vision]'" in ended.err) == (2, True), ended.err
