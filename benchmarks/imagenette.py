"""What do photographs cost to train on: ResNet-18 and ResNet-50, by the command line?

Each net of timm on a folder of photographs (``DIR/train/CLASS/*``, ``DIR/val/CLASS/*``), as a person would train it:
dense; sparse at 90 %, frozen and sieved (the preset ``spfde``) with the masked engine; and the same with the native
one. Training FLOPs are modelled, seconds and memory are measured, each in a process of its own. A few epochs from
random weights tell nothing about accuracy, which is not shown.

    python benchmarks/imagenette.py --data DIR      # about 4 minutes on two cores
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from _common import Figure, Result, Table, begin, parser, publish, show

MODELS = ("timm:resnet18", "timm:resnet50")
VARIANTS = {
    "dense": ("--recipe", "dense", "--engine", "masked"),
    "SpFDE, masked": ("--recipe", "spfde", "--sieve-criterion", "loss", "--engine", "masked"),
    "SpFDE, native": ("--recipe", "spfde", "--sieve-criterion", "loss", "--engine", "native"),
}


def trained(model: str, variant: str, asked: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The summary of a run."""
    command = ["--data", str(asked.data), "--model", model, "--image-size", str(asked.image_size)]
    command += ["--epochs", str(asked.epochs), "--batch-size", str(asked.batch_size), "--interval", "1", "--quiet"]
    out = folder / f"{model.removeprefix('timm:')}-{variant.replace(', ', '-')}"
    before = computed()
    subprocess.run(
        [sys.executable, "-m", "spfde", "train", *command, *VARIANTS[variant], "--out", str(out)],
        check=True,
        stdin=subprocess.DEVNULL,
    )
    found: dict[str, Any] = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    found["core_seconds"] = computed() - before
    print(f"{model}, {variant}: {found['seconds']:.1f} s", flush=True)
    return found


def computed() -> float:
    """Seconds that all cores together have computed for the processes that were started from here."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main(argv: list[str] | None = None) -> None:
    """Run it."""
    made = parser(__doc__)
    made.add_argument("--data", type=Path, required=True, metavar="DIR", help="the folder with train/ and val/")
    made.add_argument("--epochs", type=int, default=10)
    made.add_argument("--image-size", type=int, default=48, help="pixels a side (48)")
    made.add_argument("--batch-size", type=int, default=32)
    asked = made.parse_args(argv)
    stamped = begin(asked)
    models = MODELS[:1] if asked.quick else MODELS
    figures, rows = [], []
    with tempfile.TemporaryDirectory() as folder:
        for model in models:
            found = {variant: trained(model, variant, asked, Path(folder)) for variant in VARIANTS}
            dense, native, name = found["dense"], found["SpFDE, native"], model.removeprefix("timm:")
            figures += [
                Figure(f"{name}: training FLOPs of dense", native["flops_ratio"], "share", kind="modelled"),
                Figure(
                    f"{name}: core seconds over dense, native",
                    native["core_seconds"] / dense["core_seconds"],
                    "ratio",
                    n=1,
                ),
            ]
            rows += [
                (
                    f"{name}, {variant}",
                    show(each["training_flops"], "flops"),
                    show(each["seconds"], "seconds"),
                    show(each["core_seconds"], "seconds"),
                    f"{each['peak_memory_bytes'] / 2**20:,.0f} MiB",
                    f"{each['frozen_blocks']} of {each['total_blocks']}",
                )
                for variant, each in found.items()
            ]
    columns = (
        "run",
        "training FLOPs (modelled)",
        "seconds",
        "core seconds of the process",
        "peak memory of the process",
        "frozen blocks at the end",
    )
    publish(
        Result(
            name="imagenette",
            title="Photographs",
            question="What does it cost to train ResNet-18 and ResNet-50 on photographs, dense and with all savings?",
            command="python benchmarks/imagenette.py --data DIR",
            figures=tuple(figures),
            tables=(Table("Each run", columns, tuple(rows)),),
            settings={
                "photographs": "500 + 200 of Imagenette",
                "pixels": asked.image_size,
                "epochs": asked.epochs,
                "batch": asked.batch_size,
                "seeds": 1,
            },
            notes=(
                "In few epochs little is frozen: what is at the end stands in the table.",
                "Core seconds: what all cores together computed for the process, its start included.",
            ),
            stamp=stamped,
        ),
        asked,
    )


if __name__ == "__main__":
    main()
