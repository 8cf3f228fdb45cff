"""Weights with blocks, and what the kernels make of them: on the GPU where there is one, else interpreted."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from spfde.engines.blocks.lists import BlockLists

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

# By how much a result may differ from float64: rounding of what is stored, sums are float32.
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def mask_of(units: Tensor, block: Sequence[int]) -> Tensor:
    """The mask in which exactly these blocks [rows, columns] exist."""
    return units.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)


def lists_of(mask: Tensor, block: Sequence[int]) -> BlockLists:
    lists = BlockLists(tuple(mask.shape), block, DEVICE)
    lists.fill(mask.to(DEVICE))
    return lists


def drawn(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype).to(DEVICE)


def relative_error(found: Tensor, expected: Tensor) -> float:
    exact = expected.detach().double()
    distance = (found.detach().to(exact.device).double() - exact).norm()
    return float(distance / exact.norm().clamp_min(1e-30))


def exact_step(
    x: Tensor, weight: Tensor, bias: Tensor | None, slope: Tensor, mask: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Output and gradients of ``F.linear`` in float64; the weight's gradient inside of the mask."""
    given = [None if value is None else value.detach().double().cpu().requires_grad_() for value in (x, weight, bias)]
    assert given[0] is not None
    assert given[1] is not None
    out = F.linear(given[0], given[1], given[2])
    out.backward(slope.double().cpu())
    gradients = {
        name: value.grad for name, value in zip(("x", "weight", "bias"), given, strict=True) if value is not None
    }
    gradients["weight"] = gradients["weight"] * mask.cpu()
    return out.detach(), gradients


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels that were started."""
    from spfde.engines.blocks import kernels

    names: list[str] = []

    class Counted:
        def __init__(self, name: str) -> None:
            self.name, self.kernel = name, getattr(kernels, name)

        def __getitem__(self, grid: Any) -> Any:
            names.append(self.name)
            return self.kernel[grid]

    for name in ("product", "weight_gradient", "collect"):
        monkeypatch.setattr(kernels, name, Counted(name))
    return names
