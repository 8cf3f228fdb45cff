"""Weights that a run starts from."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from helpers.commands import Spfde
from spfde import presets
from spfde.app.data.images import DataSpec
from spfde.app.train.events import Display
from spfde.app.train.loop import train
from spfde.app.train.models import build_for
from spfde.app.train.options import TrainOptions
from spfde.app.train.starting import start_from
from spfde.core.errors import InvalidArgument

SPEC = DataSpec("tiny", 3, 1, (8, 8), 96, 32)


def options(weights: object, model: str = "resnet8", **changes: Any) -> TrainOptions:
    recipe = presets.mest.to_dict()
    given = {"weights": str(weights), "model": model, "recipe": recipe, "dense_timing_steps": 0, "engine": "masked"}
    return TrainOptions(**(given | changes))


def built(n_classes: int = 3, seed: int = 0) -> nn.Module:
    spec = DataSpec("tiny", n_classes, 1, (8, 8), 96, 32)
    return build_for("resnet8", spec, width=1.0, seed=seed)


def begun(model: nn.Module, weights: object, name: str = "resnet8") -> str:
    return start_from(model, options(weights, name), SPEC, lambda work: work())


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_model_takes_all_of_a_file(suffix: str, tmp_path: Path) -> None:
    path, state = tmp_path / f"weights{suffix}", built(seed=1).state_dict()
    (torch.save if suffix == ".pt" else save_file)(state, path)
    model = built()
    assert begun(model, path) == f"weights: from {path}"
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_a_head_of_other_classes_is_left_fresh_and_named(tmp_path: Path) -> None:
    path, state = tmp_path / "w.pt", built(10, seed=1).state_dict()
    torch.save(state, path)
    model, fresh = built(), built()
    assert begun(model, path).endswith("; fresh, as they were for other classes: fc.weight, fc.bias")
    assert torch.equal(model.get_parameter("fc.weight"), fresh.get_parameter("fc.weight"))
    assert torch.equal(model.get_parameter("conv1.weight"), state["conv1.weight"])


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        (lambda state: state.pop("conv1.weight"), r"lacks conv1\.weight\."),
        (lambda state: state.update(other=torch.zeros(1)), r"has what the model has not: other\."),
        (
            lambda state: state.update({"conv1.weight": torch.zeros(16, 3, 3, 3)}),
            r"has conv1\.weight \(16, 3, 3, 3\) instead of \(16, 1, 3, 3\)\.",
        ),
        (lambda state: state["fc.bias"].fill_(float("nan")), r"holds numbers that are not finite in fc\.bias\."),
        (
            lambda state: [state.pop(name) for name in list(state)],
            r"lacks conv1\.weight, bn1\.weight, bn1\.bias and \d+ more\.",
        ),
    ],
)
def test_weights_of_another_model_are_refused_and_nothing_is_changed(change: Any, rule: str, tmp_path: Path) -> None:
    path, state = tmp_path / "w.pt", built(seed=1).state_dict()
    change(state)
    torch.save(state, path)
    model, before = built(), built().state_dict()
    with pytest.raises(InvalidArgument, match=rf"weights='.*w\.pt': {rule}"):
        begun(model, path)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class Runs:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


def test_a_file_that_would_run_code_is_refused_and_runs_none(tmp_path: Path) -> None:
    torch.save({"conv1.weight": Runs(tmp_path / "ran")}, tmp_path / "w.pt")
    with pytest.raises(InvalidArgument, match="cannot be read"):
        begun(built(), tmp_path / "w.pt")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("name", "content", "rule"),
    [
        ("w.safetensors", b"\xff" * 40, "cannot be read"),
        ("w.pt", b"none", "cannot be read"),
        ("w.npz", b"none", "must end in .safetensors, .pt"),
        ("w.pth", None, "is no file"),
    ],
)
def test_what_is_no_file_of_weights_is_refused(name: str, content: bytes | None, rule: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InvalidArgument, match=rule):
        begun(built(), tmp_path / name)


def test_a_file_of_something_else_than_a_state_is_refused(tmp_path: Path) -> None:
    torch.save({"model": built().state_dict()}, tmp_path / "w.pt")
    with pytest.raises(InvalidArgument, match=r"holds no state_dict.*Save model\.state_dict\(\) alone"):
        begun(built(), tmp_path / "w.pt")


def test_pretrained_weights_are_of_timms_models_alone() -> None:
    with pytest.raises(InvalidArgument, match=r"weights='pretrained': there are none of resnet8\. Give a file"):
        begun(built(), "pretrained")


@pytest.fixture
def timm(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """In the place of timm, which takes seconds to import."""
    module = SimpleNamespace(is_model=lambda name: name == "resnet18")
    monkeypatch.setitem(sys.modules, "timm", module)
    return module


def test_pretrained_weights_that_cannot_be_downloaded_are_a_plain_error(timm: SimpleNamespace) -> None:
    def offline(*_: Any, **__: Any) -> Any:
        raise OSError("no route to host")

    timm.create_model = offline
    with pytest.raises(InvalidArgument, match=r"weights='pretrained': timm:resnet18 cannot .*no route to host"):
        begun(built(), "pretrained", "timm:resnet18")


def test_pretrained_weights_are_taken_but_for_their_head(timm: SimpleNamespace) -> None:
    pretrained = built(10, seed=5)
    asked: dict[str, Any] = {}
    timm.create_model = lambda name, **given: asked.update(given, name=name) or pretrained
    model, before = built(), torch.get_rng_state()
    words = begun(model, "pretrained", "timm:resnet18")
    assert words == "weights: from resnet18, pretrained; fresh, as they were for other classes: fc.weight, fc.bias"
    assert torch.equal(torch.get_rng_state(), before)
    assert (asked["name"], asked["pretrained"], asked["in_chans"]) == ("resnet18", True, 1)
    assert torch.equal(model.get_parameter("conv1.weight"), pretrained.get_parameter("conv1.weight"))


class AtTheStart(Display):
    """Keeps the masks and the weights that a run has before its first step."""

    def started(self, run: Any) -> None:
        self.masks = dict(run.session.masks)
        self.weights = {name: p.detach().clone() for name, p in run.model.named_parameters()}


def test_sparse_fine_tuning_starts_from_the_largest_weights_of_a_dense_run(
    tiny: Path, spfde: Spfde, here: Path
) -> None:
    usual = ("train", "--data", tiny, "--epochs", 1, "--quiet", "--engine", "masked")
    assert spfde(*usual, "--recipe", "dense", "--out", "dense").code == 0
    file = here / "dense/checkpoints/latest/model.safetensors"
    from safetensors.torch import load_file

    dense, seen = load_file(file), AtTheStart()
    train(options(file, data=str(tiny), epochs=1), here / "sparse", seen)
    assert len(seen.masks) > 3
    for name, mask in seen.masks.items():
        kept, dropped = dense[name][mask].abs(), dense[name][~mask].abs()
        assert not len(dropped) or kept.min() >= dropped.max(), name
        assert torch.equal(seen.weights[name], dense[name] * mask)
    shown = spfde("train", "--data", tiny, "--epochs", 1, "--weights", "dense/checkpoints/latest/model.safetensors")
    assert f"weights: from {file}" in shown.out.replace("\n  ", " ").replace("weights: from\n", "weights: from ")


def test_a_mistake_in_the_weights_leaves_nothing_behind(tiny: Path, spfde: Spfde, here: Path) -> None:
    ended = spfde("train", "--data", tiny, "--weights", "none.pt", "--out", "run")
    assert (ended.code, ended.out) == (2, "")
    assert ended.err == "spfde: --weights='none.pt': is no file. Give a file, or pretrained.\n"
    assert not (here / "run").exists()
