"""The recipe: plain data that survives TOML, and says what is wrong with it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

import spfde
from spfde import presets
from spfde.core.errors import InvalidArgument
from spfde.core.registry import registered
from spfde.freezing import BlockwiseCosine, ProgressiveFreezing
from spfde.sieving import DataSieving, OneTimeRemoval
from spfde.sparsity import Block, Patterns, PruningAtInitialisation, SparsityMethod, Unstructured

METHODS = registered("method")

shares = st.floats(0, 0.99)
patterns = st.text(min_size=1, max_size=8)


@st.composite
def methods(draw: st.DrawFn) -> SparsityMethod:
    fields: dict[str, Any] = {
        "sparsity": draw(shares),
        "distribution": draw(st.sampled_from(["uniform", "erk"])),
        "include": tuple(draw(st.lists(patterns, max_size=2))),
        "exclude": tuple(draw(st.lists(patterns, max_size=2))),
        "overrides": draw(st.dictionaries(patterns, shares, max_size=2)),
        "dense_first": draw(st.booleans()),
        "init": draw(st.sampled_from(["random", "magnitude"])),
    }
    method = draw(st.sampled_from(sorted(METHODS.values(), key=lambda method: method.name)))
    if issubclass(method, PruningAtInitialisation):
        del fields["distribution"], fields["overrides"]
    if method.model_fields["init"].annotation == Literal["magnitude"] or issubclass(method, PruningAtInitialisation):
        del fields["init"]
    if method.structured:
        fields["structure"] = draw(st.sampled_from([Unstructured(), Block(rows=2, columns=3), Patterns()]))
    return method(**fields)


freezings = st.builds(
    ProgressiveFreezing,
    flops_reduction=shares,
    fraction=st.floats(0.01, 1),
    scheme=st.sampled_from(["single-shot", "single-shot-resume", "periodic", "delayed-periodic"]),
    as_far_as_possible=st.booleans(),
    blocks=st.none() | st.lists(patterns, min_size=1, max_size=3, unique=True).map(tuple),
)
kinds_of_sieving: dict[str, Any] = {
    "removed_fraction": shares,
    "criterion": st.sampled_from(["forgetting", "loss", "el2n", "random"]),
    "never_learned": st.sampled_from(["hard", "literal"]),
    "balanced": st.booleans(),
}
of_circular: dict[str, Any] = {**kinds_of_sieving, "rescale_loss": st.booleans(), "full_last": shares}
anew = st.sampled_from(["top-loss", "repeated-random"])
sievings = (
    st.builds(DataSieving, swap_fraction=st.none() | shares, **of_circular)
    | st.builds(DataSieving, **{**of_circular, "criterion": anew})
    | st.builds(OneTimeRemoval, at_fraction=st.floats(0.01, 0.99), **kinds_of_sieving)
)
rates = st.builds(BlockwiseCosine, warmup_epochs=st.integers(0, 9), final=st.floats(0, 1))
recipes = st.builds(
    spfde.Recipe,
    sparsity=st.none() | methods(),
    freezing=st.none() | freezings,
    sieving=st.none() | sievings,
    learning_rate=st.none() | rates,
    update_interval_epochs=st.just("auto") | st.integers(1, 99),
)


class TestRoundTrip:
    def test_a_recipe_is_read_as_it_is_written_by_hand(self) -> None:
        recipe = spfde.Recipe.from_toml(
            """
            update_interval_epochs = 3

            [sparsity]
            method = "set"
            sparsity = 0.8
            overrides = { "*.fc.weight" = 0.5 }

            [sieving]
            removed_fraction = 0.1
            """
        )
        assert recipe == spfde.Recipe(
            sparsity=spfde.SET(sparsity=0.8, overrides={"*.fc.weight": 0.5}),
            sieving=DataSieving(removed_fraction=0.1),
            update_interval_epochs=3,
        )

    @given(recipes)
    def test_toml_gives_the_recipe_back(self, recipe: spfde.Recipe) -> None:
        assert spfde.Recipe.from_toml(recipe.to_toml()) == recipe

    @given(recipes)
    def test_primitives_give_the_recipe_back(self, recipe: spfde.Recipe) -> None:
        assert spfde.Recipe.from_dict(recipe.to_dict()) == recipe

    def test_an_empty_text_is_the_neutral_recipe(self) -> None:
        assert spfde.Recipe.from_toml("") == spfde.Recipe()

    def test_a_one_time_removal_is_read_as_it_is_written_by_hand(self) -> None:
        written = '[sieving]\nmethod = "one-time"\nremoved_fraction = 0.1\nat_fraction = 0.5\ncriterion = "loss"\n'
        expected = OneTimeRemoval(removed_fraction=0.1, at_fraction=0.5, criterion="loss")
        assert spfde.Recipe.from_toml(written) == spfde.Recipe(sieving=expected)

    @pytest.mark.parametrize("name", presets.PRESETS)
    def test_presets_survive(self, name: str) -> None:
        assert spfde.Recipe.from_toml(presets.PRESETS[name].to_toml()) == presets.PRESETS[name]


class TestPresets:
    def test_they_are_what_their_names_say(self) -> None:
        methods = {name: recipe.sparsity and recipe.sparsity.name for name, recipe in presets.PRESETS.items()}
        expected = {"static": "static", "set": "set", "rigl": "rigl", "mest": "mest", "spfde": "mest", "dense": None}
        assert expected.items() <= methods.items()
        assert all(recipe.sparsity.sparsity == 0.9 for recipe in presets.PRESETS.values() if recipe.sparsity)

    def test_the_paper_s_recipe_saves_twenty_percent_twice(self) -> None:
        recipe = presets.get("spfde")
        assert recipe.sparsity == spfde.MEST(sparsity=0.9, soft_bound=True)
        assert recipe.freezing is not None
        assert recipe.sieving is not None
        assert (recipe.freezing.flops_reduction, recipe.sieving.removed_fraction) == (0.2, 0.2)
        assert recipe.freezing.as_far_as_possible
        assert recipe.learning_rate == BlockwiseCosine()

    def test_only_the_dense_one_is_neutral(self) -> None:
        assert [name for name, recipe in presets.PRESETS.items() if recipe.is_neutral] == ["dense"]

    def test_an_unknown_one_is_refused_with_the_nearest(self) -> None:
        with pytest.raises(InvalidArgument, match="Did you mean 'rigl'"):
            presets.get("rigle")


class TestFields:
    def test_replacing_a_field_leaves_the_others_and_the_original(self) -> None:
        changed = presets.spfde.replace(sieving=None, update_interval_epochs=2)
        assert (changed.sparsity, changed.freezing) == (presets.spfde.sparsity, presets.spfde.freezing)
        assert (changed.sieving, changed.update_interval_epochs) == (None, 2)
        assert presets.spfde.sieving is not None

    def test_a_replaced_field_is_checked(self) -> None:
        with pytest.raises(InvalidArgument, match="update_interval_epochs=0"):
            presets.spfde.replace(update_interval_epochs=0)
        with pytest.raises(InvalidArgument, match="Did you mean 'sieving'"):
            presets.spfde.replace(seiving=None)

    def test_a_recipe_cannot_be_changed(self) -> None:
        with pytest.raises(ValueError, match="frozen"):
            presets.spfde.sieving = None  # type: ignore[misc]

    @pytest.mark.parametrize(
        ("written", "told"),
        [
            ({"sparsty": {}}, "Did you mean 'sparsity'"),
            ({"sparsity": {"method": "mets", "sparsity": 0.9}}, "Did you mean 'mest'"),
            ({"sparsity": {"method": "set", "sparsity": 0.9, "drop_fracton": 0.1}}, "Did you mean 'drop_fraction'"),
            ({"freezing": {"flop_reduction": 0.1}}, "Did you mean 'flops_reduction'"),
            ({"sieving": {"remove_fraction": 0.1}}, "Did you mean 'removed_fraction'"),
            ({"sieving": {"method": "one-tim"}}, r"sieving\.method='one-tim'.*Did you mean 'one-time'"),
            ({"sieving": {"method": "one-time", "swap_fraction": 0.1}}, "swap_fraction=0.1: is no field"),
            ({"sieving": {"criterion": "el2m"}}, "Did you mean 'el2n'"),
            ({"learning_rate": {"warmup": 1}}, "Did you mean 'warmup_epochs'"),
            ({"sieving": 0.2}, r"sieving=0\.2: must be a table. Write it as \[sieving\]"),
        ],
    )
    def test_an_unknown_key_is_refused_with_the_nearest(self, written: dict[str, Any], told: str) -> None:
        with pytest.raises(InvalidArgument, match=told):
            spfde.Recipe.from_dict(written)

    def test_a_text_that_is_no_toml_is_refused(self) -> None:
        with pytest.raises(InvalidArgument, match="is no valid TOML"):
            spfde.Recipe.from_toml("[sparsity")

    @pytest.mark.parametrize("value", [0, -1, 1.5, True, "often", None])
    def test_an_interval_is_a_whole_number_from_one_on_or_auto(self, value: Any) -> None:
        with pytest.raises(InvalidArgument, match="update_interval_epochs"):
            spfde.Recipe(update_interval_epochs=value)


class TestNeutral:
    def test_nothing_and_zeros_are_neutral(self) -> None:
        assert spfde.Recipe().is_neutral
        assert spfde.Recipe(
            sparsity=spfde.MEST(sparsity=0),
            freezing=ProgressiveFreezing(flops_reduction=0),
            sieving=DataSieving(removed_fraction=0),
            update_interval_epochs=3,
        ).is_neutral
        assert spfde.Recipe(sieving=OneTimeRemoval(removed_fraction=0)).is_neutral

    @pytest.mark.parametrize(
        "fields",
        [
            {"sparsity": spfde.SET(sparsity=0.1)},
            {"sparsity": spfde.SET(sparsity=0, overrides={"*": 0.5})},
            {"freezing": ProgressiveFreezing(flops_reduction=0.1)},
            {"freezing": ProgressiveFreezing(flops_reduction=0, start_epoch=2)},
            {"sieving": DataSieving(removed_fraction=0.1)},
            {"sieving": OneTimeRemoval(removed_fraction=0.1)},
            {"learning_rate": BlockwiseCosine()},
        ],
    )
    def test_each_saving_alone_makes_it_other_than_neutral(self, fields: dict[str, Any]) -> None:
        assert not spfde.Recipe(**fields).is_neutral


class TestInterval:
    @pytest.mark.parametrize(
        ("epochs", "interval"),
        [(1, 1), (2, 1), (3, 1), (4, 2), (20, 2), (47, 2), (64, 2), (80, 2), (96, 3), (128, 4), (160, 5), (1000, 5)],
    )
    def test_auto_by_hand(self, epochs: int, interval: int) -> None:
        assert spfde.Recipe().interval(epochs) == interval

    @given(st.integers(1, 10**6))
    def test_auto_follows_the_rule_and_fits_into_the_run(self, epochs: int) -> None:
        interval = spfde.Recipe().interval(epochs)
        rule = min(5, max(1, round(epochs / 32)))
        assert interval == (max(rule, 2) if epochs >= 4 else rule)
        assert 1 <= interval <= epochs
        assert math.isclose(interval, rule, abs_tol=1)

    def test_a_given_interval_is_taken_up_to_the_length_of_the_run(self) -> None:
        recipe = spfde.Recipe(update_interval_epochs=7)
        assert recipe.interval(7) == 7
        with pytest.raises(InvalidArgument, match=r"update_interval_epochs=7: must not be longer than the run of 6"):
            recipe.interval(6)


def test_an_unknown_structure_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(InvalidArgument, match=r"structure.*'blok'.*Did you mean 'block'"):
        spfde.Recipe.from_dict({"sparsity": {"method": "set", "sparsity": 0.9, "structure": {"kind": "blok"}}})


@pytest.mark.parametrize(
    ("method", "refused"),
    [
        (
            lambda: spfde.DeepR(sparsity=0.5, structure=Block()),
            "structure=Block(rows=4, columns=1, along='row'): must be Unstructured(), for deepr works on single "
            "weights. "
            "Use another method, such as set or rigl.",
        ),
        (
            lambda: spfde.MEST(sparsity=0.5, structure=spfde.NM()),
            "structure=NM(n=2, m=4): keeps the number of active weights fixed, and mest varies it as it is set here. "
            "Use soft_bound=False, or another method, such as set or rigl.",
        ),
        (
            lambda: spfde.GMP(sparsity=0.5, structure=spfde.NM()),
            "structure=NM(n=2, m=4): keeps the number of active weights fixed, and gmp varies it as it is set here. "
            "Use another method, such as set or rigl.",
        ),
    ],
    ids=["deepr", "mest", "gmp"],
)
def test_a_structure_that_a_method_cannot_keep_is_refused_with_what_can(
    method: Callable[[], object], refused: str
) -> None:
    with pytest.raises(InvalidArgument) as caught:
        method()
    assert str(caught.value) == refused


def test_what_is_wrong_with_a_structure_is_told_beside_what_is_wrong_elsewhere() -> None:
    with pytest.raises(InvalidArgument) as caught:
        spfde.SET(sparsity=2.0, structure={"kind": "blok"})
    assert [problem.argument for problem in caught.value.problems] == ["sparsity", "structure.kind"]


@pytest.mark.parametrize(
    ("name", "value", "remedy"),
    [
        ("sparsity", 0.9, "MEST(sparsity=0.9)"),
        ("freezing", 0.2, "ProgressiveFreezing(flops_reduction=0.2)"),
        ("sieving", 0.2, "DataSieving(removed_fraction=0.2)"),
        ("learning_rate", "cosine", "BlockwiseCosine()"),
    ],
)
def test_a_bare_value_in_a_techniques_place_is_refused_with_the_technique(name: str, value: Any, remedy: str) -> None:
    with pytest.raises(spfde.InvalidArgument) as caught:
        spfde.Recipe(**{name: value})
    (problem,) = caught.value.problems
    assert str(problem).startswith(f"{name}={value!r}: must be a technique or None. Expected: ")
    assert remedy in problem.remedy
