"""What else does the same budget buy?

ResNet-8 on fashion-mini, as `spfde compare` trains it: SpFDE (90 % sparse, 20 % + 20 %) against dense nets on the same
budget, once in training FLOPs (modelled) and once in seconds (measured): the same net for fewer epochs, and a narrower
net for as many. Budgets are rounded up to whole epochs and channels, so a dense net never gets less. Also the dense net
over the full length (SpFDE should end at most 3 points below it, within 5 minutes), SpFDE once more by the masked
engine (which should be as accurate, and half as fast or slower), SpFDE with a prefix cache of 1 and of 4 variants and,
with --extras, a static random mask, and MEST without freezing and sieving. All runs have the same learning rate, each
its own cosine to zero.

    python benchmarks/same_budget.py                # about 40 minutes on two cores; --extras: about 20 more
    python benchmarks/same_budget.py --seeds 0 1 2 --epochs 20 --runs runs/benchmarks/same_budget

Runs are kept and taken up again as _compared.py says, with the budget that the first ones came to.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch.optim import SGD

import spfde
from _common import Figure, Result, Table, compare, interleave, publish
from _compared import SAMPLE, Compared, Runs, Values, network, opened_runs, over_seeds, run_parser
from spfde.app.compare.table import ACCURACY
from spfde.app.runs.folder import RunFolder
from spfde.cost import format_seconds

FULL_WIDTH, RIVALS = 16, "rivals.json"
MOST_BELOW_DENSE, MOST_SECONDS, LEAST_FASTER = 0.03, 300.0, 2.0
DENSE, SYSTEM = "dense", "SpFDE 20 % + 20 % at 90 %"
MASKED = SYSTEM + ", masked engine"
CACHED = {SYSTEM + f", prefix cache, variants: {variants}": variants for variants in (1, 4)}
OTHERS: dict[str, Values] = {MASKED: {"recipe": "spfde", "engine": "masked"}}
OTHERS |= {label: {"recipe": "spfde", "engine": "native", "cache_variants": n} for label, n in CACHED.items()}
EXTRAS: dict[str, Values] = {"static random mask, 90 %": {"recipe": "static"}, "MEST at 90 %": {"recipe": "mest"}}

# --- what the budget buys ---------------------------------------------------------------------------------------------


def compared_to_rivals(runs: Runs, others: Mapping[str, Values], *, rounds: int) -> Compared:
    """SpFDE, the dense net and these others, with the dense nets that SpFDE's budget buys; its runs come first.

    What it buys is kept, so that a benchmark that goes on compares the same.
    """
    dense = {"recipe": "dense", "epochs": runs.epochs, "width": 1.0}
    first: dict[str, Values] = {SYSTEM: {"recipe": "spfde"}, DENSE: dense}
    folder = RunFolder(runs.folder)
    if not (runs.folder / RIVALS).is_file():
        found = runs.compared(first)
        flops, seconds = (found.mean(SYSTEM, cost) / found.mean(DENSE, cost) for cost in ("training_flops", "seconds"))
        widths = {"FLOPs": width_of_flops(flops), "seconds": width_of_seconds(seconds, rounds)}
        rivals: dict[str, Values] = {}
        for cost, ratio in {"FLOPs": flops, "seconds": seconds}.items():
            # Rounded up, in the dense net's favour; a hair more than a whole number is that number.
            epochs = max(1, math.ceil(ratio * runs.epochs - 1e-6))
            rivals[f"dense, fewer epochs, equal {cost}"] = {**dense, "epochs": epochs}
            rivals[f"dense, narrower, equal {cost}"] = {**dense, "width": widths[cost] / FULL_WIDTH}
        folder.write_json(RIVALS, rivals)
    return runs.compared({**first, **folder.read_json(RIVALS), **others})


def width_of_flops(ratio: float) -> int:
    """Least width whose training FLOPs are at least ``ratio`` of the full width's."""

    def flops(width: int) -> int:
        return spfde.plan(network(width / FULL_WIDTH), SAMPLE, spfde.presets.dense, 1, 1).training_flops

    full = flops(FULL_WIDTH)
    return next(width for width in range(1, FULL_WIDTH + 1) if flops(width) >= ratio * full)


def width_of_seconds(ratio: float, rounds: int) -> int:
    """One channel more than the widest net whose step takes at most ``ratio`` of the full width's; timed interleaved.

    Widths that suit the kernels badly can be slower than wider ones, so the widest that fits is looked for.
    """
    x = torch.randn(64, 1, 28, 28).contiguous(memory_format=torch.channels_last)
    y = torch.zeros(64, dtype=torch.int64)

    def step_of(width: int) -> Any:
        model = network(width / FULL_WIDTH).to(memory_format=torch.channels_last).train()
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


# --- telling it -------------------------------------------------------------------------------------------------------


def main_table(compared: Compared) -> Table:
    """The comparison's table, with what the nets differ in."""

    def widths(label: str) -> str:
        first = round(FULL_WIDTH * compared.options(label)["width"])
        return f"{first}-{2 * first}-{4 * first}"

    full = compared.mean(DENSE, "training_flops")
    more: dict[str, Callable[[str], str]] = {
        "epochs": lambda label: str(compared.options(label)["epochs"]),
        "widths": widths,
        "FLOPs of the dense net's": lambda label: f"{compared.mean(label, 'training_flops') / full:.1%}",
    }
    return compared.table("What each budget bought", more)


def curve(compared: Compared, label: str) -> list[dict[str, float]]:
    """After each epoch: FLOPs and seconds spent so far, and test accuracy."""
    flops, seconds, points = 0.0, 0.0, []
    for point in compared.curve(label, "training_flops", "seconds", ACCURACY):
        flops, seconds = flops + point["training_flops"], seconds + point["seconds"]
        points.append({"training_flops": flops, "seconds": seconds, ACCURACY: point[ACCURACY]})
    return points


def curve_table(curves: dict[str, list[dict[str, float]]]) -> Table:
    """Accuracy on the way, against FLOPs and against the clock."""
    rows = [
        (label, str(mark), f"{at['training_flops']:.3g}", f"{at['seconds']:.0f}", f"{at[ACCURACY]:.4f}")
        for label, points in curves.items()
        for mark in sorted({max(1, round(len(points) * quarter / 4)) for quarter in (1, 2, 3, 4)})
        for at in [points[mark - 1]]
    ]
    columns = ("net", "after epoch", "training FLOPs so far (modelled)", "seconds so far", "test accuracy")
    title = "On the way (means over the seeds; each learning rate falls to zero at its own end)"
    return Table(title, columns, tuple(rows))


def figures(compared: Compared) -> list[Figure]:
    """SpFDE against the dense net, against the masked engine, and with a prefix cache; then each net's accuracy."""

    def more_accurate(one: str, other: str) -> list[float]:
        return [ours - theirs for ours, theirs in compared.pairs(one, other, ACCURACY)]

    def slower(one: str, other: str) -> list[float]:
        return [ours / theirs for ours, theirs in compared.pairs(one, other, "seconds")]

    seconds = [run["seconds"] for run in compared.rows[SYSTEM].runs.values()]
    of_dense = compared.mean(SYSTEM, "seconds") / compared.mean(DENSE, "seconds")
    engine = ", ".join(compared.rows[SYSTEM].engines)
    found = [
        over_seeds(
            "SpFDE below the dense net of the same length", more_accurate(DENSE, SYSTEM), "points",
            high=MOST_BELOW_DENSE, headline=True,
        ),
        Figure(
            "SpFDE's training, longest of the seeds", max(seconds), "seconds", high=MOST_SECONDS, n=len(seconds),
            headline=True,
        ),
        Figure("SpFDE's seconds over the dense net's", of_dense, "ratio", n=len(seconds)),
        over_seeds(
            f"a whole run: seconds of the masked engine over the {engine} one's", slower(MASKED, SYSTEM), "ratio",
            low=LEAST_FASTER, headline=True,
        ),
        over_seeds(
            f"accuracy of the {engine} engine less the masked one's", more_accurate(SYSTEM, MASKED), "points"
        ),
    ]  # fmt: skip
    for label, variants in CACHED.items():
        words = f"a prefix cache of {variants} variant{'s' if variants > 1 else ''}"
        found.append(over_seeds(f"accuracy with {words} less that without", more_accurate(label, SYSTEM), "points"))
        what = f"a whole run: seconds without over those with {words}"
        found.append(over_seeds(what, slower(SYSTEM, label), "ratio"))
    return [*found, *compared.accuracy_figures(headline=True)]


def result(compared: Compared, arguments: str) -> Result:
    """Put it side by side."""
    curves = {label: curve(compared, label) for label in compared.rows}
    engine = ", ".join(compared.rows[SYSTEM].engines)
    ours, dense = (format_seconds(compared.mean(label, "seconds")) for label in (SYSTEM, DENSE))
    return compared.result(
        "What else the same budget buys",
        "At 90 % sparsity with 20 % + 20 %, how accurate is SpFDE against a dense net that is trained for fewer "
        "epochs, and against a narrower dense net, on equal training FLOPs and on equal seconds?",
        figures(compared),
        [main_table(compared), curve_table(curves)],
        [
            "The native engine turns the sparsity into seconds; the masked engine computes densely, and saves by "
            f"freezing and sieving alone. SpFDE took {ours} on average, the dense net {dense}.",
            "Budgets are rounded up to whole epochs and channels: the dense nets never get less than SpFDE.",
            f"Widths for equal seconds are chosen by timed steps; the full width is {FULL_WIDTH}.",
        ],
        settings={
            "batch": compared.options(SYSTEM)["batch_size"],
            "engine": f"auto ({engine} for SpFDE, PyTorch for the dense nets)",
        },
        data={"curves": curves},
        arguments=arguments,
    )


def main(argv: list[str] | None = None) -> None:
    """Run it, or go on with it."""
    made = run_parser(__doc__, "same_budget")
    made.add_argument("--extras", action="store_true", help="a static random mask and plain MEST as well")
    asked = made.parse_args(argv)
    with opened_runs(asked, quick_epochs=8) as runs:
        others = OTHERS | EXTRAS if asked.extras else OTHERS
        compared = compared_to_rivals(runs, others, rounds=3 if asked.quick else 30)
        publish(result(compared, " --extras" if asked.extras else ""), asked)


if __name__ == "__main__":
    main()
