"""A model that is run to be recorded, and is afterwards as if it had not been."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from spfde.core.generators import keep_numpy, keep_python, numpy_state
from spfde.core.torch_private import BUFFERS


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
    on_cpu, others, put_back = torch.get_rng_state(), _others(), (keep_python(), keep_numpy())
    on_device = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    try:
        yield
        if _others() != others or (on_device is not None and not torch.equal(torch.get_rng_state(), on_cpu)):
            raise RuntimeError("it draws random numbers beside the generator of its device")
    finally:
        for owner, name, buffer, value in kept:
            buffer.data.copy_(value)  # by .data: a backward pass of before may still want the buffer as it was
            owner[name] = buffer
        torch.set_rng_state(on_cpu)
        if on_device is not None:
            torch.cuda.set_rng_state(on_device, device)
        if _others() != others:
            for each in put_back:
                each()


def draws_beside(device: torch.device) -> tuple[Any, ...]:
    """The states of the generators that no recording on the device moves, to be compared."""
    return (*_others(), torch.get_rng_state().tolist() if device.type != "cpu" else None)


def _others() -> tuple[Any, ...]:
    """The states of the generators of Python and NumPy, to be compared."""
    return random.getstate(), numpy_state()
