"""Loading a state and going on equals never having stopped, bit for bit."""

from __future__ import annotations

import copy
from itertools import combinations, cycle, product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import spfde
from helpers.native import both_engines, needs_kernels
from helpers.pairwise import pairwise
from helpers.resuming import (
    METHODS,
    MOMENTS,
    SCHEMES,
    Loop,
    assert_equal,
    bottom,
    everything,
    finish,
    load,
    recipe_with,
    save,
)
from helpers.short import METHODS as SOME
from helpers.short import by_form
from helpers.training import EPOCHS, step, train
from spfde.engines.native import build

STOPS = {
    "tops of even epochs": MOMENTS[0::4],
    "bottoms of even epochs": MOMENTS[1::4],
    "tops of odd epochs": MOMENTS[2::4],
    "bottoms of odd epochs": MOMENTS[3::4],
}
WORKERS = {
    "no workers": {},
    "a worker that stays": {"workers": 1, "persistent": True},
    "a worker of each epoch": {"workers": 1},
    "the global generator": {"own_generator": False},
}
FACTORS = {
    "method": list(METHODS),
    "scheme": list(SCHEMES),
    "stops": list(STOPS),
    "engine": ["masked", "native"],
    "workers": list(WORKERS),
}


def on_engine(engine: str, *values: Any) -> Any:
    """A parameter that is skipped where its engine has no kernels."""
    return pytest.param(*values, marks=needs_kernels if engine == "native" else ())


def loop_of(case: dict[str, Any]) -> Loop:
    return Loop(recipe_with(case["method"], case["scheme"]), case["engine"], **WORKERS[case["workers"]])


def check(loop: Loop, moments: list[int]) -> None:
    assert_equal(loop.end_with_stops(moments), loop.end_with_stops([]))


# --- a sample of all runs --------------------------------------------------------------------------------------------

CASES = pairwise(FACTORS)

#: These keep between two epochs what another method keeps, for weights that lie elsewhere.
LIKE_ANOTHER = {"mest-em", "mest-pattern", "rigl-erk", "rigl-itop", "rigl-kernel"}


def short(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A case of each kind of method; few of them with worker processes, whose start takes longer than all else."""
    kinds = ["no workers", "the global generator"] * 4 + ["a worker that stays", "a worker of each epoch"]
    wanted = zip((method for method in METHODS if method not in LIKE_ANOTHER), cycle(kinds), strict=False)
    return [next(c for c in cases if (c["method"], c["workers"]) == (method, kind)) for method, kind in wanted]


#: In the short form; each choice is in one of them at least.
SHORT = short(CASES)


def on_engine_or_long(case: dict[str, Any]) -> Any:
    marks = [needs_kernels] if case["engine"] == "native" else []
    return pytest.param(case, id=", ".join(case.values()), marks=marks if case in SHORT else [*marks, pytest.mark.long])


@pytest.mark.parametrize("case", [on_engine_or_long(case) for case in CASES])
def test_a_run_that_was_stopped_ends_like_one_that_never_stopped(case: dict[str, Any]) -> None:
    moments = list(STOPS[case["stops"]])
    check(loop_of(case), by_form(moments[1::2], moments))


@needs_kernels
def test_a_run_in_bf16_that_was_stopped_ends_like_one_that_never_stopped() -> None:
    # PyTorch keeps the weights that it has cast until autocast ends: here that would be for all steps.
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        check(Loop(recipe_with("rigl", "periodic"), "native"), list(STOPS["bottoms of odd epochs"]))


def test_every_two_choices_meet_in_a_case() -> None:
    for left, right in combinations(FACTORS, 2):
        assert {(case[left], case[right]) for case in CASES} == set(product(FACTORS[left], FACTORS[right]))
    assert len(CASES) < 100
    for factor, values in FACTORS.items():
        assert {case[factor] for case in SHORT} == set(values) - LIKE_ANOTHER


runs = st.fixed_dictionaries(
    {
        "method": st.sampled_from(list(METHODS)),
        "scheme": st.sampled_from(list(SCHEMES)),
        "engine": st.sampled_from(["masked"] if build.available() else ["masked", "native"]),
        "workers": st.sampled_from(list(WORKERS)),
    }
)
some_moments = st.lists(st.sampled_from(MOMENTS), min_size=1, max_size=4, unique=True).map(sorted)


@pytest.mark.long
@settings(max_examples=4, deadline=None)
@given(case=runs, moments=some_moments)
def test_a_run_stopped_at_random_ends_like_one_that_never_stopped(case: dict[str, Any], moments: list[int]) -> None:
    check(loop_of(case), moments)


# --- all of them -----------------------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.timeout(3000)
@settings(max_examples=200, deadline=None)
@given(case=runs, moments=some_moments)
def test_many_runs_stopped_at_random_end_like_those_that_never_stopped(
    case: dict[str, Any], moments: list[int]
) -> None:
    check(loop_of(case), moments)


@pytest.mark.long
@both_engines
@pytest.mark.parametrize("method", METHODS)
def test_a_run_stopped_at_the_top_and_bottom_of_every_epoch_ends_like_one_that_never_stopped(
    method: str, engine: str
) -> None:
    loop = Loop(recipe_with(method), engine)
    saved, expected = loop.states()
    assert list(saved) == list(MOMENTS)
    assert_equal(loop.end_with_stops(MOMENTS), expected)
    # And once in the middle of an interval and of freezing, undisturbed from there on.
    assert_equal(finish(*loop.resume(saved[bottom(5)])), expected)


@pytest.mark.long
@pytest.mark.parametrize("how", WORKERS)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_resumes_at_any_moment_whoever_loads_its_data(method: str, how: str) -> None:
    loop = Loop(recipe_with(method), **WORKERS[how])
    saved, expected = loop.states()
    for state in saved.values():
        assert_equal(finish(*loop.resume(state)), expected)


# --- other ways to go on ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "engine"),
    [
        pytest.param(method, engine, marks=[*on_engine(engine).marks, *(() if method in SOME else [pytest.mark.long])])
        for method, engine in zip(METHODS, cycle(FACTORS["engine"]), strict=False)
    ],
)
def test_an_earlier_state_loaded_into_the_session_that_has_gone_on_leads_to_the_same_end(
    method: str, engine: str
) -> None:
    parts, session = Loop(recipe_with(method), engine).start()
    saved: dict[int, bytes] = {}
    train(parts, session, at_top=lambda epoch: saved.update({epoch: save(parts, session)}))
    expected = copy.deepcopy(everything(parts, session))
    for epoch in (2, EPOCHS - 1):
        load(saved[epoch], parts, session)
        train(parts, session)
        assert_equal(everything(parts, session), expected)


@both_engines
def test_a_run_resumed_between_two_epochs_ends_like_one_that_never_stopped(engine: str) -> None:
    loop = Loop(recipe_with("mest-ems"), engine)
    parts, session = loop.start()
    saved = []
    for _ in range(EPOCHS):
        for x, y in session.loader:
            step(parts, session, x, y)
        session.end_epoch()
        saved.append(save(parts, session))
    expected = everything(parts, session)
    for state in saved[1::2]:
        assert_equal(finish(*loop.resume(state)), expected)


@both_engines
def test_a_loop_without_epochs_goes_on_from_the_bottom_of_an_epoch(engine: str) -> None:
    loop = Loop(recipe_with("mest-ems"), engine)
    saved, expected = loop.states()
    parts, session = loop.resume(saved[bottom(3)])
    for _ in range(4, EPOCHS):
        for x, y in session.loader:
            step(parts, session, x, y)
        session.end_epoch()
    assert_equal(everything(parts, session), expected)


def test_every_stage_is_among_the_resumed_ones() -> None:
    """The runs above prove little unless masks change, blocks freeze and samples move while they last."""
    parts, session = Loop(recipe_with("mest-ems")).start()
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


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"sparsity": spfde.MEST(sparsity=0.7)}, "sparsity"),
        ({"sieving": spfde.DataSieving(removed_fraction=0.1)}, "removed_fraction"),
        ({"update_interval_epochs": 1}, "update_interval_epochs"),
    ],
)
@pytest.mark.filterwarnings("ignore:update_interval_epochs")
def test_a_state_from_another_recipe_is_refused(change: dict[str, Any], named: str) -> None:
    recipe = recipe_with("mest-ems")
    _, session = Loop(recipe).start()
    state = session.state_dict()
    _, other = Loop(recipe.replace(**change)).start()
    with pytest.raises(spfde.StateMismatch, match=named):
        other.load_state_dict(state)


def test_a_state_from_another_model_length_or_version_is_refused() -> None:
    _, session = Loop(recipe_with("mest-ems")).start()
    state = session.state_dict()
    with pytest.raises(spfde.StateMismatch, match="format"):
        session.load_state_dict({**state, "format": 99})
    with pytest.raises(spfde.StateMismatch, match="epochs"):
        session.load_state_dict({**state, "run": {**state["run"], "epochs": 9}})
    shapes = {**state["run"]["parameters"], "fc.weight": [5, 6]}
    with pytest.raises(spfde.StateMismatch, match=r"fc\.weight"):
        session.load_state_dict({**state, "run": {**state["run"], "parameters": shapes}})


def mismatch(saved: spfde.Recipe, now: spfde.Recipe) -> str:
    _, session = Loop(saved).start()
    _, other = Loop(now).start()
    with pytest.raises(spfde.StateMismatch) as caught:
        other.load_state_dict(session.state_dict())
    return str(caught.value)


def test_a_technique_that_was_switched_off_is_named_and_not_poured_out() -> None:
    whole = recipe_with("mest-ems")
    said = mismatch(whole, whole.replace(sieving=None))
    assert "sieving is circular" in said
    assert "here sieving is none" in said
    assert "there sieving is none" in mismatch(whole.replace(sieving=None), whole)
    for name in ("sieving", "freezing", "sparsity", "learning_rate"):
        said = mismatch(whole, whole.replace(**{name: None}))
        assert name in said
        assert "{" not in said
        assert len(said) < 300


def test_a_loader_with_other_generators_is_told_in_words_of_the_loader() -> None:
    _, session = Loop(recipe_with("set")).start()
    state = session.state_dict()
    state["run"] = {**state["run"], "loader_generators": state["run"]["loader_generators"] + 1}
    with pytest.raises(spfde.StateMismatch) as caught:
        session.load_state_dict(state)
    assert "loader_generators" not in str(caught.value)
    assert "generator" in str(caught.value)
