"""Do the trainers of others train as our own loop does, and what does the callback cost them?

Accuracy: ResNet-8 on fashion-mini with SpFDE (80 % sparse, 15 % frozen, 20 % sieved), the same seeds, rates and number
of epochs in our own loop, in Lightning, in the Trainer of Hugging Face and with Accelerate. Target: the mean accuracy
differs from our loop's by at most the noise of the seeds (two standard errors of the difference of the means), and the
bill is the same number.

Time: a step in each trainer with the integration and a neutral recipe, over the same trainer without the library, on
ResNet-20 at batch 64: whole runs turn by turn in one process, and of each the median time from one forward pass to the
next. Target: at most 2 % more.

    python benchmarks/integrations.py               # about 12 minutes on two cores
"""

from __future__ import annotations

import logging
import math
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
import transformers
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import SGD
from torch.utils.data import DataLoader, Dataset, TensorDataset

import spfde
from _common import Figure, Result, Table, Timing, begin, compare, parser, publish
from spfde.app.data.datasets import load_data
from spfde.app.train.augment import normalise
from spfde.app.train.models import build_model
from spfde.integrations.accelerate import attach
from spfde.integrations.lightning import SpfdeCallback as LightningCallback
from spfde.integrations.transformers import SpfdeCallback as TrainerCallback

BATCH, RATE, ENGINE = 64, 0.1, "masked"
MOST_MORE = 1.02
RECIPE = spfde.Recipe(
    sparsity=spfde.MEST(sparsity=0.8),
    freezing=spfde.ProgressiveFreezing(flops_reduction=0.15),
    sieving=spfde.DataSieving(removed_fraction=0.2),
    learning_rate=spfde.BlockwiseCosine(),
    update_interval_epochs=2,
)


class Run:
    """One training run: the net, its data, and its seed.

    Attributes:
        recipe: None for the trainer without the library.
        session: what was attached, once it has run.
        starts: when each forward pass in training mode began.
    """

    def __init__(self, name: str, data: TensorDataset, recipe: spfde.Recipe | None, epochs: int, seed: int) -> None:
        self.net = build_model(name, num_classes=10, in_channels=1, image_size=28, seed=seed)
        self.data, self.recipe, self.epochs, self.seed = data, recipe, epochs, seed
        self.session: spfde.Session | None = None
        self.starts: list[float] = []
        self.net.register_forward_pre_hook(self._note)

    def _note(self, net: nn.Module, inputs: Any) -> None:
        if net.training:
            self.starts.append(time.perf_counter())

    @property
    def step_seconds(self) -> float:
        """Median time of a step, the first two left out."""
        found = [after - before for before, after in zip(self.starts[2:], self.starts[3:], strict=False)]
        return statistics.median(found)

    def optimizer(self) -> SGD:
        return SGD(self.net.parameters(), lr=RATE, momentum=0.9, weight_decay=1e-4)

    def loader(self) -> DataLoader[Any]:
        generator = torch.Generator().manual_seed(self.seed)
        return DataLoader(self.data, batch_size=BATCH, shuffle=True, generator=generator)

    def options(self) -> dict[str, Any]:
        return {"seed": self.seed, "engine": ENGINE}


def own_loop(run: Run) -> None:
    """The loop of the README, or the plain one."""
    optimizer, loader = run.optimizer(), run.loader()
    if run.recipe is not None:
        session = spfde.attach(run.net, optimizer, loader, run.recipe, epochs=run.epochs, **run.options())
        run.session, loader = session, session.loader
    for _ in range(run.epochs) if run.session is None else run.session.epochs():
        run.net.train()
        for x, y in loader:
            logits = run.net(x)
            F.cross_entropy(logits, y).backward()
            optimizer.step()
            optimizer.zero_grad()
            if run.session is not None:
                run.session.observe(logits, y)


class Module(pl.LightningModule):
    """The run's net in Lightning."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        self.net, self.make_optimizer = run.net, run.optimizer

    def configure_optimizers(self) -> SGD:
        return self.make_optimizer()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> dict[str, Tensor]:
        logits = self.net(batch[0])
        return {"loss": F.cross_entropy(logits, batch[1]), "logits": logits, "y": batch[1]}


def in_lightning(run: Run) -> None:
    """Lightning's trainer, with nothing that writes or prints."""
    callback = None if run.recipe is None else LightningCallback(run.recipe, **run.options())
    names = ("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing")
    quiet: dict[str, Any] = dict.fromkeys(names, False)
    callbacks = [] if callback is None else [callback]
    trainer = pl.Trainer(max_epochs=run.epochs, callbacks=callbacks, accelerator="cpu", devices=1, **quiet)
    trainer.fit(Module(run), run.loader())
    run.session = None if callback is None else callback.session


class Items(Dataset[dict[str, Tensor]]):
    """The data as the Trainer wants it."""

    def __init__(self, data: TensorDataset) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        x, y = self.data[index]
        return {"x": x, "labels": y}


class Classifier(nn.Module):
    """The run's net as the Trainer calls it."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.net(x)
        return {"logits": logits} if labels is None else {"loss": F.cross_entropy(logits, labels), "logits": logits}


def in_trainer(run: Run) -> None:
    """The Trainer of Hugging Face; its clipping and its schedule are switched off."""
    callback = None if run.recipe is None else TrainerCallback(run.recipe, **run.options())
    with tempfile.TemporaryDirectory() as folder:
        args = transformers.TrainingArguments(
            folder,
            num_train_epochs=run.epochs,
            per_device_train_batch_size=BATCH,
            seed=run.seed,
            lr_scheduler_type="constant",
            max_grad_norm=0.0,
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
        )
        transformers.Trainer(
            model=Classifier(run.net),
            args=args,
            train_dataset=Items(run.data),
            optimizers=(run.optimizer(), None),
            callbacks=[] if callback is None else [callback],
        ).train()
    run.session = None if callback is None else callback.session


def with_accelerate(run: Run) -> None:
    """The loop of Accelerate's documentation."""
    accelerator = Accelerator(cpu=True)
    net, optimizer, loader = accelerator.prepare(run.net, run.optimizer(), run.loader())
    if run.recipe is not None:
        session = attach(accelerator, net, optimizer, loader, run.recipe, epochs=run.epochs, **run.options())
        run.session, loader = session, session.loader
    for _ in range(run.epochs) if run.session is None else run.session.epochs():
        net.train()
        for x, y in loader:
            logits = net(x)
            accelerator.backward(F.cross_entropy(logits, y))
            optimizer.step()
            optimizer.zero_grad()
            if run.session is not None:
                run.session.observe(logits, y)


OWN = "our own loop"
TRAINERS: dict[str, Callable[[Run], None]] = {
    OWN: own_loop,
    "Lightning": in_lightning,
    "Hugging Face Trainer": in_trainer,
    "Accelerate": with_accelerate,
}


@torch.no_grad()
def accuracy(net: nn.Module, test: TensorDataset) -> float:
    net.eval()
    x, y = test.tensors
    return float(torch.cat([net(part).argmax(1) for part in x.split(500)]).eq(y).float().mean())


def accuracies(data: TensorDataset, test: TensorDataset, epochs: int, seeds: int) -> tuple[list[Figure], Table]:
    """Accuracy and bill in each trainer, over ours."""
    found: dict[str, list[float]] = {name: [] for name in TRAINERS}
    bills: dict[str, list[int]] = {name: [] for name in TRAINERS}
    for seed in range(seeds):
        for name, train in TRAINERS.items():
            run = Run("resnet8", data, RECIPE, epochs, seed)
            train(run)
            assert run.session is not None
            found[name].append(accuracy(run.net, test))
            bills[name].append(run.session.cost.totals.cost.training_flops)
    figures = []
    for name in list(TRAINERS)[1:]:
        apart = statistics.fmean(found[name]) - statistics.fmean(found[OWN])
        noise = 2 * math.sqrt(sum(statistics.variance(found[each]) for each in (name, OWN)) / seeds)
        what = f"{name}: accuracy with SpFDE over our own loop's"
        figures.append(Figure(what, apart, "points", low=-noise, high=noise, n=seeds))
        same = bills[name][0] / bills[OWN][0] if bills[name] == bills[OWN] else math.nan
        what = f"{name}: training FLOPs over our own loop's"
        figures.append(Figure(what, same, "ratio", low=1.0, high=1.0, kind="modelled", n=seeds))
    rows = [(name, *(f"{value:.4f}" for value in values), f"{bills[name][0]:.4g}") for name, values in found.items()]
    columns = ("trainer", *(f"seed {seed}" for seed in range(seeds)), "training FLOPs (modelled)")
    return figures, Table("Test accuracy with SpFDE", columns, tuple(rows))


def overheads(data: TensorDataset, rounds: int) -> tuple[list[Figure], Table]:
    """A step with the integration over a step without the library, turn by turn."""
    seconds: dict[str, list[float]] = {}
    names = list(TRAINERS)[1:]
    for number in range(rounds + 1):
        for name in names:
            both = [(f"{name}, plain", None), (f"{name}, neutral recipe", spfde.Recipe())]
            for label, recipe in both if number % 2 else reversed(both):
                run = Run("resnet20", data, recipe, 1, 0)
                TRAINERS[name](run)
                if number:  # the first round warms up
                    seconds.setdefault(label, []).append(run.step_seconds)
    timings = {label: Timing(tuple(taken)) for label, taken in sorted(seconds.items())}
    figures = [
        Figure.of(
            f"{name}: step with the integration over one without",
            compare(timings[f"{name}, neutral recipe"], timings[f"{name}, plain"]),
            high=MOST_MORE,
            headline=True,
        )
        for name in names
    ]
    return figures, Table.of_timings("A step of ResNet-20 at batch 64", "trainer", timings)


def main(argv: list[str] | None = None) -> None:
    """Run it."""
    made = parser(__doc__)
    made.add_argument("--seeds", type=int, default=None, help="seeds (3)")
    made.add_argument("--rounds", type=int, default=None, help="timed rounds (15)")
    made.add_argument("--epochs", type=int, default=None, help="length of the runs (10)")
    made.add_argument("--samples", type=int, default=None, help="training images (10,000)")
    options = made.parse_args(argv)
    stamped = begin(options)
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "transformers", "accelerate"):
        logging.getLogger(name).setLevel(logging.ERROR)
    seeds, rounds = options.seeds or (2 if options.quick else 3), options.rounds or (2 if options.quick else 15)
    epochs = options.epochs or (8 if options.quick else 10)
    samples, steps = options.samples or (400 if options.quick else 10_000), 6 if options.quick else 24
    data = load_data("fashion-mini", root="data")

    def part(of: Any, count: int) -> TensorDataset:
        return TensorDataset(normalise(of.images[:count], data.mean, data.std), of.labels[:count])

    train = part(data.train, samples)
    figures, accuracy_table = accuracies(train, part(data.test, 2_000), epochs, seeds)
    times, step_table = overheads(part(data.train, BATCH * steps), rounds)
    versions = ", ".join(
        f"{each.__name__.split('.')[0]} {version}"
        for each, version in ((pl, pl.__version__), (transformers, transformers.__version__))
    )
    publish(
        Result(
            name="integrations",
            title="In the trainers of others",
            question="With SpFDE, do Lightning, the Hugging Face Trainer and Accelerate reach our own loop's accuracy "
            "at our own loop's bill, and what does the integration add to their steps?",
            command="python benchmarks/integrations.py",
            figures=(*figures, *times),
            tables=(accuracy_table, step_table),
            settings={
                "batch": BATCH,
                "samples": f"{len(train):,}",
                "epochs": epochs,
                "engine": ENGINE,
                "steps a round": steps,
                "trainers": versions,
            },
            notes=(
                "Accuracy has to lie within two standard errors of the difference of the two means of the seeds.",
                "Orders of samples differ: each trainer shuffles in its own way. Accelerate's is that of our own loop.",
                "Steps are timed with a neutral recipe: what is left is the integration itself. What masks and "
                "sieving cost stands under Bookkeeping.",
            ),
            stamp=stamped,
        ),
        options,
    )


if __name__ == "__main__":
    main()
