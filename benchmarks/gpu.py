"""What does the engine for GPUs save? Each promise of docs/methods/cudagraph.md, measured on one GPU.

ResNet-32 (widths 32-64-128), batch 128, bf16 autocast, channels_last, random images of CIFAR's size. Steps are timed
many at once, turn by turn in one process; what is said to be captured is checked to be replayed. It needs torch, numpy
and pydantic alone, and no network.

    python benchmarks/gpu.py                        # the whole table: at most 4 minutes on one H100 or H200
    python benchmarks/gpu.py --only dense,mest      # some rows; nothing is recorded
    python benchmarks/gpu.py --quick                # few repetitions; nothing is recorded
    python benchmarks/gpu.py --rehearse             # on a CPU, tiny, without graphs: it runs, and measures nothing

Rows: start (a process's first captured step, a new stage), frozen (5 and 10 of 15 blocks), run (all of SpFDE's 160
epochs), dense and mest (in the user's own loop), step (session.capture), compiled (over torch.compile), masks, memory,
side (several runs on the GPU), linear (blocks of weights), busy (the trainer).

The exit status is 1 where a row has failed (then nothing is recorded, either), 2 without a GPU, and 0 where figures
miss their targets.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from _common import Figure, Result, Table, begin, markdown, parser, publish, show
from _gpu import BEGUN, Scale, counting, recorded_without_a_gpu, tell
from _gpu_rows import FIRST, FULL, QUICK, REHEARSAL, ROWS, Bench, compiled_into
from _gpu_run import whole_run

LIMIT_MINUTES = 4
NOTES = (
    "A ratio of times: 0.5x is half the time. Plain eager PyTorch is the faster of tf32 and bf16 autocast, both in the "
    "table; all variants step with the same fused SGD, in channels_last, on one batch that lies on the GPU.",
    "The whole run is gone through from end to end in short epochs, in a process of its own that finds nothing "
    "compiled: a step is the median of those of its front, and what an epoch takes beyond its steps (captures, "
    "compilations, mutations, the sieve) counts in full. Loading images is in none of the runs that are compared.",
    "The compiled dense network is compiled after the blocks, so that some of its kernels are at hand.",
    "Memory is PyTorch's own count (max_memory_allocated) from before a variant is made to its warm step, over the "
    "smaller of the two eager ones.",
    "The share of time that the GPU is busy is the trainer's own figure (spfde train --profile).",
)


def options_of(argv: list[str] | None) -> argparse.Namespace:
    """The command line; exit status 2 where it cannot be followed."""
    made = parser(__doc__)
    made.add_argument("--only", type=_names, default=tuple(ROWS), metavar="ROW[,ROW]", help=", ".join(ROWS))
    made.add_argument("--rehearse", action="store_true", help="on a CPU, tiny: it runs, and measures nothing")
    made.add_argument("--whole-run", type=float, default=None, help=argparse.SUPPRESS)
    options = made.parse_args(argv)
    if options.rehearse and options.results is not None:
        made.error("--rehearse measures nothing, so there is no result to write into --results")
    if not options.rehearse and not torch.cuda.is_available():
        made.exit(2, "benchmarks/gpu.py: nothing is measured, for PyTorch finds no CUDA device here\n")
    return options


def _names(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    if unknown := [name for name in names if name not in ROWS]:
        raise argparse.ArgumentTypeError(f"no row: {', '.join(unknown)} (there are {', '.join(ROWS)})")
    return names


def _scale_of(options: argparse.Namespace) -> Scale:
    return REHEARSAL if options.rehearse else QUICK if options.quick else FULL


def main(argv: list[str] | None = None) -> int:
    """Run it; 1 where a row has failed."""
    options = options_of(argv)
    stamped, scale = begin(options), _scale_of(options)
    with ExitStack() as afterwards:
        folder = Path(
            afterwards.enter_context(tempfile.TemporaryDirectory(prefix="spfde-gpu-", ignore_cleanup_errors=True))
        )
        graph = afterwards.enter_context(recorded_without_a_gpu()) if options.rehearse else torch.cuda.CUDAGraph
        replays = afterwards.enter_context(counting(graph))
        if scale.device == "cuda":
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        if options.whole_run is not None:
            print(json.dumps(asdict(whole_run(scale, replays, options.whole_run))), flush=True)
            return 0
        bench = Bench(scale, replays, folder)
        afterwards.enter_context(compiled_into(bench.compiled))
        figures, failed = taken(bench, options.only)
    found = result(options, scale, figures, bench.rows, failed, stamped)
    if options.rehearse:
        print(f"REHEARSED on a CPU with a tiny network: none of these numbers means anything.\n\n{markdown(found)}")
    else:
        part = options.quick or bool(failed) or set(options.only) != set(ROWS)
        publish(found, argparse.Namespace(quick=part, results=options.results))
    return 1 if failed else 0


def taken(bench: Bench, names: Sequence[str]) -> tuple[list[Figure], list[str]]:
    """The figures of the rows, in the table's order, and the rows that failed: loudly, and the others go on."""
    figures: dict[str, list[Figure]] = {name: [] for name in ROWS}
    failed = []
    for name in sorted(names, key=[*FIRST, *ROWS].index):
        begun = time.perf_counter()
        tell(f"== {name}: {ROWS[name].__doc__}")
        try:
            for figure in ROWS[name](bench):
                figures[name].append(figure)
                tell(f"{name}: {figure.what}: {show(figure.value, figure.unit)} (target: {figure.target})")
        except (Exception, SystemExit):
            failed.append(name)
            traceback.print_exc()
        seconds = time.perf_counter() - begun
        tell(f"== {name}: {'FAILED' if name in failed else 'done'} in {seconds:.1f} s")
        bench.rows.append(("in all", name, f"{seconds:.1f} s", "–", "1"))
    minutes = (time.time() - BEGUN) / 60
    tell(f"== all: {minutes:.1f} of at most {LIMIT_MINUTES} minutes; failed: {', '.join(failed) or 'none'}")
    return [figure for found in figures.values() for figure in found], failed


def result(
    options: argparse.Namespace,
    scale: Scale,
    figures: Sequence[Figure],
    rows: Sequence[tuple[str, ...]],
    failed: Sequence[str],
    stamped: dict[str, Any],
) -> Result:
    """What is published."""
    only = "" if set(options.only) == set(ROWS) else " --only " + ",".join(options.only)
    return Result(
        name="gpu",
        title="The engine for GPUs",
        question="How much faster does a small network train on a GPU when its steps are captured in CUDA graphs and "
        "its blocks compiled, and what do masks, frozen blocks, and several runs at once come to there?",
        command=f"python benchmarks/gpu.py{only}{' --quick' if options.quick else ''}",
        figures=tuple(figures),
        tables=(Table("Each variant, a step", ("row", "what", "median", "quartiles", "n"), tuple(rows)),),
        settings={"network": scale.model, "batch": scale.batch, "steps at once": scale.steps, "rounds": scale.rounds},
        notes=(
            *NOTES, *(f"Failed, with a traceback on the standard error: {name}." for name in failed),
        ),
        stamp=stamped,
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
