"""A number that tells tensors apart, exact in their bits."""

from __future__ import annotations

import pytest
import torch

from spfde.core.checksum import checksum, checksums


def test_it_is_the_sum_of_the_bits_weighted_by_the_odd_numbers() -> None:
    assert int(checksum(torch.tensor([2, 3, 5], dtype=torch.int64))) == 1 * 2 + 3 * 3 + 5 * 5
    assert int(checksum(torch.tensor([True, False, True]))) == 1 + 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.complex64])
def test_the_last_bit_and_the_place_of_a_value_count_and_the_layout_does_not(dtype: torch.dtype) -> None:
    value = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    same = value.contiguous(memory_format=torch.channels_last)
    other = value.clone()
    other[1, 2, 3, 4] *= 1 + 2 * torch.finfo(dtype).eps
    numbers = checksums({"a": value, "b": same, "c": other, "d": value.flip(0), "e": torch.zeros(0)})
    assert numbers["a"] == numbers["b"]
    assert len({numbers["a"], numbers["c"], numbers["d"]}) == 3
    assert numbers["e"] == 0


def test_the_sign_of_zero_does_not_count() -> None:
    assert int(checksum(torch.tensor([0.0, -0.0]))) == 0
