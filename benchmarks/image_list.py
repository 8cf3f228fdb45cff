"""How does a run start where the data are 1.28 million files?

A tree of ImageNet's form (1,000 folders, 1,281,167 images to train on and 50,000 to test on, hard links to a few tiny
JPEGs) is made in a temporary folder, or in ``--tree``, where it stays. In a process of its own each: the first start,
which looks for the files and at their headers; a second one, which takes the list that was kept; and the memory that
each adds to a process with PyTorch and this package. Beside that the sieve's update for so many samples.

    python benchmarks/image_list.py                 # about 5 minutes on two cores; 1.3 million hard links
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from _common import Figure, Result, Table, begin, parser, publish, show
from spfde.sieving.methods import DataSieving
from spfde.sieving.sieve import Sieve

CLASSES, TRAIN, TEST = 1000, 1_281_167, 50_000
STARTED = """
import json, resource, sys, time
import torch, spfde.app.train.loop, spfde.app.data.folders
from spfde.app.data.datasets import load_data
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
began = time.perf_counter()
data = load_data(sys.argv[1], root=sys.argv[2], image_size=224)
seconds = time.perf_counter() - began
assert not data.in_memory
most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
unit = 1 if sys.platform == "darwin" else 1024
print(json.dumps({"seconds": seconds, "bytes": unit * (most - before), "images": len(data.train)}))
"""


def make_tree(root: Path, train: int, test: int, classes: int) -> None:
    """Folders of hard links; a file system takes some ten thousand of each file."""
    bases = []
    root.mkdir(parents=True, exist_ok=True)
    for number in range(64):
        bases.append(root / f".{number}.jpg")
        Image.new("RGB", (32, 32), (3 * number, 0, 0)).save(bases[-1])
    made = 0
    for part, count in (("train", train), ("val", test)):
        for label in range(classes):
            folder = root / part / f"n{label:08}"
            folder.mkdir(parents=True)
            for number in range(count // classes + (label < count % classes)):
                os.link(bases[made % len(bases)], folder / f"{folder.name}_{number}.JPEG")
                made += 1


def started(data: str, root: Path, cache: Path) -> dict[str, Any]:
    """One start in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", STARTED, data, str(root)],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "SPFDE_CACHE_DIR": str(cache)},
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def update_seconds(samples: int) -> float:
    """Of a core, of one update of a sieve that leaves 20 % out."""
    technique = DataSieving(removed_fraction=0.2)
    sieve = Sieve(torch.arange(samples), technique, generator=torch.Generator().manual_seed(0))
    difficulty = torch.rand(samples, generator=torch.Generator().manual_seed(1))
    began = time.process_time()
    sieve.update(difficulty)
    return time.process_time() - began


def main(argv: list[str] | None = None) -> None:
    """Run it."""
    made = parser(__doc__)
    made.add_argument("--tree", type=Path, default=None, metavar="DIR", help="where the tree is, or is made and stays")
    made.add_argument("--starts", type=int, default=None, help="starts after the first one (5)")
    options = made.parse_args(argv)
    stamped = begin(options)
    starts = options.starts or (1 if options.quick else 5)
    train, test, classes = (20_000, 10_000, 10) if options.quick else (TRAIN, TEST, CLASSES)
    with ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        tree = options.tree or work / "tree"
        if not tree.exists():
            make_tree(tree, train, test, classes)
        time.sleep(5)  # a list is kept of folders alone that have been left alone
        data = str(tree) if options.quick else "imagenet"
        first = started(data, tree, work / "cache")
        later = [started(data, tree, work / "cache") for _ in range(starts)]
    seconds, most = sorted(each["seconds"] for each in later), max(each["bytes"] for each in [first, *later])
    updates = [update_seconds(train) for _ in range(starts)]
    publish(
        Result(
            name="image_list",
            title="A million files",
            question="How does a run over 1.28 million files start, and how much memory does their list take?",
            command="python benchmarks/image_list.py",
            figures=(
                Figure("start after the first one", seconds[len(seconds) // 2], "seconds", high=10.0, n=starts),
                Figure(
                    "memory above PyTorch's and the package's, of a GiB", most / 2**30, "share", high=1.0, n=starts + 1
                ),
                Figure(
                    "update of the sieve, seconds of a core",
                    sorted(updates)[starts // 2],
                    "seconds",
                    high=1.0,
                    n=starts,
                ),
            ),
            tables=(
                Table(
                    "Each start (the import of PyTorch not counted)",
                    ("start", "seconds", "memory"),
                    tuple(
                        (name, show(each["seconds"], "seconds"), f"{each['bytes'] / 2**20:.0f} MiB")
                        for name, each in [("first", first), *((f"{n + 2}.", each) for n, each in enumerate(later))]
                    ),
                ),
            ),
            settings={"images": f"{train:,} + {test:,} in {classes:,} classes", "files": "hard links to 64 tiny JPEGs"},
            stamp=stamped,
        ),
        options,
    )


if __name__ == "__main__":
    main()
