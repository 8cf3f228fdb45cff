"""A stream has one owner at a time, though PyTorch deals out the same ones again; here a stand-in does."""

from __future__ import annotations

import gc
from itertools import count
from typing import Any

import pytest
import torch

from spfde.core.errors import UsageError
from spfde.core.streams import own_stream

GPU = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def dealt(monkeypatch: pytest.MonkeyPatch) -> None:
    """32 streams in turn, as PyTorch has them."""
    numbers = count()

    class Stream:
        def __init__(self, device: torch.device) -> None:
            self.cuda_stream = 0x9000 + next(numbers) % 32

    monkeypatch.setattr(torch.cuda, "Stream", Stream)


def test_a_stream_that_is_held_is_not_given_again() -> None:
    held = [own_stream(GPU) for _ in range(3)]
    torch.cuda.Stream(GPU)  # somebody else's, who does not ask here
    for _ in range(100):
        held[1:] = [own_stream(GPU), own_stream(GPU)]
        assert len({each.cuda_stream for each in held}) == 3


def test_all_32_can_be_had_and_a_further_one_is_an_error() -> None:
    held = [own_stream(GPU) for _ in range(32)]
    assert len({each.cuda_stream for each in held}) == 32
    with pytest.raises(UsageError) as error:
        own_stream(GPU)
    assert "cuda:0" in str(error.value)
    given_back = held.pop(7).cuda_stream
    assert own_stream(GPU).cuda_stream == given_back


def test_one_that_is_held_in_a_circle_that_nobody_reaches_is_free() -> None:
    held = [own_stream(GPU) for _ in range(31)]
    circle: list[Any] = [own_stream(GPU)]
    circle.append(circle)
    lost = circle[0].cuda_stream
    gc.disable()
    try:
        del circle
        assert own_stream(GPU).cuda_stream == lost
    finally:
        gc.enable()
    assert len(held) == 31
