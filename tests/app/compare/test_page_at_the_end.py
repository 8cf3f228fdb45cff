"""What ``spfde compare`` leaves beside its tables: the page of its folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.commands import Spfde
from spfde.app.compare import command


def test_a_comparison_ends_with_a_page_or_says_what_it_lacks_for_one(
    spfde: Spfde, here: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = here / "table"
    asked = ("--recipe", "dense", "--seeds", 1, "--epochs", 1, "--data", tiny, "--engine", "masked", "--out", folder)
    outcome = spfde("compare", *asked)
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out.endswith(f"page: {folder / 'report.html'}\n")
    made = sorted(path.name for path in folder.glob("report*"))
    assert made == ["report-flops.png", "report-seconds.png", "report.html"]
    assert "1 candidate with 1 seed each" in (folder / "report.html").read_text(encoding="utf-8")

    for name in made:
        (folder / name).unlink()
    monkeypatch.setattr(command, "find_spec", lambda name: None if name == "jinja2" else name)
    outcome = spfde("compare", "--resume", folder)
    assert outcome.code == 0
    told = f"page: none without jinja2; install that, and run `spfde report {folder}`"
    assert outcome.out.splitlines()[-1] == told
    assert not list(folder.glob("report*"))
