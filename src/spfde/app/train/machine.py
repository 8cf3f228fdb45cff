"""What a run computes on and in which numbers: chosen once, said in a line, and put back when the run is over."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch.amp import GradScaler

from spfde.app.train.options import TrainOptions
from spfde.planning import Plan

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}

COMPILING_PAYS_FROM = 40_000
"""Optimizer steps. Compiling takes about half a minute, and gains 0.7 of 4.1 ms a step (ResNet-32, batch 128, H200)."""


@dataclass(frozen=True)
class Machine:
    """A device, and the precision of the products on it.

    Attributes:
        device: with its number, where it has one.
        precision: fp32, or what autocast casts to: bf16 or fp16.
    """

    device: torch.device
    precision: str

    @property
    def takes_tf32(self) -> bool:
        """Whether products that stay in fp32 are rounded to TF32: on CUDA, unless fp32 was asked for."""
        return self.device.type == "cuda" and self.precision != "fp32"

    def autocast(self) -> AbstractContextManager[Any]:
        """For forward passes."""
        if self.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, DTYPES[self.precision])

    def scaler(self) -> GradScaler:
        """Of the loss; in fp16 alone it does anything."""
        return GradScaler(self.device.type, enabled=self.precision == "fp16")

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """The device is the current one, and TF32 is on where it is taken; afterwards both are as they were."""
        if self.device.type != "cuda":
            yield
            return
        before = switches()
        with torch.cuda.device(self.device):
            try:
                if self.takes_tf32:
                    set_switches((True, True))
                yield
            finally:
                if self.takes_tf32:
                    set_switches(before)


def switches() -> tuple[bool, bool]:
    """Whether products of matrices, and those of cuDNN, are rounded to TF32: what a run sets in the process."""
    return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32


def set_switches(to: tuple[bool, bool]) -> None:
    """Set what ``switches`` tells."""
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = to


def pick_device(name: str, local_rank: int | None = None) -> torch.device:
    """The device of that name, with its number; ``auto`` is the first of cuda, mps and cpu that there is.

    Args:
        name: as ``--device`` has it.
        local_rank: of several processes that train together, which one of its host this is: each has a GPU of its own,
            and none computes on MPS, over which gradients cannot travel.
    """
    if name == "auto":
        has_mps = local_rank is None and torch.backends.mps.is_available()
        name = "cuda" if torch.cuda.is_available() else "mps" if has_mps else "cpu"
    if name == "cuda":
        return torch.device("cuda", torch.cuda.current_device() if local_rank is None else local_rank)
    return torch.device(name)


def choose(options: TrainOptions, device: torch.device, bill: Plan, n_processes: int = 1) -> tuple[TrainOptions, str]:
    """The options with nothing left to choose, and a line that says what was chosen.

    Args:
        options: as they were asked for; of a run that goes on, as they were chosen.
        device: what the run computes on.
        bill: the run's plan, which tells how many steps it has.
        n_processes: which share them.
    """
    has_bf16 = device.type == "cuda" and _has_bf16(device)
    steps = sum(math.ceil(samples / (options.batch_size * n_processes)) for samples in bill.samples_in_use)
    chosen: dict[str, Any] = {}
    reasons = {"precision": "", "compile": ""}
    if options.precision == "auto":
        chosen["precision"] = "bf16" if has_bf16 else "fp32"
        reasons["precision"] = " (auto: it has bf16)" if has_bf16 else f" (auto: on {_kind(device)})"
    if options.compile is None:
        pays = steps >= COMPILING_PAYS_FROM
        chosen["compile"] = pays and device.type == "cuda"
        if device.type == "cuda":
            reasons["compile"] = f" (auto: {steps:,} steps, pays from {COMPILING_PAYS_FROM:,})"
    if options.augment_draws == "auto":
        # A CPU's runs stay what they have been; elsewhere they do not depend on where the images are augmented.
        by_sample = device.type == "cuda" or options.data_on == "device" or n_processes > 1
        chosen["augment_draws"] = "sample" if by_sample else "batch"
    options = options.model_copy(update=chosen)
    parts = [f"precision {options.precision}{reasons['precision']}"]
    parts += ["tf32"] if Machine(device, options.precision).takes_tf32 else []
    parts += ["channels_last", f"{'compiled' if options.compile else 'not compiled'}{reasons['compile']}"]
    return options, " · ".join(parts)


def compiling(options: TrainOptions) -> dict[str, Any]:
    """What ``attach`` is told of compiling; nothing where nothing is to be compiled."""
    return {"compile": True} if options.compile else {}


def _has_bf16(device: torch.device) -> bool:
    """In hardware: PyTorch emulates it on older cards, slowly."""
    with torch.cuda.device(device):
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))


def _kind(device: torch.device) -> str:
    return {"cpu": "a CPU", "mps": "MPS"}.get(device.type, f"{device}, which has no bf16")
