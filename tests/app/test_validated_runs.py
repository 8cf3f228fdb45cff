"""Runs with ``--validation-share``: what they are judged by, and when they look at the test set."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import Subset

from helpers.commands import Spfde, start_together
from spfde import presets
from spfde.app.data.datasets import load_data
from spfde.app.runs.best import best_epoch
from spfde.app.train import loop, setup
from spfde.app.train.augment import normalise
from spfde.app.train.events import Display
from spfde.app.train.loop import train
from spfde.app.train.models import build_for
from spfde.app.train.options import TrainOptions, choose_recipe
from spfde.app.train.saving import load_weights

# As sparse in the first epoch as in the last, so that any of them may be the best.
ALL_SAVINGS = choose_recipe("spfde", soft_bound=False).to_dict()
MEASURED = ("seconds", "loader_wait_seconds", "peak_memory_bytes", "dense_step_seconds", "dense_seconds_extrapolated")


@pytest.fixture(scope="module")
def noisy(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny set with noise, so that accuracies differ between epochs and sets."""
    random = np.random.default_rng(1)
    with np.load(tiny) as archive:
        arrays = {name: archive[name] for name in archive.files}
    for name in ("x_train", "x_test"):
        arrays[name] = np.clip(arrays[name] + random.normal(0, 40, arrays[name].shape), 0, 255).astype(np.uint8)
    path = tmp_path_factory.mktemp("noisy") / "noisy.npz"
    np.savez(path, **arrays)
    return path


def options(data: Path, **changes: Any) -> TrainOptions:
    given = {"recipe": presets.mest.to_dict(), "epochs": 6, "batch_size": 16, "lr": 0.02, "engine": "masked"}
    settings = {"validation_share": 0.25, "dense_timing_steps": 0, "device": "cpu"}
    return TrainOptions(data=str(data), **(given | settings | changes))


def read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text())
    return {name: value for name, value in content.items() if name not in MEASURED}


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


class Held(Display):
    """Keeps the run's data, and the sets that were evaluated on."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.splits: list[str] = []
        usual = setup.TrainingRun.evaluation_batches
        patch.setattr(
            setup.TrainingRun, "evaluation_batches", lambda run, split: self.splits.append(split) or usual(run, split)
        )

    def started(self, run: Any) -> None:
        self.train, self.validation = run.data.train, run.data.validation
        self.population = len(run.session.loader.dataset)


@pytest.fixture(scope="module")
def validated(noisy: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Held]:
    folder = tmp_path_factory.mktemp("validated") / "run"
    with pytest.MonkeyPatch.context() as patch:
        held = Held(patch)
        train(options(noisy, recipe=ALL_SAVINGS), folder, held)
    return folder, held


def test_every_epoch_is_evaluated_on_what_was_held_out_and_the_test_set_is_looked_at_once(
    validated: tuple[Path, Held],
) -> None:
    folder, held = validated
    found = rows(folder)
    assert all({"val_loss", "val_accuracy"} <= row.keys() for row in found)
    assert not any(name.startswith("test") for row in found for name in row)
    assert all((row["val_accuracy"] * 24).is_integer() for row in found), "a quarter of 96 samples"
    best = best_epoch(found)
    assert best is not None
    assert held.splits == ["val"] * 6 + ["test"] * (1 if best == 5 else 2)
    assert list(read(folder / "summary.json"))[:5] == [
        "val_accuracy", "best_val_accuracy", "test_accuracy", "best_test_accuracy", "best_epoch",
    ]  # fmt: skip


def test_what_is_held_out_is_neither_trained_on_nor_sieved_nor_billed(validated: tuple[Path, Held]) -> None:
    folder, held = validated
    assert isinstance(held.train, Subset)
    assert isinstance(held.validation, Subset)
    assert not set(held.train.indices) & set(held.validation.indices)
    assert (held.population, len(held.validation)) == (72, 24)
    assert {row["partial_samples"] + row["removed_samples"] for row in rows(folder)} == {72}
    config = read(folder / "config.json")
    assert (config["plan"]["samples"], config["data"]["train_samples"]) == (72, 72)
    assert config["data"]["validation_samples"] == 24


def test_figures_of_the_test_set_are_those_of_the_last_and_of_the_best_checkpoint(
    noisy: Path, validated: tuple[Path, Held], tmp_path: Path
) -> None:
    folder, _ = validated
    summary, data = read(folder / "summary.json"), load_data(noisy, root=tmp_path)
    best = best_epoch(rows(folder))
    assert summary["best_epoch"] == best
    assert summary["best_val_accuracy"] == rows(folder)[summary["best_epoch"]]["val_accuracy"]
    assert summary["val_accuracy"] == rows(folder)[-1]["val_accuracy"]
    for name, figure in (("latest", "test_accuracy"), ("best", "best_test_accuracy")):
        model = build_for("resnet8", data.spec, width=1).to(memory_format=torch.channels_last).eval()
        load_weights(folder / "checkpoints" / name, model)
        with torch.no_grad():
            images = normalise(data.test.images, data.mean, data.std)  # type: ignore[attr-defined]
            logits = model(images.contiguous(memory_format=torch.channels_last))
        assert summary[figure] == float((logits.argmax(1) == data.test.labels).double().mean())  # type: ignore[attr-defined]


@pytest.mark.parametrize("changes", [{"recipe": presets.dense.to_dict()}, {"data_on": "device"}])
def test_all_runs_of_a_seed_hold_out_the_same(
    changes: dict[str, Any], noisy: Path, validated: tuple[Path, Held], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = Held(monkeypatch)
    train(options(noisy, epochs=1, **changes), tmp_path / "run", held)
    assert isinstance(held.validation, Subset)
    assert isinstance(validated[1].validation, Subset)
    assert held.validation.indices == validated[1].validation.indices


@pytest.mark.parametrize("moment", ["after an epoch", "before the summary"])
def test_a_run_that_was_stopped_comes_to_the_same_summary(
    moment: str, noisy: Path, validated: tuple[Path, Held], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, stopped = options(noisy, recipe=ALL_SAVINGS), tmp_path / "stopped"

    def stop(*_: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if moment == "before the summary":
            patch.setattr(loop, "_summary", stop)
        else:
            patch.setattr(Display, "epoch_done", lambda self, run, row: row["epoch"] == 2 and stop())
        with pytest.raises(KeyboardInterrupt):
            train(given, stopped)
    assert not (stopped / "summary.json").exists()
    train(given, stopped, resume=True)
    assert read(stopped / "summary.json") == read(validated[0] / "summary.json")


@pytest.mark.cli
def test_the_command_line_says_what_the_best_epoch_is_chosen_by(noisy: Path, spfde: Spfde, here: Path) -> None:
    words = ["--recipe", "dense", "--epochs", 2, "--batch-size", 16]
    ended = spfde("train", "--data", noisy, "--out", "run", *words, "--validation-share", 0.25)
    assert ended.code == 0, ended.err
    assert "72 + 24 held out + 32 images" in ended.out
    assert "val, train: accuracy" in ended.out
    assert "chosen by validation accuracy" in spfde("export", "run").out
    planned = json.loads(spfde("plan", "--data", noisy, "--json", *words, "--validation-share", 0.25).out)
    assert planned["training_flops"] == read(here / "run" / "summary.json")["training_flops"]


@pytest.mark.cli
@pytest.mark.parametrize("command", ["train", "plan"])
@pytest.mark.parametrize(
    ("share", "told"),
    [(0.001, "leaves none of 96"), (0.9, "leaves 10 of 96"), (1.0, "[0, 1)"), (-0.1, "[0, 1)"), ("nan", "")],
)
def test_a_share_that_cannot_be_held_out_is_refused(
    command: str, share: float, told: str, noisy: Path, spfde: Spfde, here: Path
) -> None:
    ended = spfde(command, "--data", noisy, "--batch-size", 16, "--epochs", 4, "--validation-share", share)
    assert (ended.code, ended.out) == (2, "")
    assert ended.err.startswith("spfde: --validation-share=")
    assert told in ended.err
    assert list(here.iterdir()) == []


@pytest.mark.long
def test_several_processes_share_the_validation_set(noisy: Path, tmp_path: Path) -> None:
    words = ["train", "--data", str(noisy), "--epochs", "3", "--batch-size", "16", "--validation-share", "0.25"]
    started = start_together([*words, "--recipe", "dense", "--out", "run"], log=tmp_path / "log", cwd=tmp_path)
    assert [command.end().code for command in started] == [0, 0]
    assert all((row["val_accuracy"] * 24).is_integer() for row in rows(tmp_path / "run"))
    summary = read(tmp_path / "run" / "summary.json")
    assert (summary["best_test_accuracy"] * 32).is_integer()
    assert summary["processes"] == 2
