"""Does a run that is killed end like one that never was?

``spfde train`` on a small set of images, with every preset by both engines: once undisturbed, and once with SIGKILLs at
random moments, from before the folder is made to after the summary is written, and ``--resume`` after each. At the end
every figure (but times and memory), the summary and the weights must be those of the undisturbed run, bit for bit.
Processes are forked from one that has imported PyTorch, so that moments of training are hit, not of importing.

    python benchmarks/crash.py                      # 100 kills or more, about 10 minutes on two cores
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np

from _common import Figure, Result, Table, begin, parser, publish
from spfde.recipe import presets

MEASURED = ("seconds", "peak_memory_bytes", "dense_step_seconds", "dense_seconds_extrapolated")
ENGINES = ("masked", "native")
KILLS, CASES_QUICK, KILLS_QUICK = 100, 2, 2
EPOCHS = 4
MOST_SECONDS = 300.0

_FORKS = multiprocessing.get_context("forkserver")


@dataclass
class Case:
    """A preset by an engine, and what came of it."""

    preset: str
    engine: str
    kills: int = 0
    moments: list[str] = field(default_factory=list)
    trouble: str | None = None

    @property
    def name(self) -> str:
        return f"{self.preset} by {self.engine}"


def main(argv: list[str] | None = None) -> None:
    """Run it."""
    made = parser(__doc__)
    made.add_argument("--kills", type=int, default=None, help=f"at least so many ({KILLS})")
    made.add_argument("--seed", type=int, default=None, help="of the moments (drawn)")
    made.add_argument("--presets", nargs="*", default=None, help="these alone")
    options = made.parse_args(argv)
    stamped = begin(options)
    _FORKS.set_forkserver_preload(["spfde.app.train.loop", "spfde.app.train.display", "torch._dynamo"])
    seed = options.seed if options.seed is not None else random.SystemRandom().randrange(2**32)
    draw = random.Random(seed)
    names = options.presets or [name for name in presets.PRESETS if name != "dense"]
    cases = [Case(name, engine) for name in names for engine in ENGINES]
    if options.quick:
        cases = [Case(name, engine) for name, engine in zip(("spfde", "rigl"), ENGINES, strict=True)][:CASES_QUICK]
    wanted = options.kills or (CASES_QUICK * KILLS_QUICK if options.quick else KILLS)
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="spfde-crash-") as folder:
        run(cases, wanted, Path(folder), draw)
    publish(result(cases, seed, time.monotonic() - start, stamped), options)
    if any(case.trouble for case in cases):
        sys.exit(1)


def run(cases: list[Case], wanted: int, folder: Path, draw: random.Random) -> None:
    """Take the cases one after the other, with their share of the kills."""
    data = images(folder / "data.npz")
    first = _FORKS.Process(target=int)  # it waits for what all are forked from
    first.start()
    first.join()
    for number, case in enumerate(cases):
        place = folder / f"{number}"
        place.mkdir()
        started = time.monotonic()
        if (code := end(start(case, data, place, "whole"))) != 0:
            case.trouble = f"lost: the undisturbed run ended with {code}"
            continue
        seconds = time.monotonic() - started
        left = wanted - sum(each.kills for each in cases[:number])
        kill_and_resume(case, data, place, draw, kills=-(-left // (len(cases) - number)), seconds=seconds)
        print(f"{case.name}: {case.kills} kills, {case.trouble or 'as if nothing had been'}", flush=True)


def kill_and_resume(case: Case, data: Path, place: Path, draw: random.Random, *, kills: int, seconds: float) -> None:
    """Kill the run so often, and let it end then; where it ends before, the next one begins anew."""
    out = place / "killed"
    while case.trouble is None:
        process = start(case, data, place, "killed")
        if case.kills < kills:
            process.join(draw.uniform(0, 0.8 * seconds))
            if process.exitcode is None:
                case.moments.append(moment(out))
                kill(process)
                case.kills += 1
                continue
        code = end(process)
        case.trouble = f"lost: it went on to end with {code}" if code != 0 else compare(place / "whole", out)
        if case.kills == kills:
            return
        shutil.rmtree(out)


def kill(process: BaseProcess) -> None:
    """SIGKILL, and wait for its end."""
    assert process.pid is not None
    with contextlib.suppress(ProcessLookupError):
        os.kill(process.pid, signal.SIGKILL)
    process.join()


def moment(out: Path) -> str:
    """Where about a run stands."""
    if not (out / "config.json").is_file():
        return "before it began"
    if (out / "summary.json").is_file():
        return "after the end"
    drafts = list(out.rglob("*.writing*")) + list(out.rglob(".writing-*"))
    return "while something is written" if drafts else "in training"


def start(case: Case, data: Path, place: Path, name: str) -> BaseProcess:
    """The run in a process of its own; it goes on where its folder is one already."""
    out = place / name
    if (out / "config.json").is_file():
        argv = ["train", "--resume", name]
    else:
        argv = ["train", "--recipe", case.preset, "--engine", case.engine, "--data", str(data), "--out", name]
        argv += ["--epochs", str(EPOCHS), "--batch-size", "16", "--interval", "1", "--keep-every", "2"]
    process = _FORKS.Process(target=_command, args=(argv, place))
    process.start()
    return process


def end(process: BaseProcess) -> int | None:
    process.join(MOST_SECONDS)
    if process.exitcode is None:
        kill(process)
        return None
    return process.exitcode


def _command(argv: list[str], place: Path) -> None:
    multiprocessing.set_start_method("fork", force=True)
    os.chdir(place)
    log = os.open(place / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for number in (1, 2):
        os.dup2(log, number)
    from spfde.app.cli import main as command

    command(argv)


def images(path: Path) -> Path:
    """96 + 32 grey images of 8 x 8 pixels in 3 classes, told apart by a bright bar."""
    drawn, arrays = np.random.default_rng(0), {}
    for part, count in (("train", 96), ("test", 32)):
        labels = np.arange(count) % 3
        pixels = drawn.integers(0, 120, (count, 8, 8), dtype=np.uint8)
        for image, label in zip(pixels, labels, strict=True):
            image[:, 2 * label : 2 * label + 3] += 100
        arrays |= {f"x_{part}": pixels, f"y_{part}": labels}
    np.savez(path, **arrays)
    return path


def compare(whole: Path, killed: Path) -> str | None:
    """What differs between two runs that ended; None for nothing."""
    for name in ("metrics.jsonl", "summary.json"):
        if _lines(whole / name) != _lines(killed / name):
            return f"different: {name}"
    for path in sorted(whole.glob("checkpoints/**/*.safetensors")):
        other = killed / path.relative_to(whole)
        if not other.is_file() or other.read_bytes() != path.read_bytes():
            return f"different: {path.relative_to(whole)}"
    return None


def _lines(path: Path) -> list[dict[str, Any]]:
    text = path.read_text(encoding="utf-8")
    found = [json.loads(text)] if path.suffix == ".json" else [json.loads(line) for line in text.splitlines()]
    return [{name: value for name, value in row.items() if name not in MEASURED} for row in found]


def result(cases: list[Case], seed: int, seconds: float, stamped: dict[str, Any]) -> Result:
    """What was found, as it is published."""
    troubles = [case for case in cases if case.trouble]
    lost = sum(str(case.trouble).startswith("lost") for case in troubles)
    return Result(
        name="crash",
        title="Runs that are killed",
        question="Does a run that is killed at random moments, and resumed, end like one that never was?",
        command="python benchmarks/crash.py",
        figures=(
            Figure("SIGKILLs", sum(case.kills for case in cases), "count"),
            Figure("runs lost", lost, "count", high=0, n=len(cases)),
            Figure("runs that ended otherwise", len(troubles) - lost, "count", high=0, n=len(cases)),
        ),
        tables=(
            Table("Where the kills fell", ("moment", "kills"), tuple(_moments(cases))),
            *(
                [Table("Trouble", ("run", "what"), tuple((c.name, str(c.trouble)) for c in troubles))]
                if troubles
                else []
            ),
        ),
        settings={"seed": seed, "runs": len(cases), "epochs": EPOCHS, "seconds": round(seconds)},
        stamp=stamped,
    )


def _moments(cases: list[Case]) -> Iterator[tuple[str, str]]:
    found = [moment for case in cases for moment in case.moments]
    return ((name, str(found.count(name))) for name in sorted(set(found)))


if __name__ == "__main__":
    main()
