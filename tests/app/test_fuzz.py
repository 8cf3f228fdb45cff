"""Thousands of inputs of all sorts: what is refused is refused by an error of this package, and what is taken works.

``make test-long`` tries ten thousand of each; ``python -m pytest -m long tests/app/test_fuzz.py`` does that alone.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import warnings
import zipfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import spfde
from helpers.fuzzing import changed, changed_bytes, deep, odd_object
from helpers.resuming import METHODS, Loop, recipe_with
from helpers.training import step
from spfde import presets
from spfde.app.data.npz import describe_npz, load_npz
from spfde.app.report.folders import read_run
from spfde.app.runs import manifest
from spfde.app.runs.checkpoints import check_whole, described, epoch_of
from spfde.app.runs.folder import CONFIG, RunFolder
from spfde.app.train.augment import BatchAugment
from spfde.app.train.machine import Machine
from spfde.app.train.options import TrainOptions
from spfde.app.train.saving import load_state, save_state
from spfde.app.train.setup import Progress
from spfde.core.registry import registered
from spfde.core.technique import write_named
from spfde.recipe.recipe import Recipe

CPU = torch.device("cpu")
NAMES = sorted(presets.PRESETS)
MODEL = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 8), nn.ReLU(), nn.Linear(8, 3))
Case = Callable[[random.Random, Path], None]


@pytest.fixture(autouse=True)
def _nothing_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def some_recipe(rng: random.Random) -> dict[str, Any]:
    """A preset, or one with a method of another kind."""
    written = presets.PRESETS[rng.choice(NAMES)].to_dict()
    methods = registered("method")
    if rng.random() < 0.5:
        with contextlib.suppress(spfde.SpfdeError):  # of one that has to be told how sparse
            written["sparsity"] = write_named(methods[rng.choice(sorted(methods))](), key="method")
    return written


def recipe(rng: random.Random, place: Path) -> None:
    written: Any = some_recipe(rng)
    for _ in range(rng.choice([0, 1, 1, 1, 2, 3])):
        written = changed(written, rng)
    made = Recipe.from_dict(written if isinstance(written, dict) else {"sparsity": written})
    assert repr(made)
    assert Recipe.from_dict(made.to_dict()) == made
    assert Recipe.from_toml(made.to_toml()) == made
    epochs, samples = rng.choice([1, 2, 8]), rng.choice([1, 7, 40])
    assert str(spfde.plan(MODEL, torch.zeros(2, 1, 8, 8), made, epochs, samples, batch_size=4))


def toml(rng: random.Random, place: Path) -> None:
    text = Recipe.from_dict(some_recipe(rng)).to_toml().encode()
    if rng.random() < 0.1:
        text = b"a = " + b"[" * rng.choice([10, 500, 5000]) + b"]" * 10
    text = changed_bytes(text, rng)
    assert Recipe.from_toml(text.decode(errors=rng.choice(["replace", "surrogateescape"])))


def options(rng: random.Random, place: Path) -> None:
    written: Any = TrainOptions(recipe=some_recipe(rng)).model_dump(mode="json")
    for _ in range(rng.choice([1, 1, 2, 3])):
        written = changed(written, rng)
    made = TrainOptions.from_config({"command": written} if rng.random() < 0.95 else {}, place / CONFIG)
    again = TrainOptions.from_config({"command": made.model_dump(mode="json")}, place / CONFIG)
    assert again == made
    assert json.dumps(made.identity())


def checkpoint(rng: random.Random, place: Path) -> None:
    """One file changed and sealed again; what is taken trains a step."""
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    scaler = Machine(CPU, "fp16").scaler()
    augment, progress = BatchAugment("crop", torch.Generator()), Progress([dict(ROW, epoch=at) for at in range(2)])
    others = {"augment": augment, "progress": progress}
    model(torch.ones(2, 1, 4, 4)).sum().backward()
    optimizer.step()
    save_state(place, model, optimizer, scaler, others, CPU)
    manifest.seal(place, {"epoch": 1, "about": {"lr": 0.1}})
    name = rng.choice(sorted(path.name for path in place.iterdir()))
    path = place / name
    if name == manifest.MANIFEST and rng.random() < 0.7:
        path.write_bytes(json.dumps(changed(json.loads(path.read_text()), rng)).encode(errors="surrogatepass"))
    elif path.suffix == ".pt" and rng.random() < 0.8:
        torch.save(changed(torch.load(path, weights_only=True), rng, odd_object), path)
    else:
        path.write_bytes(changed_bytes(path.read_bytes(), rng))
    if name != manifest.MANIFEST:
        (place / manifest.MANIFEST).unlink()
        manifest.seal(place, {"epoch": 1, "about": {"lr": 0.1}})
    check_whole(place)
    assert (described(place), epoch_of(place)) is not None
    try:
        load_state(place, model, optimizer, scaler, others, CPU)
    except spfde.SpfdeError:
        raise
    except (
        Exception
    ) as error:  # PyTorch's and safetensors' readers have errors of their own; the trainer names the file
        if any("spfde" in str(at.tb_frame.f_code.co_filename) for at in last_frame(error)):
            raise
        return
    model(augment(torch.ones(2, 1, 4, 4))).sum().backward()
    optimizer.step()
    assert json.dumps(progress.rows, allow_nan=False)


ROW = {"density": 0.1, "test_accuracy": 0.5, "saved_tensor_bytes": 3, "test_loss": None}


def last_frame(error: BaseException) -> list[Any]:
    at = error.__traceback__
    while at is not None and at.tb_next is not None:
        at = at.tb_next
    return [] if at is None else [at]


def run_folder(rng: random.Random, place: Path) -> None:
    """Its files for people: config, metrics, summary."""
    command = TrainOptions().model_dump(mode="json")
    config: Any = {
        "command": command,
        "plan": {"block_names": ["a", "b"]},
        "timeline": {"rows": [[2, {"frozen_blocks": 1}]]},
    }
    rows: list[Any] = [dict(ROW, epoch=at, frozen_blocks=1, seconds=0.1) for at in range(3)]
    at = rng.randrange(3)
    config, rows[at] = (changed(config, rng), rows[at]) if rng.random() < 0.5 else (config, changed(rows[at], rng))
    (place / CONFIG).write_text(json.dumps(config))
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    (place / "metrics.jsonl").write_bytes(changed_bytes(text, rng) if rng.random() < 0.3 else text)
    assert all(type(epoch) is int for epoch in RunFolder(place).read_metrics())
    found = read_run(place)
    for name in ("frozen_blocks", "seconds", "test_accuracy"):
        assert found.total(name) is not False
    assert len(found.block_names()) + len(found.frozen_blocks()) >= 0


def archive(rng: random.Random, place: Path) -> None:
    content = BytesIO()
    rows = {"train": 12, "test": 6}
    arrays = {f"x_{part}": np.zeros((n, 8, 8), np.uint8) for part, n in rows.items()}
    arrays |= {f"y_{part}": np.arange(n) % 3 for part, n in rows.items()}
    rng.choice([np.savez, np.savez_compressed])(content, **arrays)
    whole = content.getvalue()
    if rng.random() < 0.5:  # one entry, with the checksum that it has then
        content, at = BytesIO(), rng.choice(list(arrays))
        with zipfile.ZipFile(BytesIO(whole)) as before, zipfile.ZipFile(content, "w") as after:
            for name in before.namelist():
                data = before.read(name)
                after.writestr(name, changed_bytes(data[:128], rng) + data[128:] if name.startswith(at) else data)
        whole = content.getvalue()
    else:
        whole = changed_bytes(whole, rng)
    (place / "set.npz").write_bytes(whole)
    assert describe_npz(place / "set.npz") == load_npz(place / "set.npz")[0]


def weights(rng: random.Random, place: Path) -> None:
    path = place / "weights.safetensors"
    state = {"a": torch.tensor([0.0, 1.0, 0.0, 2.0] * 20).view(20, 4), "b": torch.ones(3)}
    spfde.export.save_compressed(state, path)
    whole = path.read_bytes()
    table = 8 + int.from_bytes(whole[:8], "little")
    changed_ = changed_bytes(whole[8:table], rng).ljust(table - 8)[: table - 8] if rng.random() < 0.7 else None
    path.write_bytes(changed_bytes(whole, rng) if changed_ is None else whole[:8] + changed_ + whole[table:])
    assert all(isinstance(tensor, torch.Tensor) for tensor in spfde.export.load(path).values())


CASES: dict[str, Case] = {
    each.__name__: each for each in (recipe, toml, options, checkpoint, run_folder, archive, weights)
}


def attempt(case: Case, seed: int, place: Path) -> str:
    """Whether the input of that seed was refused or taken."""
    for path in place.iterdir():
        path.unlink()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            case(random.Random(seed), place)
    except spfde.SpfdeError as error:
        return "refused" if str(error) else "refused without a word"
    except BaseException as error:
        error.add_note(f"{case.__name__} of seed {seed}")
        raise
    return "taken"


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_some_inputs_are_taken_or_refused(case: Case, tmp_path: Path) -> None:
    found = {attempt(case, seed, tmp_path) for seed in range(60)}
    assert "refused" in found
    assert found <= {"refused", "taken"}


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_ten_thousand_inputs_are_taken_or_refused(case: Case, tmp_path: Path) -> None:
    for seed in range(10_000):
        attempt(case, seed, tmp_path)


@given(
    st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(), st.lists, max_leaves=5), st.data()
)
def test_any_value_in_any_place_of_a_recipe_is_taken_or_refused(value: object, data: st.DataObject) -> None:
    written = presets.PRESETS[data.draw(st.sampled_from(NAMES))].to_dict()
    table = written[data.draw(st.sampled_from(sorted(written)))]
    at = table if isinstance(table, dict) else written
    at[data.draw(st.sampled_from(sorted(at)))] = value
    try:
        made = Recipe.from_dict(written)
    except spfde.SpfdeError:
        return
    assert Recipe.from_toml(made.to_toml()) == made


@given(st.text())
def test_any_text_as_a_recipe_is_taken_or_refused(text: str) -> None:
    with contextlib.suppress(spfde.SpfdeError):
        Recipe.from_toml(text)


def session_state(name: str, seed: int) -> str:
    """A session's state with something changed; what is taken trains to the end."""
    loop, rng = Loop(recipe_with(name)), random.Random(seed)
    parts, session = loop.start()
    for epoch in session.epochs():
        parts.model.train()
        if epoch == 5:
            break
        for x, y in session.loader:
            step(parts, session, x, y)
    state = changed(session.state_dict(), rng, odd_object)
    other, resumed = loop.start()
    other.model.load_state_dict(parts.model.state_dict())
    try:
        resumed.load_state_dict(state, trust_weights=True)
        for _ in resumed.epochs():
            other.model.train()
            for x, y in resumed.loader:
                step(other, resumed, x, y)
    except spfde.SpfdeError:
        return "refused"
    except BaseException as error:
        error.add_note(f"{name} of seed {seed}")
        raise
    return "taken"


@pytest.mark.parametrize("name", ["set", "rigl"])
def test_some_states_of_a_session_are_taken_or_refused(name: str) -> None:
    assert "refused" in {session_state(name, seed) for seed in range(6)}


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_thousands_of_states_of_sessions_are_taken_or_refused() -> None:
    for seed in range(3000):
        session_state(sorted(METHODS)[seed % len(METHODS)], seed)


def test_what_is_tried_nests_deep() -> None:
    with pytest.raises(RecursionError):
        json.dumps(deep(5000))
