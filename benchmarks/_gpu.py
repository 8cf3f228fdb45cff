"""What benchmarks/gpu.py times: training steps of several kinds, plain and with a session attached."""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import SGD
from torch.utils.data import DataLoader

import spfde
from _common import BENCHMARKS, Timing, interleave
from spfde.app.train.feed import SampleIds
from spfde.app.train.models import build_model

BEGUN = time.time()


@dataclass(frozen=True)
class Scale:
    """How much of everything.

    Attributes:
        device: where it runs.
        model: the network, for ``classes`` classes and images of ``side`` pixels.
        batch: samples in a step.
        compiles: blocks are compiled, and the dense network that is compared with.
        steps: between two looks at the clock.
        rounds: looks, at each variant.
        warm_up: steps before, in which libraries set themselves up, blocks are compiled and graphs captured.
        side_by_side: runs on one device.
        epochs: of a whole run, in which something changes every ``interval`` epochs.
        samples: of the data set whose run is told.
        epoch_steps: steps of an epoch, as it is gone through for that.
        singly: steps of each epoch after each of which the device is waited for; the others are timed together.
        fronts: numbers of frozen blocks that are told.
        images: of the trainer's run, of which ``profiled`` steps are recorded.
    """

    device: str = "cuda"
    model: str = "resnet32"
    classes: int = 100
    side: int = 32
    batch: int = 128
    compiles: bool = True
    steps: int = 20
    rounds: int = 8
    warm_up: int = 12
    side_by_side: int = 8
    epochs: int = 160
    interval: int = 5
    samples: int = 50_000
    epoch_steps: int = 24
    singly: int = 8
    fronts: tuple[int, ...] = (5, 10)
    images: int = 20_480
    profiled: int = 80

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        return 3, self.side, self.side

    def recipe(self, name: str) -> spfde.Recipe:
        """Nothing at all, MEST EM&S at 90 %, or that with 20 % of the FLOPs frozen and 20 % of the samples sieved."""
        if name == "dense":
            return spfde.Recipe(update_interval_epochs=self.interval)
        mest = spfde.MEST(sparsity=0.9, soft_bound=True)
        if name == "MEST":
            return spfde.Recipe(sparsity=mest, update_interval_epochs=self.interval)
        return spfde.Recipe(
            sparsity=mest,
            freezing=spfde.ProgressiveFreezing(flops_reduction=0.2),
            sieving=spfde.DataSieving(removed_fraction=0.2),
            learning_rate=spfde.BlockwiseCosine(),
            update_interval_epochs=self.interval,
        )

    def network(self) -> torch.nn.Module:
        """The network, in channels_last, on the device."""
        made = build_model(self.model, num_classes=self.classes, in_channels=3, image_size=self.side, seed=0)
        return made.to(self.device).to(memory_format=torch.channels_last).train()


def tell(text: str) -> None:
    """Say what is being done, and when."""
    print(f"{time.time() - BEGUN:6.1f} s  {text}", file=sys.stderr, flush=True)


def wait_for(device: str) -> None:
    """Wait until the device has done everything."""
    if device == "cuda":
        torch.cuda.synchronize()


# --- were graphs replayed? -------------------------------------------------------------------------------------------


@dataclass
class Replays:
    """How often graphs were replayed."""

    count: int = 0


@contextmanager
def counting(graph: Any) -> Iterator[Replays]:
    """Count the replays of all graphs of a class, inside; what is said to be captured is checked by it."""
    found, own = Replays(), graph.replay

    def replay(self: Any) -> None:
        found.count += 1
        own(self)

    graph.replay = replay
    try:
        yield found
    finally:
        graph.replay = own


@contextmanager
def recorded_without_a_gpu() -> Iterator[Any]:
    """Let the engine ``cudagraph`` work on a CPU as in the tests, inside; gives the class of what is replayed."""
    sys.path.insert(0, str(BENCHMARKS.parent / "tests"))
    try:
        from helpers import recording
    finally:
        del sys.path[0]
    engine = recording.CudaGraphEngine
    before, engine.backend = engine.backend, recording.Replays
    try:
        yield recording._Again
    finally:
        engine.backend = before


# --- a training step -------------------------------------------------------------------------------------------------


class Contender:
    """A network in training on one batch: plain PyTorch, or with a session attached.

    Args:
        scale: how large it is.
        recipe: that is attached, by its name; None for plain PyTorch.
        bf16: forward passes run under autocast to bfloat16.
        is_step_captured: the whole step goes through ``session.capture``; otherwise forward and backward pass are
            captured by the engine alone, and the loop is the user's own.
        is_compiled: the network is compiled as a whole, with PyTorch's own CUDA graphs.
        samples: of a data set of which the session's loader gives the ids: images lie on the device, and loading
            them is no part of a step. None: batches come from elsewhere.
        stream: where it runs; None for the current one.

    Attributes:
        session: what is attached, or None.
    """

    def __init__(
        self,
        scale: Scale,
        recipe: str | None = None,
        *,
        bf16: bool = True,
        is_step_captured: bool = False,
        is_compiled: bool = False,
        samples: int | None = None,
        stream: torch.cuda.Stream | None = None,
    ) -> None:
        self.scale, self._stream, self._bf16 = scale, stream, bf16
        with self._on_stream():
            generator = torch.Generator().manual_seed(0)
            x = torch.randn(scale.batch, *scale.sample_shape, generator=generator)
            self.x = x.to(scale.device).contiguous(memory_format=torch.channels_last)
            self.y = torch.randint(scale.classes, (scale.batch,), generator=generator).to(scale.device)
            self.model = scale.network()
            self.optimizer = SGD(self.model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4, fused=True)
            if is_compiled and scale.compiles:
                self.model.compile(mode="reduce-overhead")
            self.session = None if recipe is None else self._attached(recipe, samples)
            self._compute: Callable[[Tensor, Tensor], Tensor] = self.plain
            if is_step_captured:
                assert self.session is not None, "what captures is a session"
                self._compute = self.session.capture(self.plain)
        self._epochs: Iterator[int] | None = None  # dropped, it would end the epoch

    def _attached(self, recipe: str, samples: int | None) -> spfde.Session:
        scale = self.scale
        loader: DataLoader[Any] | None = None
        if samples is not None:
            loader = DataLoader(
                SampleIds(samples),
                batch_size=scale.batch,
                shuffle=True,
                drop_last=True,
                generator=torch.Generator().manual_seed(0),
                collate_fn=_as_given,
            )
        return spfde.attach(
            self.model,
            self.optimizer,
            loader,
            scale.recipe(recipe),
            epochs=scale.epochs,
            samples_per_epoch=scale.samples if loader is None else None,
            sample=self.x[:2],
            engine="cudagraph",
            compile=scale.compiles,
        )

    def plain(self, x: Tensor, y: Tensor) -> Tensor:
        """A training step as anyone would write it; the logits."""
        with torch.autocast(self.scale.device, torch.bfloat16, enabled=self._bf16):
            logits: Tensor = self.model(x)
            loss = F.cross_entropy(logits, y)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return logits

    def step(self) -> None:
        """A step, as it is timed."""
        with self._on_stream():
            logits = self._compute(self.x, self.y)
            if self.session is not None:
                self.session.observe(logits, self.y)

    def warm_up(self, replays: Replays) -> None:
        """Begin the first epoch, and step until nothing is new.

        Raises:
            RuntimeError: what is to be captured is not replayed.
        """
        with self._on_stream():
            if self.session is not None:
                self._epochs = self.session.epochs()
                next(self._epochs)
        for _ in range(self.scale.warm_up):
            self.step()
        before = replays.count
        self.step()
        wait_for(self.scale.device)
        if self.session is not None and replays.count == before:
            raise RuntimeError(f"no graph was replayed by step {self.scale.warm_up + 1}: {self.session}")

    def _on_stream(self) -> AbstractContextManager[Any]:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)


def _as_given(batch: Any) -> Any:
    return batch


# --- contenders ------------------------------------------------------------------------------------------------------

EAGER = ("dense, eager, tf32", "dense, eager, bf16")
COMPILED = "dense, compiled (reduce-overhead), bf16"
DENSE_LOOP, DENSE_STEP = "dense recipe, own loop", "dense recipe, captured step"
MEST_LOOP, MEST_STEP = "MEST 90 %, own loop", "MEST 90 %, captured step"
CONTENDERS: Mapping[str, Callable[[Scale], Contender]] = {
    EAGER[0]: lambda scale: Contender(scale, bf16=False),
    EAGER[1]: Contender,
    COMPILED: lambda scale: Contender(scale, is_compiled=True),
    DENSE_LOOP: lambda scale: Contender(scale, "dense"),
    DENSE_STEP: lambda scale: Contender(scale, "dense", is_step_captured=True),
    MEST_LOOP: lambda scale: Contender(scale, "MEST"),
    MEST_STEP: lambda scale: Contender(scale, "MEST", is_step_captured=True),
}


@dataclass(frozen=True)
class Made:
    """A contender that is warm.

    Attributes:
        seconds: that it took to make it and to warm it up.
        peak: bytes that were in use at most meanwhile, beyond what was in use before; 0 on a CPU.
        reserved: bytes that PyTorch holds since, likewise, the memory of graphs included.
    """

    contender: Contender
    seconds: float
    peak: int
    reserved: int


def make(name: str, scale: Scale, replays: Replays) -> Made:
    """Make a contender and warm it up."""
    tell(f"{name}: made, and {scale.warm_up + 1} steps to warm it up …")
    gc.collect()
    before = _memory(scale.device, start=True)
    begun = time.perf_counter()
    contender = CONTENDERS[name](scale)
    contender.warm_up(replays)
    seconds = time.perf_counter() - begun
    after = _memory(scale.device)
    made = Made(contender, seconds, after[0] - before[0], after[1] - before[1])
    tell(f"{name}: ready in {seconds:.1f} s, {made.peak >> 20} MiB at most, {made.reserved >> 20} MiB reserved")
    return made


def _memory(device: str, *, start: bool = False) -> tuple[int, int]:
    """Bytes in use at most since the start, and bytes reserved; with ``start`` they begin now."""
    if device != "cuda":
        return 0, 0
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    if start:
        torch.cuda.reset_peak_memory_stats()
    return torch.cuda.max_memory_allocated(), torch.cuda.memory_reserved()


def many(step: Callable[[], object], scale: Scale) -> Callable[[], None]:
    """So many steps, and the end of them."""

    def call() -> None:
        for _ in range(scale.steps):
            step()
        wait_for(scale.device)

    return call


def time_steps(steps: Mapping[str, Callable[[], object]], scale: Scale) -> dict[str, Timing]:
    """Seconds of a step of each, taken turn by turn."""
    found = interleave({name: many(step, scale) for name, step in steps.items()}, scale.rounds)
    return {name: Timing(tuple(taken / scale.steps for taken in timing.seconds)) for name, timing in found.items()}
