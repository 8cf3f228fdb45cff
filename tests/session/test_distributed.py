"""Two processes on one session each: equal masks and sets, every sample dealt out once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from helpers import distributed_worker as worker
from helpers.processes import ranks
from helpers.training import EPOCHS, SAMPLES
from spfde.session.distributed import fingerprint
from spfde.sieving.batch_sampler import SievedBatchSampler


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no distributed package")
@pytest.mark.parametrize("method", [pytest.param("mest", marks=pytest.mark.long), "rigl"])
def test_two_ranks_keep_the_same_masks_and_sets_and_share_the_samples(tmp_path: Path, method: str) -> None:
    first, second = ranks(worker.train, tmp_path, which=method)
    for key in ("masks", "weights"):
        assert first[key].keys() == second[key].keys()
        assert all(torch.equal(value, second[key][name]) for name, value in first[key].items()), key
    assert torch.equal(first["partial"], second["partial"])
    assert torch.equal(first["removed"], second["removed"])
    assert first["frozen"] == second["frozen"] >= 1
    assert len(first["partial"]) + len(first["removed"]) == SAMPLES
    # 30 samples in batches of 8: 4 batches, 2 for each rank.
    for one, other in zip(first["seen"], second["seen"], strict=True):
        assert len(one) == len(other) == 2
        dealt = sorted(index for batch in one + other for index in batch)
        assert len(dealt) == len(set(dealt)) == 30
    assert [row["samples"] for row in first["cost"]] == [30] * EPOCHS
    assert [row["training_flops"] for row in first["cost"]] == [row["training_flops"] for row in second["cost"]]


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no distributed package")
@pytest.mark.long
def test_two_ranks_draw_the_same_partial_set_and_share_all_samples_in_the_last_epochs(tmp_path: Path) -> None:
    """A quarter of 40 in each of 8 epochs are 80: 13 in each of the 6 before the last two."""
    first, second = ranks(worker.train_on_the_highest_losses, tmp_path)
    assert first["left out"] == second["left out"]
    assert [len(removed) for removed in first["left out"]] == [13] * 6 + [0] * 2
    assert len({tuple(removed) for removed in first["left out"]}) == 5  # drawn anew at 1, 3 and 5
    for one, other, removed in zip(first["seen"], second["seen"], first["left out"], strict=True):
        dealt = {index for batch in one + other for index in batch}
        assert dealt == set(range(SAMPLES)) - set(removed)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no distributed package")
@pytest.mark.long
def test_ranks_that_disagree_are_refused_with_what_differs(tmp_path: Path) -> None:
    for messages in ranks(worker.attach_with_other_seeds, tmp_path):
        model, loader, seed = messages
        assert model.startswith("model=")
        assert "loader.generator" in loader
        assert seed.startswith("seed=")


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no distributed package")
@pytest.mark.long
def test_ranks_share_every_epoch_or_are_told_why_not(tmp_path: Path) -> None:
    first, second = ranks(worker.share_and_resume, tmp_path)
    assert len(set(first["neutral"] + second["neutral"])) == SAMPLES
    for found in (first, second):
        assert "init_process_group" in found["early"]
        assert "use_distributed_sampler=False" in found["remade"]
        assert "different orders" in found["looks"]
        # Each rank took a batch of 8 before it stopped. What the others observed is not in the first rank's state.
        assert found["sieves"] == {"samples": 2 * 8 + 30, "steps": 1 + 2, "said": True}
        # Five batches, the first one of the two ranks twice: three steps, one of them before the stop.
        assert found["sparse"] == {"samples": SAMPLES + 8, "steps": 3, "said": False}


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no distributed package")
@pytest.mark.parametrize(("before", "now"), [(2, 1), (1, 2), pytest.param(2, 3, marks=pytest.mark.long)])
@pytest.mark.long
def test_a_run_goes_on_with_another_number_of_ranks_and_sees_each_sample_once(
    tmp_path: Path, before: int, now: int
) -> None:
    first = [worker.begin_runs()] if before == 1 else ranks(worker.begin, tmp_path, size=before)
    states = {name: own["states"] for name, own in first[0].items()}
    torch.save(states, tmp_path / "states.pt")
    (tmp_path / "meet").unlink(missing_ok=True)
    second = [worker.go_on_runs(states)] if now == 1 else ranks(worker.go_on, tmp_path, size=now)

    taken = [index for rank in first for index in rank["amid"]["seen"][1]]
    left = [index for rank in second for index in rank["amid"]["seen"]]
    assert len(taken) == before * 8
    assert sorted(taken + left) == list(range(SAMPLES))
    assert [rank["amid"]["samples"] for rank in second] == [SAMPLES] * now
    assert [rank["amid"]["steps"] for rank in second] == [1 + (SAMPLES // 8 - before) // now] * now

    # Four batches of 30 samples; where they do not divide, the first come again.
    dealt = [index for rank in second for index in rank["bottom"]["seen"]]
    assert set(dealt) == set(second[0]["bottom"]["partial"].tolist())
    assert len(dealt) == {1: 30, 2: 30, 3: 30 + 2 * 8}[now]


def test_batches_are_dealt_out_evenly_and_the_first_come_again_where_they_do_not_divide() -> None:
    def dealt(rank: int, size: int, *, drop_last: bool) -> list[list[int]]:
        sampler = SievedBatchSampler(range(10), 2, drop_last, keep=lambda: None, share=(rank, size))
        batches = list(sampler)
        assert len(sampler) == len(batches)
        return batches

    assert [dealt(rank, 3, drop_last=False) for rank in range(3)] == [
        [[0, 1], [6, 7]],
        [[2, 3], [8, 9]],
        [[4, 5], [0, 1]],
    ]
    assert [dealt(rank, 3, drop_last=True) for rank in range(3)] == [[[0, 1]], [[2, 3]], [[4, 5]]]
    assert dealt(3, 8, drop_last=False) == [[6, 7]]
    assert dealt(7, 8, drop_last=False) == [[4, 5]]


def test_what_all_ranks_have_taken_is_dealt_out_no_more() -> None:
    def dealt(rank: int, size: int, taken: int, *, drop_last: bool = False) -> list[list[int]]:
        sampler = SievedBatchSampler(range(10), 2, drop_last, keep=lambda: None, share=(rank, size))
        batches = list(sampler._batches(taken))
        assert sampler.n_left(taken) == len(batches)
        return batches

    assert [dealt(rank, 2, 2) for rank in range(2)] == [[[4, 5], [8, 9]], [[6, 7], [0, 1]]]
    assert [dealt(rank, 2, 2, drop_last=True) for rank in range(2)] == [[[4, 5]], [[6, 7]]]
    assert [dealt(rank, 3, 2) for rank in range(3)] == [[[4, 5]], [[6, 7]], [[8, 9]]]
    assert dealt(0, 1, 3) == [[6, 7], [8, 9]]
    assert dealt(0, 2, 5) == dealt(1, 2, 5) == []


def test_fingerprints_tell_tensors_apart() -> None:
    ones = {"a": torch.ones(3), "b": 1}
    assert fingerprint(ones) == fingerprint({"a": torch.ones(3), "b": 1})
    assert fingerprint(ones) != fingerprint({"a": torch.ones(3), "b": 2})
    assert fingerprint(ones) != fingerprint({"a": torch.tensor([1.0, 1.0, 2.0]), "b": 1})
