"""What all sparse training methods share."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spfde.core.errors import InvalidArgument
from spfde.core.registry import registered
from spfde.sparsity import SET, PruningAtInitialisation, SparsityMethod, StaticSparse

METHODS = registered("method")

EVERY_METHOD = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())


def test_methods_are_listed_with_the_baseline_and_the_papers_own_first() -> None:
    assert list(METHODS)[:5] == ["drop-grow", "static", "set", "rigl", "mest"]


@EVERY_METHOD
def test_a_method_says_what_it_does_what_it_costs_and_where_it_is_from(method: type[SparsityMethod]) -> None:
    assert METHODS[method.name] is method
    assert method.cost
    assert method.summary.endswith(".")
    assert "\n" not in method.summary
    assert method.references


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 1.5, float("nan"), "much"])
def test_a_sparsity_outside_its_range_is_refused(sparsity: Any) -> None:
    with pytest.raises(InvalidArgument, match=r"\[0, 1\)") as caught:
        StaticSparse(sparsity=sparsity)
    assert [problem.argument for problem in caught.value.problems] == ["sparsity"]


def test_all_wrong_fields_are_named_together() -> None:
    with pytest.raises(InvalidArgument) as caught:
        SET(sparsity=2.0, drop_fraction=1.0, stop_fraction=0.0, overrides={"a": 1.0}, droprate=0.1)
    assert {p.argument for p in caught.value.problems} == {
        "sparsity",
        "drop_fraction",
        "stop_fraction",
        "overrides.a",
        "droprate",
    }


def test_counts_follow_the_distribution() -> None:
    shapes = {"tiny": (2, 2), "wide": (100, 100)}
    assert StaticSparse(sparsity=0.5).counts(shapes) == {"tiny": 2, "wide": 5000}
    assert StaticSparse(sparsity=0.5, distribution="erk").counts(shapes) == {"tiny": 4, "wide": 4998}
    assert StaticSparse(sparsity=0.5, overrides={"t*": 0.0}).counts(shapes) == {"tiny": 4, "wide": 5000}


def test_the_last_override_that_matches_wins_and_the_layers_keep_their_order() -> None:
    counts = StaticSparse(sparsity=0.9, overrides={"*.w": 0.5, "b.*": 0.2}).counts({"b.w": (10, 10), "a.w": (4, 25)})
    assert counts == {"b.w": 80, "a.w": 50}
    assert list(counts) == ["b.w", "a.w"]


@EVERY_METHOD
def test_a_method_survives_its_own_dump(method: type[SparsityMethod]) -> None:
    overrides = {} if issubclass(method, PruningAtInitialisation) else {"b": 0.5}
    made = method(sparsity=0.8, include=("a*",), overrides=overrides)
    assert method(**made.model_dump()) == made
    assert method(**made.model_dump(mode="json")) == made


@EVERY_METHOD
@given(data=st.data(), progress=st.floats(0, 1), sparsity=st.floats(0, 0.99))
def test_counts_stay_within_the_layer_and_gradients_reach_what_is_active(
    method: type[SparsityMethod], data: st.DataObject, progress: float, sparsity: float
) -> None:
    made, n_units = method(sparsity=sparsity), data.draw(st.integers(1, 500))
    target = data.draw(st.integers(1, n_units))
    first = made.first_count(target, n_units)
    assert target <= first <= n_units
    survive, final = made.mutation_counts(target, n_units, first, progress)
    assert 0 < survive <= min(first, final)
    assert final <= n_units
    assert final <= made.gradient_count(n_units, final, progress) <= n_units


@pytest.mark.parametrize("name", ["static", "deepr", "snip", "grasp", "synflow"])
def test_methods_whose_masks_keep_their_counts_say_so(name: str) -> None:
    made = METHODS[name](sparsity=0.9)
    for progress in (0.0, 0.3, 1.0):
        assert made.first_count(10, 100) == 10
        assert made.mutation_counts(10, 100, 10, progress) == (10, 10)
        assert made.gradient_count(100, 10, progress) == 10
        assert not made.mutates_at(progress)
    assert made.dense_gradients == "none"
    assert not made.varies_counts
