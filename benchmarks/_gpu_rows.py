"""The rows of benchmarks/gpu.py: each a question, and what they share."""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import spfde
from _common import BENCHMARKS, Figure, Timing, compare, quartiles
from _gpu import (
    COMPILED,
    DENSE_LOOP,
    DENSE_STEP,
    EAGER,
    MEST_LOOP,
    MEST_STEP,
    Contender,
    Made,
    Replays,
    Scale,
    make,
    tell,
    time_steps,
)
from _gpu_run import WholeRun
from spfde import presets
from spfde.app.train.events import Display
from spfde.app.train.loop import train
from spfde.app.train.options import TrainOptions
from spfde.app.train.profile import Profile
from spfde.core.streams import own_stream

FULL = Scale()
QUICK = replace(FULL, steps=5, rounds=2, side_by_side=3, epoch_steps=12)
REHEARSAL = Scale(
    device="cpu", model="resnet8", classes=4, side=8, batch=4, compiles=False, steps=1, rounds=1, warm_up=3,
    side_by_side=2, epochs=24, interval=2, samples=100, epoch_steps=7, singly=5, fronts=(1, 2), images=64, profiled=2,
)  # fmt: skip
OPTIONS = {FULL: [], QUICK: ["--quick"], REHEARSAL: ["--rehearse"]}
"""On the command line."""


class Bench:
    """What the rows share: contenders that are made once, a whole run that is gone through once, and timings.

    Args:
        scale: how much of everything.
        replays: of all graphs.
        folder: for what is written meanwhile.

    Attributes:
        compiled: the folder of what is compiled.
        rows: of the table of timings.
    """

    def __init__(self, scale: Scale, replays: Replays, folder: Path) -> None:
        self.scale, self.replays, self.folder = scale, replays, folder
        self.compiled = folder / "compiled"
        self.rows: list[tuple[str, ...]] = []
        self._made: dict[str, Made | Exception] = {}
        self._run: WholeRun | Exception | None = None

    def made(self, name: str) -> Made:
        """The contender of that name, warm; if it could not be made before, the same error."""
        if name not in self._made:
            try:
                self._made[name] = make(name, self.scale, self.replays)
            except Exception as error:
                self._made[name] = error
        found = self._made[name]
        if isinstance(found, Exception):
            raise found
        return found

    def time(self, row: str, *names: str) -> dict[str, Timing]:
        """Seconds of a step of each contender, taken turn by turn."""
        timings = time_steps({name: self.made(name).contender.step for name in names}, self.scale)
        self.note(row, timings)
        return timings

    def note(self, row: str, timings: dict[str, Timing]) -> None:
        """Put timings of a step into the table."""
        for name, timing in timings.items():
            low, high = timing.quartiles
            cells = (f"{1e3 * timing.median:.3f} ms", f"{1e3 * low:.3f} … {1e3 * high:.3f} ms", str(timing.n))
            self.rows.append((row, name, *cells))
            tell(f"{row}: {name}: {cells[0]}")

    def over(self, row: str, name: str, base: str, what: str, *, high: float, aim: float) -> Figure:
        """A contender's step over another one's."""
        timings = self.time(row, name, base)
        return Figure.of(what, compare(timings[name], timings[base]), high=high, aim=aim, headline=True)

    def over_eager(self, row: str, name: str, what: str, *, high: float, aim: float) -> Figure:
        """A contender's step over the faster one of plain dense PyTorch in tf32 and in bf16."""
        timings = self.time(row, name, *EAGER)
        faster = min(EAGER, key=lambda each: timings[each].median)
        tell(f"{row}: the faster eager one is {faster}")
        return Figure.of(what, compare(timings[name], timings[faster]), high=high, aim=aim, headline=True)

    @property
    def run(self) -> WholeRun:
        """A whole run, in a process of its own that finds nothing compiled; if it failed before, the same error."""
        if self._run is None:
            try:
                self._run = self._whole_run()
            except Exception as error:
                self._run = error
        if isinstance(self._run, Exception):
            raise self._run
        return self._run

    def _whole_run(self) -> WholeRun:
        if found := sorted(self.compiled.iterdir()):
            raise RuntimeError(f"something was compiled before the run that is to find nothing: {found}")
        started = time.time()
        done = subprocess.run(
            [sys.executable, str(BENCHMARKS / "gpu.py"), *OPTIONS[self.scale], "--whole-run", str(started)],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
            timeout=600,
        )
        return WholeRun.from_dict(json.loads(done.stdout.splitlines()[-1]))


@contextmanager
def compiled_into(folder: Path) -> Iterator[None]:
    """What is compiled inside, by this process and those that it starts, is kept in a folder; so is nothing older."""
    folder.mkdir()
    names = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
    before = {name: os.environ.pop(name, None) for name in names}
    os.environ |= {name: str(folder / name.split("_")[0].lower()) for name in names}
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


# --- the rows --------------------------------------------------------------------------------------------------------


def dense(bench: Bench) -> Iterator[Figure]:
    """The dense recipe in the user's own loop, captured and compiled, over plain eager PyTorch."""
    what = "dense recipe, own loop: captured and compiled, over plain eager PyTorch"
    yield bench.over_eager("dense", DENSE_LOOP, what, high=0.50, aim=0.36)


def mest(bench: Bench) -> Iterator[Figure]:
    """MEST at 90 % in the user's own loop, nothing frozen, over plain eager dense PyTorch."""
    what = "MEST 90 %, own loop, nothing frozen: over plain eager dense PyTorch"
    yield bench.over_eager("mest", MEST_LOOP, what, high=0.52, aim=0.38)


def step(bench: Bench) -> Iterator[Figure]:
    """The same by session.capture(step)."""
    what = "MEST 90 %, session.capture(step), nothing frozen: over plain eager dense PyTorch"
    yield bench.over_eager("step", MEST_STEP, what, high=0.40, aim=0.30)


def compiled(bench: Bench) -> Iterator[Figure]:
    """MEST by session.capture(step) over dense torch.compile(mode="reduce-overhead")."""
    what = 'MEST 90 %, session.capture(step): over dense torch.compile(mode="reduce-overhead")'
    yield bench.over("compiled", MEST_STEP, COMPILED, what, high=1.05, aim=0.95)


def frozen(bench: Bench) -> Iterator[Figure]:
    """Steps of the whole run with some blocks frozen over those with none."""
    found = bench.run
    none = found.step[0]
    bench.note("frozen", {f"{front} frozen": Timing(tuple(found.steps_at(front))) for front in found.step})
    bounds = ((0.68, 0.60), (0.47, 0.40))
    for front, (high, aim) in zip(bench.scale.fronts, bounds, strict=True):
        ratios = [taken / none for taken in found.steps_at(front)]
        yield Figure(
            f"captured step with {front} of {found.blocks} blocks frozen, over none frozen",
            statistics.median(ratios), "ratio", high=high, aim=aim, n=len(ratios), spread=quartiles(ratios),
            headline=True,
        )  # fmt: skip


def run(bench: Bench) -> Iterator[Figure]:
    """A whole run of SpFDE, captures and compilations included, over a dense run, eager and compiled."""
    scale, found = bench.scale, bench.run
    sample, recipe = torch.zeros(2, *scale.sample_shape), scale.recipe("SpFDE")
    network = replace(scale, device="cpu").network()
    plan = spfde.plan(network, sample, recipe, scale.epochs, scale.samples, batch_size=scale.batch)
    seconds = found.seconds_for(plan.samples_in_use, plan.timeline.frozen, scale.batch)
    dense_steps = scale.epochs * math.ceil(scale.samples / scale.batch)
    eager = min(statistics.median(times) for times in found.eager.values())
    bench.note("run", {name: Timing(tuple(times)) for name, times in found.eager.items()})
    told = {"SpFDE": seconds, "of it beside steps": found.beside_steps, "dense, eager": dense_steps * eager}
    what = f"whole run of {scale.epochs} epochs, SpFDE 20 % + 20 %, captures and compilations included"
    yield Figure(f"{what}: over eager dense", seconds / told["dense, eager"], "ratio", high=0.33, aim=0.26, n=1)
    made = bench.made(COMPILED)
    steady = bench.time("run", COMPILED)[COMPILED].median
    compiling = made.seconds - (scale.warm_up + 1) * steady
    told["dense, compiled"] = dense_steps * steady + compiling
    told["of it compiling"] = compiling
    yield Figure(f"{what}: over compiled dense", seconds / told["dense, compiled"], "ratio", high=0.70, aim=0.55, n=1)
    bench.rows += [("run, in all", name, f"{taken:.1f} s", "–", "1") for name, taken in told.items()]


def side(bench: Bench) -> Iterator[Figure]:
    """Several runs side by side, a stream and a captured step each, one thread that steps them in turn."""
    scale = bench.scale
    runs = []
    for number in range(scale.side_by_side):
        stream = own_stream(torch.device(scale.device)) if scale.device == "cuda" else None
        begun = time.perf_counter()
        runs.append(Contender(scale, "MEST", is_step_captured=True, stream=stream))
        runs[-1].warm_up(bench.replays)
        tell(f"side: run {number + 1} of {scale.side_by_side} is ready after {time.perf_counter() - begun:.1f} s")

    def together() -> None:
        for each in runs:
            each.step()

    names = "one run alone", f"{len(runs)} runs side by side, a step of each"
    timings = time_steps({names[0]: runs[0].step, names[1]: together}, scale)
    bench.note("side", timings)
    a_run_step = Timing(tuple(taken / len(runs) for taken in timings[names[1]].seconds))
    what = f"{len(runs)} runs side by side: a run-step, over that of one run alone"
    yield Figure.of(what, compare(a_run_step, timings[names[0]]), high=0.70, aim=0.60, headline=True)
    for each in runs:
        assert each.session is not None, "it has a recipe"
        each.session.detach()


def masks(bench: Bench) -> Iterator[Figure]:
    """A captured step with masks over the same without."""
    what = "captured step with masks, over the same without"
    yield bench.over("masks", MEST_STEP, DENSE_STEP, what, high=1.03, aim=1.01)


def start(bench: Bench) -> Iterator[Figure]:
    """Seconds until the first captured step of a process that finds nothing compiled, and of each new freeze stage."""
    found = bench.run
    what = "first captured step after the start of the process, nothing compiled before"
    yield Figure(what, found.first, "seconds", high=40, aim=20, n=1, headline=True)
    stages = found.new_stages
    bench.rows += [
        ("start", f"{front} frozen: first captured step", f"{1e3 * s:.0f} ms", "–", "1") for front, s in stages.items()
    ]
    seconds = list(stages.values())
    what = f"first captured step of a new freeze stage, the slowest of {len(seconds)}"
    yield Figure(what, max(seconds), "seconds", high=5, aim=2, n=len(seconds), spread=quartiles(seconds), headline=True)


def memory(bench: Bench) -> Iterator[Figure]:
    """Peak memory over eager dense, of the smaller precision, from nothing to a warm step, capture included."""
    names = (*EAGER, MEST_LOOP, MEST_STEP)
    made = {name: bench.made(name) for name in names}
    bench.rows += [
        ("memory", name, f"{each.peak >> 20} MiB", f"{each.reserved >> 20} MiB reserved", "1")
        for name, each in made.items()
    ]
    base = max(1, min(made[name].peak for name in EAGER))
    for name in (MEST_LOOP, MEST_STEP):
        yield Figure(f"peak memory over eager dense: {name}", made[name].peak / base, "ratio", high=1.3, aim=1.0, n=1)


def linear(bench: Bench) -> Iterator[Figure]:
    """A linear layer with blocks of weights, forward and backward, over the dense one in bf16."""
    import block_linear  # imports Triton

    case, rounds = block_linear.HEADLINE, 2 * bench.scale.rounds
    measured = block_linear.measure(case, rounds) if bench.scale.device == "cuda" else _plain_layers(rounds)
    bench.rows += [("linear", *row[1:], str(rounds)) for row in block_linear.rows_of(case, measured)]
    judged, eager = block_linear.figures_of(case, measured)
    yield replace(judged, aim=0.35)
    yield eager


def _plain_layers(rounds: int) -> dict[str, Timing]:
    """In the place of layers on a GPU, where the script itself is tried."""
    layer, x = nn.Linear(4, 4), torch.zeros(2, 4)
    names = ("dense", "blocks", "dense, eager", "blocks, eager")
    found = time_steps({name: lambda: layer(x) for name in names}, replace(REHEARSAL, rounds=rounds))
    return dict(found)


def busy(bench: Bench) -> Iterator[Figure]:
    """Share of time that the GPU is busy in the trainer, by its own profile of steps of the first epoch."""
    scale, heard = bench.scale, Listening()
    options = TrainOptions(
        data=str(made_images(scale, bench.folder)), model=scale.model, recipe=presets.spfde.to_dict(),
        recipe_name="spfde", epochs=FULL.epochs, batch_size=scale.batch, augment="crop+flip", device=scale.device,
        engine="auto" if scale.device == "cuda" else "masked", compile=scale.compiles, profile=scale.profiled,
        dense_timing_steps=0,
    )  # fmt: skip
    try:
        train(options, bench.folder / "trained", heard)
    except Enough:
        tell("busy: the steps that were to be profiled are through")
    if heard.found is None:
        raise RuntimeError("the trainer has told of no profile")
    share = heard.found.gpu_busy if scale.device == "cuda" else 1.0
    if share is None or heard.found.steps < scale.profiled:
        raise RuntimeError(f"the GPU was not seen in {scale.profiled} steps: {heard.found}")
    what = f"share of time that the GPU is busy: spfde train, {scale.model} at batch {scale.batch}"
    yield Figure(what, share, "share", low=0.95, aim=0.98, n=heard.found.steps, headline=True)


class Enough(KeyboardInterrupt):
    """The run has shown what was asked for: it is stopped as by Ctrl-C."""


class Listening(Display):
    """Says what the trainer has chosen, keeps its profile, and stops it then."""

    found: Profile | None = None

    def started(self, run: Any) -> None:
        for line in (*run.choices, f"engine {run.session.engine}: {run.session.engine_reason}"):
            tell(f"busy: {line}")

    def profiled(self, run: Any, found: Profile) -> None:
        self.found = found
        raise Enough


def made_images(scale: Scale, folder: Path) -> Path:
    """Random images and labels of the network's size in an .npz."""
    draw = np.random.default_rng(0)

    def part(n: int) -> tuple[Any, Any]:
        images = draw.integers(0, 256, (n, scale.side, scale.side, 3), dtype=np.uint8)
        return images, np.arange(n) % scale.classes

    (x, y), (x_test, y_test) = part(scale.images), part(2 * scale.classes)
    path = folder / "images.npz"
    np.savez(path, x_train=x, y_train=y, x_test=x_test, y_test=y_test)
    return path


ROWS: dict[str, Callable[[Bench], Iterator[Figure]]] = {
    "dense": dense, "mest": mest, "step": step, "compiled": compiled, "frozen": frozen, "run": run, "side": side,
    "masks": masks, "start": start, "memory": memory, "linear": linear, "busy": busy,
}  # fmt: skip
"""In the table's order. The last one profiles, which slows down the process from then on."""
FIRST = ("start", "frozen", "run")
"""Taken first: their process compiles everything anew, and what it has compiled is at hand for the others."""
