"""Runs with averaged weights, norms estimated anew, several batches a step: stopped anywhere, they come to the same."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from helpers import commands
from helpers.commands import Spfde
from helpers.recording import Replays, on_cpu  # noqa: F401  # a fixture
from helpers.stopping import Stopping
from spfde import presets
from spfde.app.runs import kept_checkpoints
from spfde.app.runs.checkpoints import described
from spfde.app.runs.manifest import seal
from spfde.app.train.evaluated import check_norms
from spfde.app.train.loop import train
from spfde.app.train.options import TrainOptions, choose_recipe
from spfde.core.errors import InvalidArgument, StateMismatch

MEASURED = ("seconds", "loader_wait_seconds", "peak_memory_bytes")
ASKED: dict[str, Any] = {
    "ema": 0.9,
    "reestimate_bn": 40,
    "label_smoothing": 0.1,
    "optimizer": "adamw",
    "clip_norm": 1.0,
    "accumulate": 2,
    "warmup": 1,
}


def options(tiny: Path, recipe: str = "spfde", **changes: Any) -> TrainOptions:
    given = {"data": str(tiny), "epochs": 6, "batch_size": 16, "device": "cpu", "dense_timing_steps": 0}
    return TrainOptions(recipe=presets.PRESETS[recipe].to_dict(), recipe_name=recipe, **(given | changes))


def lines(folder: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in MEASURED} for row in rows]


def assert_same(folder: Path, expected: Path) -> None:
    assert lines(folder) == lines(expected)
    for name in ("latest", "previous", "best"):
        for file in ("model.safetensors", "evaluated.safetensors"):
            found, wanted = (each / "checkpoints" / name / file for each in (folder, expected))
            assert found.read_bytes() == wanted.read_bytes(), (name, file)


@pytest.fixture(scope="module")
def whole(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "whole"
    train(options(tiny, keep_every=6, **ASKED), folder)
    return folder


@pytest.mark.long
def test_a_stopped_run_goes_on_as_if_nothing_had_been(whole: Path, tiny: Path, tmp_path: Path) -> None:
    for epoch in (1, 4):
        given = options(tiny, keep_every=6, **ASKED)
        with pytest.raises(KeyboardInterrupt):
            train(given, tmp_path / f"after-{epoch}", Stopping(epoch))
        train(given, tmp_path / f"after-{epoch}", resume=True)
        assert_same(tmp_path / f"after-{epoch}", whole)


def test_a_killed_command_goes_on_to_the_same(whole: Path, tiny: Path, tmp_path: Path) -> None:
    asked = [word for name, value in ASKED.items() for word in ("--" + name.replace("_", "-"), str(value))]
    usual = ["--data", str(tiny), "--epochs", "6", "--batch-size", "16", "--device", "cpu", "--out", "run"]
    begun = commands.start(["train", *usual, *asked], log=tmp_path / "log", cwd=tmp_path, wait_at="before a checkpoint")
    begun.reach()
    begun.kill(signal.SIGKILL)
    assert commands.start(["train", "--resume", "run"], log=tmp_path / "log", cwd=tmp_path).end().code == 0
    assert_same(tmp_path / "run", whole)
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["training"] == {
        "optimizer": "adamw",
        "lr": 0.001,
        "schedule": "cosine",
        "warmup": 1,
        "momentum": 0.9,
        "nesterov": False,
        "weight_decay": 1e-4,
        "clip_norm": 1.0,
        "accumulate": 2,
        "weights": None,
        "label_smoothing": 0.1,
        "ema": 0.9,
        "reestimate_bn": 40,
    }


def test_the_averaged_model_is_exactly_as_sparse_as_the_trained_one(whole: Path) -> None:
    trained, averaged = (load_file(whole / f"checkpoints/latest/{name}.safetensors") for name in ("model", "evaluated"))
    _, masks = kept_checkpoints.read(whole / "checkpoints/kept/epoch-0006")
    assert len(masks) > 3
    for name, mask in masks.items():
        assert not averaged[name][~mask].any(), name
        assert torch.count_nonzero(averaged[name]) == int(mask.sum()), name
    assert not torch.equal(trained["fc.weight"], averaged["fc.weight"])
    # Frozen blocks are as they were trained, their norms too.
    assert torch.equal(trained["conv1.weight"], averaged["conv1.weight"])
    assert torch.equal(trained["bn1.running_mean"], averaged["bn1.running_mean"])
    assert not torch.equal(trained["layer3.0.bn1.running_mean"], averaged["layer3.0.bn1.running_mean"])


def test_the_average_of_a_block_that_pauses_is_none_of_its_weights(tiny: Path, tmp_path: Path) -> None:
    recipe = choose_recipe("mest", freeze=0.15, freeze_scheme="periodic", interval="1")
    train(options(tiny, ema=0.9, epochs=2).model_copy(update={"recipe": recipe.to_dict()}), tmp_path)
    assert lines(tmp_path)[-1]["frozen_blocks"], "the last epoch is a pause"
    found = (load_file(tmp_path / f"checkpoints/latest/{name}.safetensors") for name in ("model", "evaluated"))
    trained, averaged = (weights["conv1.weight"] for weights in found)
    assert not torch.equal(trained, averaged)


def test_steps_are_counted_once_for_several_batches_and_samples_all(whole: Path) -> None:
    # 77 of 96 samples are in use: five batches of 16, so three steps, the last one of a single batch.
    assert {(row["steps"], row["samples"]) for row in lines(whole)[1:]} == {(3, 77)}


def test_what_was_evaluated_is_what_is_evaluated_and_exported(whole: Path, spfde: Spfde, here: Path) -> None:
    shown = json.loads(spfde("evaluate", whole, "--json").out)
    assert shown["weights"] == "averaged, norms estimated anew"
    assert shown["last"]["top1"] == pytest.approx(lines(whole)[-1]["test_accuracy"])
    assert "averaged, norms estimated anew" in spfde("evaluate", whole).out
    ended = spfde("export", whole, "--last", "--format", "dense", "--out", here / "w.safetensors")
    assert "averaged, norms estimated anew" in " ".join(ended.out.split())
    exported, kept = load_file(here / "w.safetensors"), load_file(whole / "checkpoints/latest/evaluated.safetensors")
    assert all(torch.equal(value, exported[name]) for name, value in kept.items())


def test_a_run_without_options_keeps_what_it_trains_alone(tiny: Path, spfde: Spfde, tmp_path: Path) -> None:
    train(options(tiny, "mest", epochs=1), tmp_path / "run")
    names = {path.name for path in (tmp_path / "run/checkpoints/latest").iterdir()}
    assert "model.safetensors" in names
    assert not names & {"evaluated.safetensors", "averaging.pt"}
    assert json.loads(spfde("evaluate", tmp_path / "run", "--json").out)["weights"] == "trained"


def test_training_is_the_same_whatever_is_evaluated(tiny: Path, tmp_path: Path) -> None:
    for name, changes in (("plain", {}), ("other", {"ema": 0.5, "reestimate_bn": 16})):
        train(options(tiny, "mest", epochs=2, **changes), tmp_path / name)
    plain, other = (load_file(tmp_path / name / "checkpoints/latest/model.safetensors") for name in ("plain", "other"))
    assert all(torch.equal(value, other[name]) for name, value in plain.items())


def test_norms_alone_are_estimated_on_a_copy(tiny: Path, tmp_path: Path) -> None:
    train(options(tiny, "dense", epochs=1, reestimate_bn=96), tmp_path / "run")
    trained, other = (
        load_file(tmp_path / f"run/checkpoints/latest/{name}.safetensors") for name in ("model", "evaluated")
    )
    differ = {name for name, value in trained.items() if not torch.equal(value, other[name])}
    assert differ
    assert all("running_" in name or "num_batches" in name for name in differ)


def test_a_damaged_average_is_refused(tiny: Path, tmp_path: Path) -> None:
    given = options(tiny, "mest", epochs=2, ema=0.9)
    with pytest.raises(KeyboardInterrupt):
        train(given, tmp_path, Stopping(1))
    latest = tmp_path / "checkpoints/latest"
    torch.save({"updates": -1}, latest / "averaging.pt")
    about = described(latest)
    (latest / "manifest.json").unlink()
    seal(latest, {"epoch": 1, "about": about})
    with pytest.raises(StateMismatch, match="averaged weights were updated -1 times"):
        train(given, tmp_path, resume=True)


def test_norms_of_a_model_that_has_none_are_no_option(tiny: Path) -> None:
    given = options(tiny, "dense", reestimate_bn=16, model="timm:vit_tiny_patch16_224")
    with pytest.raises(InvalidArgument, match=r"reestimate_bn=16: timm:vit_tiny_patch16_224 has no batch norms"):
        check_norms(torch.nn.Linear(2, 2), given)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (("--schedule", "step"), "spfde: --schedule='step': recipe spfde drives the rates itself"),
        (("--warmup", 19), "spfde: --warmup=19: must be less than every block's freeze epoch"),
        (("--warmup", 20), "spfde: --warmup=20: must be shorter than the run (20 epochs)"),
        (("--ema", 1), "spfde: --ema=1.0: input should be less than 1"),
        (("--reestimate-bn", 1), "spfde: --reestimate-bn=1: one sample has no variance"),
    ],
)
def test_a_mistake_in_the_updates_is_told_in_options(
    given: tuple[str, object], told: str, tiny: Path, spfde: Spfde, here: Path
) -> None:
    ended = spfde("train", "--data", tiny, *given)
    assert ended.code == 2
    assert ended.err.startswith(told)
    assert not list(here.glob("runs/*"))


@pytest.mark.long
@pytest.mark.usefixtures("on_cpu")
def test_captured_steps_are_clipped_and_averaged_as_pytorch_does(tiny: Path, tmp_path: Path) -> None:
    for engine in ("masked", "cudagraph"):
        given = options(
            tiny, "mest", engine=engine, epochs=2, batch_size=8, ema=0.9, clip_norm=0.5, label_smoothing=0.1
        )
        train(given, tmp_path / engine)
    assert Replays.newest.replays > 0
    for mine, other in zip(lines(tmp_path / "cudagraph"), lines(tmp_path / "masked"), strict=True):
        assert mine["train_loss"] == pytest.approx(other["train_loss"], rel=1e-3)
        assert mine["test_loss"] == pytest.approx(other["test_loss"], rel=1e-2)


@pytest.mark.long
@pytest.mark.parametrize("recipe", ["rigl", "gmp", "str", "topkast", "deepr", "snip"])
def test_every_kind_of_method_is_averaged_as_sparse_as_it_is(recipe: str, tiny: Path, tmp_path: Path) -> None:
    given = options(tiny, recipe, ema=0.8, accumulate=2, keep_every=4, epochs=4)
    train(given, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(given, tmp_path / "stopped", Stopping(2))
    train(given, tmp_path / "stopped", resume=True)
    assert_same(tmp_path / "stopped", tmp_path / "whole")
    averaged = load_file(tmp_path / "whole/checkpoints/latest/evaluated.safetensors")
    for name, mask in kept_checkpoints.read(tmp_path / "whole/checkpoints/kept/epoch-0004")[1].items():
        assert not averaged[name][~mask].any(), name


@pytest.mark.long
def test_two_processes_come_to_one_average(tiny: Path, tmp_path: Path) -> None:
    argv = ["train", "--data", str(tiny), "--epochs", "4", "--batch-size", "8", "--ema", "0.9", "--accumulate", "2"]
    for out in ("a", "b"):
        log = tmp_path / f"log-{out}"
        found = commands.start_together([*argv, "--reestimate-bn", "32", "--out", out], log=log, cwd=tmp_path)
        assert [each.end().code for each in found] == [0, 0]
    assert_same(tmp_path / "a", tmp_path / "b")
