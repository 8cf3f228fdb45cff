"""The kernels compile for GPUs, as a training step starts them, also where there is none."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import ROOT
from helpers.blocks import needs_triton

pytestmark = needs_triton

# What a program may have of a multiprocessor's shared memory: the least of all cards since capability 8.0.
MOST_SHARED = 99 * 1024


@pytest.mark.long
@pytest.mark.parametrize("capability", [80, 90])
def test_every_kernel_of_a_step_compiles_and_fits(capability: int, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT / "src")}
    script = ROOT / "tests" / "helpers" / "compile_kernels.py"
    done = subprocess.run(
        [sys.executable, str(script), str(capability)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    # Three kinds of blocks, few and many tokens, five types; the product forward and back.
    assert [one["kernel"] for one in found] == ["product", "product", "weight_gradient", "collect"] * 30
    assert all(one["machine code"] for one in found)
    assert max(one["shared"] for one in found) <= MOST_SHARED
    # All but float32 that is not rounded ("ieee") is for tensor cores, and read 16 bytes at a time.
    in_half = [one for number, one in enumerate(found) if number // 4 % 5 < 3]
    assert len(in_half) == 72
    for one in in_half:
        assert one["tensor cores"] == (one["kernel"] != "collect"), one
        assert one["wide"], one
        assert not one["narrow"], one
