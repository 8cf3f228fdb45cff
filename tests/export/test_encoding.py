"""Sparse tensors in few bytes: by hand, and back again bit by bit."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from spfde.core.errors import InvalidArgument
from spfde.export import weight_bytes
from spfde.export.encoding import Encoded, WeightBytes, as_bits, decode, encode, encoded_bytes

DTYPES = [
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.complex64,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
]  # fmt: skip


def same_bits(one: Tensor, other: Tensor) -> bool:
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return bool((as_bits(one.contiguous().view(-1)) == as_bits(other.contiguous().view(-1))).all())


def round_trip(tensor: Tensor, mask: Tensor | None = None) -> Tensor:
    return decode({"x": encode(tensor, mask)})["x"]


def test_a_sparse_tensor_is_its_values_and_a_bit_for_each_entry() -> None:
    found = encode(torch.tensor([1.0, 0, 2, 3, 0, 0, 0, 0, 0, 4]))
    # Bits 0, 2, 3 of the first byte and 1 of the second; 4 x 4 + 2 bytes against 40 dense.
    assert (found.kind, found.nbytes) == ("mask", 18)
    assert found.values.tolist() == [1.0, 2.0, 3.0, 4.0]
    assert found.positions.tolist() == [0b1101, 0b10]


def test_a_dense_tensor_stays_as_it_is() -> None:
    found = encode(torch.ones(2, 3))
    assert (found.kind, found.nbytes, found.values.tolist()) == ("dense", 24, [1.0] * 6)


def test_a_tensor_of_zeros_is_the_bits_alone() -> None:
    assert encode(torch.zeros(1000)).nbytes == 125
    assert torch.equal(round_trip(torch.zeros(10, 3)), torch.zeros(10, 3))


def test_negative_zeros_and_nans_keep_their_bits() -> None:
    bits = torch.tensor([0, 0x7FC01234, -(2**31), 0, 0, 0x7F800000, 0, 0], dtype=torch.int32)
    assert same_bits(round_trip(bits.view(torch.float32)), bits.view(torch.float32))


def test_a_mask_drops_negative_zeros_and_keeps_active_zeros() -> None:
    weight = torch.tensor([1.0, -0.0, -0.0, 0.0, 0.0, 0.0, 0.0, 0.0])
    mask = torch.tensor([True, True, False, True, False, False, False, False])
    found = encode(weight, mask)
    assert len(found.values) == 3
    assert torch.signbit(decode({"x": found})["x"]).tolist() == [False, True, *[False] * 6]
    assert torch.signbit(round_trip(weight)).tolist() == [False, True, True, *[False] * 5]


@pytest.mark.parametrize(
    ("mask", "told"),
    [
        (torch.zeros(3, dtype=torch.bool), "1 other weights"),
        (torch.ones(4, dtype=torch.bool), "must be bool of shape"),
        (torch.ones(3), "must be bool of shape"),
    ],
)
def test_a_mask_that_does_not_fit_is_refused(mask: Tensor, told: str) -> None:
    with pytest.raises(InvalidArgument, match=told):
        encode(torch.tensor([0.0, 1.0, 0.0]), mask)


def test_what_is_not_contiguous_is_stored_row_by_row() -> None:
    weight = torch.randn(4, 3, 2, 2).masked_fill(torch.rand(4, 3, 2, 2) < 0.7, 0)
    for other in (weight.to(memory_format=torch.channels_last), weight.transpose(0, 1), weight[:, :, ::2], weight.mT):
        found = round_trip(other)
        assert torch.equal(found, other)
        assert found.is_contiguous()


def test_a_parameter_is_restored_without_its_gradient() -> None:
    found = round_trip(torch.nn.Parameter(torch.ones(3)))
    assert type(found) is Tensor
    assert not found.requires_grad


def test_a_conjugate_view_is_stored_as_what_it_shows() -> None:
    tensor = torch.tensor([1 + 2j, 0, 0, 3 - 1j]).conj()
    assert torch.equal(round_trip(tensor), tensor)


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.integers(0, 9), max_size=4))
    density = draw(st.sampled_from([0.0, 0.02, 0.1, 0.3, 0.5, 0.9, 1.0]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    size, numel = torch.empty(0, dtype=dtype).element_size(), math.prod(shape)
    # Any bits at all: negative zeros, NaN with a payload, denormals.
    high = 2 if dtype == torch.bool else 256
    entries = rng.integers(0, high, (numel, size), dtype=np.uint8) * (rng.random((numel, 1)) < density)
    flat = torch.from_numpy(entries.astype(np.uint8).reshape(-1))
    return flat.view(dtype).view(shape) if numel else torch.empty(shape, dtype=dtype)


@given(tensors())
def test_every_tensor_comes_back_bit_by_bit_and_never_takes_more_than_it_is(tensor: Tensor) -> None:
    found = encode(tensor)
    assert same_bits(decode({"x": found})["x"], tensor)
    assert found.nbytes <= tensor.nbytes


@given(st.integers(1, 3000), st.floats(0, 0.5), st.sampled_from([1, 2, 4, 8]))
def test_from_half_sparse_on_every_tensor_is_smaller_than_dense(n: int, density: float, size: int) -> None:
    assert encoded_bytes(n, int(density * n), itemsize=size) < n * size or n * size == 1


@given(st.lists(tensors(), min_size=2, max_size=4))
def test_tensors_that_are_restored_together_do_not_share_their_storage(many: list[Tensor]) -> None:
    found = list(decode({str(number): encode(tensor) for number, tensor in enumerate(many)}).values())
    assert [tensor.untyped_storage().nbytes() for tensor in found] == [tensor.nbytes for tensor in many]
    found[0].zero_()
    assert all(same_bits(tensor, before) for tensor, before in zip(found[1:], many[1:], strict=True))


@given(st.integers(0, 2**32 - 1), st.sampled_from([0.5, 0.9, 0.99]))
def test_the_modelled_bytes_are_those_of_the_encoding(seed: int, sparsity: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight, bias = torch.rand(30, 40, generator=generator) + 1, torch.zeros(30)
    mask = torch.rand(30, 40, generator=generator) >= sparsity
    found = encode(weight.masked_fill(~mask, 0), mask)
    assert weight_bytes({"w": weight, "b": bias}, {"w": mask}) == WeightBytes(4 * 1230, found.nbytes + 120)


@pytest.mark.parametrize(
    "damaged",
    [
        Encoded("mask", (4,), torch.ones(2), torch.tensor([0b111], dtype=torch.uint8)),
        Encoded("mask", (4,), torch.ones(2), torch.tensor([0b1], dtype=torch.uint8)),
        Encoded("mask", (4,), torch.ones(2), torch.tensor([0b11, 0], dtype=torch.uint8)),
        Encoded("dense", (4,), torch.ones(2), torch.empty(0, dtype=torch.uint8)),
    ],
    ids=["too few values", "too many values", "long", "short"],
)
def test_positions_that_do_not_fit_are_refused(damaged: Encoded) -> None:
    with pytest.raises(InvalidArgument, match=r"x=.*do not fit"):
        decode({"x": damaged})
