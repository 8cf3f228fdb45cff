"""The process's generators, used by one thread while others may draw."""

from __future__ import annotations

import random
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from random import randint
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.random import rand as numbers_of_numpy
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from spfde.core.generators import GeneratorsRestored
from spfde.core.torch_private import FakeTensorMode

KINDS = ("torch", "python", "numpy")
OTHERS: dict[str, Callable[[], object]] = {
    "torch": lambda: torch.rand(2),
    "python": random.random,
    "numpy": lambda: np.random.rand(2),  # noqa: NPY002
}


class Holds:
    def __init__(self) -> None:
        self.draws = np.random.normal
        self.generators = np.random

    def method(self) -> object:
        return self.draws()

    def module(self) -> object:
        return self.generators.rand()


def with_import() -> object:
    import numpy as numbers

    return numbers.random.rand()  # noqa: NPY002


def draws_as(given: Any) -> object:
    return given.shuffle([1, 2, 3])


OWN: dict[str, tuple[str, Callable[[], object]]] = {
    "an operator": ("torch", lambda: torch.randn(3)),
    "in place": ("torch", lambda: torch.zeros(3).uniform_()),
    "dropout": ("torch", lambda: F.dropout(torch.ones(8))),
    "attention that drops out": ("torch", lambda: attention(0.5)),
    "a seed for torch": ("torch", lambda: torch.manual_seed(3)),
    "a state for torch": ("torch", lambda: torch.set_rng_state(torch.Generator().manual_seed(1).get_state())),
    "random": ("python", lambda: random.random()),
    "an imported function": ("python", lambda: randint(0, 9)),
    "shuffle": ("python", lambda: random.shuffle([1, 2, 3])),
    "a seed for Python": ("python", lambda: random.seed(3)),
    "numpy.random": ("numpy", lambda: np.random.randint(9)),  # noqa: NPY002
    "a function of NumPy's": ("numpy", lambda: numbers_of_numpy(2)),  # noqa: NPY002
    "a seed for NumPy": ("numpy", lambda: np.random.seed(3)),  # noqa: NPY002
    "a method in an attribute": ("numpy", Holds().method),
    "a module in an attribute": ("numpy", Holds().module),
    "an argument": ("numpy", lambda: draws_as(np.random)),
    "an import within": ("numpy", with_import),
}


def attention(dropout: float) -> Tensor:
    x = torch.ones(1, 2, 4, 8)
    return F.scaled_dot_product_attention(x, x, x, dropout_p=dropout)


def states() -> dict[str, Any]:
    name, keys, *position = np.random.get_state()  # noqa: NPY002
    return {
        "torch": torch.get_rng_state().tolist(),
        "python": random.getstate(),
        "numpy": (name, keys.tolist(), position),
    }


def moved(before: dict[str, Any]) -> list[str]:
    now = states()
    return [kind for kind in KINDS if now[kind] != before[kind]]


@pytest.fixture
def other() -> Iterator[Callable[[Callable[[], object]], object]]:
    """Runs something in another thread, which is there all the time."""
    with ThreadPoolExecutor(1) as pool:
        pool.submit(lambda: None).result()
        yield lambda act: pool.submit(act).result()


@pytest.fixture(params=["alone", "beside others"])
def beside(request: pytest.FixtureRequest) -> None:
    if request.param == "beside others":
        request.getfixturevalue("other")


@pytest.mark.usefixtures("beside")
@pytest.mark.parametrize("how", OWN)
def test_what_this_thread_draws_is_noticed_and_put_back(how: str) -> None:
    kind, draw = OWN[how]
    draw(), OTHERS[kind]()  # a seed moves what is elsewhere
    before = states()
    with GeneratorsRestored() as generators:
        mark = generators.mark()
        draw()
        assert generators.has_drawn_since(mark)
        assert moved(before) == [kind]
        assert not generators.has_drawn_since(generators.mark())
    assert not moved(before)


def quiet() -> None:
    own = np.random.default_rng(0), torch.Generator().manual_seed(0), random.Random(0)
    own[0].random(), torch.rand(2, generator=own[1]), own[2].random()
    torch.ones(3) + attention(0.0).sum()
    checkpoint(torch.relu, torch.ones(2, requires_grad=True), use_reentrant=False)  # reads the state
    with FakeTensorMode():
        F.dropout(torch.rand(3))
    torch.rand(3, device="meta")


@pytest.mark.usefixtures("beside")
def test_what_draws_from_no_generator_of_the_process_is_no_draw() -> None:
    with GeneratorsRestored() as generators:
        mark = generators.mark()
        quiet()
        assert not generators.has_drawn_since(mark)


@pytest.mark.parametrize("theirs", KINDS)
@pytest.mark.parametrize("own", [None, *KINDS])
def test_what_another_thread_draws_stays_drawn_and_is_none_of_this_one_s(
    own: str | None, theirs: str, other: Callable[[Callable[[], object]], object]
) -> None:
    if own == theirs:
        pytest.skip("two threads on one generator: see the next test")
    before = states()
    with GeneratorsRestored() as generators:
        if own is not None:
            OTHERS[own]()
        mark = generators.mark()
        other(OTHERS[theirs])
        assert not generators.has_drawn_since(mark)
    assert moved(before) == [theirs]


@pytest.mark.parametrize("kind", KINDS)
def test_what_another_thread_drew_before_this_one_did_stays_drawn_too(
    kind: str, other: Callable[[Callable[[], object]], object]
) -> None:
    OTHERS[kind]()
    before = states()
    with GeneratorsRestored():
        other(OTHERS[kind])
        between = states()
        OTHERS[kind]()
    assert not moved(between)
    assert moved(before) == [kind]


@pytest.mark.usefixtures("beside")
def test_one_within_another_leaves_to_the_outer_one_what_it_has_seen() -> None:
    before = states()
    with GeneratorsRestored() as outer:
        mark = outer.mark()
        random.random()
        between = states()
        with GeneratorsRestored() as inner:
            torch.rand(2)
            random.random()
            assert inner.has_drawn_since((*mark[:2], *mark[2:]))
        assert not moved(between)
        assert outer.has_drawn_since(mark)
    assert not moved(before)
    assert sys.getprofile() is None


@pytest.mark.usefixtures("beside")
def test_seeds_hold_for_all_draws_of_this_thread() -> None:
    def draw() -> list[Tensor]:
        x = torch.ones(16, requires_grad=True)
        # The state is read before the first draw, and set before the second.
        checkpoint(F.dropout, x, use_reentrant=False).square().sum().backward()
        assert x.grad is not None
        return [x.grad, torch.rand(3)]

    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = states()
        with GeneratorsRestored(prepare=lambda: torch.default_generator.manual_seed(0)):
            found.append(draw())
        assert not moved(before)
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))
    assert set(found[0][0].tolist()) == {0.0, 8.0}, "each place is dropped in both passes, or in none"


def test_without_watchers_it_is_unclear_who_drew_until_it_is_done_again(
    other: Callable[[Callable[[], object]], object],
) -> None:
    before = states()
    with GeneratorsRestored(watches=False) as first:
        assert sys.getprofile() is None
        mark = first.mark()
        assert not first.has_drawn_since(mark)
        random.random()
        other(OTHERS["numpy"])
        assert first.has_drawn_since(mark)
    assert first.is_unclear
    assert moved(before) == ["python", "numpy"]
    with GeneratorsRestored(again=first) as second:
        random.random()
    assert not second.is_unclear
    assert moved(before) == ["numpy"]


@pytest.mark.usefixtures("beside")
def test_without_watchers_nothing_is_unclear_where_nothing_moves_or_nobody_else_is_there() -> None:
    with GeneratorsRestored(watches=False) as still:
        torch.rand(2, generator=torch.Generator())
    assert not still.is_unclear
    if len(sys._current_frames()) == 1:  # threads of libraries count, which threading does not know
        before = states()
        with GeneratorsRestored(watches=False) as alone:
            random.random()
        assert not alone.is_unclear
        assert not moved(before)


def test_a_seed_that_is_not_needed_disturbs_nobody(other: Callable[[Callable[[], object]], object]) -> None:
    before = states()
    with GeneratorsRestored(prepare=lambda: torch.default_generator.manual_seed(0)):
        other(OTHERS["torch"])
    after = states()
    assert moved(before) == ["torch"]
    torch.set_rng_state(torch.tensor(before["torch"], dtype=torch.uint8))
    torch.rand(2)
    assert states()["torch"] == after["torch"], "drawn as if nobody else was there"


def test_a_profiler_of_the_user_s_stays_and_all_that_moves_counts_then(
    other: Callable[[Callable[[], object]], object],
) -> None:
    seen = []

    def profile(frame: object, event: str, argument: object) -> None:
        seen.append(event)

    before = states()
    sys.setprofile(profile)
    try:
        with GeneratorsRestored() as generators:
            assert sys.getprofile() is profile
            mark = generators.mark()
            numbers_of_numpy(2)  # noqa: NPY002
            assert generators.has_drawn_since(mark)
        assert sys.getprofile() is profile
    finally:
        sys.setprofile(None)
    assert not moved(before)


def test_an_error_takes_the_watchers_away(other: Callable[[Callable[[], object]], object]) -> None:
    before = states()
    with pytest.raises(ZeroDivisionError), GeneratorsRestored():
        int(torch.rand(2).numel()) // 0
    assert sys.getprofile() is None
    assert torch._C._len_torch_dispatch_stack() == 0
    assert not moved(before)
    assert threading.active_count() > 1
