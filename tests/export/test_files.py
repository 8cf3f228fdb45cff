"""Weights in files: what is written is read again, and what is damaged is refused."""

from __future__ import annotations

import builtins
import json
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import spfde
from helpers.training import SmallNet, make_parts
from spfde.core.errors import InvalidArgument, UsageError, WeightsFileError
from spfde.export import files, load, save_compressed, save_dense, save_onnx

ABSURD: list[Any] = [[2**40, 2**40], [10**400], [-1, -324], [-324, -1], ["324"], [324.0], [True] * 3, "324", 324, None]


def sparse_net() -> nn.Module:
    torch.manual_seed(0)
    model = SmallNet()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.masked_fill_(torch.rand_like(parameter) < 0.9, 0)
    return model.eval()


def payload(path: Path) -> int:
    """Bytes of the tensors in a safetensors file."""
    (header,) = struct.unpack("<Q", path.read_bytes()[:8])
    return path.stat().st_size - 8 - header


@pytest.mark.parametrize("save", [save_dense, save_compressed])
def test_a_file_restores_the_same_outputs_bit_for_bit(save: Any, tmp_path: Path) -> None:
    model, other = sparse_net(), SmallNet().eval()
    save(model.state_dict(), tmp_path / "x.safetensors")
    other.load_state_dict(load(tmp_path / "x.safetensors"))
    x = torch.randn(5, 2, 8, 8)
    assert torch.equal(other(x), model(x))
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


def test_the_compressed_file_keeps_order_shapes_and_types(tmp_path: Path) -> None:
    state = {
        "z": torch.zeros(3, 4, dtype=torch.float16),
        "steps": torch.tensor(7),
        "a/b": torch.tensor([True, False]),
        "empty": torch.empty(0, 5),
        "half": torch.tensor([0, 1.5] * 20, dtype=torch.bfloat16),
    }
    save_compressed(state, tmp_path / "x")
    found = load(tmp_path / "x")
    assert list(found) == list(state)
    for name, tensor in state.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


def test_the_dense_file_has_exact_zeros_and_is_read_by_safetensors_itself(tmp_path: Path) -> None:
    state = sparse_net().state_dict()
    save_dense(state, tmp_path / "x")
    found = load_file(tmp_path / "x")
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())
    assert (found["blocks.0.conv1.weight"] == 0).float().mean() > 0.8


def test_tied_weights_are_written_under_each_name(tmp_path: Path) -> None:
    weight = torch.randn(3, 3)
    for save in (save_dense, save_compressed):
        save({"one": weight, "two": weight, "three": weight[1:]}, tmp_path / "x")
        found = load(tmp_path / "x")
        assert torch.equal(found["one"], weight)
        assert torch.equal(found["two"], weight)
        assert torch.equal(found["three"], weight[1:])


def test_what_was_read_outlives_its_file(tmp_path: Path) -> None:
    for save in (save_dense, save_compressed):
        save({"x": torch.arange(1000.0)}, tmp_path / "x")
        found = load(tmp_path / "x")
        with (tmp_path / "x").open("r+b") as file:
            file.write(bytes((tmp_path / "x").stat().st_size))
        assert torch.equal(found["x"], torch.arange(1000.0))


def test_the_bill_says_what_the_compressed_file_takes(tmp_path: Path) -> None:
    parts = make_parts()
    recipe = spfde.Recipe(sparsity=spfde.MEST(sparsity=0.8))
    session = spfde.attach(parts.model, parts.optimizer, parts.loader, recipe, epochs=1, engine="masked")
    assert session.cost.totals.compressed_weight_bytes is None
    for _ in session.epochs():
        for x, y in session.loader:
            nn.functional.cross_entropy(parts.model(x), y).backward()
            parts.optimizer.step()
            parts.optimizer.zero_grad()
    totals = session.cost.totals
    save_dense(parts.model.state_dict(), tmp_path / "dense")
    save_compressed(parts.model.state_dict(), tmp_path / "compressed", masks=session.masks)
    assert totals.dense_weight_bytes == payload(tmp_path / "dense")
    assert totals.compressed_weight_bytes == payload(tmp_path / "compressed")
    assert totals.compressed_weight_bytes < 0.5 * totals.dense_weight_bytes
    assert "weights, compressed" in str(session.cost)


def test_negative_zeros_of_a_multiplied_mask_are_left_out_with_the_masks(tmp_path: Path) -> None:
    mask = torch.rand(40, 40) < 0.1
    weight = torch.randn(40, 40) * mask
    save_compressed({"w": weight}, tmp_path / "without")
    save_compressed({"w": weight}, tmp_path / "with", masks={"w": mask})
    assert payload(tmp_path / "with") < 0.3 * payload(tmp_path / "without")
    assert torch.equal(load(tmp_path / "with")["w"], weight)
    assert torch.equal(torch.signbit(load(tmp_path / "without")["w"]), torch.signbit(weight))


def test_masks_that_do_not_fit_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match=r"masks\['w'\]=.*outside the mask"):
        save_compressed({"w": torch.ones(2)}, tmp_path / "x", masks={"w": torch.zeros(2, dtype=torch.bool)})
    with pytest.raises(InvalidArgument, match=r"masks=\['v'\]"):
        save_compressed({"w": torch.ones(2)}, tmp_path / "x", masks={"v": torch.zeros(2, dtype=torch.bool)})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("save", [save_dense, save_compressed])
def test_entries_that_are_no_plain_tensors_are_refused_together(save: Any, tmp_path: Path) -> None:
    state = {"model": {}, "meta": torch.empty(2, device="meta"), "coo": torch.eye(2).to_sparse(), "w": torch.ones(1)}
    with pytest.raises(InvalidArgument) as caught:
        save(state, tmp_path / "x")
    assert [problem.argument for problem in caught.value.problems] == [
        f"state_dict[{name!r}]" for name in ("model", "meta", "coo")
    ]
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def compressed(tmp_path: Path) -> Path:
    path = tmp_path / "x.safetensors"
    save_compressed(sparse_net().state_dict(), path)
    return path


@pytest.mark.parametrize("save", [save_dense, save_compressed])
def test_a_file_that_was_cut_off_is_refused(save: Any, tmp_path: Path) -> None:
    path = tmp_path / "x"
    save(sparse_net().state_dict(), path)
    whole = path.read_bytes()
    for length in (0, 4, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(WeightsFileError, match=r"x: is damaged"):
            load(path)


def test_any_changed_byte_of_the_compressed_weights_shows(compressed: Path) -> None:
    whole = bytearray(compressed.read_bytes())
    first = len(whole) - payload(compressed)
    rng = np.random.default_rng(0)
    for at in (first, len(whole) - 1, *rng.integers(first, len(whole), 30)):
        changed = bytearray(whole)
        changed[at] ^= 1 << int(rng.integers(8))
        compressed.write_bytes(changed)
        with pytest.raises(WeightsFileError, match="is damaged"):
            load(compressed)


def test_a_header_that_lies_is_refused(compressed: Path) -> None:
    stored = {name: value.clone() for name, value in load_file(compressed).items()}  # the file is written over
    (length,) = struct.unpack("<Q", compressed.read_bytes()[:8])
    metadata = json.loads(compressed.read_bytes()[8 : 8 + length])["__metadata__"]
    tensors = json.loads(metadata["spfde.tensors"])
    name = "blocks.0.conv1.weight"
    for lie in (
        None,
        "{",
        [],
        {name: ["dense", [6, 6]]},
        {name: ["rle", [6, 6, 3, 3]]},
        {"v": ["dense", [1]]},
        {name: 1},
        *({name: [kind, shape]} for kind in ("dense", "mask") for shape in ABSURD),
    ):
        lied = {**tensors, **lie} if isinstance(lie, dict) else lie
        text = lied if isinstance(lied, str) else json.dumps(lied)
        sealed = {"spfde.tensors": text, "spfde.checksum": files._checksum(stored, text)}
        save_file(stored, compressed, metadata={**metadata, **sealed})
        with pytest.raises(WeightsFileError, match="is damaged"):
            load(compressed)


def test_a_shape_is_refused_before_there_is_memory_for_it(compressed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = {name: value.clone() for name, value in load_file(compressed).items()}
    name = next(name.removeprefix("mask/") for name in stored if name.startswith("mask/"))
    text = json.dumps({name: ["mask", [2**20, 2**20]]})
    sealed = {"spfde.tensors": text, "spfde.checksum": files._checksum(stored, text)}
    save_file(stored, compressed, metadata={"spfde.compressed": "3", **sealed})
    monkeypatch.setattr(np, "zeros", lambda *_, **__: pytest.fail("memory was asked for"))
    with pytest.raises(WeightsFileError, match="is damaged"):
        load(compressed)


def test_any_changed_character_of_the_table_shows(compressed: Path) -> None:
    whole = compressed.read_bytes()
    for old, new in ((b" 3, 3]]", b" 9, 1]]"), (b'\\"mask\\"', b'\\"task\\"')):
        assert old in whole
        compressed.write_bytes(whole.replace(old, new, 1))
        with pytest.raises(WeightsFileError, match="checksum"):
            load(compressed)


def test_a_newer_layout_is_refused(compressed: Path) -> None:
    stored = {name: value.clone() for name, value in load_file(compressed).items()}
    save_file(stored, compressed, metadata={"spfde.compressed": "4"})
    with pytest.raises(WeightsFileError, match="layout 4"):
        load(compressed)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "nothing", tmp_path):
        with pytest.raises(WeightsFileError, match="is no file"):
            load(path)


@pytest.mark.parametrize("save", [save_dense, save_compressed])
def test_a_file_that_cannot_be_written_leaves_nothing_behind(save: Any, tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    with pytest.raises(WeightsFileError, match="cannot be written"):
        save({"w": torch.ones(3)}, tmp_path / "x")
    with pytest.raises(WeightsFileError, match="cannot be written"):
        save({"w": torch.ones(3)}, tmp_path / "nowhere" / "x")
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_a_write_that_fails_keeps_the_file_that_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_dense({"w": torch.ones(3)}, tmp_path / "x")

    def fails(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", fails)
    with pytest.raises(WeightsFileError, match="No space left"):
        save_dense({"w": torch.zeros(3)}, tmp_path / "x")
    assert os.listdir(tmp_path) == ["x"]
    assert load(tmp_path / "x")["w"].tolist() == [1, 1, 1]


def test_without_safetensors_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usual = builtins.__import__

    def lacking(name: str, *rest: Any, **more: Any) -> Any:
        if name.startswith("safetensors"):
            raise ImportError(name)
        return usual(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", lacking)
    for call in (save_dense, save_compressed):
        with pytest.raises(UsageError, match=r"spfde\[export\]"):
            call({"w": torch.ones(1)}, tmp_path / "x")
    with pytest.raises(UsageError, match=r"spfde\[export\]"):
        load(tmp_path / "x")


class TestOnnx:
    def test_the_graph_gives_the_same_outputs_for_batches_of_any_size(self, tmp_path: Path) -> None:
        runtime = pytest.importorskip("onnxruntime")
        model = sparse_net().train()
        statistics = model.get_buffer("bn.running_mean").clone()
        save_onnx(model, torch.zeros(1, 2, 8, 8), tmp_path / "x.onnx")
        assert os.listdir(tmp_path) == ["x.onnx"]
        assert model.training
        assert torch.equal(model.get_buffer("bn.running_mean"), statistics)
        session = runtime.InferenceSession(tmp_path / "x.onnx")
        for size in (1, 2, 7):
            x = torch.randn(size, 2, 8, 8)
            (found,) = session.run(["output"], {"input": x.numpy()})
            torch.testing.assert_close(torch.from_numpy(found), model.eval()(x).detach(), rtol=1e-4, atol=1e-5)

    def test_a_model_that_cannot_be_exported_is_named_and_nothing_is_left(self, tmp_path: Path) -> None:
        pytest.importorskip("onnxscript")

        class Branching(nn.Module):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return x if x.sum().item() > 0 else -x

        with pytest.raises(InvalidArgument, match=r"model='Branching': PyTorch cannot export"):
            save_onnx(Branching(), torch.zeros(1, 2), tmp_path / "x.onnx")
        assert list(tmp_path.iterdir()) == []

    def test_without_its_packages_they_and_the_extra_are_named(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("spfde.export.onnx.find_spec", lambda name: None)
        with pytest.raises(UsageError, match=r"onnx and onnxscript.*spfde\[export\]"):
            save_onnx(sparse_net(), torch.zeros(1, 2, 8, 8), tmp_path / "x.onnx")


@pytest.mark.parametrize("wrapper", ["net", "trainer.model"])
def test_masks_of_a_part_of_the_model_are_refused_with_the_part_to_save(wrapper: str, tmp_path: Path) -> None:
    model = sparse_net()
    state = {f"{wrapper}.{name}": tensor for name, tensor in model.state_dict().items()}
    masks = {name: p != 0 for name, p in model.named_parameters() if p.dim() == 4}
    with pytest.raises(InvalidArgument) as caught:
        save_compressed(state, tmp_path / "x", masks=masks)
    assert f"{wrapper}.state_dict()" in str(caught.value)
    save_compressed(model.state_dict(), tmp_path / "x", masks=masks)


def test_masks_of_another_model_are_refused_without_the_name_of_a_part(tmp_path: Path) -> None:
    masks = {"fc.weight": torch.ones(4, 6, dtype=torch.bool), "other.weight": torch.ones(2, dtype=torch.bool)}
    state = {f"net.{name}": tensor for name, tensor in sparse_net().state_dict().items()}
    with pytest.raises(InvalidArgument) as caught:
        save_compressed(state, tmp_path / "x", masks=masks)
    assert "net.state_dict()" not in str(caught.value)
