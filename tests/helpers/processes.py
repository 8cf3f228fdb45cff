"""Helper modules of the tests as processes of their own: several ranks, and runs that are killed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from helpers import ROOT


def start(*words: str, ranks: int = 1, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run a helper module by its path and arguments, under ``torchrun`` where there are several ranks."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    path = os.pathsep.join([str(ROOT / "tests"), str(ROOT / "src")])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    return subprocess.run(
        [sys.executable, *launcher, *words],
        env=environment,
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
