"""A model that is run to be recorded, and is afterwards as if it had not been."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from spfde.core.torch_private import BUFFERS
from spfde.model.sample import generators_of_python, global_generators_restored


@contextmanager
def as_before(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Put back buffers and generators, whatever happens.

    Raises:
        RuntimeError: the model drew random numbers that a replay would not draw.
    """
    kept = [
        (vars(module)[BUFFERS], name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in vars(module)[BUFFERS].items()
        if buffer is not None
    ]
    try:
        with global_generators_restored():
            before = _elsewhere(device)
            yield
            if _elsewhere(device) != before:
                raise RuntimeError("it draws random numbers beside the generator of its device")
    finally:
        for owner, name, buffer, value in kept:
            buffer.data.copy_(value)  # by .data: a backward pass of before may still want the buffer as it was
            owner[name] = buffer


def _elsewhere(device: torch.device) -> tuple[Any, ...]:
    """The states of the generators that a recording on the device does not draw from."""
    on_cpu = torch.get_rng_state().numpy().tobytes() if device.type != "cpu" else b""
    return generators_of_python(), on_cpu
