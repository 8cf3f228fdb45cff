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


def rewire(
    weight: Tensor, mask: Tensor, before: Tensor, *, shrink: float, noise: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """One step of deep rewiring, after the gradient step: weights that cross zero go dormant, others wake up.

    A connection keeps the sign that it has; of a weight that is zero, the sign bit says which one.

    Args:
        weight: after the gradient step.
        mask: boolean, of its shape.
        before: the weight's sign bits before the step, boolean, of its shape.
        shrink: by how much the magnitude of active weights shrinks (learning rate times the L1 penalty).
        noise: standard deviation of what is added to active weights.
        generator: a CPU generator.

    Returns:
        The weight and the mask, with as many active weights as before. Those that woke up are zero, of a random sign.

    Source: Bellec et al. (DEEP R, arXiv 1711.05136), algorithm 1.
    """
    flat, active = weight.flatten(), mask.flatten().nonzero().squeeze(1)
    negative = before.flatten()[active]
    # theta, as the paper has it: the magnitude, counted along the sign that the connection has.
    theta = torch.where(negative, -flat[active], flat[active]) - shrink
    if noise:
        drawn = torch.randn(len(active), generator=generator, dtype=torch.float32)
        theta = theta + noise * drawn.to(theta)
    stays = theta >= 0
    alive = torch.zeros_like(mask.flatten())
    alive[active[stays]] = True
    grown = grow_random(alive, len(active), generator)
    awake = (grown & ~alive).nonzero().squeeze(1)
    signs = torch.rand(len(awake), generator=generator).to(weight.device) < 0.5
    result = torch.zeros_like(flat)
    result[active[stays]] = torch.where(negative[stays], -theta[stays], theta[stays])
    result[awake] = torch.where(signs, -0.0, 0.0).to(flat.dtype)
    return result.view(weight.shape), grown.view(mask.shape)
