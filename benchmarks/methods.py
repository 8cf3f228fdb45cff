"""How accurate, and how dear, is each sparse training method at 90 %?

ResNet-8 on fashion-mini by the command line's own trainer: every method of ``spfde methods`` with its preset, the same
learning rate, length and seeds, beside the dense net; and MEST on groups of weights. Training FLOPs are modelled by
each method's own rule, seconds are measured.

    python benchmarks/methods.py                    # about an hour and a half on two cores
    python benchmarks/methods.py --epochs 20 --seeds 0 1 2 --only snip grasp

Runs are kept and taken up again as in same_budget.py.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from _common import Result, Table, begin, parser, publish
from same_budget import Entry, Runs, accuracy_figure, add_run_options, mean, opened_runs, run_settings, with_sd
from spfde.app.train.options import TrainOptions, choose_recipe

METHODS = (
    "dense", "static", "set", "rigl", "mest", "snip", "grasp", "synflow", "deepr", "dsr", "snfs", "set-itop",
    "rigl-itop", "topkast", "gmp", "str",
)  # fmt: skip
GROUPS = ("block", "kernel", "pattern", "channel")


@dataclass(frozen=True)
class MethodEntry(Entry):
    """A preset, on groups of weights where a structure is named."""

    structure: str | None = None

    @property
    def model(self) -> str:
        # Part of the run folder's name alone.
        return f"{super().model}{f'-{self.structure}' if self.structure else ''}"

    def options(self, seed: int, data: str) -> TrainOptions:
        recipe = choose_recipe(self.recipe, structure=self.structure)
        if self.structure == "pattern":
            assert recipe.sparsity is not None
            # Patterns are for 3x3 kernels: the shortcuts stay dense.
            method = type(recipe.sparsity)(**{**dict(recipe.sparsity), "exclude": ("*downsample*",)})
            recipe = recipe.replace(sparsity=method)
        options = super().options(seed, data)
        return options.model_copy(update={"model": super().model, "recipe": recipe.to_dict()})


def undisturbed_seconds(epochs_of_seeds: Sequence[Sequence[float]]) -> float:
    """Seconds of a run whose every epoch is the shortest of all seeds': what else the machine did only adds."""
    return sum(min(same_epoch) for same_epoch in zip(*epochs_of_seeds, strict=True))


def row(runs: Runs, entry: MethodEntry, dense_flops: float) -> tuple[str, ...]:
    """A method's line."""
    found = runs.summaries(entry)
    seconds = undisturbed_seconds([[row["seconds"] for row in rows] for rows in runs.rows(entry)])
    flops = mean(found, "training_flops")
    return (
        entry.label,
        with_sd([summary["test_accuracy"] for summary in found], 4),
        f"{flops:.3g}",
        f"{flops / dense_flops:.1%}",
        f"{seconds:.0f}",
        f"{mean(found, 'final_sparsity'):.1%}",
        f"{statistics.mean(last_explored(runs, entry)):.1%}",
        found[0]["engine"],
        str(len(found)),
    )


def last_explored(runs: Runs, entry: Entry) -> list[float]:
    """Share of the masked weights that were ever active, at the end of each seed's run."""
    return [float(rows[-1]["explored"]) for rows in runs.rows(entry)]


def compared(runs: Runs, epochs: int, options: argparse.Namespace, stamped: dict[str, Any]) -> Result:
    """Train what is missing, and put it side by side."""
    wanted = options.only or (["static", "snip"] if options.quick else METHODS)
    entries = [MethodEntry(name, name, epochs) for name in dict.fromkeys(["dense", *wanted])]
    if options.only is None and not options.quick:
        entries += [MethodEntry(f"mest, {group}", "mest", epochs, structure=group) for group in GROUPS]
    runs.train(entries)
    dense = mean(runs.summaries(entries[0]), "training_flops")
    figures = tuple(replace(accuracy_figure(runs, entry), headline=False) for entry in entries)
    columns = (
        "method", "test accuracy", "training FLOPs (modelled)", "of dense", "seconds (measured)", "final sparsity",
        "explored", "engine", "n",
    )  # fmt: skip
    return Result(
        name="methods",
        title="Every method at 90 %",
        question="How accurate and how dear is each sparse training method, all else equal?",
        command="python benchmarks/methods.py",
        figures=figures,
        tables=(
            Table(
                "Each method (mean ± standard deviation over the seeds)",
                columns,
                tuple(row(runs, entry, dense) for entry in entries),
            ),
        ),
        settings=run_settings(runs, epochs),
        notes=(
            "explored: share of the masked weights that have been active at some time (ITOP's rate).",
            "Seconds: each epoch's shortest of all seeds, added up; what else the machine did meanwhile only adds.",
            "Each run chooses its own engine (auto).",
        ),
        stamp=stamped,
    )


def main(argv: list[str] | None = None) -> None:
    """Run it."""
    made = parser(__doc__)
    add_run_options(made, "methods")
    made.add_argument("--only", nargs="+", default=None, metavar="NAME", help="some of the methods, and dense")
    options = made.parse_args(argv)
    stamped = begin(options)
    with opened_runs(options, quick_epochs=4) as (runs, epochs):
        publish(compared(runs, epochs, options, stamped), options)


if __name__ == "__main__":
    main()
