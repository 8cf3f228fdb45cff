"""What else does the same budget buy?

ResNet-8 on fashion-mini by the command line's own trainer: SpFDE (90 % sparse, 20 % + 20 %) against dense nets on the
same budget, once in training FLOPs (modelled) and once in seconds (measured): the same net for fewer epochs, and a
narrower net for as many. Budgets are rounded up to whole epochs and channels, so a dense net never gets less. Also the
dense net over the full length (SpFDE should end at most 3 points below it, within 5 minutes), SpFDE once more by the
masked engine (which should be as accurate, and half as fast or slower), SpFDE with a prefix cache of 1 and of 4
variants and, with --extras, a static random mask, and MEST without freezing and sieving. All runs have the same
learning rate, each its own cosine to zero.

    python benchmarks/same_budget.py                # about 40 minutes on two cores; --extras: about 20 more
    python benchmarks/same_budget.py --seeds 0 1 2 --epochs 20 --runs runs/benchmarks/same_budget

Every run has a folder of its own under --runs, with its own stamp in config.json. A benchmark that was interrupted goes
on where it stopped, and a run that is finished is not trained again; take another --runs folder, or remove this one, to
start afresh.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import nn
from torch.optim import SGD

import spfde
from _common import BENCHMARKS, Figure, Result, Table, begin, compare, interleave, parser, publish
from spfde.app.data.datasets import load_data
from spfde.app.data.images import ImageArray
from spfde.app.train.display import ConsoleDisplay
from spfde.app.train.loop import train
from spfde.app.train.models import build_model
from spfde.app.train.options import TrainOptions, choose_recipe
from spfde.cost import format_seconds

FULL_WIDTH = 16
MOST_BELOW_DENSE, MOST_SECONDS, LEAST_FASTER = 0.03, 300.0, 2.0
STATIC, MEST, SYSTEM = "static random mask, 90 %", "MEST at 90 %", "SpFDE 20 % + 20 % at 90 %"
MASKED = SYSTEM + ", masked engine"
VARIANTS = (1, 4)
DENSE, DATA = "dense", "fashion-mini"


@dataclass(frozen=True)
class Entry:
    """One net that is compared, trained once with each seed."""

    label: str
    recipe: str
    epochs: int
    width: int = FULL_WIDTH
    engine: str = "auto"
    cache_variants: int = 0

    @property
    def model(self) -> str:
        return "resnet8" if self.width == FULL_WIDTH else f"resnet8-width-{self.width}"

    def options(self, seed: int, data: str) -> TrainOptions:
        """What the command line would make of it."""
        return TrainOptions(
            data=data,
            model="resnet8",
            width=self.width / FULL_WIDTH,
            recipe_name=self.recipe,
            recipe=choose_recipe(self.recipe).to_dict(),
            epochs=self.epochs,
            seed=seed,
            engine=self.engine,
            cache_variants=self.cache_variants,
            dense_timing_steps=0,
        )


class Runs:
    """The runs in a folder: trained when they are first asked for."""

    def __init__(self, folder: Path, seeds: Sequence[int], data: str) -> None:
        self.folder, self.seeds, self.data = folder, tuple(seeds), data

    def train(self, entries: Sequence[Entry]) -> None:
        """Train what is missing, seed by seed, so that a machine's slow hour hits all entries alike."""
        for seed in self.seeds:
            for entry in entries:
                self._summary(entry, seed)

    def summaries(self, entry: Entry) -> list[dict[str, Any]]:
        """The summary of each seed's run."""
        return [self._summary(entry, seed) for seed in self.seeds]

    def curves(self, entry: Entry) -> list[dict[str, float]]:
        """After each epoch: FLOPs and seconds spent so far, and test accuracy; means over the seeds."""
        curve, flops, seconds = [], 0.0, 0.0
        for rows in zip(*self.rows(entry), strict=True):
            flops += statistics.mean(row["training_flops"] for row in rows)
            seconds += statistics.mean(row["seconds"] for row in rows)
            accuracy = statistics.mean(row["test_accuracy"] for row in rows)
            curve.append({"training_flops": flops, "seconds": seconds, "test_accuracy": accuracy})
        return curve

    def rows(self, entry: Entry) -> list[list[dict[str, Any]]]:
        """The lines of each seed's metrics."""
        files = [self._path(entry, seed) / "metrics.jsonl" for seed in self.seeds]
        return [[json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] for file in files]

    def _path(self, entry: Entry, seed: int) -> Path:
        engine = "" if entry.engine == "auto" else f"-{entry.engine}"
        cache = f"-cache-{entry.cache_variants}" if entry.cache_variants else ""
        return self.folder / f"{entry.recipe}{engine}{cache}-{entry.model}-{entry.epochs}-epochs-seed-{seed}"

    def _summary(self, entry: Entry, seed: int) -> dict[str, Any]:
        path, options = self._path(entry, seed), entry.options(seed, self.data)
        if (path / "config.json").is_file():
            kept = json.loads((path / "config.json").read_text(encoding="utf-8"))["command"]
            if kept != json.loads(options.model_dump_json()):
                raise SystemExit(f"{path} was run with other options. Remove it, or choose another --runs folder.")
        if not (path / "summary.json").is_file():
            print(f"{entry.label}, {entry.epochs} epochs, seed {seed}: {path}", flush=True)
            quiet = ConsoleDisplay(Console(quiet=True))
            summary = train(options, path, quiet, resume=(path / "config.json").is_file())
            print(f"  accuracy {summary['test_accuracy']:.4f} in {summary['seconds']:.0f} s", flush=True)
        found: dict[str, Any] = json.loads((path / "summary.json").read_text(encoding="utf-8"))
        return found


def resnet8(width: int) -> nn.Module:
    """ResNet-8 whose first stage has ``width`` channels."""
    return build_model("resnet8", num_classes=10, in_channels=1, image_size=28, width=width / FULL_WIDTH)


def small_set(folder: Path) -> str:
    """A tenth of the embedded set, for smoke tests: the path of its .npz."""
    path = folder / "small.npz"
    if not path.is_file():
        whole = load_data(DATA, root=folder)
        parts = {"train": whole.train, "test": whole.test}
        arrays = {}
        for name, part in parts.items():
            assert isinstance(part, ImageArray), "the embedded set is in memory"
            arrays[f"x_{name}"], arrays[f"y_{name}"] = part.images[:1000, 0].numpy(), part.labels[:1000].numpy()
        np.savez(path, **arrays)
    return str(path)


def mean(summaries: Sequence[dict[str, Any]], name: str) -> float:
    """Mean of one entry over the seeds."""
    return statistics.mean(summary[name] for summary in summaries)


# --- what the budget buys ---------------------------------------------------------------------------------------------


def width_of_flops(ratio: float) -> int:
    """Least width whose training FLOPs are at least ``ratio`` of the full width's."""
    sample = torch.zeros(1, 1, 28, 28)

    def flops(width: int) -> int:
        return spfde.plan(resnet8(width), sample, spfde.presets.dense, 1, 1).training_flops

    full = flops(FULL_WIDTH)
    return next(width for width in range(1, FULL_WIDTH + 1) if flops(width) >= ratio * full)


def width_of_seconds(ratio: float, rounds: int) -> int:
    """One channel more than the widest net whose step takes at most ``ratio`` of the full width's; timed interleaved.

    Widths that suit the kernels badly can be slower than wider ones, so the widest that fits is looked for.
    """
    x = torch.randn(64, 1, 28, 28).contiguous(memory_format=torch.channels_last)
    y = torch.zeros(64, dtype=torch.int64)

    def step_of(width: int) -> Any:
        model = resnet8(width).to(memory_format=torch.channels_last).train()
        optimizer = SGD(model.parameters(), lr=1e-6, momentum=0.9)

        def step() -> None:
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        timings = interleave({str(w): step_of(w) for w in range(1, FULL_WIDTH + 1)}, rounds, warmup=2)
    base = timings[str(FULL_WIDTH)]
    fitting = [w for w in range(1, FULL_WIDTH) if compare(timings[str(w)], base).paired <= ratio]
    return max(fitting, default=0) + 1


@dataclass(frozen=True)
class Budget:
    """Whole epochs and channels that SpFDE's budget buys a dense net."""

    epochs_for_flops: int
    epochs_for_seconds: int
    width_for_flops: int
    width_for_seconds: int


def budget_of(runs: Runs, system: Entry, dense: Entry, *, rounds: int) -> Budget:
    """Work the budget out from the runs at full length; kept, so that a benchmark that goes on compares the same."""
    path = runs.folder / f"budget-{dense.epochs}-epochs-seeds-{'-'.join(map(str, runs.seeds))}.json"
    if path.is_file():
        return Budget(**json.loads(path.read_text(encoding="utf-8")))
    spent, full = runs.summaries(system), runs.summaries(dense)
    flops = mean(spent, "training_flops") / mean(full, "training_flops")
    seconds = mean(spent, "seconds") / mean(full, "seconds")

    def epochs(ratio: float) -> int:
        # Rounded up, in the dense net's favour; a hair more than a whole number is that number.
        return max(1, math.ceil(ratio * dense.epochs - 1e-6))

    budget = Budget(epochs(flops), epochs(seconds), width_of_flops(flops), width_of_seconds(seconds, rounds))
    path.write_text(json.dumps(vars(budget), indent=2) + "\n", encoding="utf-8")
    return budget


# --- telling it -------------------------------------------------------------------------------------------------------


def main_table(runs: Runs, entries: Sequence[Entry], dense: Entry) -> Table:
    """Accuracy, FLOPs and seconds of each."""
    base = mean(runs.summaries(dense), "training_flops")
    rows = []
    for entry in entries:
        summaries = runs.summaries(entry)
        accuracies = [summary["test_accuracy"] for summary in summaries]
        flops = mean(summaries, "training_flops")
        rows.append(
            (
                entry.label,
                str(entry.epochs),
                f"{entry.width}-{2 * entry.width}-{4 * entry.width}",
                f"{flops:.3g}",
                f"{flops / base:.1%}",
                with_sd([summary["seconds"] for summary in summaries], 0),
                with_sd(accuracies, 4),
                str(len(accuracies)),
            )
        )
    columns = ("net", "epochs", "widths", "training FLOPs (modelled)", "of dense", "seconds", "test accuracy", "n")
    return Table("What each budget bought (mean ± standard deviation over the seeds)", columns, tuple(rows))


def curve_table(runs: Runs, entries: Sequence[Entry]) -> Table:
    """Accuracy on the way, against FLOPs and against the clock."""
    rows = []
    for entry in entries:
        curve = runs.curves(entry)
        marks = sorted({max(1, round(len(curve) * quarter / 4)) for quarter in (1, 2, 3, 4)})
        for mark in marks:
            point = curve[mark - 1]
            rows.append(
                (
                    entry.label,
                    str(mark),
                    f"{point['training_flops']:.3g}",
                    f"{point['seconds']:.0f}",
                    f"{point['test_accuracy']:.4f}",
                )
            )
    columns = ("net", "after epoch", "training FLOPs so far (modelled)", "seconds so far", "test accuracy")
    title = "On the way (means over the seeds; each learning rate falls to zero at its own end)"
    return Table(title, columns, tuple(rows))


def with_sd(values: Sequence[float], digits: int) -> str:
    """``0.8760 ± 0.0021``; without the second part for a single value."""
    text = f"{statistics.mean(values):.{digits}f}"
    return f"{text} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else text


def add_run_options(made: argparse.ArgumentParser, name: str) -> None:
    """The options of a benchmark that trains the same nets with several seeds, of that name."""
    made.add_argument("--epochs", type=int, default=None, help="length of every run (20)")
    made.add_argument("--seeds", type=int, nargs="+", default=None, help="seeds of every run (0 1 2)")
    made.add_argument("--runs", type=Path, default=BENCHMARKS.parent / "runs" / "benchmarks" / name)


@contextmanager
def opened_runs(options: argparse.Namespace, *, quick_epochs: int) -> Iterator[tuple[Runs, int]]:
    """The runs that these options ask for, and their length; those of a smoke test are removed again."""
    if options.quick:
        with tempfile.TemporaryDirectory() as folder:
            yield Runs(Path(folder), options.seeds or [0], small_set(Path(folder))), options.epochs or quick_epochs
        return
    options.runs.mkdir(parents=True, exist_ok=True)
    yield Runs(options.runs, options.seeds or [0, 1, 2], DATA), options.epochs or 20


def run_settings(runs: Runs, epochs: int) -> dict[str, Any]:
    """What a result says of its runs."""
    data = runs.data if runs.data == DATA else f"a tenth of {DATA}"
    return {"data": data, "model": "resnet8", "epochs": epochs, "seeds": " ".join(map(str, runs.seeds))}


def accuracy_figure(runs: Runs, entry: Entry) -> Figure:
    """Mean test accuracy."""
    accuracies = [summary["test_accuracy"] for summary in runs.summaries(entry)]
    return Figure(
        f"test accuracy: {entry.label}",
        statistics.mean(accuracies),
        "accuracy",
        n=len(accuracies),
        spread=around(accuracies),
        spread_is="sd",
        headline=True,
    )


def around(values: Sequence[float]) -> tuple[float, float] | None:
    """The mean, a standard deviation less and more; None for a single value."""
    if len(values) < 2:
        return None
    middle, deviation = statistics.mean(values), statistics.stdev(values)
    return middle - deviation, middle + deviation


def target_figures(runs: Runs, system: Entry, dense: Entry) -> list[Figure]:
    """How far below dense, and how long."""
    spent, full = runs.summaries(system), runs.summaries(dense)
    below = [one["test_accuracy"] - other["test_accuracy"] for one, other in zip(full, spent, strict=True)]
    seconds = [summary["seconds"] for summary in spent]
    return [
        Figure(
            "SpFDE below the dense net of the same length",
            statistics.mean(below),
            "points",
            high=MOST_BELOW_DENSE,
            n=len(below),
            spread=around(below),
            spread_is="sd",
            headline=True,
        ),
        Figure(
            "SpFDE's training, longest of the seeds",
            max(seconds),
            "seconds",
            high=MOST_SECONDS,
            n=len(seconds),
            headline=True,
        ),
        Figure(
            "SpFDE's seconds over the dense net's",
            mean(spent, "seconds") / mean(full, "seconds"),
            "ratio",
            n=len(seconds),
        ),
    ]


def engine_figures(runs: Runs, system: Entry, masked: Entry) -> list[Figure]:
    """The engine of its own choice against the masked one, over whole runs."""
    ours, theirs = runs.summaries(system), runs.summaries(masked)
    ratios = [other["seconds"] / one["seconds"] for one, other in zip(ours, theirs, strict=True)]
    gaps = [one["test_accuracy"] - other["test_accuracy"] for one, other in zip(ours, theirs, strict=True)]
    return [
        Figure(
            f"a whole run: seconds of the masked engine over the {ours[0]['engine']} one's",
            statistics.mean(ratios),
            "ratio",
            low=LEAST_FASTER,
            n=len(ratios),
            spread=around(ratios),
            spread_is="sd",
            headline=True,
        ),
        Figure(
            f"accuracy of the {ours[0]['engine']} engine less the masked one's",
            statistics.mean(gaps),
            "points",
            n=len(gaps),
            spread=around(gaps),
            spread_is="sd",
        ),
    ]


def cache_figures(runs: Runs, system: Entry, cached: Sequence[Entry]) -> list[Figure]:
    """What the prefix cache does to accuracy and seconds, seed by seed."""
    figures = []
    for entry in cached:
        pairs = list(zip(runs.summaries(entry), runs.summaries(system), strict=True))
        gaps = [one["test_accuracy"] - other["test_accuracy"] for one, other in pairs]
        ratios = [other["seconds"] / one["seconds"] for one, other in pairs]
        words = f"a prefix cache of {entry.cache_variants} variant{'s' if entry.cache_variants > 1 else ''}"
        figures.append(
            Figure(
                f"accuracy with {words} less that without", statistics.mean(gaps), "points", n=len(gaps),
                spread=around(gaps), spread_is="sd",
            )
        )  # fmt: skip
        figures.append(
            Figure(
                f"a whole run: seconds without over those with {words}", statistics.mean(ratios), "ratio",
                n=len(ratios), spread=around(ratios), spread_is="sd",
            )
        )  # fmt: skip
    return figures


def rivals_of(budget: Budget, epochs: int) -> list[Entry]:
    """The dense nets that SpFDE's budget buys."""
    return [
        Entry("dense, fewer epochs, equal FLOPs", "dense", budget.epochs_for_flops),
        Entry("dense, narrower, equal FLOPs", "dense", epochs, budget.width_for_flops),
        Entry("dense, fewer epochs, equal seconds", "dense", budget.epochs_for_seconds),
        Entry("dense, narrower, equal seconds", "dense", epochs, budget.width_for_seconds),
    ]


def options_of(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    made = parser(__doc__)
    made.add_argument("--seeds", type=int, nargs="+", default=None, help="seeds, one run each (0 1 2)")
    made.add_argument("--epochs", type=int, default=None, help="length of the full runs (20)")
    made.add_argument("--extras", action="store_true", help="a static random mask and plain MEST as well")
    made.add_argument("--no-rivals", action="store_true", help="only SpFDE and the dense net over the full length")
    made.add_argument("--runs", type=Path, default=None, metavar="FOLDER", help="where the runs are kept")
    options = made.parse_args(argv)
    options.seeds = options.seeds or ([0] if options.quick else [0, 1, 2])
    options.epochs = options.epochs or (8 if options.quick else 20)
    kept = BENCHMARKS.parent / "runs" / "benchmarks"
    options.runs = options.runs or kept / ("same_budget-quick" if options.quick else "same_budget")
    return options


def main(argv: list[str] | None = None) -> None:
    """Run it, or go on with it."""
    options = options_of(argv)
    stamped = begin(options)
    options.runs.mkdir(parents=True, exist_ok=True)
    data = small_set(options.runs) if options.quick else DATA
    runs = Runs(options.runs, options.seeds, data)
    epochs = options.epochs
    system, dense = Entry(SYSTEM, "spfde", epochs), Entry(DENSE, "dense", epochs)
    runs.train([system, dense])
    budget = None if options.no_rivals else budget_of(runs, system, dense, rounds=3 if options.quick else 30)
    rivals = rivals_of(budget, epochs) if budget is not None else []
    extras = [Entry(STATIC, "static", epochs), Entry(MEST, "mest", epochs)] if options.extras else []
    masked = Entry(MASKED, "spfde", epochs, engine="masked")
    cached = [
        Entry(
            f"{SYSTEM}, prefix cache, variants: {variants}", "spfde", epochs, engine="native", cache_variants=variants
        )
        for variants in VARIANTS
    ]
    entries = [system, dense, *rivals, masked, *cached, *extras]
    runs.train(entries)
    figures = [*target_figures(runs, system, dense), *engine_figures(runs, system, masked)]
    figures += cache_figures(runs, system, cached)
    figures += [*(accuracy_figure(runs, entry) for entry in entries)]
    publish(
        Result(
            name="same_budget",
            title="What else the same budget buys",
            question="At 90 % sparsity with 20 % + 20 %, how accurate is SpFDE against a dense net that is trained for "
            "fewer epochs, and against a narrower dense net, on equal training FLOPs and on equal seconds?",
            command="python benchmarks/same_budget.py"
            + (" --extras" if options.extras else "")
            + (" --no-rivals" if options.no_rivals else ""),
            figures=tuple(figures),
            tables=(main_table(runs, entries, dense), curve_table(runs, entries)),
            settings={
                "data": data,
                "model": "resnet8",
                "epochs": epochs,
                "seeds": " ".join(map(str, options.seeds)),
                "batch": 64,
                "engine": f"auto ({runs.summaries(system)[0]['engine']} for SpFDE, PyTorch for the dense nets)",
            },
            notes=(
                "Training FLOPs are modelled. The native engine turns the sparsity into seconds; the masked engine "
                "computes densely, and saves by freezing and sieving alone. "
                f"SpFDE took {format_seconds(mean(runs.summaries(system), 'seconds'))} on average, the dense net "
                f"{format_seconds(mean(runs.summaries(dense), 'seconds'))}.",
                "Budgets are rounded up to whole epochs and channels: the dense nets never get less than SpFDE.",
                f"Widths for equal seconds are chosen by timed steps; the full width is {FULL_WIDTH}.",
            ),
            stamp=stamped,
            data={
                "curves": {entry.label: runs.curves(entry) for entry in entries},
                "budget": vars(budget) if budget else {},
            },
        ),
        options,
    )


if __name__ == "__main__":
    main()
