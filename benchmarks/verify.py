"""What share of an epoch passes in looking whether all is right?

ResNet-32 (widths 32-64-128) at batch 64, MEST at 90 % of sparsity, 50,000 samples an epoch. Timed turn by turn: a whole
training step, ``session.verify()`` as the end of each epoch calls it, the look at the top of an epoch, and the one
before each step. Target: at most 0.1 % of an epoch in all.

    python benchmarks/verify.py                     # about 2 minutes on two cores
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.optim import SGD
from torch.utils.data import DataLoader, TensorDataset

import spfde
from _common import Figure, Result, Table, begin, interleave, parser, publish, quartiles
from spfde.app.train.models import build_model

BATCH, SAMPLES = 64, 50_000
TARGET = 0.001


def calls() -> dict[str, Callable[[], object]]:
    """What is timed, by name."""
    model = build_model("resnet32", num_classes=100, in_channels=3, image_size=32, seed=0)
    model = model.to(memory_format=torch.channels_last)
    optimizer = SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(BATCH, 3, 32, 32, generator=generator).contiguous(memory_format=torch.channels_last)
    y = torch.randint(0, 100, (BATCH,), generator=generator)
    items = TensorDataset(x[:1].expand(SAMPLES, -1, -1, -1), y[:1].expand(SAMPLES))
    loader = DataLoader(items, batch_size=BATCH)
    recipe = spfde.Recipe(sparsity=spfde.MEST(sparsity=0.9), update_interval_epochs=2)
    session = spfde.attach(model, optimizer, loader, recipe, epochs=8, engine="masked")
    session.begin_epoch()
    guards, row = session._guards, session.timeline[0]

    def step() -> None:
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()

    def top() -> None:
        guards.before_masks()
        guards.begin_epoch(row)

    return {"step": step, "bottom": session.verify, "top": top, "before a step": guards.before_step}


def main() -> None:
    options = parser(__doc__).parse_args()
    stamped = begin(options)
    rounds = 3 if options.quick else 20
    timings = interleave(calls(), rounds, warmup=1)
    steps = SAMPLES // BATCH

    def share(number: int) -> float:
        at = {name: timing.seconds[number] for name, timing in timings.items()}
        return (at["bottom"] + at["top"] + steps * at["before a step"]) / (steps * at["step"])

    shares = [share(number) for number in range(rounds)]
    once = [
        (bottom + top) / (steps * step)
        for bottom, top, step in zip(*(timings[name].seconds for name in ("bottom", "top", "step")), strict=True)
    ]
    publish(
        Result(
            name="verify",
            title="Guards",
            question="What share of an epoch of ResNet-32 passes in looking whether all is right: weights outside "
            "masks, replaced parameters, steps of others?",
            command="python benchmarks/verify.py",
            figures=(
                Figure(
                    "guards, share of an epoch",
                    statistics.median(shares),
                    "share",
                    high=TARGET,
                    n=rounds,
                    spread=quartiles(shares),
                ),
                Figure(
                    "of it at the ends of the epoch", statistics.median(once), "share", n=rounds, spread=quartiles(once)
                ),
            ),
            tables=(Table.of_timings("Where it goes", "what", timings),),
            settings={"batch": BATCH, "samples": f"{SAMPLES:,}", "layout": "channels_last"},
            notes=("One process: with several, the sums that ranks compare travel once an epoch.",),
            stamp=stamped,
        ),
        options,
    )


if __name__ == "__main__":
    main()
