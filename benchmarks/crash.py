"""Does a run that is killed end like one that never was?

``spfde train`` on a small set of images, with every preset by both engines: once undisturbed, and once with SIGKILLs at
random moments, from before the folder is made to after the summary is written, and ``--resume`` after each. At the end
every figure (but times and memory), the summary and the weights must be those of the undisturbed run, bit for bit.
The same for loops of Lightning, Hugging Face's Trainer and Accelerate, which save and resume in their own ways; half of
their kills fall within the writing of a checkpoint.
Processes are forked from one that has imported PyTorch, so that moments of training are hit, not of importing.

    python benchmarks/crash.py                      # 160 kills or more, about 12 minutes on two cores
    python benchmarks/crash.py --loops lightning    # in that one alone
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

import _crash_frameworks as frameworks
from _common import Figure, Result, Table, begin, parser, publish
from spfde.recipe import presets

MEASURED = ("seconds", "loader_wait_seconds", "peak_memory_bytes", "dense_step_seconds", "dense_seconds_extrapolated")
ENGINES = ("masked", "native")
COMMAND = "spfde train"
LOOPS = (COMMAND, *frameworks.LOOPS)
PRESETS_OF_FRAMEWORKS = ("spfde", "rigl")
KILLS, KILLS_OF_A_FRAMEWORK, KILLS_QUICK = 100, 20, 2
EPOCHS = 4
MOST_SECONDS = 300.0

_FORKS = multiprocessing.get_context("forkserver")


@dataclass
class Case:
    """A preset by an engine in a loop, and what came of it."""

    preset: str
    engine: str
    loop: str = COMMAND
    kills: int = 0
    refused: int = 0
    moments: list[str] = field(default_factory=list)
    trouble: str | None = None

    @property
    def name(self) -> str:
        return f"{self.preset} by {self.engine}" + (f" in {self.loop}" if self.is_framework else "")

    @property
    def is_framework(self) -> bool:
        return self.loop != COMMAND


def main(argv: list[str] | None = None) -> None:
    """Run it."""
    made = parser(__doc__)
    made.add_argument("--kills", type=int, default=None, help=f"a loop ({KILLS}, or {KILLS_OF_A_FRAMEWORK})")
    made.add_argument("--seed", type=int, default=None, help="of the moments (drawn)")
    made.add_argument("--presets", nargs="*", default=None, help="these alone")
    made.add_argument("--loops", nargs="*", default=LOOPS, choices=LOOPS, help="these alone")
    options = made.parse_args(argv)
    stamped = begin(options)
    preload = ["spfde.app.train.loop", "spfde.app.train.display", "torch._dynamo"]
    _FORKS.set_forkserver_preload(preload + [f"spfde.integrations.{loop}" for loop in options.loops if loop != COMMAND])
    seed = options.seed if options.seed is not None else random.SystemRandom().randrange(2**32)
    draw = random.Random(seed)
    done: list[Case] = []
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="spfde-crash-") as folder:
        data = images(Path(folder) / "data.npz")
        first = _FORKS.Process(target=int)  # it waits for what all are forked from
        first.start()
        first.join()
        for loop in options.loops:
            cases = cases_of(loop, options.presets, is_quick=options.quick)
            usual = KILLS if loop == COMMAND else KILLS_OF_A_FRAMEWORK
            wanted = options.kills or (len(cases) * KILLS_QUICK if options.quick else usual)
            run(cases, wanted, data, Path(folder) / loop, draw)
            done += cases
    publish(result(done, seed, time.monotonic() - start, stamped), options)
    if any(case.trouble for case in done):
        sys.exit(1)


def cases_of(loop: str, wanted: list[str] | None, *, is_quick: bool) -> list[Case]:
    """What is tried in a loop."""
    if is_quick:
        return [Case("spfde", "masked", loop), *([Case("rigl", "native", loop)] if loop == COMMAND else [])]
    own = [name for name in presets.PRESETS if name != "dense"] if loop == COMMAND else PRESETS_OF_FRAMEWORKS
    return [Case(name, engine, loop) for name in wanted or own for engine in ENGINES]


def run(cases: list[Case], wanted: int, data: Path, folder: Path, draw: random.Random) -> None:
    """Take the cases one after the other, with their share of the kills."""
    for number, case in enumerate(cases):
        place = folder / f"{number}"
        place.mkdir(parents=True)
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
        before = frameworks.unfinished(case.loop, out) if case.is_framework else set()
        process = start(case, data, place, "killed")
        if case.kills < kills:
            process.join(draw.uniform(0, 0.8 * seconds))
            if case.is_framework and draw.random() < 0.5:
                wait_for_writing(case, process, out, before, draw)
            if process.exitcode is None:
                case.moments.append(moment(case, out, before))
                kill(process)
                case.kills += 1
                continue
        code = end(process)
        if code == frameworks.REFUSED and frameworks.may_be_cut_off(case.loop, out):
            frameworks.take_away_newest(case.loop, out)
            case.refused += 1
            continue
        case.trouble = f"lost: it went on to end with {code}" if code != 0 else compare(case, place / "whole", out)
        if case.kills == kills:
            return
        shutil.rmtree(out)


def wait_for_writing(case: Case, process: BaseProcess, out: Path, before: set[Path], draw: random.Random) -> None:
    """Until some moment at which a checkpoint is being written, or the process has ended."""
    while process.exitcode is None and not frameworks.unfinished(case.loop, out) - before:
        time.sleep(0.0002)
    time.sleep(draw.choice((0, 0.001, 0.003)))


def kill(process: BaseProcess) -> None:
    """SIGKILL, and wait for its end."""
    assert process.pid is not None
    with contextlib.suppress(ProcessLookupError):
        os.kill(process.pid, signal.SIGKILL)
    process.join()


def moment(case: Case, out: Path, before: set[Path]) -> str:
    """Where about a run stands; ``before``: what another process has left unfinished."""
    if case.is_framework:
        is_writing = frameworks.unfinished(case.loop, out) - before
        return f"in {case.loop}" + (", while a checkpoint is written" if is_writing else "")
    if not (out / "config.json").is_file():
        return "before it began"
    if (out / "summary.json").is_file():
        return "after the end"
    drafts = list(out.rglob("*.writing*")) + list(out.rglob(".writing-*"))
    return "while something is written" if drafts else "in training"


def start(case: Case, data: Path, place: Path, name: str) -> BaseProcess:
    """The run in a process of its own; it goes on where its folder is one already."""
    out = place / name
    process: BaseProcess
    if case.is_framework:
        process = _FORKS.Process(target=_framework, args=(case, data, out))
        process.start()
        return process
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


def _framework(case: Case, data: Path, out: Path) -> None:
    _write_to(out.parent / "log")
    frameworks.run(case.loop, case.preset, case.engine, data, out)


def _write_to(path: Path) -> None:
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for number in (1, 2):
        os.dup2(log, number)


def _command(argv: list[str], place: Path) -> None:
    multiprocessing.set_start_method("fork", force=True)
    os.chdir(place)
    _write_to(place / "log")
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


def compare(case: Case, whole: Path, killed: Path) -> str | None:
    """What differs between two runs that ended; None for nothing."""
    if case.is_framework:
        return frameworks.compare(whole, killed)
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
            Figure("checkpoints of frameworks that were cut off, and refused", sum(c.refused for c in cases), "count"),
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
