"""Loading a state and going on equals never having stopped, bit for bit."""

from __future__ import annotations

import copy
from contextlib import suppress
from itertools import cycle
from typing import Any

import pytest
import torch

import spfde
from helpers.native import needs_kernels
from helpers.resuming import METHODS, assert_equal, everything, load, recipe_with, save
from helpers.resuming import resume as resume_with
from helpers.training import EPOCHS, Parts, make_parts, step, train
from spfde.model.trace import Trace, trace
from spfde.planning import blueprint as planning


@pytest.fixture(autouse=True, params=["masked", pytest.param("native", marks=needs_kernels)])
def engine(request: pytest.FixtureRequest) -> str:
    """Every test of this module runs under both engines."""
    ENGINE[0] = request.param
    return str(request.param)


ENGINE = ["masked"]


@pytest.fixture(autouse=True)
def traced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test of this module attaches to models that look alike, many times: one trace is enough for all."""

    def traced(model: torch.nn.Module, sample: Any) -> Trace:
        look = str(model)
        if look not in _TRACES:
            _TRACES[look] = trace(model, sample)
        return _TRACES[look]

    monkeypatch.setattr(planning, "trace", traced)


_TRACES: dict[str, Trace] = {}


def attach(parts: Parts, recipe: spfde.Recipe) -> spfde.Session:
    return spfde.attach(parts.model, parts.optimizer, parts.loader, recipe, epochs=EPOCHS, seed=3, engine=ENGINE[0])


def run_whole(recipe: spfde.Recipe, **how: Any) -> tuple[list[bytes], dict[str, Any]]:
    """The states at the top and at the bottom of each epoch of a run that never stops, and what it ends with."""
    parts, saved = make_parts(**how), []
    session = attach(parts, recipe)

    def keep(_: int) -> None:
        saved.append(save(parts, session))

    train(parts, session, at_top=keep, at_bottom=keep)
    assert len(saved) == 2 * EPOCHS
    return saved, everything(parts, session)


def resume(saved: bytes, recipe: spfde.Recipe, **how: Any) -> tuple[Parts, spfde.Session]:
    return resume_with(saved, recipe, attach, **how)


class Stopped(Exception):
    """The run was killed."""


def go_on(state: bytes, recipe: spfde.Recipe) -> bytes | dict[str, Any]:
    """Resume a run, and stop it again at the next top or bottom of an epoch; at the end, what it ends with."""
    parts, session = resume(state, recipe)
    start, kept = session.step, []

    def stop(_: int) -> None:
        # A state from the top of an epoch is at its top once more.
        if session.step > start or len(session.cost.rows) > rows:
            kept.append(save(parts, session))
            raise Stopped

    rows = len(session.cost.rows)
    with suppress(Stopped):
        train(parts, session, at_top=stop, at_bottom=stop)
    return kept[0] if kept else everything(parts, session)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_a_run_stopped_at_the_top_and_bottom_of_every_epoch_ends_like_one_that_never_stopped(
    method: spfde.sparsity.SparsityMethod,
) -> None:
    recipe = recipe_with(method)
    saved, expected = run_whole(recipe)
    state: bytes | dict[str, Any] = saved[0]
    stops = 0
    # Nothing but the states is handed on: whatever one of them lacks is lost at once, and shows now or later.
    while isinstance(state, bytes):
        state = go_on(state, recipe)
        stops += 1
    assert stops == 2 * EPOCHS
    assert_equal(state, expected)
    # And once in the middle of an interval and of freezing, undisturbed from there on.
    again, resumed = resume(saved[2 * EPOCHS - 5], recipe)
    train(again, resumed)
    assert_equal(everything(again, resumed), expected)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_an_earlier_state_loaded_into_the_session_that_has_gone_on_leads_to_the_same_end(
    method: spfde.sparsity.SparsityMethod,
) -> None:
    recipe = recipe_with(method)
    parts, saved = make_parts(), []
    session = attach(parts, recipe)
    train(parts, session, at_top=lambda _: saved.append(save(parts, session)))
    expected = copy.deepcopy(everything(parts, session))
    for state in (saved[2], saved[EPOCHS - 1]):
        load(state, parts, session)
        train(parts, session)
        assert_equal(everything(parts, session), expected)


# Workers know nothing of engines, so one stands for both.
without_native = pytest.mark.parametrize("engine", ["masked"], indirect=True)


@without_native
@pytest.mark.parametrize("own_generator", [True, False])
@pytest.mark.parametrize(("workers", "persistent", "moments"), [(1, True, (0, 1, 2, 7, 10)), (2, False, (5, 10))])
def test_a_run_with_data_workers_resumes_bit_for_bit(
    workers: int, persistent: bool, moments: tuple[int, ...], own_generator: bool
) -> None:
    """A resumed run starts its workers anew, which must change neither the order of samples nor any other draw."""
    recipe = recipe_with(METHODS["mest-ems"])
    how = {"workers": workers, "persistent": persistent, "own_generator": own_generator}
    saved, expected = run_whole(recipe, **how)
    for moment in moments:
        again, resumed = resume(saved[moment], recipe, **how)
        train(again, resumed)
        assert_equal(everything(again, resumed), expected)


@without_native
@pytest.mark.parametrize(("method", "moment"), zip(METHODS.values(), cycle(range(2, 2 * EPOCHS, 3))), ids=METHODS)
def test_every_method_resumes_bit_for_bit_with_data_workers(method: spfde.sparsity.SparsityMethod, moment: int) -> None:
    recipe = recipe_with(method)
    saved, expected = run_whole(recipe, workers=1, persistent=True)
    again, resumed = resume(saved[moment], recipe, workers=1, persistent=True)
    train(again, resumed)
    assert_equal(everything(again, resumed), expected)


def test_a_run_resumed_between_two_epochs_ends_like_one_that_never_stopped() -> None:
    recipe = recipe_with(METHODS["mest-ems"])
    parts = make_parts()
    session = attach(parts, recipe)
    saved = []
    for _ in range(EPOCHS):
        for x, y in session.loader:
            step(parts, session, x, y)
        session.end_epoch()
        saved.append(save(parts, session))
    expected = everything(parts, session)
    for state in saved[1::2]:
        again, resumed = resume(state, recipe)
        train(again, resumed)
        assert_equal(everything(again, resumed), expected)


def test_a_loop_without_epochs_goes_on_from_the_bottom_of_an_epoch() -> None:
    recipe = recipe_with(METHODS["mest-ems"])
    parts = make_parts()
    session = attach(parts, recipe)
    saved = []
    train(parts, session, at_bottom=lambda _: saved.append(save(parts, session)))
    expected = everything(parts, session)
    again, resumed = resume(saved[3], recipe)
    for _ in range(4, EPOCHS):
        for x, y in resumed.loader:
            step(again, resumed, x, y)
        resumed.end_epoch()
    assert_equal(everything(again, resumed), expected)


def test_every_stage_is_among_the_resumed_ones() -> None:
    """The runs above prove little unless masks change, blocks freeze and samples move while they last."""
    parts = make_parts()
    session = attach(parts, recipe_with(METHODS["mest-ems"]))
    seen: list[tuple[float, int, int]] = []
    train(
        parts,
        session,
        at_bottom=lambda _: seen.append(
            (session.density, session.frozen_blocks, session.sieve_turnover["moved"]),
        ),
    )
    densities, frozen, moved = zip(*seen, strict=True)
    assert len(set(densities)) >= 2
    assert min(frozen) == 0
    assert max(frozen) >= 2
    assert sum(count > 0 for count in moved) == 3


def test_a_state_between_two_batches_is_refused(parts: Parts, whole_recipe: spfde.Recipe) -> None:
    session = attach(parts, whole_recipe)
    for _ in session.epochs():
        for x, y in session.loader:
            step(parts, session, x, y)
            with pytest.raises(spfde.UsageError, match="between two batches"):
                session.state_dict()
            break
        break


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"sparsity": spfde.MEST(sparsity=0.7)}, "sparsity"),
        ({"sieving": spfde.DataSieving(removed_fraction=0.1)}, "removed_fraction"),
        ({"update_interval_epochs": 1}, "update_interval_epochs"),
    ],
)
@pytest.mark.filterwarnings("ignore:update_interval_epochs")
def test_a_state_from_another_recipe_is_refused(
    parts: Parts, whole_recipe: spfde.Recipe, change: dict[str, Any], named: str
) -> None:
    state = attach(parts, whole_recipe).state_dict()
    other = make_parts()
    session = attach(other, whole_recipe.replace(**change))
    with pytest.raises(spfde.StateMismatch, match=named):
        session.load_state_dict(state)


def test_a_state_from_another_model_length_or_version_is_refused(parts: Parts, whole_recipe: spfde.Recipe) -> None:
    session = attach(parts, whole_recipe)
    state = session.state_dict()
    with pytest.raises(spfde.StateMismatch, match="format"):
        session.load_state_dict({**state, "format": 99})
    with pytest.raises(spfde.StateMismatch, match="epochs"):
        session.load_state_dict({**state, "run": {**state["run"], "epochs": 9}})
    shapes = {**state["run"]["parameters"], "fc.weight": [5, 6]}
    with pytest.raises(spfde.StateMismatch, match=r"fc\.weight"):
        session.load_state_dict({**state, "run": {**state["run"], "parameters": shapes}})
