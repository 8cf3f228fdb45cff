"""Criteria: what they score, and how a stranger's is used."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar

import pytest
import torch
from pydantic import Field
from torch import Tensor

import spfde
from helpers.masking import HandRun
from helpers.registering import forgetting_names
from spfde.errors import InvalidArgument, UsageError
from spfde.sparsity import (
    Criterion,
    DropGrow,
    Gradient,
    Magnitude,
    MagnitudePlusGradient,
    Random,
    SparsityMethod,
)

WEIGHT, GRADIENT = torch.tensor([-2.0, 1.0, 0.0]), torch.tensor([0.5, -4.0, 3.0])


@pytest.mark.parametrize(
    ("criterion", "scores", "needs_gradient"),
    [
        (Magnitude(), [2.0, 1.0, 0.0], False),
        (MagnitudePlusGradient(), [2.25, 3.0, 1.5], True),
        (MagnitudePlusGradient(gradient_weight=2.0), [3.0, 9.0, 6.0], True),
        (Gradient(), [0.5, 4.0, 3.0], True),
    ],
    ids=repr,
)
def test_scores_by_hand(criterion: Criterion, scores: list[float], needs_gradient: bool) -> None:
    assert criterion.needs_gradient is needs_gradient
    assert criterion.score(WEIGHT, GRADIENT if needs_gradient else None).tolist() == scores


def test_without_a_gradient_term_importance_is_the_magnitude() -> None:
    criterion = MagnitudePlusGradient(gradient_weight=0.0)
    assert not criterion.needs_gradient
    assert criterion.score(WEIGHT, None).tolist() == [2.0, 1.0, 0.0]


def test_chance_scores_nothing() -> None:
    assert Random().score(WEIGHT, None) is None
    assert not Random().needs_gradient


def test_a_negative_weight_of_the_gradient_is_refused() -> None:
    with pytest.raises(InvalidArgument) as caught:
        MagnitudePlusGradient(gradient_weight=-0.1)
    assert [problem.argument for problem in caught.value.problems] == ["gradient_weight"]


class SmallestSquare(Criterion):
    """Of somebody else's package: the smallest weights stay."""

    name: ClassVar[str] = "smallest-square"
    summary: ClassVar[str] = "The smallest stay."

    power: Annotated[float, Field(gt=0.0)] = 2.0

    def score(self, weight: Tensor, gradient: Tensor | None) -> Tensor:
        return -(weight.abs() ** self.power)


class LastPlace(Criterion):
    """The last places grow."""

    name: ClassVar[str] = "last-place"
    summary: ClassVar[str] = "The last places grow."

    def score(self, weight: Tensor, gradient: Tensor | None) -> Tensor:
        return torch.arange(weight.numel()).view(weight.shape)


@pytest.fixture
def _registered() -> Iterator[None]:
    with forgetting_names("drop"), forgetting_names("grow"):
        spfde.register("drop")(SmallestSquare)
        spfde.register("grow")(LastPlace)
        yield


THEIRS = {"drop_fraction": 0.5, "decay": "constant", "init": "magnitude", "sparsity": 0.5}
OBJECT = DropGrow(drop=SmallestSquare(power=3.0), grow=LastPlace(), **THEIRS)
TOML = """
[sparsity]
method = "drop-grow"
drop = { name = "smallest-square", power = 3.0 }
grow = "last-place"
drop_fraction = 0.5
decay = "constant"
init = "magnitude"
sparsity = 0.5
"""


def _by_a_recipe(recipe: spfde.Recipe) -> SparsityMethod:
    assert recipe.sparsity is not None
    return recipe.sparsity


@pytest.mark.usefixtures("_registered")
@pytest.mark.parametrize(
    "made",
    [
        lambda: OBJECT,
        lambda: DropGrow(drop={"name": "smallest-square", "power": 3.0}, grow="last-place", **THEIRS),
        lambda: _by_a_recipe(spfde.Recipe.from_dict(spfde.Recipe(sparsity=OBJECT).to_dict())),
        lambda: _by_a_recipe(spfde.Recipe.from_toml(spfde.Recipe(sparsity=OBJECT).to_toml())),
        lambda: _by_a_recipe(spfde.Recipe.from_toml(TOML)),
    ],
    ids=["object", "name", "dict", "written TOML", "TOML"],
)
def test_a_strangers_criteria_decide_what_drops_and_what_grows(made: Any) -> None:
    method = made()
    assert method == OBJECT
    run = HandRun(method, {"w": [8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0]})
    run.begin_epoch(0)
    assert run.active() == [0, 1, 2, 3]
    run.begin_epoch(1)
    # Of the four largest the two smallest stay; the last two places grow, and start from nothing.
    assert run.active() == [2, 3, 6, 7]
    assert run.weight() == [0.0, 0.0, 6.0, 5.0, 0.0, 0.0, 0.0, 0.0]


@pytest.mark.usefixtures("_registered")
@pytest.mark.parametrize("name", ["smallest-squar", "last-place", ""])
def test_a_name_that_no_drop_criterion_has_is_refused(name: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        DropGrow(sparsity=0.5, drop=name)
    assert [(problem.argument, problem.value) for problem in caught.value.problems] == [("drop", name)]


@pytest.mark.usefixtures("_registered")
def test_a_wrong_field_of_a_criterion_is_refused_under_its_own_name() -> None:
    with pytest.raises(InvalidArgument) as caught:
        DropGrow(sparsity=0.5, drop={"name": "smallest-square", "power": -1.0})
    assert [problem.argument for problem in caught.value.problems] == ["power"]
    with pytest.raises(InvalidArgument) as caught:
        DropGrow(sparsity=0.5, drop={"power": 1.0})
    assert [problem.argument for problem in caught.value.problems] == ["drop.name"]


class Curvature(Criterion):
    """Needs the gradient of the active weights."""

    name: ClassVar[str] = "curvature"
    summary: ClassVar[str] = "The flattest stay."
    needs_gradient: ClassVar[bool] = True
    seen: ClassVar[list[Tensor]] = []

    def score(self, weight: Tensor, gradient: Tensor | None) -> Tensor:
        assert gradient is not None
        self.seen.append(gradient)
        return (weight * gradient).abs()


def test_a_criterion_that_needs_a_gradient_waits_for_one_and_is_given_it() -> None:
    Curvature.seen.clear()
    method = DropGrow(sparsity=0.5, drop=Curvature(), drop_fraction=0.5, decay="constant", init="magnitude")
    run = HandRun(method, {"w": [4.0, 3.0, 2.0, 1.0]}, lr=0.0)
    run.begin_epoch(0)
    run.step(w=[1.0] * 4)
    run.begin_epoch(1)
    assert run.pending == ("w",)
    assert not Curvature.seen
    run.step(w=[1.0, 10.0, 7.0, 7.0])
    assert run.pending == ()
    (gradient,) = Curvature.seen
    assert gradient.tolist() == [[1.0, 10.0, 0.0, 0.0]]
    assert 1 in run.active()
    assert run.weight()[0] == 0.0
    assert run.masker.dense_gradient_steps == 0


class Wrong(Criterion):
    """Scores what nobody can use."""

    name: ClassVar[str] = "wrong"
    summary: ClassVar[str] = "Wrong."
    scored: ClassVar[Any] = None

    def score(self, weight: Tensor, gradient: Tensor | None) -> Tensor:
        return self.scored(weight)


@pytest.mark.parametrize("where", ["drop", "grow"])
@pytest.mark.parametrize(
    ("scored", "found"),
    [(lambda w: w[0], r"\(8,\).*"), (lambda w: w.sum(), r"\(\)"), (lambda w: w.abs().tolist(), "list")],
    ids=["shape", "number", "type"],
)
def test_a_score_of_another_shape_is_refused(
    where: str, scored: Any, found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Wrong, "scored", staticmethod(scored))
    method = DropGrow(**{"sparsity": 0.5, "drop_fraction": 0.5, "decay": "constant", where: Wrong()})
    run = HandRun(method, {"w": [1.0] * 8})
    run.begin_epoch(0)
    with pytest.raises(UsageError, match=f"wrong.*{found}"):
        run.begin_epoch(1)


def test_scores_below_zero_are_refused_where_groups_are_scored_by_their_norm() -> None:
    method = DropGrow(
        sparsity=0.5,
        drop=SmallestSquare(),
        drop_fraction=0.5,
        decay="constant",
        structure=spfde.Block(rows=1, columns=2),
    )
    run = HandRun(method, {"w": [8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0]})
    run.begin_epoch(0)
    with pytest.raises(UsageError, match=r"smallest-square.*negative"):
        run.begin_epoch(1)
