"""What a run finds in its turn is what it left there. The part on CUDA runs on stand-ins here, and in tests/gpu."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from spfde.app.train import turns as module
from spfde.app.train.turns import OwnState, Turns
from spfde.core.generators import GeneratorsRestored

CPU, GPU = torch.device("cpu"), torch.device("cuda", 1)


@pytest.fixture(autouse=True)
def _generators_restored() -> Iterator[None]:
    with GeneratorsRestored():
        yield


def draw() -> tuple[float, float, float]:
    # gauss and normal leave a number behind for the next draw
    return random.gauss(0, 1), float(np.random.normal()), float(torch.rand(()))  # noqa: NPY002


def seed(number: int) -> None:
    random.seed(number)
    np.random.seed(number)  # noqa: NPY002
    torch.manual_seed(number)


@pytest.mark.parametrize("order", ["ababab", "aabbab", "bbbaaa"])
def test_each_draws_as_if_it_were_alone(order: str) -> None:
    seeds, alone = {"a": 1, "b": 2}, {}
    with Turns(CPU):
        for name, number in seeds.items():
            seed(number)
            alone[name] = [draw() for _ in range(3)]
    seed(3)
    expected = [draw() for _ in range(2)]
    seed(3)
    found: dict[str, list[Any]] = {"a": [], "b": []}
    outside = [draw()]
    with Turns(CPU) as turns:
        states = {name: OwnState(CPU) for name in seeds}
        for name, number in seeds.items():
            turns.give_to(states[name])
            seed(number)
        for name in order:
            turns.give_to(states[name])
            found[name].append(draw())
    outside.append(draw())
    assert found == alone
    assert outside == expected


def test_an_error_in_a_turn_gives_the_process_back_too() -> None:
    seed(5)
    before = torch.get_rng_state()

    def draws_and_fails() -> None:
        with Turns(CPU) as turns:
            turns.give_to(OwnState(CPU))
            draw()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        draws_and_fails()
    assert torch.equal(torch.get_rng_state(), before)


class Stream:
    """Notes whom it waits for."""

    def __init__(self, name: str) -> None:
        self.name, self.waits_for, self.drained = name, list[str](), 0

    def wait_stream(self, other: Stream) -> None:
        self.waits_for.append(other.name)

    def synchronize(self) -> None:
        self.drained += 1
        if self.name == "broken":
            raise RuntimeError("device-side assert")


class Generator:
    """As PyTorch's on CUDA: two of them may have one state."""

    def __init__(self, device: Any = None) -> None:
        self.state: list[int] = []

    def graphsafe_get_state(self) -> Generator:
        other = Generator()
        other.state = self.state
        return other

    def graphsafe_set_state(self, other: Generator) -> None:
        self.state = other.state


class Gpu:
    """One GPU's part of the process."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.callers = self.stream = Stream("caller's")
        self.generator, self.switches, names = Generator(), (False, True), iter(["first", "second", "broken"])
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: self.stream)
        monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: setattr(self, "stream", stream))
        monkeypatch.setattr(torch.cuda, "default_generators", (Generator(), self.generator))
        monkeypatch.setattr(torch, "Generator", Generator)
        monkeypatch.setattr(module, "own_stream", lambda device: Stream(next(names)))
        monkeypatch.setattr(module, "switches", lambda: self.switches)
        monkeypatch.setattr(module, "set_switches", lambda to: setattr(self, "switches", to))


def test_on_cuda_a_turn_brings_its_stream_its_generator_and_its_switches(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu(monkeypatch)
    of_caller = gpu.generator.state
    with Turns(GPU) as turns:
        runs = [OwnState(GPU), OwnState(GPU)]
        turns.give_to(runs[0])
        assert (gpu.stream.name, gpu.stream.waits_for) == ("first", ["caller's"])
        gpu.generator.state.append(1)
        gpu.switches = (True, True)
        turns.give_to(runs[1])
        assert (gpu.stream.name, gpu.generator.state, gpu.switches) == ("second", [], (False, True))
        gpu.generator.state.append(2)
        turns.give_to(runs[0])
        assert (gpu.stream.name, gpu.generator.state, gpu.switches) == ("first", [1], (True, True))
    assert gpu.stream is gpu.callers
    assert gpu.generator.state is of_caller
    assert (of_caller, gpu.switches) == ([], (False, True))


def test_a_run_is_waited_for_and_a_device_that_does_nothing_any_more_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu(monkeypatch)
    with Turns(GPU) as turns:
        for each in [OwnState(GPU) for _ in range(3)]:
            turns.give_to(each)
            each.drain()
            assert gpu.stream.drained == 1
    OwnState(CPU).drain()
