"""How many weights each layer keeps: integers that add up, rounded in one place."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

from spfde.core.errors import InvalidArgument, Problem
from spfde.core.numbers import round_half_up


def active_count(numel: int, sparsity: float) -> int:
    """Number of active weights in a tensor of ``numel`` elements at ``sparsity``.

    Rounded half up, and never 0 while ``sparsity < 1``: a layer without weights would cut the network in two.
    """
    if numel == 0 or sparsity >= 1.0:
        return 0
    return max(1, round_half_up((1.0 - sparsity) * numel))


def erk(
    shapes: Mapping[str, Sequence[int]], sparsity: float, *, overrides: Mapping[str, float] | None = None
) -> dict[str, int]:
    """Active weights per layer by Erdős–Rényi-Kernel: density in proportion to (sum of dims) / (product of dims).

    Layers that would need more than all their weights become dense and the rest share what is left. The counts add
    up to ``active_count(total, sparsity)`` exactly, by largest remainder; every layer keeps at least one weight.

    Args:
        shapes: shape of each layer's weight, by name.
        sparsity: share of inactive weights over all layers together, in [0, 1).
        overrides: sparsity by name pattern; such layers are fixed and the others absorb the difference.

    Returns:
        The count of active weights of each layer, in the order of ``shapes``.

    Raises:
        InvalidArgument: the overrides leave the other layers more, or fewer, weights than they can have.

    Source: Evci et al., "Rigging the Lottery" (arXiv 1911.11134), section 3.
    """
    numel = {name: math.prod(shape) for name, shape in shapes.items()}
    fixed = {}
    for name in shapes:
        own = override_for(name, overrides or {})
        if own is not None:
            fixed[name] = active_count(numel[name], own)
    free = [name for name in shapes if name not in fixed]
    if not free:
        return fixed
    budget = active_count(sum(numel.values()), sparsity) - sum(fixed.values())
    if not len(free) <= budget <= sum(numel[name] for name in free):
        raise InvalidArgument(_impossible_budget(sparsity, budget, len(free), sum(numel[name] for name in free)))
    dims = {name: float(sum(shapes[name])) for name in free}
    shared = apportion(dims, {name: numel[name] for name in free}, budget, least=1)
    return {name: fixed[name] if name in fixed else shared[name] for name in shapes}


def override_for(name: str, overrides: Mapping[str, float]) -> float | None:
    """The sparsity that ``overrides`` gives to ``name``; the last pattern that matches wins, None when none does."""
    found = [sparsity for pattern, sparsity in overrides.items() if fnmatchcase(name, pattern)]
    return found[-1] if found else None


def apportion(
    weights: Mapping[str, float], capacity: Mapping[str, int], budget: int, *, least: int = 0
) -> dict[str, int]:
    """Share ``budget`` out in proportion to ``weights``: integers that add up, by largest remainder, first wins.

    Who is full hands the rest on to the others, in the same proportion. With weights of zero all have the same claim.

    Args:
        weights: claims, not negative.
        capacity: the most that each can take.
        budget: what there is, from ``least * len(capacity)`` to the sum of the capacities.
        least: what each gets in any case.
    """
    claims = dict(weights) if any(weights.values()) else dict.fromkeys(weights, 1.0)
    return _round_shares(_fill(claims, capacity, budget), capacity, budget, least)


def _fill(claims: Mapping[str, float], capacity: Mapping[str, int], budget: int) -> dict[str, float]:
    """Real-valued shares ``min(capacity, scale * claim)`` that add up to ``budget``."""
    full: set[str] = set()
    while True:
        rest = [name for name in claims if name not in full]
        left, wanted = budget - sum(capacity[name] for name in full), math.fsum(claims[name] for name in rest)
        if not rest or not wanted:
            # Those who claim nothing get what nobody else can take.
            return {name: float(capacity[name]) if name in full else left / len(rest) for name in claims}
        scale = left / wanted
        overfull = {name for name in rest if scale * claims[name] > capacity[name]}
        if not overfull:
            return {name: float(capacity[name]) if name in full else scale * claims[name] for name in claims}
        full |= overfull


def _round_shares(ideal: Mapping[str, float], capacity: Mapping[str, int], budget: int, least: int) -> dict[str, int]:
    """Integers next to ``ideal`` between ``least`` and ``capacity`` that add up to ``budget``."""
    counts = {name: min(capacity[name], max(least, math.floor(round(value, 6)))) for name, value in ideal.items()}
    while (missing := budget - sum(counts.values())) != 0:
        step = 1 if missing > 0 else -1
        movable = [name for name in counts if least <= counts[name] + step <= capacity[name]]
        movable.sort(key=lambda name: step * (counts[name] - ideal[name]))
        for name in movable[: abs(missing)]:
            counts[name] += step
    return counts


def _impossible_budget(sparsity: float, budget: int, layers: int, available: int) -> Problem:
    return Problem(
        "sparsity",
        sparsity,
        f"leaves {budget} active weights to {layers} layers that can have {layers} to {available}",
        "Change the sparsity or the overrides, or use distribution='uniform'.",
    )
