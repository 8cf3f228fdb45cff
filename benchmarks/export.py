"""How small is the compressed file of a sparse ResNet-50, and how fast is it read?

Weights and masks are random: sizes and times depend on how many weights exist, not on which. Each read is timed in a
process of its own, forked for it, because a program reads its weights once, into memory that it has not used before;
the files lie in the system's cache. The dense file is read in two ways that end as the compressed one does, with every
weight in memory: by safetensors itself (``backend="pread"``), and mapped and copied, as ``spfde.export.load`` does.
Mapping alone reads nothing until the weights are used, so it stands in the table without a ratio. Targets: at most
0.16x of dense fp32 with 90 % of the weights masked, and no slower than the faster of the two.

    python benchmarks/export.py                     # about a minute on two cores
"""

from __future__ import annotations

import os
import struct
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from _common import Figure, Result, Table, Timing, begin, compare, parser, publish, show
from spfde.cost import format_bytes
from spfde.export import load, save_compressed, save_dense

SPARSITIES = (0.5, 0.8, 0.9, 0.95, 0.98)
TARGET = 0.9


def masked(model: nn.Module, sparsity: float, *, dense_head: bool = False) -> dict[str, Tensor]:
    """The model's tensors with a random share of every weight but the first convolution's set to zero."""
    generator = torch.Generator().manual_seed(0)
    dense = {"conv1.weight", "fc.weight"} if dense_head else {"conv1.weight"}
    tensors = {}
    for name, tensor in model.state_dict().items():
        if tensor.dim() > 1 and name not in dense:
            tensor = tensor.masked_fill(torch.rand(tensor.shape, generator=generator) < sparsity, 0)
        tensors[name] = tensor
    return tensors


def in_fresh_processes(calls: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, Timing]:
    """Time callables turn by turn, each time in a fork of this process; memory that they take is new to it."""
    names = list(calls)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(-1, rounds):  # the first round warms the system's cache
        for offset in range(len(names)):
            name = names[(number + offset) % len(names)]
            taken = _in_fork(calls[name])
            if number >= 0:
                seconds[name].append(taken)
    return {name: Timing(tuple(taken)) for name, taken in seconds.items()}


def _in_fork(call: Callable[[], object]) -> float:
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            start = time.perf_counter()
            kept = call()
            os.write(writing, struct.pack("d", time.perf_counter() - start))
            del kept
        finally:
            os._exit(0)
    os.close(writing)
    answer = os.read(reading, 8)
    os.close(reading)
    os.waitpid(child, 0)
    if not answer:
        raise RuntimeError("a timed read failed in its process")
    return float(struct.unpack("d", answer)[0])


def sizes(model: nn.Module, folder: Path) -> tuple[float, list[tuple[str, ...]]]:
    """Compressed over dense at the target, and a table over sparsities; leaves both files of the target behind."""
    save_dense(model.state_dict(), folder / "dense.safetensors")
    dense = (folder / "dense.safetensors").stat().st_size
    rows, at_target = [], 0.0
    for sparsity in SPARSITIES:
        row = [f"{sparsity:.0%}"]
        for dense_head in (True, False):
            path = folder / "compressed.safetensors"
            save_compressed(masked(model, sparsity, dense_head=dense_head), path)
            size = path.stat().st_size
            row.append(f"{format_bytes(size)}, {show(size / dense, 'ratio')}")
            if sparsity == TARGET and not dense_head:
                at_target = size / dense
        rows.append(tuple(row))
    tensors = masked(model, TARGET)
    save_dense(tensors, folder / "dense.safetensors")
    save_compressed(tensors, folder / "compressed.safetensors")
    found = load(folder / "compressed.safetensors")
    if not all(torch.equal(found[name], tensor) for name, tensor in tensors.items()):
        raise RuntimeError("the compressed file does not restore the weights")
    return at_target, rows


def main(argv: list[str] | None = None) -> None:
    """Run it."""
    made = parser(__doc__)
    made.add_argument("--rounds", type=int, default=None, help="rounds of one read of each (41)")
    options = made.parse_args(argv)
    stamped = begin(options)
    # Forked processes must not wait for threads that only their parent has.
    torch.set_num_threads(1)
    from torchvision.models import resnet50

    rounds = options.rounds or (3 if options.quick else 41)
    torch.default_generator.manual_seed(0)
    model = resnet50()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        share, by_sparsity = sizes(model, folder)
        dense, compressed = folder / "dense.safetensors", folder / "compressed.safetensors"
        timings = in_fresh_processes(
            {
                "compressed": lambda: load(compressed),
                "dense, read": lambda: load_file(dense, backend="pread"),
                "dense, mapped and copied": lambda: load(dense),
                "dense, mapped": lambda: load_file(dense),
                "compressed, into a model": lambda: model.load_state_dict(load(compressed)),
                "dense, mapped, into a model": lambda: model.load_state_dict(load_file(dense)),
            },
            rounds,
        )
    copied, read = timings["dense, mapped and copied"], timings["dense, read"]
    faster = copied if copied.median < read.median else read
    publish(
        Result(
            name="export",
            title="Export",
            question="How small is the compressed file of a ResNet-50 with random weights and masks, and how long does "
            "it take to read it into memory, against the dense file?",
            command="python benchmarks/export.py",
            figures=(
                Figure(
                    "compressed file over dense, 90 % of all weights but the first layer's masked",
                    share,
                    "ratio",
                    high=0.16,
                    headline=True,
                ),
                Figure.of(
                    "reading it over the faster way to read the dense file",
                    compare(timings["compressed"], faster),
                    high=1.0,
                    headline=True,
                ),
                Figure.of(
                    "loading it into a model over doing so from the mapped dense file",
                    compare(timings["compressed, into a model"], timings["dense, mapped, into a model"]),
                ),
            ),
            tables=(
                Table("Compressed file", ("sparsity", "head dense", "head masked too"), tuple(by_sparsity)),
                Table.of_timings("Each read, at 90 %", "read", timings),
            ),
            settings={"rounds": rounds, "threads of a read": 1},
            stamp=stamped,
        ),
        options,
    )


if __name__ == "__main__":
    main()
