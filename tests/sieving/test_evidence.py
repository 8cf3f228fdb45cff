"""What a batch says of its samples: right or wrong, cross entropy, error L2 norm."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spfde.core.errors import InvalidArgument
from spfde.sieving.evidence import correct_from_logits, correct_from_loss, el2n_from_logits, loss_from_logits

EVEN = torch.tensor([[0.0, 0.0], [0.0, 0.0]])


def logit(probability: float) -> float:
    return math.log(probability / (1 - probability))


def test_error_l2_norm_by_hand():
    logits = torch.tensor([[0.0, 0.0, 0.0], [math.log(2.0), 0.0, 0.0]])  # thirds; a half and two quarters
    y = torch.tensor([0, 1])
    expected = [math.sqrt(4 / 9 + 1 / 9 + 1 / 9), math.sqrt(1 / 4 + 9 / 16 + 1 / 16)]
    assert el2n_from_logits(logits, y).tolist() == pytest.approx(expected)


def test_error_l2_norm_runs_from_sure_and_right_to_sure_and_wrong():
    logits = torch.tensor([[80.0, 0.0], [80.0, 0.0]])
    assert el2n_from_logits(logits, torch.tensor([0, 1])).tolist() == pytest.approx([0.0, math.sqrt(2)])


def test_with_class_probabilities_the_error_is_against_them():
    assert el2n_from_logits(EVEN, torch.tensor([[0.5, 0.5], [0.9, 0.1]])).tolist() == pytest.approx(
        [0.0, math.sqrt(0.32)]
    )


def test_cross_entropy_by_hand():
    logits = torch.tensor([[0.0, 0.0], [math.log(3.0), 0.0]])
    assert loss_from_logits(logits, torch.tensor([0, 1])).tolist() == pytest.approx([math.log(2), math.log(4)])
    soft = torch.tensor([[0.5, 0.5], [1.0, 0.0]])
    assert loss_from_logits(logits, soft).tolist() == pytest.approx([math.log(2), math.log(4 / 3)])


@pytest.mark.parametrize("score", [loss_from_logits, el2n_from_logits])
@pytest.mark.parametrize("shape", [(3,), (3, 1)])
def test_one_logit_stands_for_two_of_which_the_first_is_zero(score, shape):
    z, y = torch.tensor([logit(0.75), logit(0.25), 0.0]), torch.tensor([1, 1, 0])
    two = torch.stack([torch.zeros(3), z], 1)
    torch.testing.assert_close(score(z.reshape(shape), y.float().reshape(shape)), score(two, y))


@pytest.mark.parametrize("score", [loss_from_logits, el2n_from_logits, correct_from_logits])
def test_scores_are_detached_in_float32_and_refuse_what_is_no_classification(score):
    logits = torch.zeros(2, 3, dtype=torch.bfloat16, requires_grad=True)
    values = score(logits, torch.tensor([0, 1]))
    assert not values.requires_grad
    assert values.dtype in (torch.float32, torch.bool)
    with pytest.raises(InvalidArgument, match="loss="):
        score(torch.zeros(2, 3, 4, 4), torch.zeros(2, 4, 4, dtype=torch.long))


def test_right_is_the_class_with_the_largest_logit():
    logits = torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 3.0], [0.0, 5.0, 1.0]], requires_grad=True)
    correct = correct_from_logits(logits, torch.tensor([0, 1, 1]))
    assert correct.tolist() == [True, False, True]
    assert correct.dtype == torch.bool
    assert not correct.requires_grad


def test_with_class_probabilities_right_is_the_most_probable_class():
    logits = torch.tensor([[2.0, 1.0], [0.0, 1.0]])
    mixed = torch.tensor([[0.7, 0.3], [0.9, 0.1]])
    assert correct_from_logits(logits, mixed).tolist() == [True, False]


@pytest.mark.parametrize("shape", [(4,), (4, 1)])
def test_with_one_logit_a_positive_one_means_class_one(shape):
    logits = torch.tensor([1.0, -1.0, 2.0, -2.0]).reshape(shape)
    assert correct_from_logits(logits, torch.tensor([1, 0, 0, 1])).tolist() == [True, True, False, False]
    assert correct_from_logits(logits, torch.tensor([[1.0], [0], [0], [1]])).tolist() == [True, True, False, False]


@pytest.mark.parametrize(
    ("logits", "y"),
    [
        ((4, 3), (5,)),
        ((4, 3), (4, 2)),
        ((4, 3, 8, 8), (4, 8, 8)),
        ((4,), (3,)),
        ((4, 1), (2, 2)),
        ((), ()),
    ],
)
def test_logits_and_labels_that_do_not_fit_are_refused_with_the_remedy(logits, y):
    with pytest.raises(InvalidArgument, match="correct="):
        correct_from_logits(torch.zeros(logits), torch.zeros(y, dtype=torch.long))


def test_the_half_of_a_batch_with_the_lower_loss_counts_as_learned():
    assert correct_from_loss(torch.tensor([3.0, 1.0, 2.0, 9.0])).tolist() == [False, True, True, False]
    assert correct_from_loss(torch.tensor([3.0, 1.0, 2.0])).tolist() == [False, True, True]


def test_a_loss_counts_the_same_in_any_unit():
    loss = torch.tensor([0.3, 0.1, 0.7, 0.2, 0.6], requires_grad=True)
    assert torch.equal(correct_from_loss(loss), correct_from_loss(loss * 1024))


def test_further_dimensions_of_a_loss_are_averaged():
    loss = torch.tensor([[1.0, 5.0], [2.0, 2.0], [9.0, 9.0]])
    assert correct_from_loss(loss).tolist() == [True, True, False]


def test_a_sample_with_a_nan_loss_is_not_learned_and_does_not_spoil_the_others():
    assert correct_from_loss(torch.tensor([float("nan"), 1.0, 2.0])).tolist() == [False, True, False]


@pytest.mark.parametrize("loss", [torch.tensor(1.0), torch.zeros(0)])
def test_a_mean_loss_is_refused_with_the_remedy(loss):
    with pytest.raises(InvalidArgument, match="reduction="):
        correct_from_loss(loss)


@settings(max_examples=20)
@given(st.integers(1, 40), st.integers(0, 2**31))
def test_at_least_half_of_a_batch_is_learned_by_loss(n, seed):
    loss = torch.rand(n, generator=torch.Generator().manual_seed(seed))
    assert correct_from_loss(loss).sum() >= (n + 1) // 2
