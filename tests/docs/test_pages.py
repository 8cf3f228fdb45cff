"""What the documentation shows in Python and TOML works, so that it cannot rot."""

from __future__ import annotations

import doctest
import importlib
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import spfde
from helpers import ROOT

Names = dict[str, object]
CARDS = sorted(path for path in (ROOT / "docs" / "methods").glob("*.md") if path.stem != "README")


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def run(page: Path, names: Names) -> None:
    found = blocks(page, "python")
    assert found
    for block in found:
        exec(compile(block, page.name, "exec"), names)


def test_the_readme_trains_the_whole_system_and_saves_it(
    new_names: Callable[[], Names], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = new_names()
    run(ROOT / "README.md", names)
    session = names["session"]
    assert isinstance(session, spfde.Session)
    assert session.epoch == 160
    assert session.frozen_blocks > 0
    assert len(session.partial_set) == 16
    assert "Cost of 160 epochs" in capsys.readouterr().out
    assert set(torch.load(tmp_path / "checkpoint.pt")) == {"model", "optimizer", "spfde"}


def test_the_faq_resumes_what_the_readme_saved(new_names: Callable[[], Names]) -> None:
    saved = new_names()
    run(ROOT / "README.md", saved)
    names = new_names() | {"recipe": saved["recipe"]}
    run(ROOT / "docs" / "faq.md", names)
    before, after = saved["session"], names["session"]
    assert isinstance(before, spfde.Session)
    assert isinstance(after, spfde.Session)
    assert after is not before
    assert after.epoch == 160
    assert after.cost == before.cost
    assert torch.equal(after.partial_set, before.partial_set)


def test_the_page_on_the_trainers_of_others_trains_in_each(
    new_names: Callable[[], Names], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from helpers.lightning_runs import RECIPE, Module
    from helpers.transformers_runs import Classifier, Items

    monkeypatch.chdir(tmp_path)  # Lightning's checkpoints and logs go where it is started
    module = Module()
    names = {"recipe": RECIPE, "module": module, "loader": module.train_dataloader(), "classifier": Classifier()}
    page = ROOT / "docs" / "integrations.md"
    lightning, trainer, accelerate = (block.replace("160", "8") for block in blocks(page, "python"))
    exec(compile(lightning, page.name, "exec"), names)
    exec(compile(trainer, page.name, "exec"), names | {"folder": tmp_path, "dataset": Items()})
    exec(compile(accelerate.replace("()", "(cpu=True)", 1), page.name, "exec"), new_names() | {"recipe": RECIPE})


@pytest.mark.parametrize("name", ["lightning", "transformers", "accelerate"])
def test_the_docstring_of_each_integration_runs(name: str, new_names: Callable[[], Names]) -> None:
    module = importlib.import_module(f"spfde.integrations.{name}")
    examples = [each for each in doctest.DocTestFinder().find(module, extraglobs=new_names()) if each.examples]
    assert examples
    for example in examples:
        assert doctest.DocTestRunner().run(example).failed == 0


def test_the_page_on_the_command_line_names_every_command_and_option() -> None:
    from typer.main import get_command

    from spfde.app.cli import app

    text = (ROOT / "docs" / "command-line.md").read_text(encoding="utf-8")
    commands = get_command(app).commands  # type: ignore[attr-defined]
    assert commands
    for name, command in commands.items():
        assert f"## spfde {name}\n" in text
        options = [option for item in command.params for option in (*item.opts, *item.secondary_opts)]
        for option in options:
            if option.startswith("--") and option != "--help":
                assert f"`{option}`" in text, f"spfde {name} {option}"


def test_the_readme_has_the_markers_that_the_results_go_between() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert text.count("<!-- results:start -->") == text.count("<!-- results:end -->") == 1
    assert text.index("<!-- results:start -->") < text.index("<!-- results:end -->")


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.stem)
def test_the_card_makes_recipes_that_can_be_attached(card: Path, new_names: Callable[[], Names]) -> None:
    found = blocks(card, "python")
    assert found
    for block in found:
        names = new_names()
        exec(compile(block, card.name, "exec"), names)
        recipe = names["recipe"]
        assert isinstance(recipe, spfde.Recipe)
        assert not recipe.is_neutral
        session = spfde.attach(names["model"], names["optimizer"], names["loader"], recipe, epochs=160)  # type: ignore[arg-type]
        session.detach()


@pytest.mark.parametrize("page", [*CARDS, ROOT / "docs" / "command-line.md"], ids=lambda page: page.stem)
def test_recipes_that_are_shown_as_toml_can_be_read(page: Path) -> None:
    for block in blocks(page, "toml"):
        recipe = spfde.Recipe.from_toml(block)
        assert not recipe.is_neutral


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.stem)
def test_the_card_has_the_headings_that_every_card_has(card: Path) -> None:
    headings = re.findall(r"^## (.+)$", card.read_text(encoding="utf-8"), re.MULTILINE)
    expected = ["How to use", "What it does", "What to expect", "When it does not help", "Hyper-parameters", "Source"]
    assert headings == expected
