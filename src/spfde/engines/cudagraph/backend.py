"""What records work once and repeats it on the same memory: CUDA graphs, or for tests something that runs it again."""

from __future__ import annotations

import gc
import warnings
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spfde.core.streams import own_stream
from spfde.core.torch_private import stop_allocating

Work = Callable[[], Sequence[Tensor]]

_WAITS = "synchronizing CUDA operation"
"""In what PyTorch says of an operation that waits for the device."""


class Recording(ABC):
    """Work that was recorded.

    Attributes:
        outputs: its results, in memory that each replay writes to.
    """

    outputs: Sequence[Tensor]

    @abstractmethod
    def replay(self) -> None:
        """Do the work again, on what its inputs' memory holds now."""


class Backend(ABC):
    """Records work on one device.

    Args:
        device: where the model is.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device

    @classmethod
    @abstractmethod
    def reason_against(cls, device: torch.device) -> str | None:
        """Why nothing can be recorded on the device, as a clause; None where it can."""

    @abstractmethod
    def warm_up(self, work: Callable[[], object]) -> None:
        """Run the work a few times as it will be recorded: libraries set themselves up, and allocate, at first."""

    @abstractmethod
    def aside(self) -> AbstractContextManager[None]:
        """A context in which work is done where it will be recorded, between what was queued before and comes after."""

    @contextmanager
    def watching(self) -> Iterator[Callable[[], str | None]]:
        """A context in which work is done that may be recorded later; gives what tells afterwards why it cannot be."""
        yield lambda: None

    @abstractmethod
    def record(self, work: Work, *, pool: str) -> Recording:
        """Record the work, and do it once.

        Args:
            work: reads and writes memory that stays where it is, and returns tensors.
            pool: recordings of one pool share memory, and may not be replayed while another one's results are in use.

        Raises:
            RuntimeError: it does what cannot be recorded, such as waiting for a result.
        """

    @abstractmethod
    def free(self) -> None:
        """Recordings are gone: give their memory back."""


class CudaGraphs(Backend):
    """CUDA graphs, recorded on a stream of their own."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        # On one stream for two models, graphs would share a workspace, and runs side by side replay them at a time.
        self._stream = own_stream(device)
        self._pools: dict[str, Any] = {}
        self._alive: dict[str, weakref.WeakSet[_Graph]] = {}

    @classmethod
    def reason_against(cls, device: torch.device) -> str | None:
        if device.type != "cuda":
            return f"the model is on {device}, and CUDA graphs are for GPUs of NVIDIA"
        if torch.version.hip is not None:
            return "this PyTorch is built for ROCm, where it has not been tried"
        return None

    def warm_up(self, work: Callable[[], object]) -> None:
        with self.aside():
            for _ in range(3):
                work()
        torch.cuda.synchronize(self.device)

    @contextmanager
    def aside(self) -> Iterator[None]:
        before = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(before)
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:
            before.wait_stream(self._stream)

    def record(self, work: Work, *, pool: str) -> Recording:
        graph, before = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self.device)
        alive = self._alive.setdefault(pool, weakref.WeakSet())
        if not alive:  # a pool whose graphs are all gone may be gone with them
            self._pools[pool] = torch.cuda.graph_pool_handle()
        try:
            # Threads that load data allocate and copy meanwhile: that is no part of what is recorded, and no error.
            # What the collector would free in a capture (an old graph, a kernel's code) would end it.
            capture = torch.cuda.graph(
                graph, pool=self._pools[pool], stream=self._stream, capture_error_mode="thread_local"
            )
            with without_collection(), capture:
                outputs = work()
        except BaseException:
            torch.cuda.set_stream(before)  # torch.cuda.graph leaves its own where the end of a capture fails
            stop_allocating(self.device, self._pools[pool])
            raise
        graph.replay()  # a capture does nothing
        recorded = _Graph(graph, outputs)
        alive.add(recorded)
        return recorded

    @contextmanager
    def watching(self) -> Iterator[Callable[[], str | None]]:
        mode = torch.cuda.get_sync_debug_mode()
        said: list[str] = []
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                yield lambda: next(iter(said), None)
            finally:
                torch.cuda.set_sync_debug_mode(mode)
        for each in caught:
            if _WAITS in str(each.message):
                said.append(f"it waits for the device at {Path(each.filename).name}:{each.lineno}")
            else:
                warnings.warn_explicit(each.message, each.category, each.filename, each.lineno)

    def free(self) -> None:
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()


@contextmanager
def without_collection() -> Iterator[None]:
    """A context in which Python's collector does not run; it runs before."""
    gc.collect()
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


class _Graph(Recording):
    def __init__(self, graph: torch.cuda.CUDAGraph, outputs: Sequence[Tensor]) -> None:
        self._graph, self.outputs = graph, outputs

    def replay(self) -> None:
        self._graph.replay()
