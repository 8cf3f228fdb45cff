"""What a batch says of its samples: right or wrong, cross entropy, error L2 norm."""

from __future__ import annotations

import math

import pytest
import torch

from spfde.core.errors import InvalidArgument
from spfde.sieving.evidence import correct_from_logits, el2n_from_logits, loss_from_logits

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
def test_scores_are_in_float32_and_refuse_what_is_no_classification(score):
    values = score(torch.zeros(2, 3, dtype=torch.bfloat16), torch.tensor([0, 1]))
    assert values.dtype in (torch.float32, torch.bool)
    with pytest.raises(InvalidArgument, match="loss="):
        score(torch.zeros(2, 3, 4, 4), torch.zeros(2, 4, 4, dtype=torch.long))


def test_right_is_the_class_with_the_largest_logit():
    logits = torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 3.0], [0.0, 5.0, 1.0]])
    correct = correct_from_logits(logits, torch.tensor([0, 1, 1]))
    assert correct.tolist() == [True, False, True]
    assert correct.dtype == torch.bool


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
