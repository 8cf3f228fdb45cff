"""The kernels, in Triton: products with the active blocks of a weight alone, forward and backward.

Importing this module imports Triton. A matrix of values is row-major [tokens, features], a weight [out, in]; its blocks
are found by the lists of ``lists.py``. A *group* is as many blocks as are loaded at once. Sums are float32. Each number
is written by one program that adds in a fixed order: the same inputs give the same bits.

Kept to what Triton 3.2 (torch 2.6) and 3.8 (torch 2.14) both have. The interpreter of both multiplies the bits of
bfloat16 as integers: there WIDEN makes them float32 before, which changes no number.
"""
# mypy: disable-error-code="import-untyped,untyped-decorator,no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def product(
    values,
    weight,
    bias,
    result,
    starts,
    others,
    tokens,
    in_features,
    out_features,
    n_tiles,
    stride_in,
    stride_out,
    TOKENS: tl.constexpr,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """``result = values @ weight (+ bias)``: a program makes TOKENS rows of one block's width of the result.

    "in" and "out" are those of this product: the gradient of the input goes through the weight the other way round.

    Args:
        values: [tokens, in_features].
        weight: read as [in_features, out_features] by its strides, stride_in and stride_out.
        bias: [out_features], where HAS_BIAS.
        result: [tokens, out_features].
        starts: [n_tiles + 1], where the blocks of each width of the result begin in ``others``.
        others: [blocks], the place of each block among the inputs.
        n_tiles: widths of the result; those of the same rows run one after the other, and find them in the cache.
    """
    program = tl.program_id(0)
    tile = program % n_tiles
    row = (program // n_tiles) * TOKENS + tl.arange(0, TOKENS)
    is_row = row < tokens
    row = row.to(tl.int64)
    out = tile * OUT + tl.arange(0, OUT)
    first = tl.load(starts + tile)
    last = tl.load(starts + tile + 1)
    lane = tl.arange(0, GROUP * IN)
    total = tl.zeros((TOKENS, OUT), dtype=tl.float32)
    for at in range(first, last, GROUP):
        which = at + lane // IN
        is_in = which < last
        place = tl.load(others + which, mask=is_in, other=0) * IN + lane % IN
        place = tl.max_contiguous(tl.multiple_of(place, [IN]), [IN])  # so that whole blocks are read in wide loads
        value = tl.load(
            values + row[:, None] * in_features + place[None, :], mask=is_row[:, None] & is_in[None, :], other=0.0
        )
        block = tl.load(
            weight + place.to(tl.int64)[:, None] * stride_in + out.to(tl.int64)[None, :] * stride_out,
            mask=is_in[:, None],
            other=0.0,
        )
        block = block.to(value.dtype)
        if WIDEN:
            value = value.to(tl.float32)
            block = block.to(tl.float32)
        total = tl.dot(value, block, total, input_precision=PRECISION)
    if HAS_BIAS:
        total += tl.load(bias + out).to(tl.float32)[None, :]
    tl.store(
        result + row[:, None] * out_features + out[None, :], total.to(result.dtype.element_ty), mask=is_row[:, None]
    )


@triton.jit
def weight_gradient(
    gradient,
    values,
    parts,
    column_starts,
    rows,
    group_columns,
    group_firsts,
    tokens,
    out_features,
    in_features,
    n_groups,
    tokens_each,
    TOKENS: tl.constexpr,
    OUT: tl.constexpr,
    IN: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """``gradient.T @ values`` of the active blocks: a program adds up a share of the tokens for one group.

    A group's blocks share their inputs, which are read once.

    Args:
        gradient: of the output, [tokens, out_features].
        values: the input, [tokens, in_features].
        parts: float32, [shares, n_groups, GROUP * OUT, IN]; where a group does not exist nothing is written.
        column_starts: [columns + 1], where the blocks of each column begin in ``rows``.
        rows: [blocks], the row of each block, column by column.
        group_columns: [n_groups], each group's column; -1 for one that does not exist.
        group_firsts: [n_groups], where each group begins in ``rows``.
        tokens_each: tokens of a share, a multiple of TOKENS.
    """
    group = tl.program_id(0)
    share = tl.program_id(1)
    column = tl.load(group_columns + group)
    if column >= 0:
        first = tl.load(group_firsts + group)
        last = tl.load(column_starts + column + 1)
        lane = tl.arange(0, GROUP * OUT)
        which = first + lane // OUT
        is_out = which < last
        out = tl.load(rows + which, mask=is_out, other=0) * OUT + lane % OUT
        out = tl.max_contiguous(tl.multiple_of(out, [OUT]), [OUT])
        place = column * IN + tl.arange(0, IN)
        total = tl.zeros((GROUP * OUT, IN), dtype=tl.float32)
        begin = share * tokens_each
        end = tl.minimum(begin + tokens_each, tokens)
        for at in range(begin, end, TOKENS):
            row = at + tl.arange(0, TOKENS)
            is_row = row < end
            row = row.to(tl.int64)
            slope = tl.load(
                gradient + row[:, None] * out_features + out[None, :], mask=is_row[:, None] & is_out[None, :], other=0.0
            )
            value = tl.load(values + row[:, None] * in_features + place[None, :], mask=is_row[:, None], other=0.0)
            if WIDEN:
                slope = slope.to(tl.float32)
                value = value.to(tl.float32)
            total = tl.dot(tl.trans(slope), value, total, input_precision=PRECISION)
        to = (share * n_groups + group).to(tl.int64) * (GROUP * OUT * IN)
        tl.store(parts + to + lane[:, None] * IN + tl.arange(0, IN)[None, :], total)


@triton.jit
def collect(
    parts,
    result,
    places,
    n_columns,
    in_features,
    n_shares,
    stride_share,
    OUT: tl.constexpr,
    IN: tl.constexpr,
):
    """The whole gradient of the weight from the shares of its active blocks: zero in the others.

    Args:
        parts: as ``weight_gradient`` leaves them.
        result: [out_features, in_features]; every number of it is written.
        places: [rows * columns], the place of each block among all groups' blocks; -1 for an inactive one.
        stride_share: numbers in a share.
    """
    block = tl.program_id(0)
    place = tl.load(places + block)
    inside = tl.arange(0, OUT)[:, None] * IN + tl.arange(0, IN)[None, :]
    total = tl.zeros((OUT, IN), dtype=tl.float32)
    if place >= 0:
        part = parts + place.to(tl.int64) * (OUT * IN) + inside
        for _ in range(n_shares):
            total += tl.load(part)
            part += stride_share
    out = (block // n_columns) * OUT + tl.arange(0, OUT)
    into = (block % n_columns) * IN + tl.arange(0, IN)
    tl.store(result + out.to(tl.int64)[:, None] * in_features + into[None, :], total.to(result.dtype.element_ty))


INTERPRETED = not isinstance(product, triton.runtime.JITFunction)
"""Whether they run in Triton's interpreter, on a CPU: ``TRITON_INTERPRET=1`` was set when Triton was imported."""
