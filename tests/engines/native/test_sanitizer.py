"""The kernels under AddressSanitizer: a short run of the fuzz; scripts/fuzz_native.py runs long ones."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import ROOT
from helpers.native import needs_kernels

SCRIPT = ROOT / "scripts" / "fuzz_native.py"


def sanitizer_is_there() -> bool:
    compiler = shutil.which("g++")
    if compiler is None or sys.platform != "linux":
        return False
    found = subprocess.run([compiler, "-print-file-name=libasan.so"], capture_output=True, text=True, check=False)
    return Path(found.stdout.strip()).is_absolute()


@needs_kernels
@pytest.mark.skipif(not sanitizer_is_there(), reason="g++ with AddressSanitizer is not there")
@pytest.mark.parametrize(
    ("options", "rounds"), [((), 12), pytest.param(("--half",), 40, marks=pytest.mark.long)], ids=["double", "bf16"]
)
def test_random_models_touch_no_memory_that_is_not_theirs_and_agree_with_pytorch(
    options: tuple[str, ...], rounds: int
) -> None:
    command = [sys.executable, str(SCRIPT), "--rounds", str(rounds), "--seed", "1", *options]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=900)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert f"{rounds} rounds, no fault" in ended.stdout
