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
    room = [numel[name] for name in free]
    if not len(free) <= budget <= sum(room):
        rule = f"leaves {budget} active weights to {len(free)} layers that can have {len(free)} to {sum(room)}"
        remedy = "Change the sparsity or the overrides, or use distribution='uniform'."
        raise InvalidArgument(Problem("sparsity", sparsity, rule, remedy))
    dims = [float(sum(shapes[name])) for name in free]
    shared = apportion(dims, room, budget, least=1)
    counts = {**fixed, **dict(zip(free, shared, strict=True))}
    return {name: counts[name] for name in shapes}


def override_for(name: str, overrides: Mapping[str, float]) -> float | None:
    """The sparsity that ``overrides`` gives to ``name``; the last pattern that matches wins, None when none does."""
    found = [sparsity for pattern, sparsity in overrides.items() if fnmatchcase(name, pattern)]
    return found[-1] if found else None


def apportion(weights: Sequence[float], capacity: Sequence[int], budget: int, *, least: int = 0) -> list[int]:
    """Share ``budget`` out in proportion to ``weights``: integers that add up, by largest remainder, first wins.

    Who is full hands the rest on to the others, in the same proportion. With weights of zero all have the same claim.

    Args:
        weights: claims, not negative.
        capacity: the most that each can take.
        budget: what there is, from ``least * len(capacity)`` to the sum of the capacities.
        least: what each gets in any case.
    """
    claims = weights if any(weights) else [1.0] * len(weights)
    return _round_shares(_fill(claims, capacity, budget), capacity, budget, least)


def _fill(claims: Sequence[float], capacity: Sequence[int], budget: int) -> list[float]:
    """Real-valued shares ``min(capacity, scale * claim)`` that add up to ``budget``."""
    full: set[int] = set()
    while True:
        rest = [place for place in range(len(claims)) if place not in full]
        left, wanted = budget - sum(capacity[place] for place in full), math.fsum(claims[place] for place in rest)
        shares = [float(most) for most in capacity]
        for place in rest:
            # Those who claim nothing get what nobody else can take.
            shares[place] = left / wanted * claims[place] if wanted else left / len(rest)
        overfull = {place for place in rest if wanted and shares[place] > capacity[place]}
        if not overfull:
            return shares
        full |= overfull


def _round_shares(ideal: Sequence[float], capacity: Sequence[int], budget: int, least: int) -> list[int]:
    """Integers next to ``ideal`` between ``least`` and ``capacity`` that add up to ``budget``."""
    counts = [min(most, max(least, math.floor(round(value, 6)))) for value, most in zip(ideal, capacity, strict=True)]
    while (missing := budget - sum(counts)) != 0:
        step = 1 if missing > 0 else -1
        movable = [place for place, most in enumerate(capacity) if least <= counts[place] + step <= most]
        movable.sort(key=lambda place: step * (counts[place] - ideal[place]))
        for place in movable[: abs(missing)]:
            counts[place] += step
    return counts
