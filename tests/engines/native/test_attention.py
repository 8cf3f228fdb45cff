"""Attention between regions, under autocast: short sequences train in fp32, where bf16 is slow."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helpers.native import needs_kernels, random_masks, relative_error
from spfde.engines.native import attention
from spfde.engines.native.model import NativeModel


@pytest.fixture(autouse=True)
def a_processor_where_bf16_is_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_multiplies_bf16_fast", lambda: False)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What PyTorch's function was called with, as it really came to be computed."""
    seen, usual = [], F.scaled_dot_product_attention

    def spy(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        casts = torch.is_autocast_enabled("cpu")
        seen.append({"dtype": torch.bfloat16 if casts else query.dtype, "args": args, **kwargs})
        return usual(query, key, value, *args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    return seen


def tokens(length: int = 5, *, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    generator = torch.Generator().manual_seed(length)
    return [torch.randn(2, 3, length, 8, generator=generator).to(dtype).requires_grad_() for _ in range(3)]


def test_two_tokens_by_hand_come_out_in_bf16() -> None:
    # Products 0 and 0: the mean of the values.
    query, key = torch.zeros(1, 1, 1, 1).bfloat16(), torch.ones(1, 1, 2, 1).bfloat16()
    value = torch.tensor([[[[1.0], [3.0]]]]).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        found = attention.attention(query, key, value)
    assert found.dtype == torch.bfloat16
    assert found.item() == 2.0


@pytest.mark.parametrize("length", [1, 5, 200])
def test_short_sequences_train_in_fp32_and_their_gradients_are_as_near_as_those_of_bf16(
    length: int, asked: list[dict[str, Any]]
) -> None:
    errors = []
    for call in (attention.attention, F.scaled_dot_product_attention):
        given = tokens(length)
        exact = [tensor.detach().double().requires_grad_() for tensor in given]
        with torch.autocast("cpu", torch.bfloat16):
            found = call(*given)
        assert found.dtype == torch.bfloat16
        expected = F.scaled_dot_product_attention(*exact)
        flowing = torch.randn(found.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
        found.backward(flowing)
        expected.backward(flowing.double())
        pairs = [(found, expected), *((one.grad, other.grad) for one, other in zip(given, exact, strict=True))]
        errors.append([relative_error(one.detach(), other.detach()) for one, other in pairs if other.abs().sum()])
        assert all(tensor.grad is not None and tensor.grad.dtype == torch.bfloat16 for tensor in given)
    assert asked[0]["dtype"] == torch.float32
    assert all(ours <= theirs + 2.0**-8 for ours, theirs in zip(*errors, strict=True))


@pytest.mark.parametrize(
    ("length", "casts", "learns"),
    [(201, True, True), (5, False, True), (5, True, False), (5, True, None)],
    ids=["a long sequence", "without autocast", "without gradients", "of what does not learn"],
)
def test_anything_else_is_pytorchs_own_call(
    length: int, casts: bool, learns: bool | None, asked: list[dict[str, Any]]
) -> None:
    given = tokens(length, dtype=torch.bfloat16 if casts else torch.float32)
    if learns is None:
        given = [tensor.detach() for tensor in given]
    with torch.autocast("cpu", torch.bfloat16, enabled=casts), torch.set_grad_enabled(learns is not False):
        found = attention.attention(*given)
        assert torch.equal(found, F.scaled_dot_product_attention(*given))
    assert asked[0]["dtype"] == given[0].dtype


def test_double_stays_double() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert attention.attention(*tokens(dtype=torch.float64)).dtype == torch.float64


def test_fp16_is_not_taken_for_bf16(asked: list[dict[str, Any]]) -> None:
    given = tokens(dtype=torch.float16)
    with torch.autocast("cpu", torch.float16):
        assert attention.attention(*given).dtype == torch.float16
    assert asked[0]["dtype"] == torch.bfloat16  # autocast's own, still on


def test_a_processor_that_multiplies_bf16_fast_keeps_it(
    monkeypatch: pytest.MonkeyPatch, asked: list[dict[str, Any]]
) -> None:
    monkeypatch.setattr(attention, "_multiplies_bf16_fast", lambda: True)
    with torch.autocast("cpu", torch.bfloat16):
        attention.attention(*tokens())
    assert asked[0]["dtype"] == torch.bfloat16


@pytest.mark.parametrize("named", [True, False], ids=["by name", "by place"])
@pytest.mark.parametrize("kind", ["floats", "booleans", "none"])
def test_masks_scales_and_causality_are_handed_on(kind: str, named: bool) -> None:
    masks = {
        "floats": torch.randn(5, 5, generator=torch.Generator().manual_seed(3)).bfloat16(),
        "booleans": torch.ones(5, 5, dtype=torch.bool).tril(),
        "none": None,
    }
    mask, causal = masks[kind], kind == "none"
    args, kwargs = ((), {"attn_mask": mask, "is_causal": causal}) if named else ((mask, 0.0, causal), {})
    given = tokens()
    with torch.autocast("cpu", torch.bfloat16):
        found = attention.attention(*given, *args, scale=0.25, **kwargs)
    wide = mask.double() if kind == "floats" and mask is not None else mask
    exact = [tensor.double() for tensor in given]
    expected = F.scaled_dot_product_attention(*exact, attn_mask=wide, is_causal=causal, scale=0.25)
    assert relative_error(found.detach(), expected.detach()) < 2.0**-7


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.into(x).chunk(3, dim=-1)
        return self.out(F.scaled_dot_product_attention(query, key, value))


@needs_kernels
def test_a_traced_model_attends_in_fp32_and_its_copy_and_what_is_detached_do_not(asked: list[dict[str, Any]]) -> None:
    model, x = Attending(), torch.randn(3, 5, 8)
    plain, masks = copy.deepcopy(model), random_masks(model, 0.5)
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            parameter.mul_(masks.get(name, torch.tensor(1.0)))
    engine = NativeModel(model, masks=lambda: masks, dense_gradients=frozenset, sample=x)
    for name, parameter in model.named_parameters():
        parameter.data.mul_(masks.get(name, torch.tensor(1.0)))
    asked.clear()
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = model(x), plain(x)
        assert [call["dtype"] for call in asked] == [torch.float32, torch.bfloat16]
        assert relative_error(ours.detach(), theirs.detach()) < 0.02
        engine.detach()
        model(x)
    assert asked[-1]["dtype"] == torch.bfloat16
