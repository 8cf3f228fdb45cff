from __future__ import annotations

import math

import pytest
import torch

from spfde.app.train.loss import classes_of, loss_of
from spfde.app.train.tally import Tally

LOGITS = torch.tensor([[math.log(3.0), 0.0], [0.0, 0.0]])  # probabilities 3/4, 1/4 and 1/2, 1/2
LABELS = torch.tensor([0, 1])


def test_without_options_it_is_the_mean_cross_entropy() -> None:
    assert float(loss_of(LOGITS, LABELS)) == pytest.approx((math.log(4 / 3) + math.log(2)) / 2)


def test_weights_are_factors_of_the_samples_losses() -> None:
    found = loss_of(LOGITS, LABELS, torch.tensor([2.0, 0.5]))
    assert float(found) == pytest.approx((2 * math.log(4 / 3) + 0.5 * math.log(2)) / 2)


@pytest.mark.parametrize("weights", [None, torch.ones(2)])
def test_smoothing_gives_all_classes_a_share_of_each_label(weights: torch.Tensor | None) -> None:
    # Labels 0.9, 0.1 and 0.1, 0.9.
    first = 0.9 * math.log(4 / 3) + 0.1 * math.log(4)
    found = loss_of(LOGITS, LABELS, weights, label_smoothing=0.2)
    assert float(found) == pytest.approx((first + math.log(2)) / 2)


def test_probabilities_of_classes_are_labels_too() -> None:
    mixed = torch.tensor([[0.5, 0.5], [0.0, 1.0]])
    expected = (0.5 * math.log(4 / 3) + 0.5 * math.log(4) + math.log(2)) / 2
    assert float(loss_of(LOGITS, mixed)) == pytest.approx(expected)
    hard = torch.nn.functional.one_hot(LABELS).float()
    assert float(loss_of(LOGITS, hard, label_smoothing=0.1)) == pytest.approx(
        float(loss_of(LOGITS, LABELS, label_smoothing=0.1))
    )


def test_of_probabilities_the_most_probable_class_is_the_right_one() -> None:
    mixed = torch.tensor([[0.6, 0.4], [0.7, 0.3]])
    assert classes_of(mixed).tolist() == [0, 0]
    assert classes_of(LABELS) is LABELS
    tally = Tally(torch.device("cpu"))
    tally.add(torch.tensor(1.0), torch.tensor([[1.0, 0.0], [0.0, 1.0]]), mixed)
    assert tally.read().accuracy == 0.5
