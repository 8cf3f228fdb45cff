"""Two processes on one session each: equal masks and sets, every sample dealt out once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import multiprocessing

from helpers import distributed_worker as worker
from helpers.training import EPOCHS, SAMPLES
from spfde.session.distributed import fingerprint
from spfde.sieving.batch_sampler import SievedBatchSampler


def run(function: Any, folder: Path, method: str = "") -> list[Any]:
    multiprocessing.spawn(function, args=(2, str(folder), method), nprocs=2)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no distributed package")
@pytest.mark.parametrize("method", ["mest", "rigl"])
def test_two_ranks_keep_the_same_masks_and_sets_and_share_the_samples(tmp_path: Path, method: str) -> None:
    first, second = run(worker.train, tmp_path, method)
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
def test_ranks_that_disagree_are_refused_with_what_differs(tmp_path: Path) -> None:
    for messages in run(worker.attach_with_other_seeds, tmp_path):
        model, loader, seed = messages
        assert model.startswith("model=")
        assert "loader.generator" in loader
        assert seed.startswith("seed=")


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


def test_fingerprints_tell_tensors_apart() -> None:
    ones = {"a": torch.ones(3), "b": 1}
    assert fingerprint(ones) == fingerprint({"a": torch.ones(3), "b": 1})
    assert fingerprint(ones) != fingerprint({"a": torch.ones(3), "b": 2})
    assert fingerprint(ones) != fingerprint({"a": torch.tensor([1.0, 1.0, 2.0]), "b": 1})
