"""Two processes: ranks that drift apart, and wrappers that do not fit what is frozen."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import multiprocessing

from helpers import distributed_worker as worker
from helpers.training import EPOCHS


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, tuple[str, int]]]:
    """By rank and case: the error, and the epoch of it."""
    if not torch.distributed.is_available():
        pytest.skip("this torch has no distributed package")
    folder: Path = tmp_path_factory.mktemp("ranks")
    multiprocessing.spawn(worker.refusals, args=(2, str(folder), ""), nprocs=2)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.mark.parametrize(
    ("case", "word", "latest"),
    [
        ("no wrapper", "DistributedDataParallel", 0),
        ("all used", "find_unused_parameters=True", 0),
        ("static graph", "static_graph", 0),
        ("wrapped frozen", "before the session's state is loaded", 7),
    ],
)
def test_ranks_that_drift_apart_and_wrappers_that_do_not_fit_are_errors_with_the_remedy(
    said: list[dict[str, tuple[str, int]]], case: str, word: str, latest: int
) -> None:
    for by_case in said:
        message, epoch = by_case[case]
        assert word in message
        assert epoch <= latest


def test_what_one_rank_finds_ends_all(said: list[dict[str, tuple[str, int]]]) -> None:
    assert "another rank" in said[0]["one rank replaced"][0]
    assert "attach again" in said[1]["one rank replaced"][0]


@pytest.mark.parametrize("what", worker.SPOILT)
def test_whatever_one_rank_finds_at_the_bottom_of_an_epoch_ends_all(
    said: list[dict[str, tuple[str, int]]], what: str
) -> None:
    found, told = (by_case[f"one rank: {what}"][0] for by_case in said)
    assert worker.SPOILT[what][1] in found
    assert "another rank" in told


def test_an_optimizer_that_shards_its_state_trains_under_masks(said: list[dict[str, tuple[str, int]]]) -> None:
    assert [by_case["sharded optimizer"] for by_case in said] == [("nothing", EPOCHS)] * 2
