"""Names of techniques: what may be registered, and what is found."""

from __future__ import annotations

from typing import Any

import pytest

import spfde
from helpers.registering import forgetting_names
from spfde.core.registry import find, registered
from spfde.errors import InvalidArgument
from spfde.sparsity import Magnitude


@pytest.fixture(autouse=True)
def _forgets() -> Any:
    with forgetting_names("drop"):
        yield


def technique(name: Any, qualname: str = "Mine") -> type:
    return type(qualname, (), {"name": name, "__qualname__": qualname})


def problem_of(caught: pytest.ExceptionInfo[InvalidArgument]) -> tuple[str, object]:
    (problem,) = caught.value.problems
    return problem.argument, problem.value


def test_a_class_is_found_by_its_name_and_stays_a_class() -> None:
    mine = technique("my-own.rule:2")
    assert spfde.register("drop")(mine) is mine
    assert find("drop", "my-own.rule:2", argument="drop") is mine
    assert list(registered("drop"))[-1] == "my-own.rule:2"


def test_what_is_registered_can_be_seen_and_not_changed() -> None:
    view = registered("drop")
    spfde.register("drop")(technique("later"))
    assert "later" in view
    with pytest.raises(TypeError):
        view["other"] = int  # type: ignore[index]


def test_each_kind_has_names_of_its_own() -> None:
    assert registered("drop")["magnitude"] is Magnitude
    assert "magnitude" not in registered("grow")


def test_an_unknown_kind_is_refused_with_the_nearest() -> None:
    with pytest.raises(InvalidArgument, match="'grow'") as caught:
        spfde.register("grown")
    assert problem_of(caught) == ("kind", "grown")


@pytest.mark.parametrize("name", [None, "", "Mine", "two words", "-x", 3])
def test_a_class_without_a_name_in_small_letters_is_refused(name: Any) -> None:
    before = dict(registered("drop"))
    with pytest.raises(InvalidArgument) as caught:
        spfde.register("drop")(technique(name))
    assert problem_of(caught) == ("Mine.name", name)
    assert dict(registered("drop")) == before


def test_a_name_that_another_class_has_is_refused() -> None:
    first = spfde.register("drop")(technique("twice"))
    with pytest.raises(InvalidArgument, match="Mine") as caught:
        spfde.register("drop")(technique("twice", "Other"))
    assert problem_of(caught) == ("Other.name", "twice")
    assert registered("drop")["twice"] is first


def test_the_same_class_again_takes_its_own_place() -> None:
    """As when a cell of a notebook runs again."""
    spfde.register("drop")(technique("again"))
    order = list(registered("drop"))
    second = spfde.register("drop")(technique("again"))
    assert registered("drop")["again"] is second
    assert list(registered("drop")) == order


@pytest.mark.parametrize("name", ["magnitud", 7, None])
def test_an_unknown_name_is_refused_for_the_argument_where_it_stands(name: object) -> None:
    with pytest.raises(InvalidArgument, match="magnitude") as caught:
        find("drop", name, argument="sparsity.drop")
    assert problem_of(caught) == ("sparsity.drop", name)
