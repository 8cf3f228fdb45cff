"""``y = x @ W.T + b`` with the active blocks of W alone, forward and backward. Importing this module imports Triton."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from spfde.engines.blocks import kernels
from spfde.engines.blocks.lists import BlockLists


@dataclass(frozen=True)
class Tile:
    """How much a program takes at once.

    Attributes:
        tokens: rows of values.
        features: what is gathered of them for one multiplication; in a gradient of the weight the lists say.
        warps, stages: see ``triton.Config``.
    """

    tokens: int
    features: int = 64
    warps: int = 4
    stages: int = 2


@dataclass(frozen=True)
class Tiles:
    """The tiles of each kernel. ``benchmarks/block_linear.py --sweep`` tries others.

    Attributes:
        few, many: for products with fewer tokens than ``MANY_TOKENS``, and with more.
        gradient: for gradients of the weight.
        programs: about how many of the latter there are to be at 90 %; so many shares the tokens are split into.
    """

    few: Tile
    many: Tile
    gradient: Tile
    programs: int = 1024


MANY_TOKENS = 4096
HALF = Tiles(Tile(64), Tile(256, warps=8), Tile(64, stages=3))
SINGLE = Tiles(Tile(64, features=32), Tile(128, features=32, warps=8), Tile(32))
TILES = {torch.bfloat16: HALF, torch.float16: HALF, torch.float32: SINGLE}
"""By the type that is multiplied in; others are left to PyTorch."""


def block_linear(
    input: Tensor, weight: Tensor, bias: Tensor | None, lists: BlockLists, *, dense_gradient: bool = False
) -> Tensor:
    """``F.linear`` with a weight that is zero outside of the blocks in ``lists``; what it holds there is not read.

    Under autocast it multiplies in autocast's type, and reads the weight as it is. Sums are float32. There are no
    second derivatives.

    Args:
        input: [..., in].
        weight: [out, in], contiguous.
        bias: [out], or None.
        lists: of the weight's active blocks.
        dense_gradient: the weight's gradient is that of all its entries; else it is zero outside of the blocks.

    Returns:
        [..., out], in the type that was multiplied in.

    Example:
        >>> lists = BlockLists((32, 64), (32, 32), "cpu")
        >>> mask = torch.arange(64).expand(32, 64) < 32
        >>> lists.fill(mask)
        >>> x, weight = torch.randn(5, 64), torch.randn(32, 64) * mask
        >>> torch.allclose(block_linear(x, weight, None, lists), x @ weight.T, atol=1e-5)
        True
    """
    dtype = multiplied_in(input, weight)
    assert dtype is not None, "the caller asks multiplied_in() first"
    result: Tensor = _BlockLinear.apply(input, weight, bias, lists, dtype, dense_gradient)
    return result


def multiplied_in(input: Tensor, weight: Tensor) -> torch.dtype | None:
    """The type that ``F.linear`` would multiply in here; None where the kernels have no tiles for it."""
    dtype, kind = input.dtype, input.device.type
    if torch.is_autocast_enabled(kind) and torch.float64 not in (dtype, weight.dtype):
        dtype = torch.get_autocast_dtype(kind)
    elif dtype != weight.dtype:
        return None
    return dtype if dtype in TILES else None


def precision() -> str:
    """How float32 is multiplied on CUDA, by PyTorch's own setting: "tf32" or "ieee"."""
    matmul = torch.backends.cuda.matmul
    # The newer name first: where somebody has used it, the older one raises an error.
    newer = getattr(matmul, "fp32_precision", None)
    allowed = matmul.allow_tf32 if newer is None else newer == "tf32"
    return "tf32" if allowed else "ieee"


class _BlockLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        lists: BlockLists,
        dtype: torch.dtype,
        dense_gradient: bool,
    ) -> Tensor:
        needs_input, needs_weight = ctx.needs_input_grad[:2]
        values = input.to(dtype).contiguous()
        # Made in its last shape: a view could not be written into by an activation in place.
        result = values.new_empty((*input.shape[:-1], weight.shape[0]))
        ctx.lists, ctx.dense_gradient, ctx.precision = lists, dense_gradient, precision()
        ctx.input_dtype, ctx.bias_dtype = input.dtype, None if bias is None else bias.dtype
        ctx.weight_dtype = weight.dtype
        ctx.save_for_backward(values if needs_weight else None, weight if needs_input else None)
        with _on(values):
            _multiply(values, weight, bias, result, lists, backward=False, precision=ctx.precision)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        values, weight = ctx.saved_tensors
        gradient = gradient.contiguous()
        of_input = of_weight = of_bias = None
        with _on(gradient):
            if ctx.needs_input_grad[0]:
                shape = (*gradient.shape[:-1], weight.shape[1])
                of_input = gradient.new_empty(shape, dtype=ctx.input_dtype)
                _multiply(gradient, weight, None, of_input, ctx.lists, backward=True, precision=ctx.precision)
            if ctx.needs_input_grad[1]:
                if ctx.dense_gradient:
                    of_weight = _dense_gradient(gradient, values, ctx.weight_dtype)
                else:
                    of_weight = _sparse_gradient(gradient, values, ctx.lists, ctx.weight_dtype, ctx.precision)
            if ctx.needs_input_grad[2]:
                of_bias = gradient.reshape(-1, gradient.shape[-1]).sum(0, dtype=ctx.bias_dtype)
        return of_input, of_weight, of_bias, None, None, None


def _multiply(
    values: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    result: Tensor,
    lists: BlockLists,
    *,
    backward: bool,
    precision: str,
) -> None:
    """``result = values @ weight.T + bias``, or backward ``values @ weight``."""
    (rows, columns), (high, wide) = lists.grid, lists.sides
    size, tiles = values.shape[-1], TILES[values.dtype]
    tokens = values.numel() // size
    tile = tiles.many if tokens >= MANY_TOKENS else tiles.few
    into, out, n_tiles = (high, wide, columns) if backward else (wide, high, rows)
    kernels.product[(-(-tokens // tile.tokens) * n_tiles,)](
        values,
        weight,
        weight if bias is None else bias,
        result,
        lists["column_starts" if backward else "row_starts"],
        lists["rows" if backward else "columns"],
        tokens,
        size,
        result.shape[-1],
        n_tiles,
        *((weight.shape[1], 1) if backward else (1, weight.shape[1])),
        TOKENS=tile.tokens,
        IN=into,
        OUT=out,
        GROUP=max(1, tile.features // into),
        HAS_BIAS=bias is not None,
        PRECISION=precision,
        WIDEN=kernels.INTERPRETED,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


def _sparse_gradient(gradient: Tensor, values: Tensor, lists: BlockLists, dtype: torch.dtype, precision: str) -> Tensor:
    """The weight's gradient: of the active blocks, zero in the others."""
    (rows, columns), (high, wide) = lists.grid, lists.sides
    out, into, tiles = gradient.shape[-1], values.shape[-1], TILES[values.dtype]
    tile, tokens, n_groups = tiles.gradient, values.numel() // into, lists.n_groups
    steps = -(-tokens // tile.tokens)
    # The same bits in every run: shares are added up in order, which atomic additions would not be, and there are as
    # many of them whatever the mask is and was.
    steps_each = max(1, steps * lists.usual_groups // tiles.programs)
    shares = -(-steps // steps_each)
    stride = n_groups * lists.group * high * wide
    parts = values.new_empty((shares, stride), dtype=torch.float32)
    if n_groups:
        kernels.weight_gradient[(n_groups, shares)](
            gradient,
            values,
            parts,
            lists["column_starts"],
            lists["rows"],
            lists["group_columns"],
            lists["group_firsts"],
            tokens,
            out,
            into,
            n_groups,
            steps_each * tile.tokens,
            TOKENS=tile.tokens,
            OUT=high,
            IN=wide,
            GROUP=lists.group,
            PRECISION=precision,
            WIDEN=kernels.INTERPRETED,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
    result = values.new_empty((out, into), dtype=dtype)
    kernels.collect[(rows * columns,)](
        parts, result, lists["places"], columns, into, shares, stride, OUT=high, IN=wide, num_warps=4, num_stages=1
    )
    return result


def _dense_gradient(gradient: Tensor, values: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight's gradient with all its entries, by PyTorch: a mutation looks at it."""
    with torch.autocast(values.device.type, enabled=False):
        flat = gradient.reshape(-1, gradient.shape[-1])
        return (flat.t() @ values.reshape(-1, values.shape[-1])).to(dtype)


def _on(tensor: Tensor) -> AbstractContextManager[None]:
    """Triton starts kernels on the current device, whatever the tensors' is."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
