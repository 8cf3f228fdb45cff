"""What does sieving save, in time?

ResNet-8 on fashion-mini through ``attach``: epochs with 20 % of the samples sieved (turns of the sieve included)
against epochs over the whole data, one of each a round, as the command line trains them. Target: at most 0.82x.

    python benchmarks/sieving.py                    # about 3 minutes on two cores
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch.optim import SGD
from torch.utils.data import DataLoader

import spfde
from _common import Figure, Result, Table, begin, compare, interleave, parser, publish, show
from spfde.app.data.datasets import load_data
from spfde.app.data.images import ImageArray, ImageData, collate
from spfde.app.train.augment import BatchAugment, normalise
from spfde.app.train.models import build_model

BATCH, REMOVED, TARGET = 64, 0.2, 0.82


class Trainer:
    """An ordinary loop over a session's loader, an epoch at a time."""

    def __init__(self, data: ImageData, samples: int, recipe: spfde.Recipe, epochs: int) -> None:
        self.data = data
        assert isinstance(data.train, ImageArray), "the embedded set is in memory"
        train = ImageArray(data.train.images[:samples], data.train.labels[:samples])
        spec = data.spec
        self.model = build_model(
            "resnet8", num_classes=spec.num_classes, in_channels=spec.channels, image_size=spec.image_size, seed=0
        )
        self.model = self.model.to(memory_format=torch.channels_last)
        self.optimizer = SGD(self.model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
        generator = torch.Generator().manual_seed(0)
        loader = DataLoader(train, batch_size=BATCH, shuffle=True, generator=generator, collate_fn=collate)
        sample = torch.zeros(2, *spec.sample_shape)
        self.session = spfde.attach(self.model, self.optimizer, loader, recipe, epochs=epochs, sample=sample)
        self.augment = BatchAugment(data.default_augmentation, torch.Generator().manual_seed(1), padding=data.padding)
        self.steps = 0
        self._epochs = self.session.epochs()

    def epoch(self) -> None:
        """One epoch: its top, its batches and, with the next one, its end."""
        next(self._epochs)
        self.model.train()
        self.steps = 0
        for images, y in self.session.loader:
            x = normalise(self.augment(images), self.data.mean, self.data.std)
            logits = self.model(x.contiguous(memory_format=torch.channels_last))
            F.cross_entropy(logits, y).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.session.observe(logits, y)
            self.steps += 1


def main(argv: list[str] | None = None) -> None:
    """Run it."""
    made = parser(__doc__)
    made.add_argument("--rounds", type=int, default=None, help="rounds of one epoch of each (12)")
    options = made.parse_args(argv)
    stamped = begin(options)
    rounds = options.rounds or (2 if options.quick else 12)
    data = load_data("fashion-mini", root=Path("data"))
    samples = 1_000 if options.quick else data.spec.train_samples
    epochs = rounds + 2  # one to warm up; the last of a run, without a turn of the sieve, is left out
    recipes = {
        "whole": spfde.Recipe(),
        "sieved": spfde.Recipe(sieving=spfde.DataSieving(removed_fraction=REMOVED), update_interval_epochs=2),
    }
    trainers = {name: Trainer(data, samples, recipe, epochs) for name, recipe in recipes.items()}
    timings = interleave({name: trainer.epoch for name, trainer in trainers.items()}, rounds)
    steps = {name: trainer.steps for name, trainer in trainers.items()}
    rows = [
        (name, str(steps[name]), show(timing.median, "seconds"), " … ".join(f"{q:.3g} s" for q in timing.quartiles))
        for name, timing in timings.items()
    ]
    publish(
        Result(
            name="sieving",
            title="Sieving",
            question="How long does an epoch take with 20 % of the samples sieved, against one over the whole data?",
            command="python benchmarks/sieving.py",
            figures=(
                Figure.of(
                    "epoch with 20 % sieved", compare(timings["sieved"], timings["whole"]), high=TARGET, headline=True
                ),
                Figure("steps in it", steps["sieved"] / steps["whole"], "ratio", n=1),
            ),
            tables=(Table("Each variant", ("data", "steps", "epoch (median)", "quartiles"), tuple(rows)),),
            settings={
                "data": f"fashion-mini ({samples:,} samples)",
                "model": "resnet8",
                "batch": BATCH,
                "rounds": rounds,
                "interval": "2 epochs",
            },
            stamp=stamped,
        ),
        options,
    )


if __name__ == "__main__":
    main()
