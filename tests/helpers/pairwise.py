"""A few cases in place of all: every two values of different factors meet in one of them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from itertools import combinations, product
from typing import Any


def pairwise(factors: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Cases in which all pairs of values of two factors occur, the same ones each time.

    Each case begins with the first pair that is still missing and takes, factor by factor, the value that brings most
    of the others; where none brings any it takes the first, so that should be the cheapest.

    Args:
        factors: values of each factor.
    """
    choices = {name: [(name, at) for at in range(len(values))] for name, values in factors.items()}
    missing = [frozenset(pair) for two in combinations(choices.values(), 2) for pair in product(*two)]
    cases = []
    while missing:
        chosen = dict(missing[0])
        for name in factors:
            if name not in chosen:
                chosen[name] = max(choices[name], key=lambda choice: _brings(choice, chosen, missing))[1]
        met = {frozenset(pair) for pair in combinations(chosen.items(), 2)}
        missing = [pair for pair in missing if pair not in met]
        cases.append({name: values[chosen[name]] for name, values in factors.items()})
    return cases


def _brings(choice: tuple[str, int], chosen: Mapping[str, int], missing: Collection[frozenset[Any]]) -> int:
    """How many of the missing pairs a choice makes with those before."""
    return sum(frozenset((choice, other)) in missing for other in chosen.items())
