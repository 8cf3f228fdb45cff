"""The lowest versions are those of every requirement, the extras' too."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from helpers import ROOT

SCRIPT = ROOT / "scripts" / "lowest_versions.py"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, check=False)


def written(folder: Path, requirements: str) -> str:
    path = folder / "pyproject.toml"
    path.write_text(
        f'[project]\nname = "own"\ndependencies = ["a>=1.2"]\n[project.optional-dependencies]\n{requirements}'
    )
    return str(path)


def test_each_requirement_is_pinned_once_and_the_projects_own_extras_are_not(tmp_path: Path) -> None:
    ran = run(written(tmp_path, 'more = ["b[x] >= 3, <4", "a>=1.2"]\nall = ["own[more]", "c-d>=0.1.post1"]\n'))
    assert ran.stdout.split() == ["a==1.2", "b==3", "c-d==0.1.post1"]


@pytest.mark.parametrize("requirement", ["b", "b<4", "b==3"])
def test_a_requirement_without_a_lower_bound_is_named(tmp_path: Path, requirement: str) -> None:
    ran = run(written(tmp_path, f'more = ["{requirement}"]\n'))
    assert ran.returncode == 1
    assert repr(requirement) in ran.stderr


def test_the_projects_own_requirements_all_have_one() -> None:
    ran = run()
    assert ran.returncode == 0
    assert "torch==2.6" in ran.stdout.split()
