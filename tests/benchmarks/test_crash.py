"""Some kills of benchmarks/crash.py; all of them take minutes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from helpers import ROOT
from helpers.native import needs_kernels

SCRIPT = ROOT / "benchmarks" / "crash.py"


def run(*options: str) -> str:
    ended = subprocess.run(
        [sys.executable, str(SCRIPT), *options], capture_output=True, text=True, check=False, timeout=600
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


@needs_kernels
@pytest.mark.long
def test_runs_that_are_killed_at_random_end_as_if_nothing_had_been() -> None:
    told = run("--quick", "--loops", "spfde train")
    assert told.count("2 kills, as if nothing had been") == 2
    assert "| runs lost | 0 |" in told


@pytest.mark.parametrize(
    "loops",
    [
        pytest.param(["accelerate"], id="accelerate", marks=pytest.mark.long),
        pytest.param(["lightning", "transformers", "accelerate"], id="all", marks=pytest.mark.long),
    ],
)
def test_in_trainers_of_others_too(loops: list[str]) -> None:
    for name in loops:
        pytest.importorskip(name)
    told = run("--quick", "--loops", *loops, "--seed", "1")
    assert told.count("2 kills, as if nothing had been") == len(loops)
    assert "while a checkpoint is written" in told
    assert "| runs lost | 0 |" in told


@pytest.mark.long
@needs_kernels
def test_a_run_that_ends_otherwise_is_told(tmp_path: Path) -> None:
    """The script can fail: what is compared with is another run."""
    script = tmp_path / "crash.py"
    source = SCRIPT.read_text().replace('out = place / "killed"', 'case.preset, out = "set", place / "killed"')
    script.write_text(source)
    ended = subprocess.run(
        [sys.executable, str(script), "--quick", "--loops", "spfde train"],
        env={"PYTHONPATH": f"{ROOT / 'benchmarks'}:{ROOT / 'src'}", "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert ended.returncode == 1
    assert "different: " in ended.stdout
