"""Layers that are frozen one by one, within residual blocks and between two updates: on a loop, by every engine."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import spfde
from helpers.freezing import EPOCHS, attach, freezing_recipe, plan
from helpers.native import both_engines
from helpers.resuming import METHODS, Loop, assert_equal, finish, top
from helpers.training import make_parts, step, train

LAYERS = [
    *("stem", "blocks.0.conv1", "blocks.0.conv2"),
    *("blocks.1.conv1", "blocks.1.conv2", "blocks.2.conv1", "blocks.2.conv2"),
]
"""Of the small network; the classifier is the head."""
BY_LAYER = spfde.ProgressiveFreezing(flops_reduction=0.15, unit="layer")
# Five of eight layers may be frozen, from a start at epoch 7 on in epochs 7, 7, 8, 9, 10, which saves 14.7 %. From
# epoch 6 on the fifth is not needed, and the fourth not until epoch 10.
FROZEN = (0, 0, 0, 0, 0, 0, 2, 3, 3, 3, 4, 4)


def recipe(method: str = "mest-ems", **changes: Any) -> spfde.Recipe:
    return freezing_recipe(**{"freezing": BY_LAYER, "method": METHODS[method], **changes})


def test_each_layer_is_frozen_with_its_norm_and_the_plan_names_it() -> None:
    bill = plan(make_parts(), recipe())
    partition = bill.blueprint.partition
    assert bill.to_dict()["block_names"] == LAYERS
    assert partition.sizes == (3, 2, 2)
    assert partition.blocks[1].parameters == ("blocks.0.conv1.weight", "blocks.0.bn1.weight", "blocks.0.bn1.bias")
    assert bill.blueprint.freeze_plan.frozen == FROZEN
    assert 0.15 <= bill.blueprint.freeze_plan.reduction < 0.155


@both_engines
def test_layers_move_until_they_are_frozen_and_no_longer(engine: str) -> None:
    parts = make_parts()
    session = attach(parts, recipe(learning_rate=None), engine)
    before: dict[str, torch.Tensor] = {}
    moved: list[list[bool]] = []

    def remember(_: int) -> None:
        before.update(copy.deepcopy(parts.model.state_dict()))

    def look(_: int) -> None:
        now = parts.model.state_dict()
        found = []
        for layer in session.blueprint.partition.blocks:
            same = {torch.equal(now[n], before[n]) for n in now if n.rpartition(".")[0] in layer.modules}
            assert len(same) == 1, "a layer's weights and its norm's statistics move together"
            found.append(same == {False})
        moved.append(found)

    train(parts, session, at_top=remember, at_bottom=look)
    assert moved == [[layer >= count for layer in range(7)] for count in FROZEN]


@pytest.mark.parametrize("method", ["mest-ems", "rigl", pytest.param("topkast", marks=pytest.mark.long)])
def test_the_bill_of_a_finished_run_equals_the_plan_and_the_masks_end_at_target(method: str) -> None:
    parts = make_parts()
    bill = plan(parts, recipe(method))
    session = attach(parts, recipe(method))
    targets = bill.blueprint.target

    def look(_: int) -> None:
        for layer in session.blueprint.partition.blocks[: session.frozen_blocks]:
            assert all(int(session.masks[n].sum()) == targets[n] for n in layer.parameters if n in targets)

    train(parts, session, at_top=look)
    session.verify()
    assert [row.cost for row in session.cost.rows] == list(bill.epoch_costs)
    assert {name: int(mask.sum()) for name, mask in session.masks.items()} == targets


def test_each_layer_has_a_learning_rate_of_its_own() -> None:
    parts = make_parts()
    session = attach(parts, recipe(sieving=None))
    assert len(parts.optimizer.param_groups) == 8
    rates: list[list[float]] = []
    train(parts, session, at_bottom=lambda _: rates.append([group["lr"] for group in parts.optimizer.param_groups]))
    assert [[rate == 0 for rate in row[:7]] for row in rates] == [[layer < n for layer in range(7)] for n in FROZEN]


@both_engines
def test_a_run_that_was_stopped_ends_like_one_that_never_stopped(engine: str) -> None:
    loop = Loop(recipe(), engine, epochs=EPOCHS)
    assert_equal(loop.end_with_stops([top(7), top(9)]), loop.end_with_stops([]))


@pytest.mark.long
@pytest.mark.parametrize("name", METHODS)
def test_every_method_resumes_where_layers_are_frozen(name: str) -> None:
    loop = Loop(recipe(name), epochs=EPOCHS)
    saved, expected = loop.states()
    for state in saved.values():
        assert_equal(finish(*loop.resume(state)), expected)


def test_detaching_in_any_epoch_thaws_everything() -> None:
    for stop in (7, 8, 11):
        parts = make_parts()
        plain = [set(vars(module)) for module in parts.model.modules()]
        session = attach(parts, recipe(sieving=None))
        for epoch in session.epochs():
            x, y = next(iter(parts.loader))
            step(parts, session, x, y)
            if epoch == stop:
                session.detach()
        assert all(p.requires_grad for p in parts.model.parameters())
        assert [set(vars(module)) for module in parts.model.modules()] == plain
        assert len(parts.optimizer.param_groups) == 1


@pytest.mark.long
@pytest.mark.parametrize("criterion", ["structure", "representation"])
def test_a_layer_that_has_converged_is_frozen_earlier_one_an_update(criterion: str) -> None:
    parts = make_parts()
    early = spfde.ProgressiveFreezing(
        flops_reduction=0.15, unit="layer", criterion=criterion, threshold=0.01, probe_samples=4
    )
    session = attach(parts, recipe(freezing=early))
    train(parts, session)
    found = [row.frozen_blocks for row in session.cost.rows]
    assert all(now >= planned for now, planned in zip(found, FROZEN, strict=True))
    assert found[4] == 1
    session.verify()
