"""Some steps under PyTorch's profiler: a trace for the eye, and how busy the GPU was."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from spfde.core.files import clear_errors, written_whole

TRACE = "trace.json"
WARM_UP = 10
"""Steps before those that are recorded, or a third of a short epoch: the first ones compile and capture."""
N_DEAREST = 10
_ON_GPU = ("kernel", "gpu_memcpy", "gpu_memset")


@dataclass(frozen=True)
class Profile:
    """What was recorded of an epoch's steps.

    Attributes:
        steps: recorded; fewer than asked for where the epoch has no more.
        trace: the file, for ``chrome://tracing`` or Perfetto.
        gpu_seconds: from the start of the GPU's first kernel or copy to the end of its last; None where none was seen.
        gpu_busy: share of that time in which at least one of them ran; likewise.
        dearest: operations on the CPU by the time that was spent in them alone, most first: name, calls, seconds, and
            their share of the time of all.
    """

    steps: int
    trace: Path
    gpu_seconds: float | None
    gpu_busy: float | None
    dearest: list[tuple[str, int, float, float]]


def busy_share(intervals: Iterable[tuple[float, float]]) -> tuple[float, float]:
    """How long it is from the first start to the last end, and the share of it that the intervals cover.

    Args:
        intervals: start and end of each, at least one, in any order; they may overlap.

    Example:
        >>> from spfde.app.train.profile import busy_share
        >>> busy_share([(0.0, 2.0), (1.0, 3.0), (4.0, 8.0)])
        (8.0, 0.875)
    """
    in_order = sorted(intervals)
    first, covered_to = in_order[0][0], in_order[0][0]
    busy = 0.0
    for start, end in in_order:
        busy += max(0.0, end - max(start, covered_to))
        covered_to = max(covered_to, end)
    return covered_to - first, busy / (covered_to - first) if covered_to > first else 1.0


@contextmanager
def profiled(
    steps: int, n_batches: int, device: torch.device, folder: Path, tell: Callable[[Profile], None]
) -> Iterator[Callable[[], object]]:
    """Profile steps of an epoch that begins now; gives what is to be called after each step.

    Args:
        steps: how many are wanted.
        n_batches: how many the epoch has.
        device: where they run.
        folder: where ``trace.json`` is written, once the steps are over.
        tell: is told then.
    """
    warm_up = min(WARM_UP, max(1, n_batches - steps, n_batches // 3), n_batches - 1)
    active = min(steps, n_batches - warm_up)
    on_gpu = device.type == "cuda"

    def ready(recorded: profile) -> None:
        tell(_written(recorded, active, folder / TRACE, on_gpu=on_gpu))

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    when = schedule(wait=0, warmup=warm_up, active=active, repeat=1)
    with _environment(on_gpu), profile(activities=activities, schedule=when, on_trace_ready=ready) as recording:
        yield recording.step


@contextmanager
def _environment(on_gpu: bool) -> Iterator[None]:
    """What PyTorch's profiler reads from the environment when it starts, as far as the user has not set it."""
    # Before CUDA 12.6 graphs do not survive that the recording of kernels is taken down and set up again. Without a GPU
    # the profiler would complain on the standard error that there is none.
    wanted = {"DISABLE_CUPTI_LAZY_REINIT": "1", "TEARDOWN_CUPTI": "0"} if on_gpu else {"KINETO_LOG_LEVEL": "9"}
    added = {name: value for name, value in wanted.items() if name not in os.environ}
    os.environ |= added
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


def _written(recorded: profile, steps: int, trace: Path, *, on_gpu: bool) -> Profile:
    with clear_errors(trace.parent), written_whole(trace) as (draft,):
        recorded.export_chrome_trace(str(draft))
        # The file has what ran on the GPU by kinds; the profiler's list has annotations among it.
        events = json.loads(draft.read_text(encoding="utf-8"))["traceEvents"] if on_gpu else []
    # In microseconds.
    spans = [(each["ts"], each["ts"] + each["dur"]) for each in events if each.get("cat") in _ON_GPU]
    elapsed, busy = busy_share(spans) if spans else (None, None)
    averages = [each for each in recorded.key_averages() if not each.key.startswith("ProfilerStep")]
    total = sum(each.self_cpu_time_total for each in averages) or 1.0
    averages.sort(key=lambda each: -each.self_cpu_time_total)
    return Profile(
        steps=steps,
        trace=trace,
        gpu_seconds=None if elapsed is None else elapsed * 1e-6,
        gpu_busy=busy,
        dearest=[
            (each.key, each.count, each.self_cpu_time_total * 1e-6, each.self_cpu_time_total / total)
            for each in averages[:N_DEAREST]
        ],
    )
