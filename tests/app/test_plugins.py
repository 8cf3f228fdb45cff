"""Modules of others on the command line: what they register can be named, and nothing else imports them."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from helpers import commands

pytestmark = pytest.mark.cli

Spfde = Callable[..., commands.Outcome]

MODULE = """
from pathlib import Path
from typing import ClassVar

import spfde

Path("imported").touch()


@spfde.register("method")
class Own(spfde.SET):
    name: ClassVar[str] = "own"
    summary: ClassVar[str] = "A method of somebody else."
"""


@pytest.fixture
def spfde(here: Path) -> Spfde:
    """Runs the command line in a process of its own, in the folder ``here``: what is imported there stays there."""

    def run(*argv: object) -> commands.Outcome:
        return commands.start([str(argument) for argument in argv], log=here.parent / "log", cwd=here).end()

    return run


@pytest.fixture
def plugin(here: Path) -> str:
    """The name of a module in the working folder that registers a method."""
    (here / "of_mine.py").write_text(MODULE)
    (here / "own.toml").write_text('[sparsity]\nmethod = "own"\nsparsity = 0.5\n')
    return "of_mine"


def test_what_a_plugin_registers_is_listed(plugin: str, spfde: Spfde) -> None:
    assert "\n  own        A method of somebody else.\n" in spfde("methods", "--plugin", plugin).out
    assert "\n  own " not in spfde("methods").out


def test_a_plugin_that_is_installed_needs_no_naming(plugin: str, here: Path) -> None:
    info = here / "of_mine-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: of-mine\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[spfde.plugins]\nmine = {plugin}\n")
    assert "\n  own " in commands.run("methods", cwd=here).out


@pytest.mark.parametrize(("text", "told"), [(None, "ModuleNotFoundError"), ("1 / 0", "ZeroDivisionError")])
def test_a_plugin_that_cannot_be_imported_is_refused(text: str | None, told: str, spfde: Spfde, here: Path) -> None:
    if text is not None:
        (here / "broken_one.py").write_text(text)
    for command in ("methods", "plan", "train"):
        ended = spfde(command, "--plugin", "broken_one")
        assert ended.code == 2
        assert ended.err.startswith("spfde: --plugin='broken_one': ")
        assert told in ended.err


def test_a_name_in_a_recipe_file_imports_nothing(plugin: str, spfde: Spfde, here: Path) -> None:
    for argv in (["plan", "--recipe", "own.toml"], ["cite", "own.toml"]):
        ended = spfde(*argv)
        assert ended.code == 2
        assert "'own'" in ended.err
    assert not (here / "imported").exists()


def test_a_recipe_file_may_name_what_a_plugin_registered(plugin: str, tiny: Path, spfde: Spfde, here: Path) -> None:
    argv = ["--plugin", plugin, "--recipe", "own.toml"]
    assert spfde("plan", *argv, "--epochs", 4).code == 0
    assert spfde("train", *argv, "--data", tiny, "--epochs", 1, "--out", "run", "--quiet").code == 0
    assert spfde("cite", "run", "--plugin", plugin).code == 0
    assert spfde("export", "run", "--plugin", plugin).code == 0


def test_a_run_goes_on_with_the_plugins_that_it_was_started_with_and_no_others(
    plugin: str, tiny: Path, spfde: Spfde, here: Path
) -> None:
    argv = ["train", "--plugin", plugin, "--recipe", "dense", "--data", str(tiny), "--epochs", "4", "--out", "run"]
    running = commands.start(argv, log=here.parent / "run", cwd=here, wait_at="before a checkpoint")
    running.reach()
    assert running.kill(signal.SIGINT).code == 130
    assert json.loads((here / "run" / "config.json").read_text())["command"]["plugin"] == [plugin]
    (here / "imported").unlink()
    for argv in (["train", "--resume", "run"], ["export", "run"]):
        ended = spfde(*argv)
        assert ended.code == 2
        assert f"--plugin {plugin}" in ended.err
    assert not (here / "imported").exists()
    ended = spfde("train", "--resume", "run", "--plugin", plugin, "--quiet")
    assert (ended.code, ended.err) == (0, "")
