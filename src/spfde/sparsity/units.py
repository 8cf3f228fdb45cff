"""Pure rules on units: pooled scores, the patterns of a 3x3 kernel, the best of each group."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

Norm = Literal["l2", "sum"]

# Flat positions of a 3x3 kernel that each pattern keeps: the centre and three neighbours, as 2x2 squares and as Ts.
PATTERNS: tuple[tuple[int, int, int, int], ...] = (
    (4, 5, 7, 8),
    (3, 4, 6, 7),
    (1, 2, 4, 5),
    (0, 1, 3, 4),
    (1, 3, 4, 5),
    (3, 4, 5, 7),
    (1, 4, 5, 7),
    (1, 3, 4, 7),
)


def pool(values: Tensor, norm: Norm) -> Tensor:
    """One score for each row of ``values`` (n, k); the score of a single weight is its own, whatever the norm."""
    if values.shape[1] == 1:
        return values[:, 0]
    return torch.linalg.vector_norm(values, dim=1) if norm == "l2" else values.sum(1)


def pattern_scores(kernels: Tensor, norm: Norm) -> Tensor:
    """What each of :data:`PATTERNS` keeps of each kernel: (n, 9) to (n, 8); where that is NaN, the lowest score."""
    columns = kernels.detach().T.contiguous()
    if norm == "l2":
        columns = columns.square()
    # Columns are added one by one: no product with zeros, which would make NaN of infinity.
    scores = torch.stack([columns[a] + columns[b] + columns[c] + columns[d] for a, b, c, d in PATTERNS], 1)
    scores = scores.sqrt_() if norm == "l2" else scores
    return torch.nan_to_num(scores, nan=-math.inf, posinf=math.inf, neginf=-math.inf)


def highest_of_each(score: Tensor, n: int) -> Tensor:
    """A mask of the ``n`` highest scores of each row of ``score`` (rows, m); of equal ones the lower index wins."""
    columns = score.T.contiguous()
    # Rows are short and many: counting who beats whom takes m(m - 1)/2 passes, far less than to sort each row.
    rank = torch.zeros(columns.shape, dtype=torch.uint8 if len(columns) < 256 else torch.int16, device=score.device)
    for first in range(len(columns)):
        for second in range(first + 1, len(columns)):
            wins = columns[first] >= columns[second]
            rank[second] += wins
            rank[first] += ~wins
    return (rank < n).T.contiguous()


def finite(score: Tensor) -> Tensor:
    """Scores between the largest finite numbers, so that infinity can mark what is beyond any score; NaN is lowest."""
    values = score.detach() if score.is_floating_point() else score.to(torch.get_default_dtype())
    lowest = torch.finfo(values.dtype).min
    return torch.nan_to_num(values, nan=lowest, neginf=lowest)
