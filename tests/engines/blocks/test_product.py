"""The kernels against float64: in Triton's interpreter, and on the GPU where there is one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from helpers.blocks import DEVICE, TOLERANCE, drawn, exact_step, lists_of, mask_of, needs_triton, relative_error

pytestmark = needs_triton

FLOATS = tuple(TOLERANCE)


def product() -> Any:
    """The module, which imports Triton."""
    from spfde.engines.blocks import product as found

    return found


def check(
    units: Tensor,
    block: Sequence[int] = (32, 32),
    *,
    tokens: Sequence[int] = (20,),
    dtype: torch.dtype = torch.float32,
    with_bias: bool = True,
) -> None:
    """A step of one layer in ``dtype`` is that in float64."""
    mask = mask_of(units, block).to(DEVICE)
    out, into = mask.shape
    x = drawn(*tokens, into, seed=1, dtype=dtype).requires_grad_()
    weight = (drawn(out, into, seed=2, dtype=dtype) * mask).requires_grad_()
    bias = drawn(out, seed=3, dtype=dtype).requires_grad_() if with_bias else None
    slope = drawn(*tokens, out, seed=4, dtype=dtype)
    found = product().block_linear(x, weight, bias, lists_of(mask, block))
    found.backward(slope)
    expected, gradients = exact_step(x, weight, bias, slope, mask)
    assert found.dtype == dtype
    assert found.shape == expected.shape
    assert relative_error(found, expected) < TOLERANCE[dtype]
    for name, own in (("x", x), ("weight", weight), ("bias", bias)):
        if own is not None:
            assert own.grad is not None
            assert own.grad.dtype == dtype
            assert relative_error(own.grad, gradients[name]) < TOLERANCE[dtype], name
    assert weight.grad is not None
    assert not bool((weight.grad * ~mask).any())


SOME = torch.tensor([[True, False, True], [False, False, False], [True, False, False], [True, False, True]])


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("with_bias", [True, False])
def test_a_step_with_an_empty_row_and_an_empty_column_is_that_in_float64(dtype: torch.dtype, with_bias: bool) -> None:
    check(SOME, dtype=dtype, with_bias=with_bias)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("units", [torch.zeros(2, 3, dtype=torch.bool), torch.ones(2, 3, dtype=torch.bool)])
def test_no_block_and_every_block_are_right(units: Tensor, dtype: torch.dtype) -> None:
    check(units, dtype=dtype)


@pytest.mark.parametrize("block", [(32, 32), (64, 32), (32, 64), (64, 64), (128, 96)])
@pytest.mark.parametrize("dtype", FLOATS)
def test_blocks_of_other_sides_are_right(block: tuple[int, int], dtype: torch.dtype) -> None:
    check(torch.tensor([[False, True], [True, True]]), block, dtype=dtype)


@pytest.mark.parametrize("tokens", [(1,), (), (65,), (3, 7, 5), (1, 64), (130,)])
def test_any_number_of_tokens_in_any_shape_is_right(tokens: tuple[int, ...]) -> None:
    check(SOME, tokens=tokens)
    check(SOME, tokens=tokens, dtype=torch.bfloat16)


def test_many_blocks_in_a_row_and_a_column_are_right() -> None:
    """More than are loaded at once, and more than one group in a column."""
    units = torch.ones(7, 7, dtype=torch.bool)
    units[3, 5] = False
    check(units, tokens=(40,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_tiles_for_many_tokens_and_several_shares_of_them_are_right(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(product(), "MANY_TOKENS", 300)
    monkeypatch.setitem(product().TILES, dtype, replace(product().TILES[dtype], programs=8))
    check(SOME, tokens=(301,), dtype=dtype)


@settings(max_examples=15, deadline=None)
@given(
    st.tuples(st.integers(1, 4), st.integers(1, 4)),
    st.floats(0, 1),
    st.integers(1, 70),
    st.sampled_from(FLOATS),
    st.integers(0, 2**31),
)
def test_random_masks_are_right(
    grid: tuple[int, int], density: float, tokens: int, dtype: torch.dtype, seed: int
) -> None:
    units = torch.rand(grid, generator=torch.Generator().manual_seed(seed)) < density
    check(units, tokens=(tokens,), dtype=dtype)


def test_the_gradients_are_those_of_dense_autograd() -> None:
    mask = mask_of(SOME, (32, 32)).to(DEVICE)
    given = [drawn(20, 96, seed=1), drawn(128, 96, seed=2) * mask, drawn(128, seed=3)]
    ours, dense = ([value.clone().requires_grad_() for value in given] for _ in range(2))
    product().block_linear(ours[0], ours[1], ours[2], lists_of(mask, (32, 32))).square().sum().backward()
    F.linear(dense[0], dense[1], dense[2]).square().sum().backward()
    assert torch.allclose(ours[0].grad, dense[0].grad, atol=1e-3, rtol=1e-5)
    assert torch.allclose(ours[1].grad, dense[1].grad * mask, atol=1e-3, rtol=1e-5)
    assert torch.allclose(ours[2].grad, dense[2].grad, atol=1e-3, rtol=1e-5)


def test_what_a_weight_holds_outside_of_its_blocks_is_not_read() -> None:
    mask = mask_of(SOME, (32, 32)).to(DEVICE)
    x, weight, lists = drawn(20, 96, seed=1), drawn(128, 96, seed=2), lists_of(mask, (32, 32))
    spoilt = weight.masked_fill(~mask, float("nan"))
    assert torch.equal(product().block_linear(x, spoilt, None, lists), product().block_linear(x, weight, None, lists))


def test_a_dense_gradient_has_the_entries_of_inactive_blocks_too() -> None:
    mask = mask_of(SOME, (32, 32)).to(DEVICE)
    x, weight = drawn(20, 96, seed=1), (drawn(128, 96, seed=2) * mask).requires_grad_()
    product().block_linear(x, weight, None, lists_of(mask, (32, 32)), dense_gradient=True).sum().backward()
    assert weight.grad is not None
    assert relative_error(weight.grad, x.double().sum(0).expand(128, 96)) < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_multiplies_in_its_type_and_gives_gradients_in_that_of_the_parameters(dtype: torch.dtype) -> None:
    mask = mask_of(SOME, (32, 32)).to(DEVICE)
    x = drawn(20, 96, seed=1).requires_grad_()
    # Numbers that need no rounding: the interpreter cuts bits off where a GPU rounds.
    weight = (drawn(128, 96, seed=2, dtype=dtype).float() * mask).requires_grad_()
    bias, slope = drawn(128, seed=3).requires_grad_(), drawn(20, 128, seed=4, dtype=dtype)
    with torch.autocast(DEVICE, dtype):
        found = product().block_linear(x, weight, bias, lists_of(mask, (32, 32)))
        dense = F.linear(x, weight, bias)
    found.backward(slope)
    assert found.dtype == dense.dtype == dtype
    expected, gradients = exact_step(x.to(dtype), weight, bias, slope, mask)
    assert relative_error(found, expected) < TOLERANCE[dtype]
    for name, own in (("x", x), ("weight", weight), ("bias", bias)):
        assert own.grad is not None
        assert own.grad.dtype == torch.float32
        # The sums are float32, and are not rounded to the type that was multiplied in.
        assert relative_error(own.grad, gradients[name]) < 1e-6, name


def test_only_the_gradients_that_are_asked_for_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    mask = mask_of(SOME, (32, 32)).to(DEVICE)
    started: list[str] = []
    kernels = product().kernels
    for name in ("product", "weight_gradient", "collect"):
        monkeypatch.setattr(kernels, name, _Counted(getattr(kernels, name), name, started))
    x, weight = drawn(20, 96, seed=1), drawn(128, 96, seed=2)
    lists = lists_of(mask, (32, 32))
    product().block_linear(x.requires_grad_(), weight, None, lists).sum().backward()
    assert started == ["product", "product"]
    started.clear()
    product().block_linear(x.detach(), weight.requires_grad_(), None, lists).sum().backward()
    assert started == ["product", "weight_gradient", "collect"]


class _Counted:
    def __init__(self, kernel: Any, name: str, started: list[str]) -> None:
        self.kernel, self.name, self.started = kernel, name, started

    def __getitem__(self, grid: Any) -> Any:
        self.started.append(self.name)
        return self.kernel[grid]


def test_an_activation_in_place_may_write_into_the_output() -> None:
    mask = mask_of(SOME, (32, 32)).to(DEVICE)
    x, weight = drawn(2, 10, 96, seed=1), (drawn(128, 96, seed=2) * mask).requires_grad_()
    found = torch.relu_(product().block_linear(x, weight, None, lists_of(mask, (32, 32))))
    found.sum().backward()
    expected = F.linear(x.double(), weight.double()).relu_()
    (gradient,) = torch.autograd.grad(expected.sum(), weight)
    assert relative_error(found, expected) < 1e-6
    assert weight.grad is not None
    assert relative_error(weight.grad, gradient * mask) < 1e-6


def test_a_weight_that_was_written_into_before_the_backward_pass_is_an_error() -> None:
    mask = mask_of(SOME, (32, 32)).to(DEVICE)
    x, weight = drawn(20, 96, seed=1).requires_grad_(), drawn(128, 96, seed=2).requires_grad_()
    found = product().block_linear(x, weight, None, lists_of(mask, (32, 32)))
    with torch.no_grad():
        weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        found.sum().backward()


def test_there_are_no_second_derivatives_and_that_is_an_error() -> None:
    mask = mask_of(SOME, (32, 32)).to(DEVICE)
    x, weight = drawn(20, 96, seed=1).requires_grad_(), drawn(128, 96, seed=2)
    found = product().block_linear(x, weight, None, lists_of(mask, (32, 32))).square().sum()
    (gradient,) = torch.autograd.grad(found, x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_the_same_inputs_give_the_same_bits() -> None:
    mask = mask_of(SOME, (32, 32)).to(DEVICE)
    lists = lists_of(mask, (32, 32))

    def gradients() -> list[Tensor]:
        x, weight = drawn(300, 96, seed=1).requires_grad_(), (drawn(128, 96, seed=2) * mask).requires_grad_()
        product().block_linear(x, weight, None, lists).square().sum().backward()
        return [x.grad, weight.grad]  # type: ignore[list-item]

    assert all(torch.equal(one, other) for one, other in zip(gradients(), gradients(), strict=True))


def test_the_bits_do_not_depend_on_the_masks_that_came_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or a run that is resumed under a falling number of blocks would not be the one that never stopped."""
    monkeypatch.setitem(product().TILES, torch.float32, replace(product().TILES[torch.float32], programs=12))
    few = mask_of(torch.arange(18).view(9, 2) % 2 == 0, (32, 32)).to(DEVICE)
    new, used = lists_of(few, (32, 32)), lists_of(torch.ones_like(few), (32, 32))
    used.fill(few)
    assert used.n_groups > new.n_groups
    gradients = []
    for lists in (new, used):
        x, weight = drawn(301, 64, seed=1), (drawn(288, 64, seed=2) * few).requires_grad_()
        product().block_linear(x, weight, None, lists).square().sum().backward()
        gradients.append(weight.grad)
    assert torch.equal(*gradients)  # type: ignore[arg-type]


class _NoWaiting(TorchDispatchMode):
    """An operation that waits for the device, and so cannot be captured, fails."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is not torch.ops.aten._local_scalar_dense.default, "a value was read from the device"
        assert "nonzero" not in str(func), "a shape depends on values"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dense_gradient", [False, True])
def test_a_step_reads_no_value_from_the_device(dense_gradient: bool) -> None:
    mask = mask_of(SOME, (32, 32)).to(DEVICE)
    x, weight = drawn(20, 96, seed=1).requires_grad_(), drawn(128, 96, seed=2).requires_grad_()
    lists = lists_of(mask, (32, 32))
    with _NoWaiting():
        product().block_linear(x, weight, None, lists, dense_gradient=dense_gradient).sum().backward()


# --- which type, which precision --------------------------------------------------------------------------------------


def test_types_that_the_kernels_do_not_have_are_left_to_pytorch() -> None:
    multiplied_in = product().multiplied_in
    single, double, half = (torch.zeros(32, 32, dtype=d) for d in (torch.float32, torch.float64, torch.bfloat16))
    assert multiplied_in(single, single) == torch.float32
    assert multiplied_in(half, half) == torch.bfloat16
    assert multiplied_in(double, double) is None
    assert multiplied_in(half, single) is None
    with torch.autocast("cpu", torch.bfloat16):
        assert multiplied_in(half, single) == torch.bfloat16
        assert multiplied_in(double, single) is None
        assert multiplied_in(double, double) is None


def test_float32_is_multiplied_as_pytorch_is_set() -> None:
    precision = product().precision
    assert precision() == "ieee"
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        assert precision() == "tf32"
    finally:
        torch.set_float32_matmul_precision(before)
    assert precision() == "ieee"
