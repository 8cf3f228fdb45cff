"""The engine ``cudagraph``, as ``attach`` and the session know it."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import partial
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from spfde.core.errors import InvalidArgument
from spfde.core.registry import register
from spfde.core.say import say
from spfde.engines.base import Job, Parts, Recorder, StandInEngine
from spfde.engines.blocks.engine import BlocksEngine, describe, modelled_speed, put_on_linears
from spfde.engines.cudagraph.backend import Backend, CudaGraphs
from spfde.engines.cudagraph.front import CachedFront, kept_on, reason_against
from spfde.engines.cudagraph.known import told
from spfde.engines.cudagraph.model import CapturedModel
from spfde.engines.guards import read_by
from spfde.engines.kept_outputs import CachedPrefix
from spfde.engines.stand_in import has_own_forward

if TYPE_CHECKING:
    from spfde.engines.blocks.linear import BlockLinears

_SPEED = 0.4
"""Time of a step over the masked engine's, for networks that wait for launches. Large layers gain less."""


@register("engine")
class CudaGraphEngine(StandInEngine[CapturedModel]):
    """Forward and backward pass of the model as CUDA graphs: no kernel waits for its launch. Masks lie inside.

    The loop stays as it is. Each frozen front, input shape, mode and autocast state is recorded when it has come twice
    in turn, and replayed from then on; what comes once, such as a smaller last batch, is run by PyTorch. Linear layers
    with blocks of weights are computed by the kernels of the engine ``blocks``, inside the graphs.
    """

    name: ClassVar[str] = "cudagraph"
    summary: ClassVar[str] = "forward and backward pass recorded once and replayed, on GPUs"
    backend: ClassVar[type[Backend]] = CudaGraphs

    def __init__(self) -> None:
        super().__init__()
        self._linears: BlockLinears | None = None

    @classmethod
    def supports(cls, job: Job) -> str | None:
        devices = {tensor.device for tensor in (*job.model.parameters(), *job.model.buffers())}
        if len(devices) != 1:
            return "the model lies on several devices" if devices else "the model has no parameters"
        reason = cls.backend.reason_against(next(iter(devices)))
        if reason is not None:
            return reason
        if job.is_compiled:
            return "the model is compiled by torch.compile"
        if has_own_forward(job.model):
            return "the model's instance has a forward of its own"
        try:
            job.found[cls.name] = read_by(job.model, job.sample)
        except InvalidArgument as error:
            return str(error)
        return None

    @classmethod
    def expected_speed(cls, job: Job) -> float:
        return _SPEED * (modelled_speed(job) if BlocksEngine.supports(job) is None else 1.0)

    @classmethod
    def prepare(cls, job: Job, tell: Callable[[str], None] | None = None) -> str | None:
        job.found[BlocksEngine.name] = works = BlocksEngine.supports(job) is None
        if works and (reason := BlocksEngine.prepare(job, tell)) is not None:
            job.found[BlocksEngine.name] = False
            say(f"engine {cls.name}: linear layers are computed dense, under their masks: {reason}")
        return None

    @classmethod
    def supports_cache(cls, job: Job) -> str | None:
        if job.cache is not None and job.cache.folder is not None:
            return "it keeps them on the GPU or in main memory, and not in a folder"
        return reason_against(job)

    def attach(self, job: Job, parts: Parts) -> None:
        device = next(job.model.parameters()).device
        if job.found.pop(BlocksEngine.name, False):
            self._linears = put_on_linears(job, parts)
        reads = job.found.pop(self.name, None) or read_by(job.model, job.sample)
        backend, cached = self.backend(device), None
        if job.cache is not None:
            kept = CachedPrefix(job.n_samples, job.cache, place=partial(kept_on, device), multiple=1)
            cached = CachedFront(job.model, kept, job.sample, job.batch_size, backend, parts, reads)
        self._attached = CapturedModel(
            job.model,
            backend,
            parts,
            reads=reads,
            is_strict=job.is_strict,
            cached=cached,
            before_replay=self.before_replay,
        )

    def detach(self) -> None:
        super().detach()
        if self._linears is not None:
            self._linears.detach()
            self._linears = None

    def before_replay(self) -> Hashable:
        if self._linears is None:
            return ()
        self._linears.refresh()
        return self._linears.key

    @property
    def recorder(self) -> Recorder | None:
        return Recorder(self.computes.backend, self.computes.reads, self.bypass, self.before_replay)

    def describe(self) -> list[str]:
        computes = self.computes
        return [
            f"replaced: the model's forward; {told(computes.recorded, computes.replayed, 'passes', computes.eager)}",
            *(computes.cached.describe() if computes.cached is not None else ()),
            *(describe(self._linears) if self._linears is not None else ()),
        ]

    def on_batch(self) -> None:
        if self.computes.cached is not None:
            self.computes.cached.announce(None)

    def on_epoch(self) -> None:
        if self.computes.cached is not None:
            self.computes.cached.look()

    def prefix_variants(self) -> int:
        return 0 if self.computes.cached is None else self.computes.cached.variants()

    def announce(self, samples: Tensor, variant: int) -> None:
        assert self.computes.cached is not None, "it has said that there are variants"
        self.computes.cached.announce(samples, variant)
