"""Every freezing scheme on a loop: what is frozen does not move, what thaws does, and the bill is the plan's.

At update epochs; between two of them see test_layers.py.
"""

from __future__ import annotations

import copy
import warnings
from itertools import pairwise
from typing import Any

import pytest
import torch

import spfde
from helpers.compiling import recompile_limit
from helpers.freezing import EPOCHS, attach, freezing_recipe, plan
from helpers.native import both_engines, needs_kernels
from helpers.resuming import METHODS, Loop, assert_equal, finish, top
from helpers.short import pairs, short
from helpers.training import SAMPLES, make_parts, step, train
from spfde.freezing.rates import learning_rate_factor

SCHEMES = {
    "single-shot": spfde.ProgressiveFreezing(flops_reduction=0.15, timing="update"),
    "single-shot-resume": spfde.ProgressiveFreezing(flops_reduction=0.2, scheme="single-shot-resume", timing="update"),
    "periodic": spfde.ProgressiveFreezing(flops_reduction=0.25, scheme="periodic"),
    "delayed-periodic": spfde.ProgressiveFreezing(flops_reduction=0.22, scheme="delayed-periodic"),
}
FROZEN = {
    "single-shot": (0, 0, 0, 0, 0, 0, 1, 1, 2, 2, 2, 2),
    "single-shot-resume": (0, 0, 0, 0, 1, 1, 2, 2, 2, 2, 0, 0),
    "periodic": (0, 2, 1, 2, 0, 2, 1, 2, 0, 2, 1, 2),
    "delayed-periodic": (0, 0, 0, 2, 1, 2, 0, 2, 1, 2, 0, 2),
}
COUNTED = ("mest-ems", "mest-gradient", "rigl", "set-block", "deepr", "topkast")
every_scheme = pytest.mark.parametrize("scheme", SCHEMES)


def recipe(scheme: str, method: spfde.sparsity.SparsityMethod | None = None, **changes: Any) -> spfde.Recipe:
    own = {"freezing": SCHEMES[scheme], "method": spfde.MEST(sparsity=0.8) if method is None else method}
    return freezing_recipe(**{**own, **changes})


@every_scheme
def test_the_session_freezes_and_thaws_as_planned(scheme: str) -> None:
    parts = make_parts()
    bill = plan(parts, recipe(scheme))
    seen = []
    session = attach(parts, recipe(scheme))
    train(parts, session, at_top=lambda _: seen.append(session.frozen_blocks))
    assert tuple(seen) == bill.blueprint.freeze_plan.frozen == FROZEN[scheme]
    assert bill.to_dict()["frozen_blocks"] == seen
    assert [row.frozen_blocks for row in session.cost.rows] == seen


@pytest.mark.parametrize(
    ("engine", "scheme"),
    [
        *(pytest.param("native", scheme, marks=needs_kernels) for scheme in SCHEMES),
        *(pytest.param("masked", each, marks=() if each == "periodic" else pytest.mark.long) for each in SCHEMES),
    ],
)
def test_blocks_move_in_the_epochs_in_which_they_train_and_in_no_other(scheme: str, engine: str) -> None:
    parts = make_parts()
    session = attach(parts, recipe(scheme, learning_rate=None), engine)
    before: dict[str, torch.Tensor] = {}
    moved: list[list[bool]] = []

    def remember(_: int) -> None:
        before.update(copy.deepcopy(parts.model.state_dict()))

    def look(_: int) -> None:
        now = parts.model.state_dict()
        norms = {"running_mean", "running_var", "num_batches_tracked"}
        blocks = []
        for block in session.blueprint.partition.blocks:
            names = [n for n in now if n.rpartition(".")[0] in block.modules]
            assert any(n.rpartition(".")[2] in norms for n in names)
            same = {bool(torch.equal(now[n], before[n])) for n in names}
            assert len(same) == 1, "a block's weights and its statistics move together"
            blocks.append(same == {False})
        moved.append(blocks)

    train(parts, session, at_top=remember, at_bottom=look)
    assert moved == [[block >= count for block in range(3)] for count in FROZEN[scheme]]


@pytest.mark.parametrize(("name", "scheme"), pairs(COUNTED, tuple(SCHEMES)))
def test_the_bill_of_a_finished_run_equals_the_plan_and_the_masks_end_at_target(name: str, scheme: str) -> None:
    parts, method = make_parts(), METHODS[name]
    bill = plan(parts, recipe(scheme, method))
    session = attach(parts, recipe(scheme, method))
    train(parts, session)
    assert [row.cost for row in session.cost.rows] == list(bill.epoch_costs)
    for name, mask in session.masks.items():
        assert int(mask.sum()) == bill.blueprint.target[name]


PRUNES = {
    "gmp": spfde.GMP(sparsity=0.8, stop_fraction=1.0),
    # The threshold stays at nothing, so that the masks are dense until they are fixed.
    "str": spfde.STR(sparsity=0.8, stop_fraction=1.0, threshold_start=-50.0, threshold_decay=0.0),
}


@pytest.mark.parametrize("scheme", short(["single-shot", "single-shot-resume", "periodic"], ["single-shot-resume"]))
@pytest.mark.parametrize("method", PRUNES.values(), ids=PRUNES)
def test_what_goes_from_dense_to_sparse_grows_nothing_after_a_thaw_and_the_plan_knows(
    scheme: str, method: spfde.sparsity.SparsityMethod
) -> None:
    parts = make_parts()
    bill = plan(parts, recipe(scheme, method))
    session = attach(parts, recipe(scheme, method))
    counts: list[list[int]] = []
    train(parts, session, at_bottom=lambda _: counts.append([int(mask.sum()) for mask in session.masks.values()]))
    for before, now in pairwise(counts):
        assert all(a >= b for a, b in zip(before, now, strict=True))
    assert [row.training_flops for row in session.cost.rows] == [cost.training_flops for cost in bill.epoch_costs]


@every_scheme
def test_a_dense_run_saves_exactly_what_the_scheme_says(scheme: str) -> None:
    parts = make_parts()
    bill = plan(parts, spfde.Recipe(freezing=SCHEMES[scheme], update_interval_epochs=2))
    layers = bill.blueprint.cost.layers
    expected = 0
    for epoch, count in enumerate(bill.blueprint.freeze_plan.frozen):
        frozen = [block < count for block in bill.blueprint.block_of_layer]
        assert frozen == bill.blueprint.frozen_layers(bill.timeline[epoch])
        expected += 2 * SAMPLES * sum(f.forward_flops for f, is_frozen in zip(layers, frozen, strict=True) if is_frozen)
    assert bill.savings["freezing"] == expected
    assert expected / bill.dense_training_flops == pytest.approx(bill.blueprint.freeze_plan.reduction)
    assert bill.blueprint.freeze_plan.reduction >= SCHEMES[scheme].flops_reduction


@every_scheme
def test_masks_of_frozen_blocks_stay_and_those_of_pausing_blocks_wait_above_their_target(scheme: str) -> None:
    parts = make_parts()
    session = attach(parts, recipe(scheme))
    masks: dict[int, dict[str, torch.Tensor]] = {}
    train(parts, session, at_bottom=lambda epoch: masks.update({epoch: dict(session.masks)}))
    names = [[n for n in masks[0] if n.startswith(f"blocks.{block}.")] for block in range(3)]
    for epoch in range(1, EPOCHS):
        for block in range(FROZEN[scheme][epoch]):
            assert all(torch.equal(masks[epoch][n], masks[epoch - 1][n]) for n in names[block]), (epoch, block)
    # The soft bound lasts until 90/160 of the run, which is epoch 6.75: the update epoch before it is 6.
    above = [int(masks[epoch]["blocks.0.conv1.weight"].sum()) > round(0.2 * 324) for epoch in range(EPOCHS)]
    expected = {
        "single-shot": [True] * 4 + [False] * 8,
        "single-shot-resume": [True] * 2 + [False] * 10,
        # The front trains, and mutates, in the epochs 0, 4 and 8, the last of which it settles in.
        "periodic": [True] * 8 + [False] * 4,
        # And here in 0, 2, 6 and 10, which is at target for 120/160 of the run are over.
        "delayed-periodic": [True] * 10 + [False] * 2,
    }
    assert above == expected[scheme]


@every_scheme
def test_learning_rates_fall_to_zero_before_a_block_is_frozen_for_long_and_are_the_runs_own_otherwise(
    scheme: str,
) -> None:
    parts = make_parts()
    session = attach(parts, recipe(scheme))
    rates: list[list[float]] = []

    def look(_: int) -> None:
        group_of = {id(p): group for group in parts.optimizer.param_groups for p in group["params"]}
        convolutions = [parts.model.blocks[index].conv1.weight for index in range(3)]
        rates.append([group_of[id(weight)]["lr"] for weight in convolutions])

    train(parts, session, at_top=look)
    whole = [0.05 * learning_rate_factor(epoch, stop=EPOCHS, warmup=0) for epoch in range(EPOCHS)]
    assert [last for *_, last in rates] == whole
    first = [front for front, *_ in rates]
    if "periodic" in scheme:
        assert first == whole
        return
    stop = FROZEN[scheme].index(1)
    assert first[:10] == [0.05 * learning_rate_factor(epoch, stop=stop, warmup=0) for epoch in range(10)]
    assert first[10:] == (whole[10:] if scheme == "single-shot-resume" else [0.0, 0.0])


@pytest.mark.long
@every_scheme
@both_engines
def test_a_run_resumed_in_any_epoch_ends_like_one_that_never_stopped(scheme: str, engine: str) -> None:
    loop = Loop(recipe(scheme), engine, epochs=EPOCHS)
    saved, expected = loop.states()
    for state in saved.values():
        assert_equal(finish(*loop.resume(state)), expected)


@pytest.mark.long
@pytest.mark.parametrize("scheme", ["single-shot-resume", "periodic"])
@pytest.mark.parametrize("name", METHODS)
def test_every_method_resumes_amid_pauses_and_after_a_thaw(scheme: str, name: str) -> None:
    loop = Loop(recipe(scheme, METHODS[name]), epochs=EPOCHS)
    assert_equal(loop.end_with_stops([top(6), top(11)]), loop.end_with_stops([]))


@pytest.mark.parametrize("scheme", short(list(SCHEMES)[:3], ["periodic"]))
def test_detaching_in_any_epoch_thaws_everything(scheme: str) -> None:
    for stop in range(EPOCHS):
        parts = make_parts()
        plain = [set(vars(module)) for module in parts.model.modules()]
        session = attach(parts, recipe(scheme, sieving=None))
        for epoch in session.epochs():
            x, y = next(iter(parts.loader))
            step(parts, session, x, y)
            if epoch == stop:
                session.detach()
        assert all(p.requires_grad for p in parts.model.parameters())
        assert all(module.training for module in parts.model.modules())
        assert [set(vars(module)) for module in parts.model.modules()] == plain
        assert len(parts.optimizer.param_groups) == 1


@every_scheme
def test_the_plan_says_in_words_when_each_block_is_frozen(scheme: str) -> None:
    text = str(plan(make_parts(), recipe(scheme)))
    assert f"freezing: from epoch {next(e for e, n in enumerate(FROZEN[scheme]) if n)}" in text
    assert ("all trained again from epoch 10" in text) == (scheme == "single-shot-resume")
    assert f", {scheme}" in text
    n_front = sum(count > 0 for count in FROZEN[scheme])
    assert (f"frozen in {n_front} epochs" in text) == (scheme != "single-shot")


@every_scheme
def test_a_compiled_model_is_warned_of_the_fronts_that_it_will_have_and_not_of_each_freezing(scheme: str) -> None:
    parts = make_parts()
    parts.model = torch.compile(parts.model, backend="eager")
    with recompile_limit(6), warnings.catch_warnings():
        warnings.simplefilter("error")
        attach(parts, recipe(scheme, sieving=None)).detach()
    with recompile_limit(5), pytest.warns(UserWarning, match="2 frozen fronts"):
        attach(parts, recipe(scheme, sieving=None)).detach()
