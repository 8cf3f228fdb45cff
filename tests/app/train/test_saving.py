"""A checkpoint's files: everything comes back, on another machine too, and nothing in them can run code."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from helpers.strangers import RunsCode
from spfde.app.train import saving
from spfde.app.train.machine import Machine
from spfde.app.train.saving import load_state, save_state, seed_all, weights_note
from spfde.errors import RunFolderError, StateMismatch

CPU = torch.device("cpu")


class Counts:
    """Remembers a number."""

    def __init__(self, value: int) -> None:
        self.value = value

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value = state["value"]


def parts(seed: int) -> tuple[nn.Module, torch.optim.Optimizer, torch.amp.GradScaler, dict[str, Any]]:
    """A model after two steps, channels last, and what belongs to it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3)).to(memory_format=torch.channels_last)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1 * (seed + 1), momentum=0.9)
        for _ in range(2):
            model(torch.randn(2, 2, 4, 4)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    return model, optimizer, Machine(CPU, "fp32").scaler(), {"one": Counts(seed), "two": Counts(10 * seed)}


def draws() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))  # noqa: NPY002


def assert_equal_parts(loaded: Any, expected: Any) -> None:
    for mine, theirs in zip(loaded[0].state_dict().values(), expected[0].state_dict().values(), strict=True):
        assert torch.equal(mine, theirs)
    assert loaded[1].state_dict()["param_groups"] == expected[1].state_dict()["param_groups"]
    for state, other in zip(loaded[1].state.values(), expected[1].state.values(), strict=True):
        assert torch.equal(state["momentum_buffer"], other["momentum_buffer"])
    assert [each.value for each in loaded[3].values()] == [each.value for each in expected[3].values()]


@pytest.fixture(autouse=True)
def _generators_restored() -> Any:
    kept = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    yield
    random.setstate(kept[0])
    np.random.set_state(kept[1])  # noqa: NPY002
    torch.set_rng_state(kept[2])


@pytest.mark.parametrize("has_safetensors", [True, False])
def test_everything_comes_back(has_safetensors: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not has_safetensors:
        monkeypatch.setattr(saving, "find_spec", lambda name: None)
    assert (weights_note() is None) == has_safetensors
    saved, loaded = parts(1), parts(2)
    seed_all(3)
    random.gauss(0, 1), np.random.normal()  # noqa: NPY002  # leave a number behind for the next draw
    save_state(tmp_path, *saved, CPU)
    expected = draws()
    draws()
    load_state(tmp_path, *loaded, CPU)
    assert draws() == expected
    assert_equal_parts(loaded, saved)
    assert (tmp_path / "model.safetensors").exists() == has_safetensors


def test_a_loss_scale_comes_back(tmp_path: Path) -> None:
    saved, loaded = (Machine(CPU, "fp16").scaler() for _ in range(2))
    state = saved.scale(torch.ones(())) and saved.state_dict() | {"scale": 64.0}
    saved.load_state_dict(state)
    model, optimizer, _, others = parts(0)
    save_state(tmp_path, model, optimizer, saved, others, CPU)
    load_state(tmp_path, model, optimizer, loaded, others, CPU)
    assert loaded.get_scale() == 64.0


def test_a_checkpoint_from_a_machine_with_gpus_is_read_without_them(tmp_path: Path) -> None:
    saved = parts(1)
    save_state(tmp_path, *saved, CPU)
    path = tmp_path / "generators.pt"
    states = torch.load(path, weights_only=True)
    torch.save(states | {"cuda": torch.zeros(16, dtype=torch.uint8)}, path)
    load_state(tmp_path, *parts(2), CPU)


def test_a_pickle_that_runs_code_does(tmp_path: Path) -> None:
    """The tests below look for this mark: here is how it comes."""
    torch.save({"a": RunsCode(tmp_path / "mark")}, tmp_path / "file")
    torch.load(tmp_path / "file", weights_only=False)
    assert (tmp_path / "mark").exists()


@pytest.mark.parametrize("has_safetensors", [True, False])
def test_no_file_of_a_checkpoint_runs_code(
    has_safetensors: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not has_safetensors:
        monkeypatch.setattr(saving, "find_spec", lambda name: None)
    folder, mark = tmp_path / "checkpoint", tmp_path / "mark"
    folder.mkdir()
    model, optimizer, _, others = parts(1)
    scaler = Machine(CPU, "fp16").scaler()
    save_state(folder, model, optimizer, scaler, others, CPU)
    names = sorted(path.name for path in folder.iterdir())
    weights = "model.safetensors" if has_safetensors else "model.pt"
    assert names == sorted([weights, "optimizer.pt", "scaler.pt", "generators.pt", "one.pt", "two.pt"])
    for name in names:
        usual = (folder / name).read_bytes()
        for content in (RunsCode(mark), {"value": RunsCode(mark)}):
            torch.save(content, folder / name)
            with pytest.raises(Exception):  # noqa: B017  # PyTorch's and safetensors' own; the trainer says which file
                load_state(folder, model, optimizer, scaler, others, CPU)
            assert not mark.exists(), name
        (folder / name).write_bytes(usual)
    load_state(folder, model, optimizer, scaler, others, CPU)


def test_arrays_of_numpy_are_not_read(tmp_path: Path) -> None:
    """Their pickles hold flags of a type, with which memory can be read as objects."""
    saved = parts(1)
    save_state(tmp_path, *saved, CPU)
    torch.save(np.zeros(3), tmp_path / "one.pt")
    with pytest.raises(StateMismatch, match=r"one\.pt cannot be read"):
        load_state(tmp_path, *parts(2), CPU)


def test_a_checkpoint_of_an_earlier_version_is_refused_with_the_reason_and_not_read(tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    saved = parts(1)
    accelerator = accelerate.Accelerator(cpu=True)
    try:
        accelerator.prepare(saved[0], saved[1])
        accelerator.register_for_checkpointing(*saved[3].values())
        accelerator.save_state(str(tmp_path))
    finally:
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    torch.save(RunsCode(tmp_path / "mark"), tmp_path / "custom_checkpoint_0.pkl")
    with pytest.raises(RunFolderError, match=r"custom_checkpoint_\d.pkl.*can run code"):
        load_state(tmp_path, *parts(2), CPU)
    assert not (tmp_path / "mark").exists()
