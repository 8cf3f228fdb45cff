"""How long a dense step takes: the measured part of what a dense run would have taken."""

from __future__ import annotations

import statistics
import time

import torch
from torch.amp import GradScaler

from spfde.app.data.images import DataSpec
from spfde.app.train.building import built
from spfde.app.train.loss import loss_of
from spfde.app.train.machine import Machine
from spfde.app.train.optimizing import make_optimizer, take_step
from spfde.app.train.options import TrainOptions
from spfde.app.train.processes import Processes
from spfde.cost import format_seconds

_SCATTERED = 1.5
"""Times the shortest of some equal steps, from which on the usual one is more than chance."""


def time_dense_step(
    options: TrainOptions, spec: DataSpec, machine: Machine, processes: Processes
) -> tuple[float, list[str]]:
    """Least seconds of a dense training step, unfrozen, timed on a model of its own before training; and words on them.

    Several processes take it together, as they would take the dense run's.

    It is the measured part of "what the dense run would have taken": this time, times the dense run's steps. The
    global generators are put back, so that the run does not depend on it.
    """
    device = machine.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        twin = built(options, spec, device).train()
        wrapped = processes.wrapped(twin, device)
        shape = (min(options.batch_size, spec.train_samples), *spec.sample_shape)
        x = torch.randn(shape, device=device).contiguous(memory_format=torch.channels_last)
        y = torch.zeros(len(x), dtype=torch.int64, device=device)
        optimizer, scaler = make_optimizer(twin.parameters(), options, lr=1e-6), GradScaler(enabled=False)
        seconds = []
        for _ in range(2 + options.dense_timing_steps):
            start = time.perf_counter()
            with machine.autocast():
                loss = loss_of(wrapped(x), y, label_smoothing=options.label_smoothing)
            torch.autograd.backward([loss])
            of_batch = _since(start, device)
            take_step(optimizer, scaler, options.clip_norm)
            seconds.append(of_batch + (_since(start, device) - of_batch) / options.accumulate)
    least, usual = min(seconds[2:]), statistics.median(seconds[2:])
    if usual > _SCATTERED * least:
        told = (
            f"dense steps took {format_seconds(least)} to {format_seconds(max(seconds[2:]))}: the machine does other "
            "things too, and seconds say little; those of a dense run are extrapolated from the shortest step"
        )
        return least, [told]
    return least, []


def _since(start: float, device: torch.device) -> float:
    """Seconds since then, once the device has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
