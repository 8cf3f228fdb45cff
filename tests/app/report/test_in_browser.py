"""The pages in a real browser: whatever their width, nothing is cut off, and nothing scrolls sideways."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from helpers.browser import cut_off
from helpers.comparisons import made_comparison
from spfde.app.report.page import write_report
from spfde.app.report.plots import PLOTS

MakeRun = Callable[..., Path]

WIDTHS = (1280, 1000, 390, 320)
LONG = "fashion-mini-resnet32_with-a-name_that-has-no-blank-" + "x" * 60

pytestmark = pytest.mark.long


@pytest.mark.parametrize("count", [1, 3, 12])
def test_all_of_a_page_about_runs_is_in_sight(
    make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    monkeypatch.setattr("spfde.app.report.page.PLOTS", PLOTS[:2])
    folders = [make_run(f"runs/{LONG}-{at}" if at % 2 == 0 else f"runs/{at}", done=6 - at % 3) for at in range(count)]
    for folder in folders:
        settings = json.loads((folder / "config.json").read_text())
        settings["command"] |= {"data": f"/data/{LONG}", "recipe_name": f"{LONG}.toml"}
        settings["plan"]["uncounted"] = {LONG: 2}
        settings["versions"]["torch"] = "2.14.1+cu130.git0123456789abcdef"
        (folder / "config.json").write_text(json.dumps(settings))
    write_report(folders, tmp_path / "report.html")
    assert cut_off(tmp_path / "report.html", WIDTHS) == {width: [] for width in WIDTHS}


@pytest.mark.parametrize("count", [3, 30])
def test_all_of_a_page_about_a_comparison_is_in_sight(tmp_path: Path, count: int) -> None:
    names = [
        f"mest sparsity=0.9 {LONG} {at}" if at % 2 else f"rigl sparsity=0.95 freeze=0.3 {at}" for at in range(count)
    ]
    found = {name: [0.5 + 0.01 * at + 0.002 * seed * (at % 4) for seed in range(4)] for at, name in enumerate(names)}
    folder = made_comparison(tmp_path / LONG, found, seeds=5, options={"data": f"/data/{LONG}"})
    write_report([folder], tmp_path / "report.html")
    assert cut_off(tmp_path / "report.html", WIDTHS) == {width: [] for width in WIDTHS}


def test_the_browser_sees_what_does_not_fit(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text(f'<div style="overflow: auto"><p style="white-space: nowrap">{"wide " * 100}</p></div>')
    assert any("wider than its place" in words for words in cut_off(page, [390])[390])
    page.write_text(f'<p style="white-space: nowrap">{"wide " * 100}</p>')
    assert "the page scrolls to" in cut_off(page, [390])[390][0]
