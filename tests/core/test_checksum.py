"""A number that tells tensors apart, exact in their bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from spfde.core.checksum import checksum, checksums


def test_it_is_the_sum_of_the_bits_weighted_by_the_odd_numbers() -> None:
    assert int(checksum(torch.tensor([2, 3, 5], dtype=torch.int64))) == 1 * 2 + 3 * 3 + 5 * 5
    assert int(checksum(torch.tensor([True, False, True]))) == 1 + 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64])
@given(st.integers(0, 7), st.integers(0, 7), st.integers(0, 2**31))
def test_those_of_the_rows_add_up_to_that_of_the_whole(dtype: torch.dtype, one: int, other: int, seed: int) -> None:
    value = torch.randn(7, 3, generator=torch.Generator().manual_seed(seed)).to(dtype)
    low, high = sorted((one, other))
    parts = [checksum(value[start:stop], 3 * start) for start, stop in ((0, low), (low, high), (high, 7))]
    assert torch.equal(torch.stack(parts).sum(), checksum(value))


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


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [("float8_e4m3fn", 3 * 1), ("float8_e5m2", 3 * 1), ("float8_e4m3fnuz", 128 + 3), ("float8_e8m0fnu", 128 + 3)],
)
def test_numbers_of_one_byte_are_their_bits_where_128_is_minus_zero_or_not(dtype: str, expected: int) -> None:
    if not hasattr(torch, dtype):
        pytest.skip("this torch has no such numbers")
    assert int(checksum(torch.tensor([128, 1], dtype=torch.uint8).view(getattr(torch, dtype)))) == expected


@pytest.mark.parametrize("at_once", [1, 7, 16, 10_000])
def test_it_is_the_same_however_much_is_added_at_once(monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    random = torch.Generator().manual_seed(0)
    whole = torch.randn(1, 5, 3, 4, 6, generator=random)
    turned = whole.permute(0, 3, 1, 4, 2)
    # By the definition, in Python's own integers.
    expected = [
        sum((2 * place + 1) * bits for place, bits in enumerate(value.flatten().view(torch.int32).tolist()))
        for value in (whole, turned)
    ]
    monkeypatch.setattr("spfde.core.checksum._AT_ONCE", at_once)
    assert [int(checksum(value)) for value in (whole, turned)] == expected
    assert int(checksum(whole.flatten()[::2])) == int(checksum(whole.flatten()[::2].clone()))


class _Largest(TorchDispatchMode):
    """The most bytes that one operator has made."""

    def __init__(self) -> None:
        super().__init__()
        self.found = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and not any(
            isinstance(each, Tensor) and each.untyped_storage()._cdata == result.untyped_storage()._cdata
            for each in args
        ):
            self.found = max(self.found, result.nbytes)
        return result


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_large_tensor_takes_no_more_memory_than_a_small_one(layout: torch.memory_format) -> None:
    large = torch.zeros(64, 64, 64, 16).contiguous(memory_format=layout)
    with _Largest() as largest:
        checksum(large)
    assert largest.found <= 8 * 2**20 < large.nbytes
