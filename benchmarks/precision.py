"""What do bf16 and structures cost in accuracy, where the native engine trains at 90 %?

MEST, as `spfde compare` trains it, seed by seed the same but for one thing:

- bf16 instead of fp32: ResNet-8 on fashion-mini, and ResNet-20 on 10,000 images of CIFAR-100;
- in bf16, structures instead of single weights, those whose pairs the kernels multiply at once among them: ResNet-8 on
  fashion-mini. Its 1x1 shortcuts stay dense, for a row of a kernel has no pair there. Single weights at 95 % are what
  a structure has to be better than, for they save time as well.

    python benchmarks/precision.py                         # fashion-mini alone: half an hour of one core
    python benchmarks/precision.py --cifar100 cifar100.npz # an hour
    python benchmarks/precision.py --only structures --seeds 0 1 2 3 4

The file is one that ``spfde train --data`` takes, with all of CIFAR-100; of each class 100 training images are trained
on and 50 test images tested on. Runs are kept and taken up again as _compared.py says, in a folder for each part.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from _common import BENCHMARKS, Figure, Result, Table, publish
from _compared import DATA, MODEL, Compared, Runs, Values, opened_runs, over_seeds, run_parser
from spfde.app.compare.table import ACCURACY
from spfde.app.compare.writing import difference_text, spread_text

sys.path.insert(0, str(BENCHMARKS.parent / "scripts"))
from make_fashion_mini import choose, write_npz

FASHION, CIFAR, STRUCTURES = "fashion", "cifar", "structures"
NATIVE: Values = {"recipe": "mest", "sparsity": 0.9, "engine": "native"}
PRECISIONS: dict[str, Values] = {each: {**NATIVE, "precision": each} for each in ("fp32", "bf16")}
IN_BF16: Values = {**NATIVE, "precision": "bf16", "exclude": ["*downsample*"]}
SHAPES = ("unstructured", "1x2", "1x2-kernel", "1x2-inputs", "2x2-inputs")
SPARSER: Values = {**IN_BF16, "structure": "unstructured", "sparsity": 0.95}
"""What buys speed, too, and is what a structure has to be better than."""
IMAGES = {"train": 100, "test": 50}
"""Of each class of CIFAR-100."""
FEW_IMAGES = {"train": 3, "test": 2}


@dataclass(frozen=True)
class Part:
    """A comparison with the first of its candidates.

    Attributes:
        title: of its table.
        seeds: how many, where no others are asked for.
        model: the net.
    """

    title: str
    seeds: int
    model: str
    candidates: Mapping[str, Values]


PARTS = {
    FASHION: Part("bf16 and fp32 on fashion-mini", 5, MODEL, PRECISIONS),
    CIFAR: Part("bf16 and fp32 on 10,000 images of CIFAR-100", 3, "resnet20", PRECISIONS),
    STRUCTURES: Part(
        "Structures in bf16 on fashion-mini",
        3,
        MODEL,
        {**{each: {**IN_BF16, "structure": each} for each in SHAPES}, "unstructured, 95 %": SPARSER},
    ),
}


def cifar_images(file: Path, place: Path, per_class: Mapping[str, int]) -> Path:
    """Some images of each class in an archive of their own, always the same ones."""
    if not place.is_file():
        with np.load(file) as whole:
            chosen = {
                part: choose(whole[f"y_{part}"], per_class=count, split=part) for part, count in per_class.items()
            }
            parts = {f"{kind}_{part}": whole[f"{kind}_{part}"][at] for part, at in chosen.items() for kind in "xy"}
        place.parent.mkdir(parents=True, exist_ok=True)
        write_npz(place, parts)
    return place


def part_runs(name: str, runs: Runs, asked: argparse.Namespace) -> Runs:
    """Where the runs of a part are kept, and what they have in common."""
    part, options = PARTS[name], dict(runs.options)
    if name == CIFAR:
        folder = runs.folder.parent / f"{asked.name}_images"
        per_class = FEW_IMAGES if asked.quick else IMAGES
        options["data"] = str(cifar_images(asked.cifar100, folder / "cifar100.npz", per_class))
    seeds = asked.seeds or range(1 if asked.quick else part.seeds)
    return replace(runs, folder=runs.folder / name, seeds=seeds, options=options | {"model": part.model})


# --- telling it -------------------------------------------------------------------------------------------------------


def figures_of(name: str, compared: Compared) -> list[Figure]:
    """The differences, seed by seed."""
    first, *others = compared.rows
    found = []
    for label in others:
        what = f"{label} less {first}, {PARTS[name].model}, {_data(name)}"
        pairs = compared.pairs(label, first, ACCURACY)
        found.append(over_seeds(what, [own - other for own, other in pairs], "points"))
    return found


def _data(name: str) -> str:
    return "CIFAR-100" if name == CIFAR else DATA


def table_of(name: str, compared: Compared) -> Table:
    """Accuracy of each candidate, and its difference from the first."""
    rows = [
        (label, str(row.n), spread_text(row.spreads[ACCURACY]), difference_text(row))
        for label, row in compared.rows.items()
    ]
    return Table(PARTS[name].title, ("trained with", "n", "test accuracy", "difference"), tuple(rows))


def result(found: Mapping[str, Compared]) -> Result:
    """Put it side by side."""
    runs = next(iter(found.values())).of
    notes = [
        "Test accuracy after the last epoch in per cent, mean ± standard deviation over n seeds. Difference: from the "
        "first line, in points, paired by seed, with its 95 % interval (Student's t); not carried: the interval holds "
        "zero.",
        "The structures are compared with single weights under the same masked layers (1x1 shortcuts are dense).",
        "MEST's soft bound is a share of the units. A block along the kernel can have two of three weights, so "
        "1x2-kernel begins with 3.3 points of density above its target, and the others with 5.",
        "Seconds are not compared here: benchmarks/native.py measures them.",
    ]
    settings: dict[str, Any] = {"method": "MEST", "sparsity": "90 %", "engine": "native", "epochs": runs.epochs}
    settings |= {
        PARTS[name].title: f"{PARTS[name].model}, seeds {_listed(each.of.seeds)}" for name, each in found.items()
    }
    return Result(
        runs.name,
        "What bf16 and structures cost in accuracy",
        "Is a net that the native engine trains in bf16 as accurate as in fp32, and what do structures lose?",
        f"python benchmarks/{runs.name}.py{' --cifar100 FILE' if CIFAR in found else ''}",
        tuple(figure for name, each in found.items() for figure in figures_of(name, each)),
        tuple(table_of(name, each) for name, each in found.items()),
        settings=settings,
        notes=tuple(notes),
        stamp=runs.stamp,
    )


def _listed(seeds: Sequence[int]) -> str:
    return " ".join(map(str, seeds))


def main(argv: list[str] | None = None) -> None:
    """Run it."""
    made = run_parser(__doc__, "precision")
    made.add_argument("--cifar100", type=Path, default=None, metavar="FILE", help="an .npz with CIFAR-100")
    made.add_argument("--only", nargs="+", default=list(PARTS), choices=list(PARTS), help="some of the parts")
    asked = made.parse_args(argv)
    wanted = [name for name in PARTS if name in asked.only and (name != CIFAR or asked.cifar100)]
    with opened_runs(asked, quick_epochs=2) as runs:
        publish(result({name: part_runs(name, runs, asked).compared(PARTS[name].candidates) for name in wanted}), asked)


if __name__ == "__main__":
    main()
