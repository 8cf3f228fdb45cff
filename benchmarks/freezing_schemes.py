"""Which freezing scheme keeps the accuracy, at equal training FLOPs?

ResNet-8 on fashion-mini by the command line's own trainer, MEST at 90 %: the four schemes of SpFDE's appendix B with
the same learning rate and seeds, beside no freezing at all; and the two criteria that freeze a block earlier where it
has converged, which cost less. With three blocks and few update epochs a scheme can save certain shares only, so the
target is the periodic scheme's bill, and of each other scheme the plan is run whose bill comes nearest. FLOPs are
modelled.

    python benchmarks/freezing_schemes.py           # about half an hour on two cores
    python benchmarks/freezing_schemes.py --epochs 20 --seeds 0 1 2 --freeze 0.2

Runs are kept and taken up again as in same_budget.py.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

import spfde
from _common import Result, Table, begin, parser, publish
from same_budget import (
    FULL_WIDTH,
    Entry,
    Runs,
    accuracy_figure,
    add_run_options,
    mean,
    opened_runs,
    resnet8,
    run_settings,
    with_sd,
)
from spfde.app.train.options import TrainOptions, choose_recipe
from spfde.core.errors import InvalidArgument

SCHEMES = ("single-shot", "single-shot-resume", "periodic", "delayed-periodic")
CRITERIA = ("structure", "representation")
COARSEST = "periodic"
"""The scheme with the fewest bills to choose from: all others are brought near to its."""


@dataclass(frozen=True)
class SchemeEntry(Entry):
    """MEST with a freezing scheme or criterion; without either nothing is frozen."""

    scheme: str | None = None
    criterion: str | None = None
    freeze: float = 0.0

    @property
    def model(self) -> str:
        # Part of the run folder's name alone.
        return "-".join(filter(None, (super().model, self.scheme, self.criterion, f"{self.freeze:g}")))

    def options(self, seed: int, data: str) -> TrainOptions:
        recipe = choose_recipe(
            self.recipe,
            freeze=self.freeze or None,
            freeze_scheme=self.scheme,
            freeze_criterion=self.criterion,
        )
        options = super().options(seed, data)
        return options.model_copy(update={"model": super().model, "recipe": recipe.to_dict()})


def bills(scheme: str, epochs: int) -> Iterator[tuple[float, int]]:
    """The FLOPs reductions that can be asked of a scheme, in per cent steps, with the training FLOPs of each."""
    model, sample = resnet8(FULL_WIDTH), torch.zeros(1, 1, 28, 28)
    for percent in range(1, 60):
        recipe = choose_recipe("mest", freeze=percent / 100, freeze_scheme=scheme)
        try:
            yield percent / 100, spfde.plan(model, sample, recipe, epochs, 1000).training_flops
        except InvalidArgument:
            return  # out of reach, and so is all beyond


def equalised(share: float, epochs: int) -> dict[str, float]:
    """For each scheme the FLOPs reduction to ask for, so that their training FLOPs are as equal as can be."""
    at_hand = {scheme: list(bills(scheme, epochs)) for scheme in SCHEMES}
    wanted = min(at_hand[COARSEST], key=lambda bill: abs(bill[0] - share))[1]
    return {scheme: min(found, key=lambda bill: abs(bill[1] - wanted))[0] for scheme, found in at_hand.items()}


def compared(runs: Runs, epochs: int, options: argparse.Namespace, stamped: dict[str, Any]) -> Result:
    """Train what is missing, and put it side by side."""
    asked = equalised(options.freeze, epochs)
    entries = [SchemeEntry("no freezing", "mest", epochs)]
    entries += [SchemeEntry(scheme, "mest", epochs, scheme=scheme, freeze=share) for scheme, share in asked.items()]
    share = asked["single-shot"]
    entries += [SchemeEntry(f"single-shot, {by}", "mest", epochs, criterion=by, freeze=share) for by in CRITERIA]
    if options.quick:
        entries = [entries[0], entries[1], entries[3], entries[-2]]
    runs.train(entries)
    unfrozen = mean(runs.summaries(entries[0]), "training_flops")
    figures, rows = [], []
    for entry in entries:
        found = runs.summaries(entry)
        accuracies = [summary["test_accuracy"] for summary in found]
        flops = mean(found, "training_flops")
        figures.append(replace(accuracy_figure(runs, entry), headline=False))
        rows.append(
            (entry.label, with_sd(accuracies, 4), f"{flops:.4g}", f"{1 - flops / unfrozen:.1%}", str(len(found)))
        )
    return Result(
        name="freezing_schemes",
        title="Freezing schemes",
        question="Which freezing scheme keeps the accuracy, at equal training FLOPs?",
        command="python benchmarks/freezing_schemes.py",
        figures=tuple(figures),
        tables=(
            Table(
                "Each scheme (mean ± standard deviation over the seeds)",
                ("scheme", "test accuracy", "training FLOPs (modelled)", "saved", "n"),
                tuple(rows),
            ),
        ),
        settings={
            **run_settings(runs, epochs),
            "method": "mest",
            "FLOPs reduction asked for": ", ".join(f"{share:.0%} of {scheme}" for scheme, share in asked.items()),
        },
        notes=(
            "What is asked for counts backward FLOPs alone. What is saved is of the whole bill: a block that is at "
            "its target before it is frozen for good saves part of the soft bound, too.",
            "The criteria freeze blocks earlier than the schedule where they have converged, and so save more.",
        ),
        stamp=stamped,
    )


def main(argv: list[str] | None = None) -> None:
    """Run it."""
    made = parser(__doc__)
    add_run_options(made, "freezing_schemes")
    made.add_argument("--freeze", type=float, default=0.25, help="FLOPs reduction of the periodic scheme (0.25)")
    options = made.parse_args(argv)
    stamped = begin(options)
    with opened_runs(options, quick_epochs=8) as (runs, epochs):
        publish(compared(runs, epochs, options, stamped), options)


if __name__ == "__main__":
    main()
