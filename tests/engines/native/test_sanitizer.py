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
def test_random_models_touch_no_memory_that_is_not_theirs_and_agree_with_pytorch() -> None:
    command = [sys.executable, str(SCRIPT), "--rounds", "12", "--seed", "1"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert "12 rounds, no fault" in ended.stdout
