"""How much faster is a native step than with an earlier version of the engine?

Steps of both versions in turn, each in a process of its own, at 90 %, batches of 64: that of this tree, in fp32 or in
bf16, and the other one's in fp32. The other version comes from the repository's history: the last commit before the
kernels for bf16. Or it is any tree with its own `benchmarks/native.py`, which is run beside this tree's `_common.py`.

    python benchmarks/versions.py                   # about 4 minutes on two cores
    python benchmarks/versions.py --other TREE
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from _common import Figure, Result, Served, Table, Timing, begin, commit, compare, interleave, parser, publish

TREE = Path(__file__).resolve().parents[1]
SPARSITY = 0.9
EARLIER = "fbc8cbe"
# Model, precision of this tree's step, least speed-up and what is aimed at.
CASES = (
    ("ResNet-32", "fp32", 1.05, 1.15),
    ("VGG-19", "bf16", 1.4, 1.6),
    ("ResNet-18", "bf16", 1.4, 1.6),
    ("ViT-tiny", "bf16", 1.1, 1.3),
)


def serve(tree: Path, name: str, precision: str, threads: int) -> None:
    """The process of one version: for each number that it reads it trains so many steps, and tells their seconds."""
    warnings.simplefilter("ignore")
    sys.path.insert(0, str(tree / "benchmarks"))
    native = importlib.import_module("native")
    torch.set_num_threads(threads)
    x, y = native.batch(native.BATCH)
    model = native.resnet32() if name == "ResNet-32" else native.MODELS[name]()
    trainer = native.sparse(model, SPARSITY, x, y)
    trainer.bf16 = precision == "bf16"
    for line in sys.stdin:
        timings = interleave({"step": trainer.step}, int(line), warmup=0)
        print(json.dumps(timings["step"].seconds), flush=True)


@contextmanager
def earlier() -> Iterator[Path]:
    """The earlier version in a folder of its own, for as long as it is needed."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "earlier"
        git = ["git", "-C", str(TREE), "worktree"]
        try:
            subprocess.run([*git, "add", "--detach", str(tree), EARLIER], check=True, capture_output=True, text=True)
        except (OSError, subprocess.CalledProcessError) as error:
            told = getattr(error, "stderr", None) or str(error)
            sys.exit(f"Commit {EARLIER} cannot be had from this repository (a shallow clone?): {told.strip()}")
        try:
            yield tree
        finally:
            subprocess.run([*git, "remove", "--force", str(tree)], check=False, capture_output=True)


def measure(other: Path, name: str, precision: str, rounds: int) -> tuple[Timing, Timing]:
    """Steps of this tree, and of the other one."""
    taken: tuple[list[float], list[float]] = ([], [])
    with ExitStack() as ended:
        versions = []
        for tree, its in ((TREE, precision), (other, "fp32")):
            command = [sys.executable, __file__, "--serve", str(tree), name, its, str(torch.get_num_threads())]
            versions.append(Served(command, {**os.environ, "PYTHONPATH": str(tree / "src")}))
            ended.callback(versions[-1].end)
            versions[-1].ask(3)
        for round_ in range(rounds):
            for at in (0, 1) if round_ % 2 else (1, 0):
                versions[at].ask(1)  # it has the caches again
                taken[at].extend(versions[at].ask(1))
    return Timing(tuple(taken[0])), Timing(tuple(taken[1]))


def main(argv: list[str] | None = None) -> None:
    """Run it."""
    made = parser(__doc__)
    made.add_argument("--serve", nargs=4, default=None, metavar=("TREE", "MODEL", "PRECISION", "THREADS"))
    made.add_argument("--other", type=Path, default=None, metavar="TREE", help="a tree with the other version")
    made.add_argument("--rounds", type=int, default=None, help="rounds (15)")
    options = made.parse_args(argv)
    if options.serve is not None:
        tree, name, precision, threads = options.serve
        serve(Path(tree), name, precision, int(threads))
        return
    if options.other is not None and not (options.other / "benchmarks" / "native.py").is_file():
        made.error(f"--other {options.other}: it has no benchmarks/native.py")
    stamped = begin(options)
    with ExitStack() as ended:
        other = (options.other or ended.enter_context(earlier())).resolve()
        publish(compared(other, options, stamped), options)


def compared(other: Path, options: argparse.Namespace, stamped: dict[str, Any]) -> Result:
    """Each case."""
    rounds = options.rounds or (2 if options.quick else 15)
    figures, timings = [], {}
    for name, precision, least, aim in CASES[:1] if options.quick else CASES:
        ours, theirs = measure(other, name, precision, rounds)
        what = f"{name}: native step at 90 % in {precision} over the earlier engine's in fp32, speed"
        figures.append(Figure.of(what, compare(theirs, ours), low=least, aim=aim))
        timings |= {f"{name}, {precision}": ours, f"{name}, earlier, fp32": theirs}
    return Result(
        name="versions",
        title="The native engine and its earlier version",
        question="How much faster is a native step than with the engine that knew float32 alone?",
        command="python benchmarks/versions.py",
        figures=tuple(figures),
        tables=(Table.of_timings("Step", "model and version", timings),),
        settings={"sparsity": "90 %", "batch": 64, "rounds": rounds, "earlier version": f"commit {commit(other)}"},
        stamp=stamped,
    )


if __name__ == "__main__":
    main()
