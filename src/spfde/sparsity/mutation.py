"""Mutation: drop, then grow. Pure functions on tensors, exact in their counts.

Masks and scores may be of any shape as long as it is the same one: an entry is whatever exists or not as a whole.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from spfde.sparsity.masks import highest


def drop(mask: Tensor, score: Tensor, n_keep: int) -> Tensor:
    """Keep the ``n_keep`` highest scores among the active weights; of equal ones the lower flat index stays.

    Returns:
        A new mask with exactly ``n_keep`` active weights, a subset of ``mask``.
    """
    return highest(score, n_keep, among=mask)


def grow_random(mask: Tensor, n_final: int, generator: torch.Generator) -> Tensor:
    """Activate inactive weights uniformly at random until ``n_final`` are active.

    Every weight that is inactive in ``mask`` is a candidate, those that were dropped just before included.

    Source: Mocanu et al. (SET, arXiv 1707.04780); Yuan et al. (MEST, arXiv 2110.14032).
    """
    flat = mask.flatten().clone()
    candidates = (~flat).nonzero().squeeze(1)
    n_new = n_final - (len(flat) - len(candidates))
    assert 0 <= n_new <= len(candidates), f"cannot grow {n_new} of {len(candidates)}"
    drawn = torch.randperm(len(candidates), generator=generator)[:n_new]
    flat[candidates[drawn.to(candidates.device)]] = True
    return flat.view(mask.shape)


def grow_by_score(mask: Tensor, score: Tensor, n_final: int) -> Tensor:
    """Activate the inactive weights of the highest scores until ``n_final`` are active; ties as in :func:`drop`.

    Every weight that is inactive in ``mask`` is a candidate, those that were dropped just before included.

    Source: Evci et al. (RigL, arXiv 1911.11134), with the magnitude of the dense gradient as the score.
    """
    return mask | highest(score, n_final - int(mask.sum()), among=~mask)


def magnitude(weight: Tensor) -> Tensor:
    """Score ``|w|``."""
    return weight.detach().abs()


def magnitude_plus_gradient(weight: Tensor, gradient: Tensor, lam: float) -> Tensor:
    """Score ``|w| + lam * |g|`` of MEST (arXiv 2110.14032)."""
    return weight.detach().abs().add(gradient.detach().abs(), alpha=lam)


def gradient(grad: Tensor) -> Tensor:
    """Score ``|g|``."""
    return grad.detach().abs()


def random_score(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Scores drawn uniformly from [0, 1), on the CPU."""
    return torch.rand(tuple(shape), generator=generator)
