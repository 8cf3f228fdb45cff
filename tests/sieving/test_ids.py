"""Ids that follow from their number are not kept; what the sieve keeps stays within its bytes a sample."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import spfde
from spfde.sieving.ids import Ids
from spfde.sieving.sieve import Sieve


@given(st.sets(st.integers(0, 60), min_size=1), st.data())
def test_ids_and_their_positions_are_those_that_were_given(given_ids: set[int], data: st.DataObject) -> None:
    ids = Ids(torch.tensor(sorted(given_ids)))
    some = data.draw(st.lists(st.sampled_from(sorted(given_ids))))
    assert ids.tensor().tolist() == sorted(given_ids)
    assert (len(ids), ids.end) == (len(given_ids), max(given_ids) + 1)
    assert ids.positions(torch.tensor(some, dtype=torch.long)).tolist() == [sorted(given_ids).index(i) for i in some]


def bytes_of(part: object) -> int:
    """What tensors and arrays a part holds, those of its parts included."""
    total, left = 0, list[Any](vars(part).values())
    while left:
        value = left.pop()
        if isinstance(value, Tensor | np.ndarray):
            total += value.nbytes
        elif isinstance(value, dict):
            left += value.values()
        elif isinstance(value, Ids):
            left += vars(value).values()
    return total


MOST = {"forgetting": 10.0, "loss": 12.0, "el2n": 12.0, "random": 8.0, "top-loss": 8.0, "repeated-random": 8.0}


@pytest.mark.parametrize(("criterion", "most"), [*MOST.items()])
def test_sieve_and_scores_hold_and_save_so_many_bytes_a_sample(criterion: str, most: float) -> None:
    n = 50_000  # ids of 4 bytes, as for 1.28 million
    technique = spfde.DataSieving(removed_fraction=0.2, criterion=criterion)
    sieve = Sieve(torch.arange(n), technique, generator=torch.Generator().manual_seed(0))
    scorer = technique.make_criterion().scorer(n)
    for _ in range(3):
        scorer.observe(sieve.partial, torch.ones(sieve.partial.numel(), dtype=torch.bool))
        sieve.update(scorer.difficulty())
    saved = [v for state in (sieve, scorer) for v in state.state_dict().values() if isinstance(v, Tensor)]
    assert bytes_of(sieve) + bytes_of(scorer) <= most * n
    assert sum(tensor.nbytes for tensor in saved) <= most * n
