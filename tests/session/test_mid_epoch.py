"""A state from amid an epoch: the run goes on as if it had never stopped."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from typing import Any

import pytest

import spfde
from helpers.resuming import METHODS, Loop, assert_equal, everything, recipe_with, save
from helpers.short import short
from helpers.training import Parts, step

STOPS = [(0, 1), (2, 3), (2, 4), (3, 2), (5, 1)]
"""Epoch, and batches that were trained on in it; an epoch has four."""


def one_ahead(batches: Iterable[Any]) -> Iterator[Any]:
    iterator = iter(batches)
    batch = next(iterator)
    for following in iterator:
        yield batch
        batch = following
    yield batch


def exactly(batches: Any) -> Iterator[Any]:
    """The batches of an epoch, and never asked for one more."""
    iterator = iter(batches)
    for _ in range(len(batches) - batches.passed_over):
        yield next(iterator)


def run(parts: Parts, session: spfde.Session, *, stop: tuple[int, int] | None = None, through: Any = iter) -> Any:
    """Train to the end, or to a stop whose state is returned; what there is at the end."""
    for epoch in session.epochs():
        parts.model.train()
        taken = 0 if session._sampling._place is None else session._sampling._place[0]
        for x, y in through(session.loader):
            step(parts, session, x, y)
            taken += 1
            if stop == (epoch, taken):
                return save(parts, session)
    end = copy.deepcopy(everything(parts, session))
    session.detach()
    return end


def check(loop: Loop, stops: list[tuple[int, int]], through: Any = iter) -> None:
    expected = run(*loop.start(), through=through)
    parts, session = loop.start()
    for stop in stops:
        state = run(parts, session, stop=stop, through=through)
        session.detach()
        parts, session = loop.resume(state)
    assert_equal(run(parts, session, through=through), expected)


@pytest.mark.parametrize("method", short(METHODS))
def test_a_run_that_was_stopped_amid_epochs_ends_like_one_that_never_stopped(method: str) -> None:
    check(Loop(recipe_with(method)), STOPS)


@pytest.mark.parametrize("own_generator", [True, False])
@pytest.mark.parametrize("through", [one_ahead, exactly])
@pytest.mark.parametrize("sieves", short([True, False], [True]))
def test_however_the_loop_draws_its_batches(through: Any, sieves: bool, own_generator: bool) -> None:
    recipe = recipe_with("mest-ems")
    recipe = recipe if sieves else recipe.replace(sieving=None)
    check(Loop(recipe, own_generator=own_generator), STOPS[:4], through)


@pytest.mark.parametrize("through", [iter, one_ahead, exactly])
def test_a_last_batch_that_is_full_leaves_the_sampler_unasked_for_its_end(through: Any) -> None:
    check(Loop(recipe_with("mest-ems").replace(sieving=None)), [(1, 5), (3, 5)], through)


@pytest.mark.parametrize("how", [{"workers": 1}, {"workers": 1, "persistent": True}], ids=str)
def test_workers_pass_over_the_batches_that_were_taken(how: dict[str, Any]) -> None:
    check(Loop(recipe_with("mest-ems"), **how), [(2, 3)])
