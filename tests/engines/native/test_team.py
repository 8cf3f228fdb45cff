"""How many threads share the kernels' work where other processes want the cores too."""

from __future__ import annotations

import ctypes
import os
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers.native import needs_kernels, random_masks, step, twin
from spfde.engines.native import build

pytestmark = needs_kernels


def free_threads(threads: int, waited: float, seconds: float) -> int:
    asked = build.load().spfde_free_threads
    asked.restype, asked.argtypes = ctypes.c_int64, (ctypes.c_int64, ctypes.c_double, ctypes.c_double)
    return int(asked(threads, waited, seconds))


@pytest.mark.parametrize(
    ("threads", "waited", "left"),
    [
        (2, 0.0, 2),
        (2, 0.002, 2),  # a fifth of a thread: somebody's short visit
        (2, 0.0067, 1),  # one busy process on two cores: each of three waits a third of the time
        (2, 0.010, 1),  # two busy processes: half of the time
        (16, 0.010, 15),  # one thread of sixteen was always without a core
        (16, 0.080, 8),
        (4, 1.0, 1),  # more than can be: one is left
    ],
)
def test_threads_that_stood_in_a_queue_for_a_core_are_left_out(threads: int, waited: float, left: int) -> None:
    assert free_threads(threads, waited, seconds=0.010) == left


@given(threads=st.integers(1, 256), waited=st.floats(0, 1e3), more=st.floats(0, 1e3), seconds=st.floats(1e-6, 1e2))
def test_one_thread_is_left_at_least_and_longer_queues_leave_no_more(
    threads: int, waited: float, more: float, seconds: float
) -> None:
    left = free_threads(threads, waited, seconds)
    assert 1 <= free_threads(threads, waited + more, seconds) <= left <= threads


@pytest.mark.skipif(sys.platform != "linux", reason="the system does not tell how long a thread waited for a core")
def test_fewer_threads_come_to_the_same_numbers_bit_for_bit() -> None:
    """Three times as many threads as cores: most of them stand in a queue."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 9, 3), torch.nn.BatchNorm2d(9), torch.nn.ReLU()).double()
    twin(model, random_masks(model, 0.4))
    x, before, threads = (
        torch.randn(64, 3, 24, 24, dtype=torch.float64),
        torch.get_num_threads(),
        3 * (os.cpu_count() or 1),
    )
    team = build.load(real="double").spfde_team
    team.restype, team.argtypes = ctypes.c_int64, (ctypes.c_int64,)
    try:
        torch.set_num_threads(threads)
        first, sizes = step(model, x), set[int]()
        for _ in range(400):
            model[1].reset_running_stats()
            again = step(model, x)
            assert all(torch.equal(again[name], first[name]) for name in first)
            sizes.add(team(threads))
            if min(sizes) < threads:
                break
        assert min(sizes) < threads
        model[1].reset_running_stats()
        again = step(model, x)
        assert all(torch.equal(again[name], first[name]) for name in first)
    finally:
        torch.set_num_threads(before)
