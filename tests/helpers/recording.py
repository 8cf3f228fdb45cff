"""A backend without a GPU: what was recorded is run again, on the same memory, and writes to the same memory.

As on a GPU, nothing can be recorded that waits for a result.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from difflib import unified_diff
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from spfde.engines.cudagraph.backend import Backend, Recording, Work
from spfde.engines.cudagraph.engine import CudaGraphEngine


class _Kernels(TorchDispatchMode):
    """Notes the operations but for views, which are no kernels; none may wait for a result."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing")
        is_view = any(out.alias_info is not None and not out.alias_info.is_write for out in func._schema.returns)
        if not is_view:
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


class _Again(Recording):
    def __init__(self, work: Work, outputs: Sequence[Tensor], kernels: list[str], backend: Replays) -> None:
        self._work, self.outputs, self._kernels, self._backend = work, outputs, kernels, backend

    def replay(self) -> None:
        self._backend.replays += 1
        with torch.no_grad(), _Kernels() as kernels:
            fresh = self._work()
        # What Python does otherwise this time, a graph would not.
        differences = [*unified_diff(self._kernels, kernels.names, "recorded", "done now", lineterm="", n=1)]
        assert not differences, differences
        with torch.no_grad():
            for mine, output in zip(self.outputs, fresh, strict=True):
                mine.copy_(output)


class Replays(Backend):
    """Runs again what was recorded.

    Attributes:
        newest: the backend made last, by the engine under test.
        records, replays, frees: how often.
    """

    newest: Replays

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.records = self.replays = self.frees = 0
        Replays.newest = self

    @classmethod
    def reason_against(cls, device: torch.device) -> str | None:
        return None if device.type == "cpu" else f"the model is on {device}"

    def warm_up(self, work: Callable[[], object]) -> None:
        work()

    def aside(self) -> AbstractContextManager[None]:
        return nullcontext()

    def record(self, work: Work, *, pool: str) -> Recording:
        self.records += 1
        with _Kernels() as kernels:
            outputs = work()
        copies = [output.detach().clone(memory_format=torch.preserve_format) for output in outputs]
        return _Again(work, copies, kernels.names, self)

    def free(self) -> None:
        self.frees += 1


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> type[Replays]:
    """Let the engine ``cudagraph`` work on the CPU, on this backend."""
    monkeypatch.setattr(CudaGraphEngine, "backend", Replays)
    return Replays
