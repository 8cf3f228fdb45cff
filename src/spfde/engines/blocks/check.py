"""Do the kernels work on this machine? Importing this module imports Triton."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from spfde.engines.blocks.kernels import INTERPRETED
from spfde.engines.blocks.lists import BlockLists
from spfde.engines.blocks.product import MANY_TOKENS, block_linear

_LARGEST_ERROR = 0.02  # of bfloat16; what goes wrong in earnest is off by more


def check(block: Sequence[int], device: torch.device) -> str | None:
    """Compute a small layer, which compiles what a training step in bfloat16 needs; what is wrong with it, as a clause.

    Args:
        block: (rows, columns) of the structure's blocks.
        device: of the weights.

    Example:
        >>> check((32, 32), torch.device("cpu")) is None
        True
    """
    try:
        worst = max(_error(block, device, tokens) for tokens in ((64,) if INTERPRETED else (64, MANY_TOKENS)))
    except Exception as error:  # whatever a compiler, a driver or a card says
        lines = str(error).strip().splitlines() or [""]
        return f"its kernels do not run on {device} ({type(error).__name__}: {lines[0]})"
    if worst < _LARGEST_ERROR:
        return None
    return f"its kernels are off by {worst:.1%} on {device}; please report it, with the versions of torch and triton"


def _error(block: Sequence[int], device: torch.device, tokens: int) -> float:
    """The largest relative error of the output and the gradients, against float64."""
    generator = torch.Generator().manual_seed(0)
    out, into = 2 * block[0], 2 * block[1]
    mask = torch.tensor([[True, False], [True, True]]).repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    drawn = [torch.randn(shape, generator=generator) for shape in ((tokens, into), (out, into), (out,), (tokens, out))]
    given = [value.bfloat16() for value in drawn]
    given[1] = given[1] * mask
    lists = BlockLists((out, into), block, device)
    lists.fill(mask.to(device))
    x, weight, bias = (value.to(device, torch.float32).requires_grad_() for value in given[:3])
    with torch.autocast(device.type, torch.bfloat16):
        found = block_linear(x, weight, bias, lists)
    torch.autograd.backward(found, given[3].to(device))
    exact = [value.double().requires_grad_() for value in given[:3]]
    expected = F.linear(*exact)
    torch.autograd.backward(expected, given[3].double())
    assert exact[1].grad is not None
    exact[1].grad *= mask
    pairs = [(found, expected), *((own.grad, other.grad) for own, other in zip((x, weight, bias), exact, strict=True))]
    return max(_distance(one, other) for one, other in pairs)


def _distance(found: Tensor | None, expected: Tensor | None) -> float:
    assert found is not None
    assert expected is not None
    exact = expected.detach()
    return float((found.detach().cpu().double() - exact).norm() / exact.norm())
