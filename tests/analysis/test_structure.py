"""Structural similarity: what it counts on tensors that fit on a line."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spfde.analysis import structural_similarity
from spfde.analysis.structure import structural_overlap
from spfde.core.errors import InvalidArgument

WEIGHT = torch.tensor([[5.0, 0.0, -4.0, 1.0], [0.0, 3.0, 0.0, -2.0]])
FINAL = torch.tensor([[True, True, False, False], [True, True, False, True]])


def test_half_of_the_non_zeros_the_largest_first_are_looked_up_in_the_final_mask() -> None:
    # Five non-zeros: 5, -4, 3 are the larger half (2.5, rounded up); 5 and 3 have a place in the final mask.
    assert structural_overlap(WEIGHT, FINAL) == (2, 3)
    assert structural_similarity(WEIGHT, FINAL) == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("fraction", "counts"), [(0.01, (1, 1)), (0.2, (1, 1)), (0.4, (1, 2)), (0.8, (3, 4)), (1, (3, 5))]
)
def test_the_share_that_is_looked_up_is_a_parameter(fraction: float, counts: tuple[int, int]) -> None:
    assert structural_overlap(WEIGHT, FINAL, fraction=fraction) == counts


def test_inactive_weights_are_never_chosen_and_small_ones_do_not_count() -> None:
    weight = torch.tensor([0.0, 0.0, 0.0, 9.0, 1.0])
    assert structural_similarity(weight, torch.tensor([True, True, True, False, True])) == 0.0
    assert structural_similarity(weight, torch.tensor([False, False, False, True, False])) == 1.0


def test_a_weight_that_is_zero_everywhere_has_none() -> None:
    assert structural_overlap(torch.zeros(3), torch.ones(3, dtype=torch.bool)) == (0, 0)
    assert math.isnan(structural_similarity(torch.zeros(3), torch.ones(3, dtype=torch.bool)))


@given(n=st.integers(1, 60), active=st.integers(1, 60), seed=st.integers(0, 100))
@settings(max_examples=50, deadline=None)
def test_a_model_is_like_itself_and_unlike_the_complement(n: int, active: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(n, generator=generator)
    mask = torch.zeros(n, dtype=torch.bool)
    mask[torch.randperm(n, generator=generator)[:active]] = True
    weight = weight * mask
    assert structural_similarity(weight, mask) == 1.0
    assert structural_similarity(weight, ~mask) == 0.0
    assert structural_overlap(weight, mask)[1] == math.floor(min(n, active) / 2 + 0.5)


def test_bad_input_is_named() -> None:
    with pytest.raises(InvalidArgument, match=r"final_mask=.*must have the shape of the weight, \(2, 4\)"):
        structural_similarity(WEIGHT, FINAL.flatten())
    for fraction in (0.0, 1.5):
        with pytest.raises(InvalidArgument, match=r"fraction=.*must be in \(0, 1\]"):
            structural_similarity(WEIGHT, FINAL, fraction=fraction)
