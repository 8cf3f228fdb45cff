"""How much of a training step does our bookkeeping take?

ResNet-32 (widths 32-64-128) at batch 64, MEST at 90 % and 20 % of 50,000 samples sieved, nothing frozen. Timed
directly, within the steps: every hook that ``attach`` registers on gradients and on the optimizer, ``session.observe``,
and each batch that ``session.loader`` hands out (the fetching of the images included). What happens at the top of an
epoch (mutation, the turn of the sieve, the ledger's row, the shuffle) is timed too and spread over an epoch's steps.
Target: at most 2 %.

    python benchmarks/bookkeeping.py                # about 3 minutes on two cores
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import SGD, Optimizer
from torch.utils.data import DataLoader

import spfde
from _common import Figure, Result, Table, begin, parser, publish, quartiles, show
from spfde.app.data.images import ImageArray, collate
from spfde.app.train.augment import normalise
from spfde.app.train.models import build_model

BATCH, SAMPLES, EPOCHS = 64, 50_000, 6
TARGET = 0.02
PARTS = ("gradient hooks", "step pre-hooks", "step post-hooks", "observe", "loader")
Hook = Callable[..., Any]


class Clock:
    """Seconds since the last ``take``, by part."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = defaultdict(float)

    def timed(self, part: str, call: Hook) -> Hook:
        """``call``, its time added to ``part``."""

        def timed_call(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                self._seconds[part] += time.perf_counter() - start

        return timed_call

    def take(self) -> dict[str, float]:
        """What was added up, which starts from zero again."""
        taken, self._seconds = dict(self._seconds), defaultdict(float)
        return taken


@contextmanager
def hooks_timed(clock: Clock) -> Iterator[None]:
    """Inside, every gradient hook and step hook that anybody registers is timed for good."""
    places: tuple[tuple[type, str, str], ...] = (
        (Tensor, "register_post_accumulate_grad_hook", PARTS[0]),
        (Optimizer, "register_step_pre_hook", PARTS[1]),
        (Optimizer, "register_step_post_hook", PARTS[2]),
    )
    originals = [getattr(owner, name) for owner, name, _ in places]

    def registering(register: Hook, part: str) -> Hook:
        return lambda self, hook, *args, **kwargs: register(self, clock.timed(part, hook), *args, **kwargs)

    for (owner, name, part), register in zip(places, originals, strict=True):
        setattr(owner, name, registering(register, part))
    try:
        yield
    finally:
        for (owner, name, _), register in zip(places, originals, strict=True):
            setattr(owner, name, register)


def images(samples: int) -> ImageArray:
    """Noise of CIFAR's shape: what the images show takes no time."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (samples, 3, 32, 32), dtype=torch.uint8, generator=generator)
    return ImageArray(pixels, torch.randint(0, 100, (samples,), generator=generator))


def measure(samples: int, steps: int) -> tuple[list[dict[str, float]], list[float]]:
    """Parts of each step (``"step"`` is the whole), and the seconds at the top of each update epoch."""
    model = build_model("resnet32", num_classes=100, in_channels=3, image_size=32, seed=0)
    model = model.to(memory_format=torch.channels_last)
    optimizer = SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
    generator = torch.Generator().manual_seed(0)
    loader = DataLoader(
        images(samples), batch_size=BATCH, shuffle=True, generator=generator, collate_fn=collate, num_workers=0
    )
    recipe = spfde.Recipe(
        sparsity=spfde.MEST(sparsity=0.9), sieving=spfde.DataSieving(removed_fraction=0.2), update_interval_epochs=2
    )
    clock = Clock()
    with hooks_timed(clock):
        session = spfde.attach(
            model, optimizer, loader, recipe, epochs=EPOCHS, engine="masked", sample=torch.zeros(2, 3, 32, 32)
        )
    observe = clock.timed("observe", session.observe)
    mean, std = torch.full((3,), 0.5), torch.full((3,), 0.25)
    rows: list[dict[str, float]] = []
    tops: list[float] = []
    epochs = session.epochs()
    for number in range(EPOCHS):
        start = time.perf_counter()
        epoch = next(epochs)
        batches = iter(session.loader)
        top = time.perf_counter() - start
        fetch = clock.timed("loader", lambda source=batches: next(source))
        model.train()
        for step in range(1 + steps):
            start = time.perf_counter()
            pixels, y = fetch()
            x = normalise(pixels, mean, std).contiguous(memory_format=torch.channels_last)
            logits = model(x)
            F.cross_entropy(logits, y).backward()
            optimizer.step()
            optimizer.zero_grad()
            observe(logits, y)
            row = {"step": time.perf_counter() - start, **clock.take()}
            if step > 0:
                rows.append(row)
            elif number > 0:
                # The first batch of an epoch draws the whole permutation, and the first step may mutate.
                top += sum(row.get(part, 0.0) for part in PARTS)
        if number > 0 and epoch % recipe.interval(EPOCHS) == 0:
            tops.append(top)
    return rows, tops


def main(argv: list[str] | None = None) -> None:
    """Run it."""
    made = parser(__doc__)
    made.add_argument("--steps", type=int, default=None, help="timed steps in each of 6 epochs (30)")
    options = made.parse_args(argv)
    stamped = begin(options)
    steps = options.steps or (2 if options.quick else 30)
    samples = 2_000 if options.quick else SAMPLES
    rows, tops = measure(samples, steps)

    shares = [sum(row[part] for part in PARTS) / row["step"] for row in rows]
    step_seconds = statistics.median(row["step"] for row in rows)
    steps_of_epoch = round(0.8 * SAMPLES / BATCH)
    top = statistics.median(tops)
    spread_top = top / (steps_of_epoch * step_seconds)
    within = statistics.median(shares)
    first, third = quartiles(shares)
    table = []
    for part in PARTS:
        seconds = [row[part] for row in rows]
        portion = statistics.median(row[part] / row["step"] for row in rows)
        table.append((part, f"{1e3 * statistics.median(seconds):.3f} ms", show(portion, "share")))
    table.append(("top of an epoch with an update epoch", f"{1e3 * top:.1f} ms an epoch", show(spread_top, "share")))
    table.append(("the whole step", f"{1e3 * step_seconds:.1f} ms", "100%"))
    publish(
        Result(
            name="bookkeeping",
            title="Bookkeeping",
            question="With 90 % sparsity and 20 % sieving on and nothing frozen, what share of a ResNet-32 step at "
            "batch 64 passes inside our hooks, `observe` and the loader? Timed directly.",
            command="python benchmarks/bookkeeping.py",
            figures=(
                Figure(
                    "bookkeeping, share of a step",
                    within + spread_top,
                    "share",
                    high=TARGET,
                    n=len(rows),
                    spread=(first + spread_top, third + spread_top),
                    headline=True,
                ),
                Figure("of it in every step", within, "share", n=len(rows), spread=(first, third)),
                Figure("of it at the top of epochs with an update epoch", spread_top, "share", n=len(tops)),
            ),
            tables=(Table("Where it goes (medians)", ("part", "time", "share of a step"), tuple(table)),),
            settings={"batch": BATCH, "samples": f"{samples:,}", "steps timed": len(rows), "layout": "channels_last"},
            notes=(
                f"What happens once an epoch is spread over {steps_of_epoch} steps, as if all were update epochs.",
                "The loader's time holds the fetching of the images, which a plain loader needs as well.",
            ),
            stamp=stamped,
        ),
        options,
    )


if __name__ == "__main__":
    main()
