"""What the paper's tables say, row by row, and what it takes to run them.

Every candidate of `spfde compare`'s files for the paper, planned (nothing is trained, no data are needed): training
FLOPs of dense, steps, and the hours that one run is expected to take on a GPU, from the seconds of a dense step that
are given. Beside it what is known of the published figure, each with its source, or that it could not be read.

    python benchmarks/papers.py                     # about a minute
    python benchmarks/papers.py --cifar-step 0.0034 --imagenet-images 2500
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass

import torch

from _common import Result, Table, begin, parser, publish
from spfde.app.compare.folder import Comparison
from spfde.app.compare.spec import read_spec
from spfde.app.data.datasets import describe_data
from spfde.app.train.models import build_for
from spfde.app.train.options import TrainOptions
from spfde.model.trace import traced_once
from spfde.planning import plan

FILES = {"spfde_cifar100": "CIFAR-100", "spfde_cifar10": "CIFAR-10", "spfde_imagenet": "ImageNet"}
UNREAD = "could not be read"
_CHASE = "Chase's README"
_PROSE = "SpFDE, text"
_Row = dict[str, str]

# Published figures, by file and the candidate's name, with where they were read. Bodies of SpFDE's own tables were not
# to be had: what its text says of them is quoted, and derived from nothing else.
PUBLISHED: dict[str, _Row] = {
    "spfde_cifar100": {
        "MEST EM&S sparsity=0.95": f"0.66 points below SpFDE 25 % + 25 % at 90 % ({_PROSE})",
        "SpFDE 20 % + 20 % sparsity=0.9": f"“similar” to MEST at 90 %, 27 % fewer FLOPs ({_PROSE})",
        "SpFDE 25 % + 25 % sparsity=0.9": f"0.66 points above MEST at 95 %, at 0.96e15 FLOPs ({_PROSE})",
        "freezing alone freeze=0.1": f"no loss ({_PROSE})",
        "freezing alone freeze=0.15": f"no loss ({_PROSE})",
        "freezing alone freeze=0.2": f"-0.01 points ({_PROSE})",
        "sieving alone sieve=0.1": f"no loss ({_PROSE})",
        "sieving alone sieve=0.15": f"no loss ({_PROSE})",
        "sieving alone sieve=0.2": f"-0.19 points ({_PROSE})",
    },
    "spfde_cifar10": {
        "MEST EM&S sparsity=0.95": f"2.5 points below dense ({_PROSE})",
        "MEST EM&S sparsity=0.98": f"4 points below dense ({_PROSE})",
    },
    "spfde_imagenet": {
        "dense": f"76.8 ± 0.09 ({_CHASE})",
        "set sparsity=0.8": f"72.9 ± 0.39 ({_CHASE})",
        "set sparsity=0.9": f"69.6 ± 0.23 ({_CHASE})",
        "dsr sparsity=0.8": f"73.3 ({_CHASE})",
        "dsr sparsity=0.9": f"71.6 ({_CHASE})",
        "snfs sparsity=0.8": f"75.2 ± 0.11 ({_CHASE})",
        "snfs sparsity=0.9": f"72.9 ± 0.06 ({_CHASE})",
        "rigl sparsity=0.8": "74.60, uniform (RigL's README)",
        "rigl sparsity=0.9": "72.02, uniform (RigL's README)",
        "rigl-itop sparsity=0.8": f"75.84 ± 0.05 ({_CHASE})",
        "rigl-itop sparsity=0.9": f"73.82 ± 0.08 ({_CHASE})",
        "MEST EM&S epochs=100 sparsity=0.8": f"75.39 ({_CHASE})",
        "MEST EM&S epochs=100 sparsity=0.9": f"72.58 ({_CHASE})",
        "MEST EM&S epochs=150 sparsity=0.8": f"75.73 ({_CHASE})",
        "MEST EM&S epochs=150 sparsity=0.9": f"75.00 ({_CHASE})",
    },
}


@dataclass(frozen=True)
class Speed:
    """What hours are expected from: a dense step on CIFAR, and dense images a second on ImageNet."""

    cifar_step: float
    imagenet_images: float

    def hours(self, options: TrainOptions, samples: int) -> float:
        """Of a run whose steps take as long as dense ones: what masks cost or save on a GPU is left out."""
        if options.data == "imagenet":
            return samples / self.imagenet_images / 3600
        return math.ceil(samples / options.batch_size) * self.cifar_step / 3600


def rows(name: str, speed: Speed) -> list[tuple[str, ...]]:
    """Each candidate of a file."""
    comparison = Comparison.of(read_spec(name))
    found = []
    with traced_once():
        for candidate in comparison.candidates:
            options = candidate.with_seed(0)
            spec = describe_data(options.data, options.image_size)
            model = build_for(options.model, spec, width=options.width)
            sample = torch.zeros(1, *spec.sample_shape)
            bill = plan(
                model, sample, options.load_recipe(), options.epochs, spec.train_samples, batch_size=options.batch_size
            )
            seen = sum(row.samples for row in bill.timeline)
            hours = speed.hours(options, seen)
            published = PUBLISHED[name].get(candidate.name, UNREAD)
            found.append((candidate.name, f"{bill.training_flops:.3g}", f"{bill.flops_ratio:.1%}", published,
                          "needs a GPU", f"{hours:.1f}"))  # fmt: skip
    return found


def result(asked: argparse.Namespace) -> Result:
    """All files."""
    stamp = begin(asked)
    speed = Speed(asked.cifar_step, asked.imagenet_images)
    columns = ("candidate", "training FLOPs (modelled)", "of dense", "published accuracy", "ours", "hours a run")
    files = ["spfde_cifar100"] if asked.quick else list(FILES)
    tables = [Table(f"{FILES[name]}: `spfde compare {name} --data-root DIR`", columns, tuple(rows(name, speed)))
              for name in files]  # fmt: skip
    return Result(
        "papers",
        "The paper's tables, row by row",
        "What is published for each row, and what does it take to run it?",
        "python benchmarks/papers.py",
        (),
        tuple(tables),
        settings={
            "dense step on CIFAR": f"{1000 * speed.cifar_step:g} ms",
            "dense images a second on ImageNet": f"{speed.imagenet_images:g}",
        },
        notes=(
            "Hours are of one seed, as if every step took as long as a dense one: an estimate, from a step of "
            "ResNet-32 that was measured on an H200 (batches of 128, docs/methods/cudagraph.md), and from an assumed "
            "number of images a second for ResNet-50, which was not measured.",
            "Published accuracies at equal sparsity are of other training recipes in part; for CIFAR and for SpFDE on "
            "ImageNet the bodies of the tables could not be read, only what the text says.",
        ),
        stamp=stamp,
    )


def main(argv: list[str] | None = None) -> None:
    """Plan it."""
    made = parser(__doc__)
    made.add_argument("--cifar-step", type=float, default=0.0034, help="seconds of a dense step of ResNet-32 (0.0034)")
    made.add_argument("--imagenet-images", type=float, default=2500, help="dense images a second of ResNet-50 (2500)")
    asked = made.parse_args(argv)
    publish(result(asked), asked)


if __name__ == "__main__":
    main()
