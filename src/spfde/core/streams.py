"""Streams of a GPU for one owner each."""

from __future__ import annotations

import gc
from weakref import WeakValueDictionary

import torch

from spfde.core.errors import UsageError

_N_DEALT = 64  # at least all that there are: PyTorch deals out the same 32 of a device in turn

_TAKEN: WeakValueDictionary[int, torch.cuda.Stream] = WeakValueDictionary()


def own_stream(device: torch.device) -> torch.cuda.Stream:
    """A CUDA stream that nobody else gets from here for as long as it is held.

    ``torch.cuda.Stream`` begins anew after 32, and gives one stream to two owners then. That would be wrong where their
    work runs at a time: cuBLAS has its workspace by stream, and a CUDA graph computes in that of the stream that it was
    captured on, wherever it is replayed.

    Raises:
        UsageError: all streams of the device are taken.
    """
    found = _free_stream(device)
    if found is None:
        gc.collect()  # owners in circles hold theirs until they are found
        found = _free_stream(device)
    if found is None:
        raise UsageError(
            f"{device}: all {len(_TAKEN)} CUDA streams are taken, one for each run side by side and one for each model "
            "that is captured. Train fewer at a time, or detach sessions that are over."
        )
    return found


def _free_stream(device: torch.device) -> torch.cuda.Stream | None:
    for _ in range(_N_DEALT):
        stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        if stream.cuda_stream not in _TAKEN:
            _TAKEN[stream.cuda_stream] = stream
            return stream
    return None
