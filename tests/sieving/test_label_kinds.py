"""Labels of other tasks than one class a sample are no class probabilities."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

import spfde
from spfde.sieving.criteria import Loss, Scorer
from spfde.sieving.evidence import (
    check_label_bounds,
    correct_from_logits,
    el2n_from_logits,
    label_bounds,
    loss_from_logits,
)
from spfde.sieving.observer import Observer
from spfde.sieving.tickets import Tickets

LOGITS = torch.zeros(3, 4)
ONE_HOT = torch.eye(4)[:3]


def check(logits: Tensor, y: Tensor) -> None:
    found = label_bounds(logits, y)
    assert found is not None
    check_label_bounds(*found)


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
        (torch.zeros(3, 1), torch.tensor([[0.05], [0.95], [0.95]])),
        (torch.zeros(3), torch.tensor([0.05, 0.95, 0.05], dtype=torch.bfloat16)),
        (torch.zeros(3), torch.tensor([0.05, 0.95, 0.05]).double()),
        (torch.zeros(3), torch.tensor([0.95, 0.95, 0.95])),
    ],
    ids=[
        "classes",
        "one-hot",
        "integers",
        "smoothed",
        "bf16",
        "column",
        "bool",
        "one output smoothed",
        "one output bf16",
        "one output float64",
        "one output one class",
    ],
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
        (torch.zeros(3), torch.tensor([0.2, 0.9, 1.0])),
        (torch.zeros(3, 1), torch.tensor([[0.2], [0.9], [0.4]])),
        (torch.zeros(3), torch.tensor([0.0, 0.001, 0.0])),
        (torch.zeros(3), torch.tensor([0.0, 0.9, 0.9])),
        (torch.zeros(3), torch.tensor([0.5, 0.5, 0.5])),
        (torch.zeros(3, 4, 5), torch.zeros(3, 5, dtype=torch.long)),
    ],
    ids=["multi-hot", "integers", "bool", "no label", "negative", "nan", "regression", "column", "one output",
         "negative target", "nan target", "shares", "column of shares", "small shares", "one-sided smoothing",
         "no class", "sequence"],
)  # fmt: skip
def test_labels_of_other_tasks_are_refused_with_the_remedy(logits: Tensor, y: Tensor) -> None:
    with pytest.raises(spfde.InvalidArgument, match=r"loss="):
        check(logits, y)


@given(st.floats(0.0, 0.875, width=32), st.lists(st.booleans(), min_size=1, max_size=8))
def test_every_smoothing_of_two_classes_is_taken_with_one_output(smoothing: float, classes: list[bool]) -> None:
    y = torch.tensor(classes).float() * (1 - smoothing) + smoothing / 2
    check(torch.zeros(len(y)), y)


@given(st.lists(st.floats(0.0, 1.0, width=32), min_size=2, max_size=8))
def test_targets_of_one_output_between_zero_and_one_are_refused_where_they_are_no_smoothed_classes(
    targets: list[float],
) -> None:
    distances = [min(target, 1 - target) for target in targets]
    assume(max(distances) - min(distances) > 1e-5)
    with pytest.raises(spfde.InvalidArgument, match=r"loss="):
        check(torch.zeros(len(targets), 1), torch.tensor(targets)[:, None])


def test_targets_that_pass_for_smoothed_classes_one_batch_at_a_time_are_refused_when_the_epoch_ends() -> None:
    observer = Observer(Scorer(Loss(), 4), Tickets(by_report=True))
    for target in (0.1, 0.8, 0.3):
        observer.check_labels(torch.zeros(1), torch.tensor([target]))
    with pytest.raises(spfde.InvalidArgument, match=r"loss="):
        observer.exchange()


@pytest.mark.parametrize("shape", [(3,), (3, 1)])
@pytest.mark.parametrize("y", [torch.tensor([0, 3, 1]), torch.tensor([0, 1, 1])], ids=["four classes", "two"])
@pytest.mark.parametrize("read", [label_bounds, correct_from_logits, loss_from_logits, el2n_from_logits])
def test_predicted_classes_are_no_logits_whatever_the_labels(read: Any, y: Tensor, shape: tuple[int, ...]) -> None:
    with pytest.raises(spfde.InvalidArgument) as caught:
        read(torch.tensor([0, 3, 1]).reshape(shape), y)
    (problem,) = caught.value.problems
    assert problem.argument == "logits"
    assert "int64" in str(problem)
    assert "correct=" in problem.remedy
