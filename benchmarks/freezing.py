"""What does freezing save, in time and in memory?

ResNet-32 (widths 32-64-128) at batch 64 under the masked engine at 90 %, with 0, 5 and 10 of its 15 blocks frozen by a
session. Whole training steps, interleaved; and the bytes that autograd keeps for the backward pass.
Targets: step time at most 0.75x and 0.48x, saved bytes at most 0.46x and 0.17x.
Where there is a GPU, also what it gains there to read the frozen front's outputs from a cache.

    python benchmarks/freezing.py                   # about 2 minutes on two cores
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import SGD
from torch.utils.data import DataLoader, TensorDataset

import spfde
from _common import Figure, Result, Table, Timing, begin, compare, interleave, parser, publish
from spfde.app.train.models import build_model
from spfde.cost import SavedTensorBytes, format_bytes

BATCH, BLOCKS = 64, 15
BATCH_ON_GPU, STEPS_ON_GPU = 128, 50
STEP_TARGETS, BYTES_TARGETS = {5: 0.75, 10: 0.48}, {5: 0.46, 10: 0.17}


class Variant:
    """A model under a session that has frozen its first ``frozen`` blocks, and a batch to train it on."""

    def __init__(self, frozen: int, x: Tensor, y: Tensor, *, engine: str = "masked", **options: Any) -> None:
        self.x, self.y = x, y
        self.model = build_model("resnet32", num_classes=100, in_channels=3, image_size=32, seed=0)
        self.model = self.model.to(x.device, memory_format=torch.channels_last).train()
        self.optimizer = SGD(self.model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)
        loader = DataLoader(TensorDataset(x, y), batch_size=len(x))
        # One block an epoch from epoch 1 on: the epoch's number is the number of frozen blocks.
        recipe = spfde.Recipe(
            sparsity=spfde.MEST(sparsity=0.9, soft_bound=False),
            freezing=spfde.ProgressiveFreezing(flops_reduction=0.0, start_epoch=1),
            update_interval_epochs=1,
        )
        self.session = spfde.attach(self.model, self.optimizer, loader, recipe, epochs=40, engine=engine, **options)
        self._epochs = self.session.epochs()
        while next(self._epochs) < frozen:
            pass
        blocks = len(self.session.blueprint.partition.blocks)
        assert (self.session.frozen_blocks, blocks) == (frozen, BLOCKS), "the recipe freezes one block an epoch"

    def step(self) -> None:
        """One training step; batches from elsewhere than the session's loader are allowed while nothing is sieved."""
        self.loss().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def loss(self) -> Tensor:
        return F.cross_entropy(self.model(self.x), self.y)

    def saved_bytes(self) -> int:
        """Bytes that autograd keeps for the backward pass."""
        with SavedTensorBytes(self.model) as saved:
            self.loss().backward()
        self.optimizer.zero_grad()
        return saved.bytes


class Captured(Variant):
    """The same on a GPU under the engine ``cudagraph`` in bf16, whose frozen front is computed or kept."""

    def __init__(self, frozen: int, x: Tensor, y: Tensor, *, cached: bool) -> None:
        self.cache = spfde.PrefixCache(1) if cached else None
        super().__init__(frozen, x.cuda(), y.cuda(), engine="cudagraph", cache=self.cache)
        self.ids = torch.arange(len(x))
        for _ in range(3):  # two calls in turn are recorded
            self.step()

    def loss(self) -> Tensor:
        if self.cache is not None:
            self.session.augmentation_seeds(self.ids)
        with torch.autocast("cuda", torch.bfloat16):
            return F.cross_entropy(self.model(self.x), self.y)

    def steps(self) -> None:
        """So many that no look at the clock is in the way."""
        for _ in range(STEPS_ON_GPU):
            self.step()
        torch.cuda.synchronize()


def on_gpu(x: Tensor, y: Tensor, rounds: int) -> tuple[list[Figure], Table]:
    """Steps on the GPU with the frozen front's outputs kept, over those that compute them."""
    figures, rows = [], []
    for frozen in STEP_TARGETS:
        made = {name: Captured(frozen, x, y, cached=name == "kept") for name in ("computed", "kept")}
        timings = interleave({name: each.steps for name, each in made.items()}, rounds, warmup=2)
        what = f"on the GPU: step with {frozen} of {BLOCKS} blocks frozen, their outputs kept over computed"
        figures.append(Figure.of(what, compare(timings["kept"], timings["computed"])))
        for name, timing in timings.items():
            rows.append((str(frozen), name, f"{1e3 * timing.median / STEPS_ON_GPU:.2f} ms"))
    return figures, Table("On the GPU, batch 128, bf16", ("frozen blocks", "their outputs", "step"), tuple(rows))


def main(argv: list[str] | None = None) -> None:
    """Run it."""
    made = parser(__doc__)
    made.add_argument("--rounds", type=int, default=None, help="rounds of one step of each variant (40)")
    options = made.parse_args(argv)
    stamped = begin(options)
    rounds = options.rounds or (2 if options.quick else 40)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(BATCH, 3, 32, 32, generator=generator).contiguous(memory_format=torch.channels_last)
    y = torch.randint(0, 100, (BATCH,), generator=generator)

    variants = {frozen: Variant(frozen, x, y) for frozen in (0, *STEP_TARGETS)}
    saved = {frozen: variant.saved_bytes() for frozen, variant in variants.items()}
    timings = interleave({str(n): v.step for n, v in variants.items()}, rounds, warmup=1 if options.quick else 3)

    figures = [
        Figure.of(
            f"step with {n} of {BLOCKS} blocks frozen", compare(timings[str(n)], timings["0"]), high=high, headline=True
        )
        for n, high in STEP_TARGETS.items()
    ]
    figures += [
        Figure(
            f"saved-tensor bytes with {n} of {BLOCKS} blocks frozen",
            saved[n] / saved[0],
            "ratio",
            high=high,
            n=1,
            headline=True,
        )
        for n, high in BYTES_TARGETS.items()
    ]
    tables = []
    if torch.cuda.is_available():
        generator = torch.Generator().manual_seed(1)
        images = torch.randn(BATCH_ON_GPU, 3, 32, 32, generator=generator).contiguous(memory_format=torch.channels_last)
        found, table = on_gpu(images, torch.randint(0, 100, (BATCH_ON_GPU,), generator=generator), rounds)
        figures += found
        tables.append(table)
    rows = [(str(n), _milliseconds(timings[str(n)]), format_bytes(saved[n])) for n in variants]
    publish(
        Result(
            name="freezing",
            title="Freezing",
            question="With the first 5 and 10 of ResNet-32's 15 blocks frozen, how long is a training step at batch "
            "64, and how many bytes does autograd keep, against the full step?",
            command="python benchmarks/freezing.py",
            figures=tuple(figures),
            tables=(
                Table("Each variant", ("frozen blocks", "step (median, quartiles)", "saved tensors"), tuple(rows)),
                *tables,
            ),
            settings={"batch": BATCH, "sparsity": 0.9, "engine": "masked", "rounds": rounds, "layout": "channels_last"},
            notes=("Saved bytes do not vary from run to run.",),
            stamp=stamped,
        ),
        options,
    )


def _milliseconds(timing: Timing) -> str:
    first, third = timing.quartiles
    return f"{1e3 * timing.median:.0f} ms ({1e3 * first:.0f} … {1e3 * third:.0f})"


if __name__ == "__main__":
    main()
