"""The check of the documentation finds what is broken, and nothing else."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def make_docs() -> ModuleType:
    path = Path(__file__).parents[2] / "scripts" / "make_docs.py"
    spec = importlib.util.spec_from_file_location("make_docs", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["make_docs"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "docs" / "methods").mkdir(parents=True)
    (tmp_path / "docs" / "guide.md").write_text("# Guide\n\n## What it costs: FLOPs, seconds\n\n## Twice\n\n## Twice\n")
    (tmp_path / "docs" / "methods" / "mest.md").write_text("# MEST\n\n`spfde.MEST(sparsity=0.9)`\n")
    return tmp_path


def faults(make_docs: ModuleType, root: Path, text: str) -> list[str]:
    (root / "README.md").write_text(text)
    return list(make_docs.broken_links(root / "README.md", root))


def test_good_links_are_accepted(make_docs: ModuleType, root: Path) -> None:
    text = (
        "# Title\n[a](docs/guide.md) [b](docs/guide.md#what-it-costs-flops-seconds) [c](#title)\n"
        "[folder](docs/methods/) [web](https://example.org/x) [mail](mailto:a@example.org)\n"
        "[twice](docs/guide.md#twice-1)\n\n"
        "[ref]: docs/guide.md\n"
    )
    assert faults(make_docs, root, text) == []


@pytest.mark.parametrize(
    ("link", "says"),
    [
        ("[a](docs/gone.md)", "leads to no file"),
        ("![picture](docs/gone.png)", "leads to no file"),
        ('<img src="docs/gone.png">', "leads to no file"),
        ("[ref]: docs/gone.md", "leads to no file"),
        ("[a](docs/guide.md#nowhere)", "no such heading"),
        ("[a](../outside.md)", "leaves the repository"),
    ],
)
def test_a_link_that_leads_nowhere_is_named(make_docs: ModuleType, root: Path, link: str, says: str) -> None:
    (fault,) = faults(make_docs, root, f"# Title\n\n{link}\n")
    assert fault.startswith("README.md: link '")
    assert says in fault


def test_links_inside_code_are_no_links(make_docs: ModuleType, root: Path) -> None:
    assert faults(make_docs, root, "```md\n[a](gone.md)\n```\nand `[b](gone.md)`\n") == []


def test_a_technique_that_no_card_shows_is_named(make_docs: ModuleType, root: Path) -> None:
    assert make_docs.without_card(["MEST", "MES", "RigL"], root) == ["MES", "RigL"]
