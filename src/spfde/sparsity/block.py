"""Blocks of weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from spfde.core.registry import register
from spfde.sparsity.structure import Count, Structure
from spfde.sparsity.units import Norm, pool


@register("structure")
class Block(Structure):
    """Blocks of ``rows`` consecutive outputs by ``columns`` consecutive weights of each.

    The default, 4x1, is the block of MEST's released code: four filters share which inputs they see.

    Attributes:
        rows: outputs in a block.
        columns: weights of each of these outputs in a block.
        along: what these weights are: "row", neighbours in the (out, in * kernel) matrix, whose rows run over the
            kernel first; "inputs", those of neighbouring inputs at one place of the kernel; or "kernel", neighbours in
            a row of the kernel, where each row has one block or none, which begins where its scores are highest.

    Example:
        >>> blocks = spfde.Block(rows=4, columns=1)
        >>> spfde.SET(sparsity=0.9, structure=blocks).structure == blocks
        True
        >>> blocks.expand(torch.tensor([True, False]), (8, 1)).flatten().int()
        tensor([1, 1, 1, 1, 0, 0, 0, 0], dtype=torch.int32)
        >>> spfde.Block(rows=2, columns=2, along="inputs").n_units((8, 4, 3, 3))
        72
    """

    name: ClassVar[str] = "block"
    summary: ClassVar[str] = "Blocks of consecutive outputs and inputs, such as 4x1 or 2x2-inputs."
    references: ClassVar[tuple[str, ...]] = ("narang2017block",)

    rows: Count = Field(default=4, description="a number of outputs, at least 1")
    columns: Count = Field(default=1, description="a number of columns, at least 1")
    along: Literal["row", "inputs", "kernel"] = Field(default="row", description="'row', 'inputs' or 'kernel'")

    def n_units(self, shape: Sequence[int]) -> int:
        return math.prod(self._grid(shape))

    def unit_size(self, shape: Sequence[int]) -> int:
        return self.rows * self.columns

    def problem(self, shape: Sequence[int], sparsity: float) -> str | None:
        if shape[0] % self.rows:
            return f"must have a number of outputs that {self.rows} divides; it has {shape[0]}"
        if self.along == "kernel":
            wide = shape[-1] if len(shape) > 2 else 1
            if wide < self.columns:
                return f"must have kernels at least {self.columns} wide; they are {wide} wide"
            least = 1 - self.columns / wide
            if sparsity < least - 1e-6:
                return (
                    f"must have a sparsity of at least {least:.3g}, one block to a row of the kernel; it has {sparsity}"
                )
            return None
        columns, what = (shape[1], "inputs") if self.along == "inputs" else (math.prod(shape[1:]), "weights per output")
        if columns % self.columns:
            return f"must have a number of {what} that {self.columns} divides; it has {columns}"
        return None

    def reduce(self, values: Tensor, norm: Norm = "l2") -> Tensor:
        if self.along != "kernel":
            return super().reduce(values, norm)
        return self._by_position(values.detach(), norm).amax(1)

    def expand(
        self,
        units: Tensor,
        shape: Sequence[int],
        *,
        previous: Tensor | None = None,
        score: Tensor | None = None,
        generator: torch.Generator | None = None,
        norm: Norm = "l2",
    ) -> Tensor:
        if self.along != "kernel":
            return super().expand(units, shape)
        wide = shape[-1]
        begins = torch.arange(wide - self.columns + 1, device=units.device)
        column = torch.arange(wide, device=units.device)
        covers = (column >= begins[:, None]) & (column < begins[:, None] + self.columns)  # position by position
        if score is not None:
            at = self._by_position(score, norm).argmax(1)
        elif generator is not None:
            at = torch.randint(len(begins), (len(units),), generator=generator).to(units.device)
        else:
            at = torch.zeros(len(units), dtype=torch.int64, device=units.device)
        rows = covers[at]
        if previous is not None:  # a block that still exists stays where it is
            before = self._cut(previous).view(len(units), self.rows, wide).any(1)
            is_one = before.sum(1, keepdim=True) == self.columns
            rows = torch.where(is_one, before, rows)
        return self._joined((rows & units[:, None])[:, None].expand(-1, self.rows, -1), shape)

    def _by_position(self, values: Tensor, norm: Norm) -> Tensor:
        """Scores of the blocks of each row of the kernel, by where they begin: (n_units, positions)."""
        rows = self._cut(values).view(-1, self.rows, values.shape[-1])
        blocks = rows.unfold(2, self.columns, 1).transpose(1, 2)  # [units, positions, rows, columns]
        n_units, positions = blocks.shape[:2]
        return pool(blocks.reshape(n_units * positions, -1), norm).view(n_units, positions)

    def _grid(self, shape: Sequence[int]) -> tuple[int, int]:
        if self.along == "kernel":
            return shape[0] // self.rows, math.prod(shape[1:-1])
        return shape[0] // self.rows, math.prod(shape[1:]) // self.columns

    def _cut(self, values: Tensor) -> Tensor:
        down, across = self._grid(values.shape)
        rows = values.movedim(1, -1) if self.along == "inputs" else values
        wide = values.shape[-1] if self.along == "kernel" else self.columns
        blocks = rows.reshape(down, self.rows, across, wide).transpose(1, 2)
        return blocks.reshape(down * across, self.rows * wide)

    def _spread(self, units: Tensor, shape: Sequence[int]) -> Tensor:
        return self._joined(units[:, None, None].expand(-1, self.rows, self.columns), shape)

    def _joined(self, blocks: Tensor, shape: Sequence[int]) -> Tensor:
        """The weight of ``shape`` from what its blocks hold: (n_units, rows, weights of each row)."""
        whole = blocks.reshape(*self._grid(shape), *blocks.shape[1:]).transpose(1, 2)
        if self.along != "inputs":
            return whole.reshape(*shape).contiguous()
        return whole.reshape(shape[0], *shape[2:], shape[1]).movedim(-1, 1).contiguous()
