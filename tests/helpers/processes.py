"""Helper modules of the tests as processes of their own: several ranks, and runs that are killed."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing

from helpers import ROOT

#: Its processes begin with torch and the package imported, once for all of them.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    ["spfde.app.cli", "spfde.app.train.loop", "spfde.app.train.display", "spfde.app.report.page", "torch._dynamo"]
)


def ranks(function: Callable[..., None], folder: Path, size: int = 2, which: str = "") -> list[Any]:
    """Run ``function(rank, size, folder, which)`` in so many processes; what each left in ``rank{rank}.pt``."""
    arguments = (size, str(folder), which)
    torch.multiprocessing.start_processes(function, arguments, nprocs=size, start_method="forkserver")
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(size)]


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
