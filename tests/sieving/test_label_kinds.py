"""Labels of other tasks than one class a sample are no class probabilities."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import spfde
from spfde.sieving.evidence import bounds_of_all, check_label_bounds, label_bounds

LOGITS = torch.zeros(3, 4)
ONE_HOT = torch.eye(4)[:3]


def check(logits: Tensor, y: Tensor) -> None:
    found = label_bounds(logits, y)
    assert found is not None
    bounds, n_classes = found
    check_label_bounds(bounds_of_all([bounds]), n_classes)
    check_label_bounds(bounds_of_all([bounds, bounds]), n_classes)


@pytest.mark.parametrize(
    ("logits", "y"),
    [
        (LOGITS, torch.tensor([0, 3, 1])),
        (LOGITS, ONE_HOT),
        (LOGITS, ONE_HOT.long()),
        (LOGITS, 0.9 * ONE_HOT + 0.1 / 4),
        (LOGITS, torch.rand(3, 4, generator=torch.Generator().manual_seed(0)).softmax(1).bfloat16()),
        (torch.zeros(3, 1), torch.tensor([[0.0], [1.0], [1.0]])),
        (torch.zeros(3), torch.tensor([True, False, True])),
        (torch.zeros(3), torch.tensor([0.2, 0.9, 1.0])),
    ],
    ids=["classes", "one-hot", "integers", "smoothed", "bf16", "column", "bool", "shares"],
)
def test_classes_and_their_probabilities_are_taken(logits: Tensor, y: Tensor) -> None:
    check(logits, y)


@pytest.mark.parametrize(
    ("logits", "y"),
    [
        (LOGITS, torch.tensor([[1.0, 1, 0, 0], [0, 1, 0, 0], [1, 0, 0, 0]])),
        (LOGITS, torch.tensor([[1, 1, 0, 0], [0, 1, 0, 0], [1, 0, 0, 0]])),
        (LOGITS, torch.tensor([[True, True, False, False]] * 3)),
        (LOGITS, torch.zeros(3, 4)),
        (LOGITS, torch.tensor([[2.0, -1.0, 0.0, 0.0]] * 3)),
        (LOGITS, torch.full((3, 4), torch.nan)),
        (LOGITS, torch.tensor([0.3, 1.7, 2.0])),
        (LOGITS, torch.tensor([[0], [1], [2]])),
        (torch.zeros(3, 1), torch.tensor([[0.1], [17.5], [2.0]])),
        (torch.zeros(3), torch.tensor([-0.5, 0.5, 0.1])),
        (torch.zeros(3), torch.full((3,), torch.nan)),
        (torch.zeros(3, 4, 5), torch.zeros(3, 5, dtype=torch.long)),
    ],
    ids=["multi-hot", "integers", "bool", "no label", "negative", "nan", "regression", "column", "one output",
         "negative target", "nan target", "sequence"],
)  # fmt: skip
def test_labels_of_other_tasks_are_refused_with_the_remedy(logits: Tensor, y: Tensor) -> None:
    with pytest.raises(spfde.InvalidArgument, match=r"loss="):
        check(logits, y)
