"""What records work once and repeats it on the same memory: CUDA graphs, or for tests something that runs it again."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor

Work = Callable[[], Sequence[Tensor]]


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
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pools: dict[str, Any] = {}

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
        graph = torch.cuda.CUDAGraph()
        shared = self._pools.setdefault(pool, torch.cuda.graph_pool_handle())
        # Threads that load data allocate and copy meanwhile: that is no part of what is recorded, and no error.
        with torch.cuda.graph(graph, pool=shared, stream=self._stream, capture_error_mode="thread_local"):
            outputs = work()
        graph.replay()  # a capture does nothing
        return _Graph(graph, outputs)

    def free(self) -> None:
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()


class _Graph(Recording):
    def __init__(self, graph: torch.cuda.CUDAGraph, outputs: Sequence[Tensor]) -> None:
        self._graph, self.outputs = graph, outputs

    def replay(self) -> None:
        self._graph.replay()
