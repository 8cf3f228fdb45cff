"""Which options keep SpFDE's accuracy, and what does each do?

ResNet-8 on 10,000 images of Fashion-MNIST (those of fashion-mini), as `spfde compare` trains it for 20 epochs: the
dense net, MEST at 90 %, SpFDE 20 % + 20 %, SpFDE with one option more each, and sieving alone where much is left out.
Options are judged by 10,000 images that are neither trained on nor tested on (from the 60,000 training images); the
10,000 test images are looked at once, at the end, and choose nothing.

    python benchmarks/accuracy.py FOLDER            # about an hour on two cores
    python benchmarks/accuracy.py FOLDER --seeds 0 1 2 --epochs 20 --only spfde dense

FOLDER holds Fashion-MNIST's four gzipped IDX files (in Debian: /usr/share/datasets/fashion-mnist, of the package
dataset-fashion-mnist). Runs are kept and taken up again as _compared.py says.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from _common import BENCHMARKS, Figure, Result, Table, publish
from _compared import Compared, Values, opened_runs, over_seeds, run_parser
from spfde.app.compare.statistics import Spread, paired
from spfde.app.compare.table import ACCURACY
from spfde.app.compare.writing import interval_text, spread_text
from spfde.app.evaluate import EvaluateOptions, evaluate_run
from spfde.app.runs.folder import RunFolder

sys.path.insert(0, str(BENCHMARKS.parent / "scripts"))
from make_fashion_mini import TRAIN_PER_CLASS, choose, read_idx, write_npz

TESTED = "tested.json"
DENSE, SYSTEM, MEST = "dense", "SpFDE 20 % + 20 %", "MEST 90 %"
HEAVY = "sieving alone, 43 %"
MOST_BELOW_DENSE = 0.03

OPTIONS: dict[str, Values] = {
    "frozen at update epochs (the paper's)": {"freeze_timing": "update"},
    "frozen by layer": {"freeze_unit": "layer"},
    "all samples in the last eighth": {"sieve_full_last": 0.125},
    "sieving one epoch after mutation": {"sieve_offset": 1},
    "EMA 0.99": {"ema": 0.99},
    "label smoothing 0.1": {"label_smoothing": 0.1},
    "norms estimated anew": {"reestimate_bn": 2000},
    "sieving by loss": {"sieve_criterion": "loss"},
    "sieving by top-loss": {"sieve_criterion": "top-loss"},
    "sieving by repeated-random": {"sieve_criterion": "repeated-random"},
}
"""What is added to SpFDE, one at a time."""
CRITERIA = ("forgetting", "loss", "random", "top-loss", "repeated-random")
"""What is tried where much is left out."""


def candidates() -> dict[str, Values]:
    """Every recipe, by its label."""
    found: dict[str, Values] = {DENSE: {"recipe": "dense"}, MEST: {"recipe": "mest"}, SYSTEM: {"recipe": "spfde"}}
    found |= {f"SpFDE, {label}": {"recipe": "spfde", **values} for label, values in OPTIONS.items()}
    heavy = {"recipe": "mest", "sieve": 0.43}
    found |= {f"{HEAVY}: {criterion}": {**heavy, "sieve_criterion": criterion} for criterion in CRITERIA}
    return found


# --- images -----------------------------------------------------------------------------------------------------------


def split_images(folder: Path, place: Path) -> tuple[Path, Path]:
    """Two archives with the same training images: one with images to judge options by, one with those to test on."""
    training, labels = (read_idx(folder / f"train-{part}-ubyte.gz") for part in ("images-idx3", "labels-idx1"))
    taken = choose(labels, per_class=TRAIN_PER_CLASS, split="train")
    rest = np.setdiff1d(np.arange(len(labels)), taken)
    judging = rest[choose(labels[rest], per_class=TRAIN_PER_CLASS, split="judging")]
    test = tuple(read_idx(folder / f"t10k-{part}-ubyte.gz") for part in ("images-idx3", "labels-idx1"))
    place.mkdir(parents=True, exist_ok=True)
    found = []
    for name, (images, classes) in {"judging": (training[judging], labels[judging]), "testing": test}.items():
        found.append(place / f"{name}.npz")
        if not found[-1].is_file():
            parts = {"x_train": training[taken], "y_train": labels[taken], "x_test": images, "y_test": classes}
            write_npz(found[-1], {key: np.ascontiguousarray(part) for key, part in parts.items()})
    return found[0], found[1]


def tested(compared: Compared, images: Path) -> dict[str, dict[int, float]]:
    """Test accuracy of each candidate's last weights, seed by seed; it is kept beside each run."""
    found: dict[str, dict[int, float]] = {label: {} for label in compared.rows}
    names = {row.name: label for label, row in compared.rows.items()}
    for run in compared.comparison.runs(compared.of.folder):
        kept = RunFolder(run.path)
        if not (run.path / TESTED).is_file():
            scores = evaluate_run(run.path, EvaluateOptions(data=str(images)))
            kept.write_json(TESTED, {"accuracy": scores.last.top1})
        if run.candidate.name in names:
            found[names[run.candidate.name]][run.seed] = kept.read_json(TESTED)["accuracy"]
    return found


# --- telling it -------------------------------------------------------------------------------------------------------


def _more(own: Mapping[int, float], other: Mapping[int, float]) -> str:
    found = paired(own, other)
    return "–" if found is None else interval_text(found)


def _spread(values: Mapping[int, float]) -> str:
    return spread_text(Spread.of(list(values.values())))


def result(compared: Compared, test: dict[str, dict[int, float]]) -> Result:
    """Put it side by side."""
    judged = {label: {seed: run[ACCURACY] for seed, run in row.runs.items()} for label, row in compared.rows.items()}
    flops = compared.mean(MEST, "training_flops")
    columns: dict[str, Callable[[str], str]] = {
        "FLOPs of MEST's": lambda label: f"{compared.mean(label, 'training_flops') / flops:.3f}",
        "judging images": lambda label: _spread(judged[label]),
        "more than SpFDE": lambda label: "–" if label == SYSTEM else _more(judged[label], judged[SYSTEM]),
        "test images": lambda label: _spread(test[label]),
        "test: more than SpFDE": lambda label: "–" if label == SYSTEM else _more(test[label], test[SYSTEM]),
        "n": lambda label: str(compared.rows[label].n),
    }
    rows = tuple((label, *(text(label) for text in columns.values())) for label in compared.rows)
    below = [test[DENSE][seed] - test[SYSTEM][seed] for seed in test[DENSE]]
    figures: list[Figure] = [
        over_seeds("SpFDE below the dense net, test images", below, "points", high=MOST_BELOW_DENSE, headline=True),
        *(over_seeds(f"test accuracy: {label}", list(test[label].values()), "accuracy") for label in compared.rows),
    ]
    return compared.result(
        "What keeps the accuracy",
        "Which options close the gap between SpFDE and dense training, judged by images that choose nothing else?",
        figures,
        [Table("Each option (per cent; differences in points, seed by seed, with 95 % interval)",
               ("recipe", *columns), rows)],
        [
            "Options are judged by 10,000 further images of the training files; the test images were looked at once. "
            "Where notes above speak of test accuracy, it is that of the images to judge by.",
            "Defaults: blocks freeze where the plan is exact, as 20 % is what was asked for; no other option's gain is "
            "carried on both sets of images, so all of them are off.",
        ],
        settings={"data": "Fashion-MNIST", "images": "10,000 to train on, 10,000 to judge by, 10,000 to test on"},
        arguments=" FOLDER",
    )  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    """Run it."""
    made = run_parser(__doc__, "accuracy")
    made.add_argument("folder", type=Path, help="with Fashion-MNIST's four gzipped IDX files")
    made.add_argument("--only", nargs="+", default=None, metavar="TEXT", help="those whose label has one of these")
    asked = made.parse_args(argv)
    judging, testing = split_images(asked.folder, asked.runs.parent / f"{asked.name}_images")
    wanted = candidates()
    if asked.only:
        always = (DENSE, MEST, SYSTEM)
        wanted = {k: v for k, v in wanted.items() if k in always or any(text in k for text in asked.only)}
    with opened_runs(asked, quick_epochs=2, data=judging) as runs:
        compared = runs.compared(wanted)
        publish(result(compared, tested(compared, testing)), asked)


if __name__ == "__main__":
    main()
