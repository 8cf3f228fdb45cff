"""A run of SpFDE from its start to its end, as benchmarks/gpu.py takes it in a process of its own."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from _gpu import CONTENDERS, EAGER, Contender, Replays, Scale, many, tell, wait_for


@dataclass(frozen=True)
class Epoch:
    """One epoch of a run.

    Attributes:
        frozen: blocks.
        seconds: from the end of the last epoch's steps to the end of its own: sieve, mutation, captures and all.
        steps: of it.
        step: seconds of one, where nothing is new.
        to_replay: seconds from its first step to the end of the first one that was replayed.
    """

    frozen: int
    seconds: float
    steps: int
    step: float
    to_replay: float


@dataclass(frozen=True)
class WholeRun:
    """A run from end to end, in short epochs.

    Attributes:
        first: seconds from the start of the process to the end of the first step that was replayed.
        epochs: in order.
        tail: seconds after the last step.
        blocks: that the network has.
        eager: seconds of a step of plain dense PyTorch, taken now and then between epochs, by precision.
    """

    first: float
    epochs: tuple[Epoch, ...]
    tail: float
    blocks: int
    eager: Mapping[str, Sequence[float]]

    @classmethod
    def from_dict(cls, found: dict[str, Any]) -> WholeRun:
        """What was written as JSON."""
        return cls(**{**found, "epochs": tuple(Epoch(**each) for each in found["epochs"])})

    def steps_at(self, frozen: int) -> list[float]:
        """Seconds of a step with so many blocks frozen, by epoch."""
        found = [epoch.step for epoch in self.epochs if epoch.frozen == frozen]
        if not found:
            raise ValueError(f"the run never has {frozen} blocks frozen, but {sorted({e.frozen for e in self.epochs})}")
        return found

    @property
    def step(self) -> dict[int, float]:
        """Median seconds of a step by the number of frozen blocks."""
        return {frozen: statistics.median(self.steps_at(frozen)) for frozen in sorted({e.frozen for e in self.epochs})}

    @property
    def new_stages(self) -> dict[int, float]:
        """Seconds from the first step behind each new front to the first one replayed, but for the run's first."""
        found: dict[int, float] = {}
        for epoch in self.epochs:
            found.setdefault(epoch.frozen, epoch.to_replay)
        return {frozen: seconds for frozen, seconds in found.items() if frozen != self.epochs[0].frozen}

    @property
    def beside_steps(self) -> float:
        """Seconds of everything but steps where nothing is new: attaching, compilations, captures, ends of epochs."""
        steps = self.step
        return sum(epoch.seconds - epoch.steps * steps[epoch.frozen] for epoch in self.epochs) + self.tail

    def seconds_for(self, samples_in_use: Sequence[int], frozen: Sequence[int], batch: int) -> float:
        """Seconds of the run with epochs as long as the data set's.

        Raises:
            ValueError: the plan freezes otherwise than the run did.
        """
        if list(frozen) != [epoch.frozen for epoch in self.epochs]:
            raise ValueError("the run has frozen other blocks than its plan says")
        steps = self.step
        parts = (math.ceil(n / batch) * steps[front] for n, front in zip(samples_in_use, frozen, strict=True))
        return sum(parts) + self.beside_steps


def whole_run(scale: Scale, replays: Replays, started: float) -> WholeRun:
    """Go through a run of SpFDE, each step captured as a whole.

    Args:
        scale: how long it is.
        replays: of graphs.
        started: ``time.time()`` at the start of the process.

    Raises:
        RuntimeError: a front was not captured in an epoch's first steps.
    """
    last = time.perf_counter()
    run = Contender(scale, "SpFDE", is_step_captured=True, samples=round(scale.epoch_steps * scale.batch / 0.8))
    assert run.session is not None, "it has a recipe"
    first, epochs = None, list[Epoch]()
    eager, times = dict[str, Contender](), dict[str, list[float]]()
    for number in run.session.epochs():
        frozen = run.session.frozen_blocks
        found = _epoch(run, replays, last)
        if first is None:
            first = time.time() - started
            tell(f"whole run: first step replayed {found.to_replay:.1f} s after the first one began")
        elif frozen != epochs[-1].frozen:
            tell(f"whole run, epoch {number}: {frozen} blocks frozen, replayed after {found.to_replay:.2f} s")
        epochs.append(found)
        if number % max(1, scale.epochs // 8) == 1:
            _time_eager(eager, scale, times)
        last = time.perf_counter()
    assert first is not None, "a run has epochs"
    blocks = len(run.session.blueprint.partition.blocks)
    return WholeRun(first, tuple(epochs), time.perf_counter() - last, blocks, times)


def _epoch(run: Contender, replays: Replays, last: float) -> Epoch:
    assert run.session is not None, "it has a recipe"
    scale, to_replay, steps = run.scale, None, 0
    counted, begun = replays.count, time.perf_counter()
    together = begun
    for _ in run.session.loader:
        run.step()
        steps += 1
        if steps <= scale.singly:
            wait_for(scale.device)
            if to_replay is None and replays.count > counted:
                to_replay = time.perf_counter() - begun
        if steps == scale.singly:
            together = time.perf_counter()
    wait_for(scale.device)
    now = time.perf_counter()
    if to_replay is None:
        raise RuntimeError(f"none of the first {scale.singly} steps was replayed: {run.session}")
    step = (now - together) / (steps - scale.singly)
    return Epoch(run.session.frozen_blocks, now - last, steps, step, to_replay)


def _time_eager(contenders: dict[str, Contender], scale: Scale, times: dict[str, list[float]]) -> None:
    for name in EAGER:
        if name not in contenders:  # not before: the run's first step is told from the start of the process
            contenders[name] = CONTENDERS[name](scale)
        contenders[name].step()
        wait_for(scale.device)
        begun = time.perf_counter()
        many(contenders[name].step, scale)()
        times.setdefault(name, []).append((time.perf_counter() - begun) / scale.steps)
