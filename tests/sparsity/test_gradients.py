"""What is asked of gradients, and when the device is waited for."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from helpers.counting import Operations
from spfde.sparsity.gradients import Skipped, are_finite, nonfinite

INF, NAN = float("inf"), float("nan")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64])
@pytest.mark.parametrize(("value", "is_finite"), [(1.0, True), (INF, False), (-INF, False), (NAN, False), (0.0, True)])
def test_one_number_that_is_not_finite_is_found_among_all(dtype: torch.dtype, value: float, is_finite: bool) -> None:
    gradients = [torch.ones(3), torch.tensor([2.0, value], dtype=dtype), torch.ones(2, dtype=torch.float64)]
    assert are_finite(gradients) == is_finite
    assert gradients[0].tolist() == [1, 1, 1]
    assert gradients[1][0] == 2


def test_the_largest_numbers_are_finite_and_so_is_nothing_at_all() -> None:
    assert are_finite([torch.full((100,), torch.finfo(torch.float32).max)])
    assert are_finite([])


def test_gradients_are_judged_without_a_look_at_them() -> None:
    with Operations() as found:
        nonfinite([torch.ones(3), torch.ones(2, dtype=torch.bfloat16)])
    assert found.reads == 0


def test_whether_a_step_was_skipped_is_read_once_and_when_somebody_asks() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    assert not Skipped(optimizer)
    optimizer.found_inf = torch.ones(1)  # type: ignore[attr-defined]  # as GradScaler leaves it to a fused one
    with Operations() as found:
        skipped = Skipped(optimizer)
    assert found.reads == 0
    with Operations() as found:
        assert skipped
        assert skipped
    assert found.reads == 1
    optimizer.found_inf = torch.zeros(1)  # type: ignore[attr-defined]
    assert not Skipped(optimizer)
