"""Structural similarity: how much of an intermediate model's structure the final model still has."""

from __future__ import annotations

import math

from torch import Tensor

from spfde.core.errors import InvalidArgument, Problem
from spfde.core.numbers import round_half_up
from spfde.sparsity.masks import highest


def structural_overlap(weight: Tensor, final_mask: Tensor, *, fraction: float = 0.5) -> tuple[int, int]:
    """How many of a weight's most significant non-zeros exist in the final mask, and how many those are.

    Counts can be added up over layers, so that a block's similarity weighs each layer by its size.

    Returns:
        ``(common, chosen)``; at least one is chosen where there is a non-zero at all.
    """
    if weight.shape != final_mask.shape:
        rule = f"must have the shape of the weight, {tuple(weight.shape)}"
        raise InvalidArgument(
            Problem("final_mask", tuple(final_mask.shape), rule, "Compare the same layer of two models.")
        )
    if not 0.0 < fraction <= 1.0:
        raise InvalidArgument(Problem("fraction", fraction, "must be in (0, 1]", "The paper takes 0.5."))
    nonzero = weight.detach() != 0
    n_nonzero = int(nonzero.sum())
    chosen = min(n_nonzero, max(1, round_half_up(fraction * n_nonzero)))
    significant = highest(weight.detach().abs(), chosen, among=nonzero)
    return int((significant & final_mask.to(significant.device)).sum()), chosen


def structural_similarity(weight: Tensor, final_mask: Tensor, *, fraction: float = 0.5) -> float:
    """Share of a weight's most significant non-zeros whose locations exist in the final mask.

    Args:
        weight: of the intermediate model, any shape; zero where it is inactive.
        final_mask: of the same shape, True where the final model has a weight.
        fraction: share of the non-zeros, in (0, 1], the largest magnitudes first; of equal ones the lower flat index.

    Returns:
        A share in [0, 1]; NaN for a weight that is zero everywhere.

    Raises:
        InvalidArgument: the shapes differ, or ``fraction`` is out of bounds.

    Source: Yuan et al., NeurIPS 2022 (arXiv 2209.11204), section 3.1.

    Example:
        >>> weight, final = torch.tensor([3.0, 2.0, 1.0, 0.0]), torch.tensor([True, False, True, False])
        >>> spfde.analysis.structural_similarity(weight, final)
        0.5
    """
    common, chosen = structural_overlap(weight, final_mask, fraction=fraction)
    return common / chosen if chosen else math.nan
