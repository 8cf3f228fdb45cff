"""What does a native step take where other processes want the cores too?

Processes that spin, none to two of them, beside one that trains with the native engine: ResNet-8 at 90 % on images of
32 pixels, batches of 64, whole steps. In turns with it train one whose kernels do not look for busy cores, and one with
OpenMP threads that never spin, which is what waits of no length would come to. Times are means of a round's steps, some
seconds after the processes began or ended. Run it on a machine that does nothing else.

    python benchmarks/busy.py                       # about 6 minutes on two cores
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

import spfde
from _common import Figure, Result, Served, Table, Timing, begin, compare, parser, publish, show
from spfde.app.train.models import build_model
from spfde.core.numbers import MOST_EPOCHS

BATCH = 64
SPINNING = (0, 1, 2)
MOST_ALONE, MOST = 1.05, {1: 2.0, 2: 4.0}
OWN, UNWATCHED = "as it comes", "without looking for busy cores"
SETTINGS = {
    OWN: {},
    UNWATCHED: {"SPFDE_CXXFLAGS": "-DSPFDE_UNWATCHED"},
    "OMP_WAIT_POLICY=passive": {"OMP_WAIT_POLICY": "passive"},
}
SETTLED = 5.0
"""Seconds after which the engine has noticed that cores are free or busy."""


def steps() -> Iterator[float]:
    """Seconds of one training step after another."""
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    model = build_model("resnet8", num_classes=10, in_channels=3, image_size=32, seed=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, fused=True)
    data = TensorDataset(torch.randn(4 * BATCH, 3, 32, 32), torch.randint(10, (4 * BATCH,)))
    recipe = spfde.Recipe(sparsity=spfde.StaticSparse(sparsity=0.9))
    session = spfde.attach(
        model, optimizer, DataLoader(data, batch_size=BATCH), recipe, epochs=MOST_EPOCHS, engine="native"
    )
    for _ in session.epochs():
        for x, y in session.loader:
            start = time.perf_counter()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
            yield time.perf_counter() - start


def serve() -> None:
    """The trainer's process: for each number that it reads it trains so many steps, and tells their seconds."""
    trained = steps()
    for line in sys.stdin:
        print(json.dumps([next(trained) for _ in range(int(line))]), flush=True)


def trainer(environment: dict[str, str]) -> Served:
    """A trainer in a process of its own."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_WAIT", "GOMP_SPIN"))}
    return Served([sys.executable, __file__, "--serve"], kept | environment)


@contextmanager
def spinning(n: int) -> Iterator[None]:
    """So many processes that do nothing for as long as they can."""
    with ExitStack() as ended:
        for _ in range(n):
            process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
            ended.callback(process.wait)
            ended.callback(process.kill)
        time.sleep(0.3)  # until they run
        yield


def measure(rounds: int, n: int) -> dict[tuple[str, int], Timing]:
    """Mean step of each round, by setting and number of spinning processes."""
    taken: dict[tuple[str, int], list[float]] = {(name, busy): [] for name in SETTINGS for busy in SPINNING}
    with ExitStack() as ended:
        trainers = {name: trainer(environment) for name, environment in SETTINGS.items()}
        for each in trainers.values():
            ended.callback(each.end)
            each.ask(8)
        for _ in range(rounds):
            for busy in SPINNING:
                with spinning(busy):
                    for name, each in trainers.items():
                        until = time.monotonic() + SETTLED
                        while time.monotonic() < until:
                            each.ask(n)
                        taken[name, busy].append(statistics.mean(each.ask(n)))
    return {key: Timing(tuple(seconds)) for key, seconds in taken.items()}


def figures(timings: dict[tuple[str, int], Timing]) -> Iterator[Figure]:
    """Each number of spinning processes against none, and what it costs to look for them."""
    for busy, high in MOST.items():
        what = f"step beside {busy} busy process{'es' if busy > 1 else ''} over alone"
        yield Figure.of(what, compare(timings[OWN, busy], timings[OWN, 0]), high=high)
    yield Figure.of(
        "alone: looking for busy cores over not", compare(timings[OWN, 0], timings[UNWATCHED, 0]), high=MOST_ALONE
    )


def main(argv: list[str] | None = None) -> None:
    """Run it."""
    made = parser(__doc__)
    made.add_argument("--serve", action="store_true", help="be a trainer's process")
    made.add_argument("--rounds", type=int, default=None, help="rounds (5)")
    options = made.parse_args(argv)
    if options.serve:
        serve()
        return
    stamped = begin(options)
    rounds, n = options.rounds or (1 if options.quick else 5), 5 if options.quick else 40
    timings = measure(rounds, n)
    rows = tuple((name, *(show(timings[name, busy].median, "seconds") for busy in SPINNING)) for name in SETTINGS)
    publish(
        Result(
            name="busy",
            title="Busy cores",
            question="How much longer does a native step take where other processes want the cores too?",
            command="python benchmarks/busy.py",
            figures=tuple(figures(timings)),
            tables=(Table("Mean step", ("trainer", *(f"{busy} busy" for busy in SPINNING)), rows),),
            settings={"rounds": rounds, "steps a round": n, "cores": os.cpu_count()},
            stamp=stamped,
        ),
        options,
    )


if __name__ == "__main__":
    main()
