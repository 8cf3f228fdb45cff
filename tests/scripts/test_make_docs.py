"""The site's links lead somewhere, and what is public is documented: with MkDocs and, where it can be, without."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from helpers import ROOT


def load(root: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_docs", root / "scripts" / "make_docs.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def make_docs() -> ModuleType:
    return load(ROOT)


def documents() -> list[str]:
    return [path.relative_to(ROOT).as_posix() for path in (*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"))]


@pytest.mark.parametrize("page", documents())
def test_links_of_the_documentation_lead_to_files(make_docs: ModuleType, page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    targets = [target for _, target, _ in make_docs.link_targets(text, page)]
    assert [target for target in targets if not (ROOT / target).exists()] == []


@pytest.mark.parametrize(
    ("page", "link", "in_the_site"),
    [
        ("README.md", "[a](docs/faq.md#resume)", "[a](faq.md#resume)"),
        ("README.md", "![a](docs/images/a.svg)", "![a](images/a.svg)"),
        ("README.md", "[a](examples/own_loop.py)", "[a](examples/own_loop.py.md)"),
        ("README.md", "[a](LICENSE)", "[a](LICENSE.md)"),
        ("docs/faq.md", "[a](../README.md#install)", "[a](index.md#install)"),
        ("docs/faq.md", "[a](cost.md) and [b](methods/mest.md)", "[a](cost.md) and [b](methods/mest.md)"),
        ("docs/methods/mest.md", "[a](../../CHANGELOG.md)", "[a](../CHANGELOG.md)"),
        ("docs/methods/mest.md", "[a]: ../cost.md", "[a]: ../cost.md"),
        ("docs/faq.md", "[a](#resume) [b](https://example.org/x) [c](mailto:a@b.c)", None),
        ("docs/faq.md", "`[a](../README.md)`\n\n```\n[b](../README.md)\n```\n", None),
    ],
)
def test_a_link_of_the_repository_becomes_one_of_the_site(
    make_docs: ModuleType, page: str, link: str, in_the_site: str | None
) -> None:
    assert make_docs.with_site_links(link, page) == (link if in_the_site is None else in_the_site)


def test_files_outside_docs_come_along_with_what_they_link_to(make_docs: ModuleType) -> None:
    found = make_docs.linked_files(["README.md"])
    assert {"CONTRIBUTING.md", "examples/own_loop.py", "LICENSE"} <= found
    assert not any(path.startswith("docs/") for path in found)


# --- with MkDocs (make docs installs it) ------------------------------------------------------------------------------


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    pytest.importorskip("mkdocs")
    for folder in ("docs", "examples", "scripts", "src"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for path in (*ROOT.glob("*.md"), *ROOT.glob("*.cff"), ROOT / "LICENSE", ROOT / "mkdocs.yml"):
        shutil.copy(path, tmp_path)
    return tmp_path


@pytest.mark.long
def test_the_site_has_the_reference_and_a_broken_link_or_an_undocumented_name_ends_its_building(copied: Path) -> None:
    with (copied / "docs" / "faq.md").open("a", encoding="utf-8") as page:
        page.write("\n[a](gone.md) [b](cost.md#nowhere)\n")
    errors = copied / "src" / "spfde" / "core" / "errors.py"
    text = errors.read_text(encoding="utf-8")
    errors.write_text(text.replace('"""The loss became NaN or infinite.', '_ = """', 1), encoding="utf-8")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict"]
    done = subprocess.run(command, cwd=copied, capture_output=True, text=True, encoding="utf-8", check=False)

    assert done.returncode != 0
    warnings = [line for line in done.stderr.splitlines() if line.startswith("WARNING")]
    for fault in ("spfde.TrainingDiverged", "gone.md", "#nowhere"):
        assert any(fault in line for line in warnings)
    assert len(warnings) == 3, done.stderr  # nothing else is wrong with it
    assert 'id="spfde.attach"' in (copied / "site" / "reference" / "session.html").read_text(encoding="utf-8")
