"""States of generators that a generator would take, and draw nonsense from, are refused."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spfde.core.generator_states import check_numpy, check_python, check_torch
from spfde.errors import StateMismatch

Check = Callable[[Any, str], None]


def python_state(seed: int) -> Any:
    return random.Random(seed).getstate()


def numpy_state(seed: int) -> Any:
    name, words, *rest = np.random.RandomState(seed).get_state()
    return (name, np.asarray(words).tolist(), *rest)


def torch_state(seed: int) -> torch.Tensor:
    return torch.Generator().manual_seed(seed).get_state()


def without_words(state: torch.Tensor) -> torch.Tensor:
    """The words of the twister, which lie behind three numbers of 8 bytes, set to zero."""
    state = state.clone()
    state[24 : 24 + 8 * 624] = 0
    return state


@given(seed=st.integers(0, 2**32 - 1))
def test_what_a_generator_gives_is_taken(seed: int) -> None:
    check_torch(torch_state(seed), "it")
    check_python(python_state(seed), "it")
    check_numpy(numpy_state(seed), "it")


def test_looking_draws_from_nobodys_generator() -> None:
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # type: ignore[index]  # noqa: NPY002
    test_what_a_generator_gives_is_taken.hypothesis.inner_test(3)  # type: ignore[attr-defined]
    assert random.getstate() == before[0]
    assert np.random.get_state()[1].tolist() == before[1]  # type: ignore[index]  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), before[2])


ZEROS = [0] * 624
_, WORDS, PLACE, HAS, KEPT = numpy_state(0)


@pytest.mark.parametrize(
    ("check", "state"),
    [
        (check_torch, without_words(torch_state(0))),
        (check_torch, torch_state(0)[:100]),
        (check_torch, torch_state(0).float()),
        (check_torch, torch.full_like(torch_state(0), 255)),
        (check_torch, torch.empty(0, dtype=torch.uint8)),
        (check_torch, None),
        (check_python, (3, (*ZEROS, 624), None)),
        (check_python, (3, (*ZEROS, 9999), None)),
        (check_python, (*python_state(0)[:2], "a number")),
        (check_python, (*python_state(0)[:2], float("nan"))),
        (check_python, (3, (1, 2), None)),
        (check_python, 3),
        (check_numpy, ("MT19937", ZEROS, 624, 0, 0.0)),
        (check_numpy, ("MT19937", WORDS, 9999, HAS, KEPT)),
        (check_numpy, ("MT19937", WORDS, -5, HAS, KEPT)),
        (check_numpy, ("MT19937", WORDS, 624, 1, float("inf"))),
        (check_numpy, ("MT19937", [*WORDS[1:], 2**40], PLACE, HAS, KEPT)),
        (check_numpy, ("MT19937", [*WORDS[1:], "a"], PLACE, HAS, KEPT)),
        (check_numpy, ("MT19937", WORDS[1:], PLACE, HAS, KEPT)),
        (check_numpy, ("PCG64", WORDS, PLACE, HAS, KEPT)),
        (check_numpy, ("MT19937", WORDS)),
        (check_numpy, None),
    ],
)
def test_a_damaged_state_is_refused(check: Check, state: Any) -> None:
    with pytest.raises(StateMismatch, match="state of the order is damaged"):
        check(state, "the order")
