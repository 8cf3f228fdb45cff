"""Two processes: ranks that drift apart, and wrappers made at any time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from helpers import distributed_worker as worker
from helpers.processes import ranks
from helpers.training import EPOCHS


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, tuple[str, int]]]:
    """By rank and case: the error, and the epoch of it."""
    if not torch.distributed.is_available():
        pytest.skip("this torch has no distributed package")
    folder: Path = tmp_path_factory.mktemp("ranks")
    return ranks(worker.refusals, folder)


def test_ranks_that_drift_apart_are_an_error_with_the_remedy(said: list[dict[str, tuple[str, int]]]) -> None:
    for by_case in said:
        message, epoch = by_case["no wrapper"]
        assert "DistributedDataParallel" in message
        assert epoch == 0


@pytest.mark.parametrize(("case", "epochs"), [("all used", EPOCHS), ("static graph", EPOCHS), ("wrapped frozen", 10)])
def test_any_wrapper_follows_what_is_frozen(said: list[dict[str, tuple[str, int]]], case: str, epochs: int) -> None:
    assert [by_case[case] for by_case in said] == [("nothing", epochs)] * 2


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


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """By rank and case: what was said, or "accepted"."""
    if not torch.distributed.is_available():
        pytest.skip("this torch has no distributed package")
    folder: Path = tmp_path_factory.mktemp("alone")
    return ranks(worker.do_not_do_the_same, folder)


@pytest.mark.parametrize("case", [case for case in worker.SHARDS if case != "same"])
@pytest.mark.long
def test_ranks_with_data_of_their_own_are_refused_with_both_ways_out(alone: list[dict[str, str]], case: str) -> None:
    for by_case in alone:
        assert "must be the same on all 2 ranks" in by_case[case]
        assert ("batch_size" if case == "batch size" else "DistributedSampler") in by_case[case]


@pytest.mark.parametrize("case", ["same", "dealt out by the sampler"])
def test_equal_data_and_a_sampler_that_deals_it_out_are_taken(alone: list[dict[str, str]], case: str) -> None:
    assert [by_case[case] for by_case in alone] == ["accepted"] * 2


@pytest.mark.parametrize(
    ("case", "word"),
    [
        ("observes", "observe"),
        ("verifies", "verify() looks at"),
        ("loads", "some ranks only"),
        ("loads amid", "some"),
    ],
)
def test_what_the_first_rank_alone_does_ends_both_with_what_it_was(
    alone: list[dict[str, str]], case: str, word: str
) -> None:
    said = [by_case[case] for by_case in alone]
    assert "accepted" not in said
    assert any(word in each for each in said)
