"""How much of a training step does our bookkeeping take?

ResNet-32 (widths 32-64-128) at batch 64, MEST at 90 % and 20 % of 50,000 samples sieved, nothing frozen. Timed
directly, within the steps: every hook that ``attach`` registers on gradients and on the optimizer, ``session.observe``,
and each batch that ``session.loader`` hands out (the fetching of the images included). What happens at the top of an
epoch (mutation, the turn of the sieve, the ledger's row, the shuffle) is timed too and spread over an epoch's steps.
Target: at most 2 %.

A GPU computes such a step in two or three milliseconds, and waits for Python meanwhile where that takes longer. What it
takes is timed on the same network with so few channels that its kernels take next to nothing: as many layers, hooks and
operations. The operations that a step hands to PyTorch on our behalf are counted.

    python benchmarks/bookkeeping.py                # about 3 minutes on two cores
"""

from __future__ import annotations

import functools
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

import spfde
import spfde.sparsity.arriving as arriving
from _common import Figure, Result, Table, begin, parser, publish, quartiles, show
from spfde.app.data.images import ImageArray, collate
from spfde.app.train.augment import normalise
from spfde.app.train.models import CifarResNet, build_model

BATCH, SAMPLES, EPOCHS = 64, 50_000, 6
TARGET = 0.02
TARGET_OPERATIONS = 6
PARTS = (
    "forward hook",
    "gradient hooks",
    "end of the backward pass",
    "step pre-hooks",
    "step post-hooks",
    "observe",
    "loader",
)
WAITED_FOR = PARTS[:-1]
"""What a GPU would wait for: the batches of a loop on a GPU are not made by this loader's process."""
VIEWS = ("detach", "view", "alias", "lift_fresh")
Hook = Callable[..., Any]


class Clock:
    """Seconds since the last ``take``, by part; ``now`` tells the time."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._seconds: dict[str, float] = defaultdict(float)

    def timed(self, part: str, call: Hook) -> Hook:
        """``call``, its time added to ``part``."""

        @functools.wraps(call)  # with what marks a hook as ours
        def timed_call(*args: Any, **kwargs: Any) -> Any:
            start = self._now()
            try:
                return call(*args, **kwargs)
            finally:
                self._seconds[part] += self._now() - start

        return timed_call

    def take(self) -> dict[str, float]:
        """What was added up, which starts from zero again."""
        taken, self._seconds = dict(self._seconds), defaultdict(float)
        return taken


@contextmanager
def hooks_timed(clock: Clock) -> Iterator[None]:
    """Inside, every hook that anybody registers on a model, a gradient, a backward pass or a step is timed for good."""
    places: tuple[tuple[type, str, str], ...] = (
        (nn.Module, "register_forward_pre_hook", PARTS[0]),
        (Tensor, "register_post_accumulate_grad_hook", PARTS[1]),
        (Optimizer, "register_step_pre_hook", PARTS[3]),
        (Optimizer, "register_step_post_hook", PARTS[4]),
    )
    after_backward = arriving.after_backward
    arriving.after_backward = lambda callback: after_backward(clock.timed(PARTS[2], callback))
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


def images(samples: int, size: int = 32) -> ImageArray:
    """Noise of CIFAR's shape: what the images show takes no time."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (samples, 3, size, size), dtype=torch.uint8, generator=generator)
    return ImageArray(pixels, torch.randint(0, 100, (samples,), generator=generator))


RECIPE = spfde.Recipe(
    sparsity=spfde.MEST(sparsity=0.9), sieving=spfde.DataSieving(removed_fraction=0.2), update_interval_epochs=2
)


def attach(model: nn.Module, data: ImageArray, batch: int) -> tuple[Optimizer, spfde.Session]:
    """What is measured: an optimizer, and a session of the masked engine."""
    optimizer = SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
    generator = torch.Generator().manual_seed(0)
    loader = DataLoader(data, batch_size=batch, shuffle=True, generator=generator, collate_fn=collate, num_workers=0)
    sample = torch.zeros(2, *data.images.shape[1:])
    return optimizer, spfde.attach(model, optimizer, loader, RECIPE, epochs=EPOCHS, engine="masked", sample=sample)


def measure(
    model: nn.Module,
    data: ImageArray,
    steps: int,
    *,
    batch: int = BATCH,
    now: Callable[[], float] = time.perf_counter,
) -> tuple[list[dict[str, float]], list[float]]:
    """Parts of each step (``"step"`` is the whole), and the seconds at the top of each update epoch."""
    model = model.to(memory_format=torch.channels_last)
    clock = Clock(now)
    with hooks_timed(clock):
        optimizer, session = attach(model, data, batch)
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
        if number > 0 and epoch % RECIPE.interval(EPOCHS) == 0:
            tops.append(top)
    return rows, tops


def narrow_model() -> nn.Module:
    """ResNet-32 with so few channels that calling its kernels takes longer than they do."""
    return CifarResNet(5, (4, 8, 8), num_classes=100, in_channels=3)


class Operations(TorchDispatchMode):
    """Counts what is handed to PyTorch, but for views, for which no kernel runs."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.partition(".")[0]
        if name not in VIEWS:
            self.names[name] += 1
        return func(*args, **(kwargs or {}))


def operations() -> Counter[str]:
    """Those of a step that the plain loop does not have, by name."""
    counts: list[Counter[str]] = []
    for is_attached in (True, False):
        model = narrow_model()
        optimizer, session = attach(model, images(80, size=8), 8)  # of which 64 are used: no smaller batch
        session.begin_epoch()
        if not is_attached:
            session.detach()
        for pixels, y in session.loader:
            with Operations() as found:  # the last step counts, in which nothing is looked up for the first time
                logits = model(pixels.float())
                F.cross_entropy(logits, y).backward()
                optimizer.step()
                optimizer.zero_grad()
                if is_attached:
                    session.observe(logits, y)
        counts.append(found.names)
    return counts[0] - counts[1]


def host_table(rows: list[dict[str, float]], counted: Counter[str]) -> Table:
    """What a step takes the host beside the kernels, part by part."""
    table = [(part, f"{1e6 * statistics.median(row.get(part, 0.0) for row in rows):.0f} µs") for part in WAITED_FOR]
    named = ", ".join(f"{count} {name}" for name, count in counted.most_common())
    table.append(("operations of a step", f"{sum(counted.values())}: {named}"))
    weights = [p for p in narrow_model().parameters() if p.dim() == 4]
    title = f"What a GPU would wait for (ResNet-32 with few channels, {len(weights) - 1} masked layers; medians)"
    return Table(title, ("part", "a step"), tuple(table))


def main(argv: list[str] | None = None) -> None:
    """Run it."""
    made = parser(__doc__)
    made.add_argument("--steps", type=int, default=None, help="timed steps in each of 6 epochs (30)")
    options = made.parse_args(argv)
    stamped = begin(options)
    steps = options.steps or (2 if options.quick else 30)
    samples = 2_000 if options.quick else SAMPLES
    model = build_model("resnet32", num_classes=100, in_channels=3, image_size=32, seed=0)
    rows, tops = measure(model, images(samples), steps)
    # The thread's own time: whatever else the machine does meanwhile is no part of it.
    narrow, _ = measure(narrow_model(), images(2_000, size=8), max(steps, 8), batch=8, now=time.thread_time)
    counted = operations()
    host = [sum(row.get(part, 0.0) for part in WAITED_FOR) for row in narrow]

    shares = [sum(row.get(part, 0.0) for part in PARTS) / row["step"] for row in rows]
    step_seconds = statistics.median(row["step"] for row in rows)
    steps_of_epoch = round(0.8 * SAMPLES / BATCH)
    top = statistics.median(tops)
    spread_top = top / (steps_of_epoch * step_seconds)
    within = statistics.median(shares)
    first, third = quartiles(shares)
    table = []
    for part in PARTS:
        seconds = [row.get(part, 0.0) for row in rows]
        portion = statistics.median(row.get(part, 0.0) / row["step"] for row in rows)
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
                Figure("operations of ours in a step", sum(counted.values()), "count", high=TARGET_OPERATIONS, n=1),
                Figure(
                    "host time of ours in a step",
                    statistics.median(host),
                    "seconds",
                    n=len(host),
                    spread=quartiles(host),
                ),
            ),
            tables=(
                Table("Where it goes (medians)", ("part", "time", "share of a step"), tuple(table)),
                host_table(narrow, counted),
            ),
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
