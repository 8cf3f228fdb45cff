"""A run folder that somebody else made: no command that reads it runs what is in it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from helpers.commands import Spfde
from helpers.stopping import stopped_run
from helpers.strangers import RunsCode
from spfde.app.runs import manifest


@pytest.fixture(scope="module")
def trained(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped after one of two epochs."""
    return stopped_run(tiny, tmp_path_factory.mktemp("stranger") / "run", after=1, epochs=2, keep_every=1)


@pytest.fixture
def run(trained: Path, here: Path) -> Path:
    return Path(shutil.copytree(trained, here / "run"))


def reseal(folder: Path) -> None:
    """Make the manifest fit what is there now, as whoever changes a file can."""
    written = json.loads((folder / manifest.MANIFEST).read_text())
    (folder / manifest.MANIFEST).unlink()
    manifest.seal(folder, {name: written[name] for name in ("epoch", "about")})


COMMANDS: dict[str, list[str]] = {
    "resume": ["train", "--resume", "run", "--quiet"],
    "export": ["export", "run", "--last"],
    "report": ["report", "run"],
    "cite": ["cite", "run"],
    "analyze": ["analyze", "run", "--quiet", "--samples", "8", "--batch-size", "4", "--gradient-samples", "0"],
}


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_no_command_runs_code_from_any_file_of_the_folder(
    command: list[str], run: Path, spfde: Spfde, here: Path
) -> None:
    mark = here / "mark"
    torch.save({"model": RunsCode(mark)}, here / "pickled.pt")
    pickled = (here / "pickled.pt").read_bytes()
    for path in [path for path in run.rglob("*") if path.is_file() and path.name != manifest.MANIFEST]:
        if path.name in ("config.json", "recipe.toml"):
            continue  # these are needed to get as far as the others; below
        path.write_bytes(pickled)
    for sealed in {path.parent for path in run.rglob(manifest.MANIFEST)}:
        reseal(sealed)
    ended = spfde(*command)
    assert ended.code in (0, 2)
    assert "Traceback" not in ended.err
    assert not mark.exists()
    for name in ("config.json", "recipe.toml"):
        (run / name).write_bytes(pickled)
    assert spfde(*command).code == 2
    assert not mark.exists()


@pytest.mark.parametrize("named", [{"plugin": ["stranger"]}, {"plugin": "stranger"}, {"plugin": [["stranger"]]}])
def test_a_module_that_a_folder_names_is_not_imported(
    named: dict[str, Any], run: Path, spfde: Spfde, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (here / "stranger.py").write_text("from pathlib import Path\nPath('mark').touch()\n")
    monkeypatch.syspath_prepend(here)
    config = json.loads((run / "config.json").read_text())
    config["command"] |= named
    (run / "config.json").write_text(json.dumps(config))
    for command in (COMMANDS["resume"], COMMANDS["export"], COMMANDS["analyze"]):
        assert spfde(*command).code == 2
    assert not (here / "mark").exists()


def test_a_folder_of_an_earlier_version_is_refused_with_the_reason(run: Path, spfde: Spfde, here: Path) -> None:
    latest = run / "checkpoints" / "latest"
    torch.save(RunsCode(here / "mark"), latest / "custom_checkpoint_0.pkl")
    reseal(latest)
    ended = spfde(*COMMANDS["resume"])
    assert ended.code == 2
    assert "custom_checkpoint_0.pkl" in ended.err
    assert "can run code" in ended.err
    assert not (here / "mark").exists()


def test_pickled_arrays_in_an_archive_of_data_are_not_read(spfde: Spfde, here: Path) -> None:
    objects = np.array([RunsCode(here / "mark")] * 4, dtype=object)
    np.savez("set.npz", x_train=objects, y_train=objects, x_test=objects, y_test=objects)
    assert spfde("plan", "--data", "set.npz").code == 2
    assert not (here / "mark").exists()


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "a/../../outside"])
def test_a_manifest_names_no_file_outside_of_its_folder(name: str, run: Path, spfde: Spfde) -> None:
    path = run / "checkpoints" / "latest" / manifest.MANIFEST
    written = json.loads(path.read_text())
    written["sha256"][name] = "0" * 64
    path.write_text(json.dumps(written))
    ended = spfde(*COMMANDS["resume"])
    assert ended.code == 2
    assert "outside of the folder" in ended.err


def test_links_in_the_folder_are_replaced_and_not_written_through(run: Path, spfde: Spfde, here: Path) -> None:
    precious = here / "precious"
    precious.write_text("content")
    for name in ("metrics.jsonl", "summary.json", "recipe.toml"):
        (run / name).unlink(missing_ok=True)
        (run / name).symlink_to(precious if name != "summary.json" else here / "nothing")
    assert spfde(*COMMANDS["resume"]).code == 0
    assert precious.read_text() == "content"
    assert not (here / "nothing").exists()


@pytest.mark.parametrize(
    "name",
    [
        "checkpoints",
        *(f"checkpoints/{name}" for name in ("latest", "previous", "best", ".writing-latest", "kept")),
        *("checkpoints/kept/epoch-0001", "spfde", "spfde/file"),
    ],
)
def test_nothing_is_written_or_deleted_through_a_link_out_of_the_folder(
    name: str, run: Path, spfde: Spfde, here: Path
) -> None:
    elsewhere = here / "elsewhere"
    place = run / name
    if place.is_dir():
        shutil.move(place, elsewhere)
    elif name == "spfde/file":  # of a tracker, which would add to it
        elsewhere.write_text("content")
    else:
        elsewhere.mkdir()
        (elsewhere / "precious").write_text("content")
    place.parent.mkdir(exist_ok=True)
    place.symlink_to(elsewhere)
    before = contents(elsewhere)
    ended = spfde(*COMMANDS["resume"])
    assert ended.code == 2
    assert f"{name}: is a link that leads out" in ended.err
    assert contents(elsewhere) == before
    assert place.is_symlink()


def test_a_link_to_the_run_folder_as_a_whole_and_those_inside_it_are_followed(
    run: Path, spfde: Spfde, here: Path
) -> None:
    shutil.move(run, here / "elsewhere")
    run.symlink_to(here / "elsewhere")
    (run / "wandb").mkdir()
    (run / "wandb" / "newest").symlink_to(run / "checkpoints")  # as some trackers make them
    assert spfde(*COMMANDS["resume"]).code == 0
    assert (here / "elsewhere" / "summary.json").is_file()


def test_checkpoints_behind_a_link_are_read(run: Path, spfde: Spfde, here: Path) -> None:
    assert spfde(*COMMANDS["resume"]).code == 0
    shutil.move(run / "checkpoints", here / "elsewhere")
    (run / "checkpoints").symlink_to(here / "elsewhere")
    before = contents(here / "elsewhere")
    assert all(spfde(*COMMANDS[name]).code == 0 for name in COMMANDS if name != "resume")
    assert contents(here / "elsewhere") == before


def test_an_analysis_is_not_written_through_a_link(run: Path, spfde: Spfde, here: Path) -> None:
    assert spfde(*COMMANDS["resume"]).code == 0
    (here / "elsewhere").mkdir()
    (run / "analysis").symlink_to(here / "elsewhere")
    ended = spfde(*COMMANDS["analyze"])
    assert ended.code == 2
    assert "leads out" in ended.err
    assert not list((here / "elsewhere").iterdir())
    named = [*COMMANDS["analyze"], "--out", "results"]  # a link that the user names is the user's
    (here / "results").symlink_to(here / "elsewhere")
    assert spfde(*named).code == 0


def test_files_that_share_their_content_with_others_are_replaced_and_not_written_to(
    run: Path, spfde: Spfde, here: Path
) -> None:
    """Hard links: as an unpacked archive may hold them."""
    linked = [path for path in run.rglob("*") if path.is_file() and path.name != ".lock"]
    for number, path in enumerate(linked):
        os.link(path, here / f"linked{number}")
    before = [(here / f"linked{number}").read_bytes() for number in range(len(linked))]
    assert spfde(*COMMANDS["resume"]).code == 0
    assert [(here / f"linked{number}").read_bytes() for number in range(len(linked))] == before


def contents(path: Path) -> dict[str, bytes]:
    if path.is_file():
        return {"": path.read_bytes()}
    return {str(each.relative_to(path)): each.read_bytes() for each in sorted(path.rglob("*")) if each.is_file()}


def change_group(state: dict[str, Any], **values: Any) -> dict[str, Any]:
    return {**state, "param_groups": [{**state["param_groups"][0], **values}]}


def change_first(state: dict[str, Any], value: Any) -> dict[str, Any]:
    return {**state, "state": {**state["state"], 0: {"momentum_buffer": value}}}


CHANGES: list[tuple[str, Callable[[Any], Any]]] = [
    ("optimizer.pt", lambda state: None),
    ("optimizer.pt", lambda state: {}),
    ("optimizer.pt", lambda state: {**state, "param_groups": []}),
    ("optimizer.pt", lambda state: change_group(state, lr="fast")),
    ("optimizer.pt", lambda state: change_group(state, lr=float("nan"))),
    ("optimizer.pt", lambda state: change_group(state, momentum=True)),
    ("optimizer.pt", lambda state: change_group(state, params=[0])),
    ("optimizer.pt", lambda state: change_group(state, more=1)),
    ("optimizer.pt", lambda state: change_first(state, "a tensor")),
    ("optimizer.pt", lambda state: change_first(state, torch.zeros(1))),
    ("optimizer.pt", lambda state: {**state, "state": {10**6: {}}}),
    ("progress.pt", lambda state: {**state, "rows": [{}]}),
    ("progress.pt", lambda state: {**state, "rows": [{**state["rows"][0], "density": "low"}]}),
    ("progress.pt", lambda state: {**state, "rows": [{**state["rows"][0], "test_accuracy": float("nan")}]}),
    ("progress.pt", lambda state: {**state, "rows": [{**state["rows"][0], "epoch": 5}]}),
    ("progress.pt", lambda state: {**state, "rows": [{**state["rows"][0], "more": [1]}]}),
    ("progress.pt", lambda state: {**state, "dense_step_seconds": "long"}),
    ("generators.pt", lambda state: {**state, "python": (3, (0,) * 625, None)}),
    ("generators.pt", lambda state: {**state, "numpy": ("MT19937", [1] * 624, 9999, 0, 0.0)}),
    ("generators.pt", lambda state: {**state, "torch": state["torch"][:7]}),
    ("generators.pt", lambda state: {}),
    ("generators.pt", lambda state: 0.5),
    ("augment.pt", lambda state: {**state, "generator": torch.zeros_like(state["generator"])}),
    ("session.pt", lambda state: {**state, "generator": torch.zeros_like(state["generator"])}),
    ("session.pt", lambda state: {**state, "run": {**state["run"], "epochs": torch.zeros(3)}}),
    ("session.pt", lambda state: [state]),
]


@pytest.mark.parametrize(("name", "change"), CHANGES, ids=[f"{at}-{name}" for at, (name, _) in enumerate(CHANGES)])
def test_a_resealed_state_with_values_of_wrong_kinds_is_refused(
    name: str, change: Callable[[Any], Any], run: Path, spfde: Spfde
) -> None:
    latest = run / "checkpoints" / "latest"
    torch.save(change(torch.load(latest / name, weights_only=True)), latest / name)
    reseal(latest)
    ended = spfde(*COMMANDS["resume"])
    assert ended.code == 2, ended.err
    assert "Traceback" not in ended.err
