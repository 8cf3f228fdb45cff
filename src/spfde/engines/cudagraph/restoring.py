"""A model that is run to be recorded, and is afterwards as if it had not been."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

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
    on_cpu, others = torch.get_rng_state(), _others()
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
            random.setstate(others[0])
            np.random.set_state(("MT19937", np.frombuffer(others[1], np.uint32), *others[2]))  # noqa: NPY002


def _others() -> tuple[Any, ...]:
    """The states of the generators of Python and NumPy, to be compared."""
    _, keys, *position = np.random.get_state()  # noqa: NPY002
    return random.getstate(), np.asarray(keys).tobytes(), position
