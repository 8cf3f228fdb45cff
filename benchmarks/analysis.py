"""How long does the analysis of a run take?

CKA per block of ResNet-32 (widths 32-64-128) between 10 checkpoints and the last of them, on 2,000 images of
3 x 32 x 32: what ``spfde analyze`` does for it, without reading files. Weights and masks are random at 90 %, for time
does not depend on them. Once with the native engine, as for a run that was trained with it, and once with PyTorch under
the mask, as for any other. Target: under 2 minutes on two cores.

    python benchmarks/analysis.py                   # about 6 minutes on two cores
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from _common import Figure, Result, Table, begin, parser, publish, quartiles
from spfde import presets
from spfde.analysis import BlockOutputs, batch_grams, minibatch_cka, native_outputs, output_modules
from spfde.app.train.models import build_model
from spfde.engines.native import build
from spfde.planning.bill import draw
from spfde.sparsity.masks import grow_random

SIZE, BATCH, TARGET = 32, 125, 120.0

Outputs = Callable[[Tensor], Mapping[str, Tensor]]


class Checkpoints:
    """A model, and states with masks to load into it one after the other."""

    def __init__(self, count: int) -> None:
        self.model = build_model("resnet32", num_classes=100, in_channels=3, image_size=SIZE, seed=0)
        self.model = self.model.to(memory_format=torch.channels_last).eval()
        sample = torch.zeros(1, 3, SIZE, SIZE)
        blueprint = draw(self.model, sample, presets.spfde, 160)
        self.modules = [name for name in output_modules(self.model, blueprint.partition, sample) if name is not None]
        self.masks: dict[str, Tensor] = {}
        generator = torch.Generator().manual_seed(0)
        self.kept = []
        for _ in range(count):
            masks = {
                name: grow_random(torch.zeros(p.shape, dtype=torch.bool), blueprint.target[name], generator)
                for name, p in blueprint.sparse_layers.items()
            }
            weights = {name: value.clone() for name, value in self.model.state_dict().items()}
            for name, mask in masks.items():
                weights[name] *= mask
            self.kept.append((weights, masks))

    def load(self, index: int) -> None:
        weights, self.masks = self.kept[index]
        self.model.load_state_dict(weights)

    def masked(self) -> BlockOutputs:
        """What gives the blocks' outputs, computed by PyTorch."""
        return BlockOutputs(self.model, self.modules)

    def native(self) -> AbstractContextManager[Outputs]:
        """The same, computed with the active weights alone."""
        return nullcontext(native_outputs(self.model, self.modules, masks=lambda: self.masks))


def cka_of_all(checkpoints: Checkpoints, outputs: Outputs, batches: list[Tensor]) -> list[dict[str, float]]:
    """CKA by block of every checkpoint with the last one."""
    checkpoints.load(-1)
    reference = list(batch_grams(outputs, batches))
    found = []
    for index in range(len(checkpoints.kept) - 1):
        checkpoints.load(index)
        found.append(minibatch_cka(batch_grams(outputs, batches), reference))
    return [*found, minibatch_cka(reference, reference)]


def main(argv: list[str] | None = None) -> None:
    """Run it."""
    made = parser(__doc__)
    made.add_argument("--rounds", type=int, default=None, help="times that each is done (3)")
    made.add_argument("--samples", type=int, default=None, help="images (2000)")
    options = made.parse_args(argv)
    stamped = begin(options)
    rounds = options.rounds or (1 if options.quick else 3)
    samples, count = options.samples or (2 * BATCH if options.quick else 2000), 2 if options.quick else 10
    images = torch.randn(samples, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    batches = [part.contiguous(memory_format=torch.channels_last) for part in images.split(BATCH)]
    checkpoints = Checkpoints(count)

    engines = {"native": checkpoints.native, "masked": checkpoints.masked}
    if build.available() is not None:
        del engines["native"]
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    processor: dict[str, list[float]] = {name: [] for name in engines}
    for _ in range(rounds):
        for name, engine in engines.items():
            with engine() as outputs:
                start, start_processor = time.perf_counter(), time.process_time()
                cka_of_all(checkpoints, outputs, batches)
                seconds[name].append(time.perf_counter() - start)
                processor[name].append(time.process_time() - start_processor)
    with checkpoints.masked() as outputs:
        grams = gram_seconds(outputs(batches[0]), batches[0]) * len(batches) * count
    figures = [
        Figure(
            f"CKA of ResNet-32, {count} checkpoints, {samples:,} images, {name} engine",
            statistics.median(taken),
            "seconds",
            high=TARGET,
            n=rounds,
            spread=quartiles(taken),
            headline=True,
        )
        for name, taken in seconds.items()
    ]
    rows = [
        (f"{name} engine", f"{statistics.median(seconds[name]):.1f}", f"{statistics.median(processor[name]):.1f}")
        for name in engines
    ]
    rows.append(("Gram matrices, of one minibatch times their number", f"{grams:.1f}", "–"))
    publish(
        Result(
            name="analysis",
            title="Analysis",
            question="How long does linear CKA (minibatches, unbiased) of all blocks of ResNet-32 at 90 % take, "
            "between 10 checkpoints and the last of them on 2,000 images?",
            command="python benchmarks/analysis.py",
            figures=tuple(figures),
            tables=(Table("Each engine", ("part", "seconds", "processor seconds"), tuple(rows)),),
            settings={
                "images per minibatch": BATCH,
                "sparsity": 0.9,
                "blocks": len(checkpoints.modules),
                "rounds": rounds,
            },
            notes=(
                "Seconds, not ratios: they are what the target is about, and they are this machine's.",
                "Processor seconds are those of this process on all its threads: far below threads times seconds means "
                "that others were at work.",
            ),
            stamp=stamped,
            data={"seconds": seconds, "processor_seconds": processor},
        ),
        options,
    )


def gram_seconds(features: dict[str, Tensor], batch: Tensor) -> float:
    """Median seconds of the Gram matrices of one minibatch."""
    taken = []
    for _ in range(5):
        start = time.perf_counter()
        list(batch_grams(lambda _: features, [batch]))
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


if __name__ == "__main__":
    main()
