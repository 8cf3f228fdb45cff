"""What does `spfde compare` cost beside its runs, and how long does a table of a thousand runs take?

ResNet-8 on the embedded images, dense, MEST and SpFDE at 90 % with two seeds: the whole command against the sum of what
`train` takes in it. Then a comparison of a thousand finished runs, whose summaries are made up: reading them and
writing all tables, and the page of `spfde report`, each with the start of the process.

    python benchmarks/compare.py                    # about 5 minutes on two cores
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from _common import Figure, Result, begin, parser, publish
from spfde.app.compare import running
from spfde.app.compare.command import compare_runs
from spfde.app.compare.folder import COMPARISON

MOST_OVERHEAD, MOST_SECONDS = 1.02, 5.0
LEARNING_RATES, SEEDS = 100, 10


def timed(call: Callable[..., Any], seconds: list[float]) -> Callable[..., Any]:
    """The same, that notes how long it takes."""

    def called(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            return call(*args, **kwargs)
        finally:
            seconds.append(time.perf_counter() - start)

    return called


def asked(**options: str) -> dict[str, Any]:
    """What the command line hands over."""
    return {"plugin": (), **options}


def compare(folder: Path, *, seeds: str, **options: str) -> None:
    """The command, in this process."""
    compare_runs(
        None, asked(**options), set(options), out=folder, resume=None, seeds=seeds, baseline=None, jobs=None,
        quick=False, formats=(), quiet=True,
    )  # fmt: skip


def overhead(folder: Path, epochs: int) -> tuple[float, list[float]]:
    """Seconds of the command, and of each of its runs."""
    runs: list[float] = []
    usual, running.train = running.train, timed(running.train, runs)
    try:
        start = time.perf_counter()
        compare(folder, seeds="2", recipe="dense,mest,spfde", epochs=str(epochs))
        return time.perf_counter() - start, runs
    finally:
        running.train = usual


def made_up(folder: Path) -> None:
    """A comparison of a thousand runs, as if all had been trained."""
    rates = ",".join(f"{0.001 * step:g}" for step in range(1, LEARNING_RATES + 1))

    def nothing(*_: Any, **__: Any) -> None:
        """Trains nothing."""

    from spfde.app.compare import command

    usual, command.train_missing = command.train_missing, nothing
    try:
        compare(folder, seeds=str(SEEDS), lr=rates, recipe="dense")
    finally:
        command.train_missing = usual
    content = json.loads((folder / COMPARISON).read_text(encoding="utf-8"))
    for at, candidate in enumerate(content["candidates"]):
        for seed in range(SEEDS):
            run = folder / "runs" / candidate["folder"] / f"seed-{seed}"
            run.mkdir(parents=True)
            accuracy = 0.8 + 0.001 * at + 0.0005 * (7 * seed % 5)
            figures = {"test_accuracy": accuracy, "best_test_accuracy": accuracy, "training_flops": 10**12 + at}
            figures |= {"flops_ratio": 1.0, "seconds": 10.0 + seed, "peak_memory_bytes": 10**9, "final_sparsity": 0.0}
            (run / "summary.json").write_text(json.dumps(figures | {"engine": "masked", "seed": seed}))


def command_seconds(*words: str) -> float:
    """Of a process of its own, from its start to its end."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "spfde", *words], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def main(argv: list[str] | None = None) -> None:
    """Run it."""
    options = parser(__doc__).parse_args(argv)
    stamped = begin(options)
    epochs = 2 if options.quick else 8
    with tempfile.TemporaryDirectory() as place:
        whole, runs = overhead(Path(place) / "few", epochs)
        many = Path(place) / "many"
        made_up(many)
        command_seconds("compare", "--resume", str(many), "--quiet")  # files are read once
        table = command_seconds("compare", "--resume", str(many), "--quiet")
        page = command_seconds("report", str(many), "--out", str(Path(place) / "page.html"))
    publish(
        Result(
            name="compare",
            title="Comparing runs",
            question="What does a comparison cost beside its runs, and how long does a table of a thousand runs take?",
            command="python benchmarks/compare.py",
            figures=(
                Figure(
                    "the command over the sum of its runs", whole / sum(runs), "ratio", high=MOST_OVERHEAD, n=len(runs)
                ),
                Figure("1,000 finished runs: list and tables", table, "seconds", high=MOST_SECONDS),
                Figure("1,000 finished runs: the page of spfde report", page, "seconds"),
            ),
            settings={"runs": len(runs), "epochs": epochs, "seconds of the runs": round(sum(runs))},
            stamp=stamped,
        ),
        options,
    )


if __name__ == "__main__":
    main()
