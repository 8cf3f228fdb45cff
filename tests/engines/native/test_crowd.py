"""How the kernels' threads wait for each other where other processes want the cores too."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers import ROOT
from helpers.native import needs_kernels, random_masks, step, twin
from spfde.engines.native import build

pytestmark = needs_kernels


def lacks_cores(waited: float, seconds: float) -> bool:
    asked = build.load().spfde_lacks_cores
    asked.restype, asked.argtypes = ctypes.c_bool, (ctypes.c_double, ctypes.c_double)
    return bool(asked(waited, seconds))


@pytest.mark.parametrize(
    ("waited", "lacks"),
    [
        (0.0, False),
        (0.002, False),  # a fifth of a thread: somebody's short visit
        (0.0067, True),  # one busy process on two cores: each of three threads waits a third of the time
        (0.010, True),  # two busy processes: half of the time
    ],
)
def test_threads_that_stand_in_a_queue_for_a_good_part_of_the_time_lack_cores(waited: float, lacks: bool) -> None:
    assert lacks_cores(waited, seconds=0.010) == lacks


@given(waited=st.floats(0, 1e3), more=st.floats(0, 1e3), seconds=st.floats(1e-6, 1e2))
def test_longer_queues_lack_them_no_less(waited: float, more: float, seconds: float) -> None:
    assert lacks_cores(waited + more, seconds) >= lacks_cores(waited, seconds)


def judged(*looks: bool) -> list[int]:
    """How long nothing is looked at after each of these looks, negative where cores are thought to lack."""
    pauses = (ctypes.c_int * len(looks))()
    build.load().spfde_judge((ctypes.c_bool * len(looks))(*looks), ctypes.c_int64(len(looks)), pauses)
    return list(pauses)


def test_two_new_threads_on_one_core_for_a_moment_are_no_lack_of_cores() -> None:
    assert judged(*7 * [True], False, *7 * [True]) == 15 * [1]


def test_a_lack_is_believed_after_eight_looks_and_then_looked_for_more_and_more_rarely() -> None:
    assert judged(*15 * [True]) == [*7 * [1], -4, -8, -16, -32, -64, -64, -64, -64]


def test_it_is_over_after_four_looks_that_follow_each_other() -> None:
    assert judged(*8 * [True], False, False, True, *4 * [False]) == [*7 * [1], -4, -1, -1, -8, -1, -1, -1, 1]


@pytest.mark.skipif(sys.platform != "linux", reason="the system does not tell how long a thread waited for a core")
def test_where_there_are_more_threads_than_cores_others_are_added_and_the_numbers_are_the_same() -> None:
    with short_of_cores() as (first, again):
        assert all(torch.equal(again[name], first[name]) for name in first)


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="the system does not tell how long a thread waited for a core")
def test_a_process_that_is_forked_meanwhile_ends() -> None:
    """In it these threads are not there to be waited for."""
    program = "import os, sys; from engines.native.test_crowd import short_of_cores\n"
    program += "with short_of_cores():\n    child = os.fork()\n    if not child: sys.exit(0)\n"
    program += "sys.exit(os.waitpid(child, 0)[1])"
    paths = os.pathsep.join([str(ROOT / "tests"), str(ROOT / "src")])
    subprocess.run([sys.executable, "-c", program], env=os.environ | {"PYTHONPATH": paths}, check=True, timeout=60)


@contextmanager
def short_of_cores() -> Iterator[tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]]:
    """Threads have been added; what the first step and the last one came to."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 9, 3), torch.nn.BatchNorm2d(9), torch.nn.ReLU()).double()
    twin(model, random_masks(model, 0.4))
    x, before, threads = torch.randn(64, 3, 24, 24, dtype=torch.float64), torch.get_num_threads(), os.cpu_count() or 1
    try:
        torch.set_num_threads(3 * threads)
        first, n = step(model, x), set[int]()
        for _ in range(400):
            model[1].reset_running_stats()
            again = step(model, x)
            n.add(len(list(Path("/proc/self/task").iterdir())))
            if max(n) > min(n):
                break
        assert max(n) > min(n)
        yield first, again
    finally:
        torch.set_num_threads(before)
