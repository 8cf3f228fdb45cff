"""Methods that are two criteria and a schedule: SET, RigL, MEST, ITOP, the static mask, and any other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import spfde
from helpers.masking import MaskedRun
from spfde.core.errors import InvalidArgument
from spfde.sparsity import (
    MEST,
    NM,
    SET,
    SETITOP,
    Block,
    DropGrow,
    Gradient,
    Magnitude,
    MagnitudePlusGradient,
    Random,
    RigL,
    RigLITOP,
    SparsityMethod,
    StaticSparse,
)


def trained(method: SparsityMethod) -> dict[str, Any]:
    """A small run under a method; everything that it leaves."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 20), nn.Tanh(), nn.Linear(20, 15), nn.Linear(15, 5))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
    layers = {name: model.get_parameter(name) for name in ("2.weight", "3.weight")}
    run = MaskedRun(layers, optimizer, method, epochs=8, interval=2)
    for epoch in range(8):
        run.begin_epoch(epoch)
        for _ in range(2):
            optimizer.zero_grad()
            model(torch.randn(4, 10)).square().mean().backward()
            optimizer.step()
    return {**model.state_dict(), **run.masker.masks, "drawn": run.masker.generator.get_state()}


@pytest.mark.parametrize(
    ("paper", "fields"),
    [
        (SET(sparsity=0.8), {}),
        (SET(sparsity=0.8, decay="constant", drop_fraction=0.5), {"decay": "constant", "drop_fraction": 0.5}),
        (SET(sparsity=0.8, structure=Block(rows=5, columns=5)), {"structure": Block(rows=5, columns=5)}),
        (RigL(sparsity=0.8), {"grow": Gradient(), "stop_fraction": 0.75}),
        (SETITOP(sparsity=0.8), {"drop_fraction": 0.5, "distribution": "erk"}),
        (RigLITOP(sparsity=0.8), {"grow": "gradient", "drop_fraction": 0.5, "distribution": "erk"}),
        (StaticSparse(sparsity=0.8), {"drop_fraction": 0.0}),
        (
            MEST(sparsity=0.8, soft_bound_steps=(0.05,), decay_at=()),
            {"drop_fraction": 0.0, "soft_bound": 0.05, "decay": "constant"},
        ),
        (
            MEST(sparsity=0.8, soft_bound=False, drop_steps=(0.2,), decay_at=(), gradient_weight=0.5),
            {"drop": MagnitudePlusGradient(), "drop_fraction": 0.2, "decay": "constant"},
        ),
    ],
    ids=lambda value: value.name if isinstance(value, SparsityMethod) else "",
)
def test_the_papers_methods_are_drop_and_grow_with_fields_of_their_own(
    paper: SparsityMethod, fields: dict[str, Any]
) -> None:
    one, other = trained(paper), trained(DropGrow(sparsity=0.8, **fields))
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def test_other_criteria_train_otherwise() -> None:
    by_magnitude, by_chance = trained(SET(sparsity=0.8)), trained(DropGrow(sparsity=0.8, drop=Random()))
    assert not torch.equal(by_magnitude["2.weight"], by_chance["2.weight"])


@pytest.mark.parametrize(
    ("method", "field", "value"),
    [
        (SET, "drop", Magnitude()),
        (SET, "grow", Gradient()),
        (SET, "soft_bound", 0.1),
        (RigL, "grow", Random()),
        (RigL, "decay", "constant"),
        (StaticSparse, "drop_fraction", 0.3),
        (MEST, "drop", MagnitudePlusGradient()),
        (MEST, "stop_fraction", 0.5),
        (SETITOP, "drop", Random()),
    ],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_what_a_paper_fixes_cannot_be_set(method: type[SparsityMethod], field: str, value: Any) -> None:
    with pytest.raises(InvalidArgument) as caught:
        method(sparsity=0.9, **{field: value})
    assert [problem.argument for problem in caught.value.problems] == [field]
    assert field not in method(sparsity=0.9).model_dump()


@pytest.mark.parametrize("field", ["drop", "grow"])
@pytest.mark.parametrize("value", [3, None, Block()])
def test_what_is_no_criterion_is_refused(field: str, value: Any) -> None:
    with pytest.raises(InvalidArgument) as caught:
        DropGrow(sparsity=0.9, **{field: value})
    assert [problem.argument for problem in caught.value.problems] == [field]


def test_a_drop_criterion_alone_does_not_grow() -> None:
    with pytest.raises(InvalidArgument, match="random"):
        DropGrow(sparsity=0.9, grow="magnitude")


def test_set_decays_by_a_cosine_or_not_at_all() -> None:
    method = SET(sparsity=0.9, drop_fraction=0.4, stop_fraction=0.8)
    assert [method.drop_fraction_at(p) for p in (0.0, 0.4, 0.8, 1.0)] == pytest.approx([0.4, 0.2, 0.0, 0.0])
    constant = SET(sparsity=0.9, drop_fraction=0.4, decay="constant", stop_fraction=0.8)
    assert [constant.drop_fraction_at(p) for p in (0.0, 0.79, 0.8)] == [0.4, 0.4, 0.0]


def test_the_soft_bound_decays_with_the_drop_fraction() -> None:
    method = DropGrow(sparsity=0.9, soft_bound=0.1, drop_fraction=0.5, stop_fraction=0.5)
    # Of 1000 units 100 are the target, and 200 are active at first; of the target a half goes, and along the cosine
    # a fourth by a quarter of the run.
    assert [method.mutation_counts(100, 1000, 200, p) for p in (0.0, 0.25, 0.5)] == [(100, 200), (75, 150), (100, 100)]


def test_rigl_stops_at_its_fraction_of_the_run_and_needs_one_dense_gradient() -> None:
    method = RigL(sparsity=0.9)
    assert method.dense_gradients == "one step"
    assert [method.drop_fraction_at(p) for p in (0.0, 0.375, 0.75, 0.9)] == pytest.approx([0.3, 0.15, 0.0, 0.0])


def test_mest_uses_the_soft_bound_or_the_drop_steps() -> None:
    soft, elastic = MEST(sparsity=0.9), MEST(sparsity=0.9, soft_bound=False)
    stages = (0.0, 89 / 160, 90 / 160, 119 / 160, 120 / 160)
    assert [soft.excess_at(p) for p in stages] == [0.05, 0.05, 0.025, 0.025, 0.0]
    assert [elastic.drop_fraction_at(p) for p in stages] == [0.2, 0.2, 0.1, 0.1, 0.0]
    assert all(soft.drop_fraction_at(p) == 0.0 == elastic.excess_at(p) for p in stages)


def test_mest_needs_a_gradient_only_for_its_gradient_term_and_never_a_dense_one() -> None:
    assert not MEST(sparsity=0.9).drop_criterion.needs_gradient
    method = MEST(sparsity=0.9, gradient_weight=0.25)
    assert method.drop_criterion == MagnitudePlusGradient(gradient_weight=0.25)
    assert method.dense_gradients == "none"


@pytest.mark.parametrize(
    ("fields", "argument"),
    [
        ({"soft_bound_steps": (0.05, 0.0)}, "soft_bound_steps"),
        ({"soft_bound": False, "drop_steps": (0.2,)}, "drop_steps"),
        ({"decay_at": (0.7, 0.5)}, "decay_at"),
    ],
)
def test_stages_of_mest_must_fit_their_boundaries(fields: dict[str, Any], argument: str) -> None:
    with pytest.raises(InvalidArgument, match=argument):
        MEST(sparsity=0.9, **fields)


@pytest.mark.parametrize("method", [DropGrow, MEST])
def test_a_soft_bound_does_not_fit_a_structure_that_fixes_the_count(method: type[DropGrow]) -> None:
    bound = {"soft_bound": 0.1} if method is DropGrow else {}
    with pytest.raises(InvalidArgument, match="soft_bound=") as caught:
        method(sparsity=0.5, structure=NM(n=1, m=2), **bound)
    assert [problem.argument for problem in caught.value.problems] == ["structure"]
    assert method(sparsity=0.5, structure=NM(n=1, m=2), **dict.fromkeys(bound, 0) or {"soft_bound": False})


def test_criteria_are_cited_with_the_method() -> None:
    assert DropGrow(sparsity=0.9).cited == ("mocanu2018set",)
    both = DropGrow(sparsity=0.9, drop=MagnitudePlusGradient(), grow=Gradient())
    assert both.cited == ("mocanu2018set", "yuan2021mest", "evci2020rigl")
    assert spfde.cite(spfde.Recipe(sparsity=RigL(sparsity=0.9, distribution="erk"))).count("evci2020rigl") == 1
