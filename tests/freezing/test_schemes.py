"""The four schemes: timelines worked by hand, and what holds for any costs."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import spfde
from helpers.registering import forgetting_names
from helpers.training import EPOCHS, SAMPLES, train
from spfde.app.methods import render_catalogue
from spfde.app.train.options import choose_recipe
from spfde.core.errors import InvalidArgument
from spfde.freezing import FreezingScheme, ProgressiveFreezing, Savings
from spfde.freezing.plan import FreezePlan, Timing
from spfde.freezing.schemes import paused, solve

SCHEMES = ("single-shot", "single-shot-resume", "periodic", "delayed-periodic")


def saved(backward: Sequence[Sequence[float]], plan: FreezePlan) -> float:
    """The saving, block by block: each is summed over the epochs in which it is frozen."""
    total = 0.0
    for index, flops in enumerate(backward):
        total += sum(flop for flop, count in zip(flops, plan.frozen, strict=True) if count > index)
    return total


def most_possible(error: InvalidArgument) -> float:
    found = re.search(r"most possible is (\d\.\d{3})", str(error))
    assert found is not None
    return float(found[1])


def equal(n_blocks: int, epochs: int, flops: float = 2.0) -> list[list[float]]:
    return [[flops] * epochs for _ in range(n_blocks)]


def test_single_shot_and_resume_by_hand():
    # Two of three blocks may be frozen, 2 FLOPs an epoch each, of 90 FLOPs in all (3 blocks x 3 x 10 epochs). The last
    # two epochs train everything. From epoch 3: 5 + 3 epochs, 16 FLOPs; from epoch 2: 6 + 4 epochs, 20 FLOPs. 18 are
    # asked for, so that the second block waits an epoch longer. At update epochs it cannot.
    def plan(timing: Timing) -> FreezePlan:
        savings = Savings(equal(3, 10), 90.0, 0.2, 2, 2, timing=timing)
        return solve(savings, scheme="single-shot-resume", resume_epochs=2)

    assert plan("update").frozen == (0, 0, 1, 1, 2, 2, 2, 2, 0, 0)
    exact = plan("exact")
    assert exact.frozen == (0, 0, 1, 1, 1, 2, 2, 2, 0, 0)
    assert exact.freeze_epochs == (2, 5, None)
    assert exact.start_epoch == 2
    assert exact.resume_epoch == 8
    assert exact.reduction == pytest.approx(18 / 90)
    assert exact.learning_stops == (2, 5, 10)


def test_every_block_is_frozen_as_much_earlier_as_everything_trains_again_in_the_end():
    savings = Savings(equal(4, 40), 480.0, 0.2, 2, 3)
    once = solve(savings)
    resumed = solve(savings, scheme="single-shot-resume", resume_epochs=6)
    assert resumed.freeze_epochs == tuple(at and at - 6 for at in once.freeze_epochs)
    assert resumed.reduction == once.reduction


def test_everything_trains_again_for_a_tenth_of_the_run_if_nothing_else_is_said():
    def resume_epoch(epochs: int, interval: int) -> int | None:
        savings = Savings(equal(2, epochs), 6.0 * epochs, 0.05, interval, 1)
        return solve(savings, scheme="single-shot-resume").resume_epoch

    assert resume_epoch(160, 5) == 145
    assert resume_epoch(100, 4) == 88
    assert resume_epoch(20, 2) == 18
    assert resume_epoch(10, 3) == 7


def test_the_periods_by_hand():
    assert paused(9, 1, 2) == (0, 2, 1, 2, 0, 2, 1, 2, 0)
    assert paused(8, 1, 3, delay=3) == (0, 0, 0, 0, 3, 1, 3, 0)
    # Of eight epochs the front trains in two, the middle in four.
    frozen = paused(8, 2, 3)
    assert sum(count <= 0 for count in frozen) == 2
    assert sum(count <= 2 for count in frozen) == 4


def test_periodic_by_hand():
    # Four blocks, 2 FLOPs an epoch each, 8 epochs, 96 FLOPs in all. A front block saves 6 epochs, a middle one 4: one
    # of each 20 FLOPs (20.8 %), two middle ones 16, one front and two middle ones 28 (29.2 %).
    plan = solve(Savings(equal(4, 8), 96.0, 0.2, 2, 4), scheme="periodic")
    assert plan.frozen == (0, 2, 1, 2, 0, 2, 1, 2)
    assert plan.freeze_epochs == (1, 1, None, None)
    assert plan.reduction == pytest.approx(20 / 96)
    assert plan.pauses
    assert plan.resume_epoch is None
    assert plan.learning_stops == (8, 8, 8, 8)
    assert solve(Savings(equal(4, 8), 96.0, 0.26, 2, 4), scheme="periodic").frozen == (0, 3, 1, 3, 0, 3, 1, 3)


def test_blocks_of_one_kind_alone_are_taken_where_two_kinds_would_save_much_too_much():
    # 16 of 96 FLOPs are wanted: two middle blocks meet that, a front and a middle one would save four points more.
    assert solve(Savings(equal(4, 8), 96.0, 1 / 6, 2, 4), scheme="periodic").frozen == (0, 2, 0, 2, 0, 2, 0, 2)


def test_delayed_periodic_by_hand():
    # A quarter of 16 epochs is epoch 4. 12 epochs are left: a front block saves 9 epochs, a middle one 6; of 192 FLOPs
    # 0.2 is 38.4: a front and two middle blocks save 42.
    plan = solve(Savings(equal(4, 16), 192.0, 0.2, 2, 4), scheme="delayed-periodic")
    assert plan.frozen == (0, 0, 0, 0, *(0, 3, 1, 3) * 3)
    assert plan.start_epoch == 5
    assert plan.reduction == pytest.approx(42 / 192)
    # More blocks pause than without the delay.
    together = solve(Savings(equal(4, 16), 192.0, 0.2, 2, 4), scheme="periodic")
    assert max(together.frozen) < max(plan.frozen)


def test_the_delay_is_shorter_where_the_target_asks_for_it_and_can_be_given():
    # With all four blocks pausing from epoch 4, 8, … of 32: 72, 24 less each; 0.4 of 384 is 153.6.
    savings = Savings(equal(4, 32), 384.0, 0.4, 4, 4)
    assert solve(savings, scheme="delayed-periodic").start_epoch == 4 + 1
    later = Savings(equal(4, 32), 384.0, 0.1, 4, 4)
    assert solve(later, scheme="delayed-periodic", start_epoch=16).start_epoch == 17
    with pytest.raises(InvalidArgument, match="multiple of the update interval"):
        solve(later, scheme="delayed-periodic", start_epoch=6)


@pytest.mark.parametrize(
    ("scheme", "options", "most"),
    [
        # 60 FLOPs in all, 2 blocks of 2 FLOPs in 10 epochs: 8 + 6 epochs, 6 + 4, 7 + 7, and 5 + 5 from epoch 2 on.
        ("single-shot", {}, "0.466"),
        ("single-shot-resume", {"resume_epochs": 2}, "0.333"),
        ("periodic", {}, "0.466"),
        ("delayed-periodic", {}, "0.400"),
    ],
)
def test_a_target_out_of_reach_is_refused_with_the_most_possible_and_that_can_be_reached(scheme, options, most):
    with pytest.raises(InvalidArgument, match=rf"flops_reduction=0.9.*most possible is {most}"):
        solve(Savings(equal(2, 10), 60.0, 0.9, 2, 2), scheme=scheme, **options)
    assert solve(Savings(equal(2, 10), 60.0, float(most), 2, 2), scheme=scheme, **options).reduction >= float(most)


@pytest.mark.parametrize(("given", "message"), [(3, "Pass 2 or 4"), (1, "Pass 2,"), (10, "within the run")])
def test_resume_epochs_that_cannot_be_are_refused(given, message):
    with pytest.raises(InvalidArgument, match=message):
        solve(Savings(equal(2, 10), 60.0, 0.1, 2, 2), scheme="single-shot-resume", resume_epochs=given)


def test_a_run_of_one_interval_has_no_epoch_to_freeze_at_and_resume_from():
    with pytest.raises(InvalidArgument, match=r"most possible is 0\.000"):
        solve(Savings(equal(1, 5), 20.0, 0.01, 5, 1), scheme="single-shot-resume")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_no_reduction_freezes_nothing(scheme):
    assert solve(Savings(equal(2, 6), 36.0, 0.0, 2, 2), scheme=scheme).frozen == (0,) * 6


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"scheme": "periodic", "start_epoch": 4}, "delayed-periodic"),
        ({"resume_epochs": 4}, "single-shot-resume"),
        ({"scheme": "single-shot-resume", "resume_epochs": 0}, "resume_epochs"),
        ({"scheme": "delayed-periodic", "start_epoch": 4, "flops_reduction": 0.0}, "flops_reduction"),
    ],
)
def test_fields_that_do_not_go_together_are_refused_by_name(fields, named):
    with pytest.raises(InvalidArgument, match=named):
        ProgressiveFreezing(**fields)


def test_an_unknown_scheme_is_refused_with_the_nearest():
    for refuse in (lambda: ProgressiveFreezing(scheme="periodik"), lambda: solve(savings(), scheme="periodik")):
        with pytest.raises(InvalidArgument, match="Did you mean 'periodic'") as caught:
            refuse()
        assert caught.value.problems[0].argument == "scheme"


# --- as far as possible ----------------------------------------------------------------------------------------------


def savings(reduction: float = 0.9, *, epochs: int = 10, interval: int = 2) -> Savings:
    """Of 6 FLOPs an epoch, two blocks of 2 each may be frozen."""
    return Savings(equal(2, epochs), 6.0 * epochs, reduction, interval, 2)


@pytest.mark.parametrize(
    ("scheme", "options", "frozen"),
    [
        ("single-shot", {}, (0, 0, 1, 1, 2, 2, 2, 2, 2, 2)),
        ("single-shot", {"start_epoch": 4}, (0, 0, 0, 0, 1, 1, 2, 2, 2, 2)),
        ("single-shot-resume", {"resume_epochs": 2}, (0, 0, 1, 1, 2, 2, 2, 2, 0, 0)),
        ("periodic", {}, (0, 2, 2, 2, 0, 2, 2, 2, 0, 2)),
        ("delayed-periodic", {}, (0, 0, 0, 2, 2, 2, 0, 2, 2, 2)),
    ],
)
def test_what_can_be_reached_is_planned_where_the_target_cannot_by_hand(scheme, options, frozen):
    plan = solve(savings(), scheme=scheme, as_far_as_possible=True, **options)
    assert plan.frozen == frozen
    assert plan.asked == 0.9
    assert plan.reduction == pytest.approx(2 * sum(frozen) / 60)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("epochs", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("interval", [1, 2])
def test_in_a_run_of_any_length_the_most_is_planned_be_it_nothing(scheme, epochs, interval):
    plan = solve(savings(epochs=epochs, interval=interval), scheme=scheme, as_far_as_possible=True)
    assert len(plan.frozen) == epochs
    with pytest.raises(InvalidArgument) as caught:
        solve(savings(epochs=epochs, interval=interval), scheme=scheme)
    most = most_possible(caught.value)
    assert most <= plan.reduction < most + 0.001
    assert (plan.reduction == 0) == (plan.start_epoch is None)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_target_in_reach_is_planned_the_same_whether_or_not_less_would_do(scheme):
    assert solve(savings(0.2), scheme=scheme, as_far_as_possible=True) == solve(savings(0.2), scheme=scheme)
    assert solve(savings(0.2), scheme=scheme).asked == 0.2


def test_a_start_that_was_given_is_checked_in_any_case():
    with pytest.raises(InvalidArgument, match="start_epoch=10"):
        solve(savings(), start_epoch=10, as_far_as_possible=True)


# --- a stranger's ----------------------------------------------------------------------------------------------------


@pytest.fixture
def together() -> Iterator[type[FreezingScheme]]:
    with forgetting_names("freezing-scheme"):

        @spfde.register("freezing-scheme")
        class Together(spfde.freezing.FreezingScheme):
            name = "together"
            summary = "All blocks are frozen at the same time, as late as can be."
            references = ("@misc{mine,\n  title = {Mine}\n}",)

            def timelines(self, savings: Savings) -> Iterator[tuple[int, ...]]:
                for start in savings.update_epochs(savings.epochs - 1):
                    yield (0,) * start + (savings.n_blocks,) * (savings.epochs - start)

        yield Together


def test_a_stranger_s_scheme_is_solved_for_by_hand(together):
    # From epoch 8 on two blocks save 2 epochs each, 8 FLOPs of 60; from epoch 6 on 16, and from epoch 2 on 32.
    assert solve(savings(0.2), scheme="together").frozen == (0,) * 6 + (2,) * 4
    assert solve(savings(), scheme="together", as_far_as_possible=True).frozen == (0,) * 2 + (2,) * 8
    with pytest.raises(InvalidArgument, match=r"most possible is 0\.533"):
        solve(savings(), scheme="together")


def test_a_stranger_s_scheme_works_in_recipes_toml_options_the_catalogue_and_citations(together):
    recipe = spfde.Recipe(freezing=ProgressiveFreezing(scheme="together"))
    assert spfde.Recipe.from_toml(recipe.to_toml()) == recipe
    assert choose_recipe("dense", freeze=0.2, freeze_scheme="together") == recipe
    assert "together" in render_catalogue()
    assert "title = {Mine}" in spfde.cite(recipe)
    with pytest.raises(InvalidArgument, match=r"start_epoch.*single-shot"):
        ProgressiveFreezing(scheme="together", start_epoch=2)


def test_a_run_freezes_by_a_stranger_s_scheme_and_the_plan_says_so(together, parts):
    recipe = spfde.Recipe(
        freezing=ProgressiveFreezing(flops_reduction=0.1, scheme="together"), update_interval_epochs=2
    )
    bill = spfde.plan(parts.model, torch.zeros(1, 2, 8, 8), recipe, EPOCHS, SAMPLES)
    session = spfde.attach(parts.model, parts.optimizer, parts.loader, recipe, epochs=EPOCHS)
    train(parts, session)
    assert tuple(row.frozen_blocks for row in session.cost.rows) == bill.blueprint.freeze_plan.frozen
    assert len({0, *bill.blueprint.freeze_plan.frozen}) == 2
    assert "together" in str(bill)


@pytest.mark.parametrize("wrong", [(0, 0, 0), (0, 0, 0, 3), (0, 0, -1, 0), (0, 1, 1, 0)])
def test_a_timeline_that_cannot_be_is_refused_by_the_scheme_s_name(together, wrong):
    together.timelines = lambda self, savings: [wrong]
    with pytest.raises(InvalidArgument, match=r"Together\.timelines"):
        solve(savings(epochs=4), scheme="together")


# --- properties ------------------------------------------------------------------------------------------------------


@st.composite
def costs(draw):
    epochs, interval = draw(st.integers(2, 40)), draw(st.integers(1, 6))
    n = draw(st.integers(1, 6))
    flops = st.floats(0.1, 10.0)
    density = draw(st.lists(st.floats(0.05, 1.0), min_size=epochs, max_size=epochs))
    backward = [[flop * d for d in density] for flop in draw(st.lists(flops, min_size=n, max_size=n))]
    total = 1.5 * sum(map(sum, backward)) * draw(st.floats(1.0, 1.5))
    return backward, total, interval, draw(st.integers(1, n))


@settings(max_examples=150, deadline=None)
@given(costs(), st.sampled_from(SCHEMES), st.floats(0.01, 0.6), st.sampled_from(["exact", "update"]))
def test_the_target_is_met_by_a_front_of_allowed_blocks_or_refused(cost, scheme, reduction, timing):
    backward, total, interval, n_blocks = cost
    try:
        plan = solve(Savings(backward, total, reduction, interval, n_blocks, timing), scheme=scheme)
    except InvalidArgument as error:
        most = most_possible(error)
        assert most < reduction
        if most > 0:
            solve(Savings(backward, total, most, interval, n_blocks, timing), scheme=scheme)
        return
    assert plan.reduction >= reduction - 1e-9
    assert plan.reduction == pytest.approx(saved(backward, plan) / total)
    assert len(plan.frozen) == len(backward[0])
    assert all(0 <= count <= n_blocks for count in plan.frozen)
    assert plan.n_blocks == len(plan.freeze_epochs) == len(backward)
    for block, at in enumerate(plan.freeze_epochs):
        assert at == next((epoch for epoch, count in enumerate(plan.frozen) if count > block), None)
    if not plan.pauses and timing == "update":
        assert all(at is None or at % interval == 0 for at in plan.freeze_epochs)


@settings(max_examples=60, deadline=None)
@given(costs(), st.floats(0.01, 0.4))
def test_the_pair_of_front_and_middle_overshoots_least_up_to_a_point(cost, reduction):
    backward, total, interval, n_blocks = cost
    try:
        plan = solve(Savings(backward, total, reduction, interval, n_blocks), scheme="periodic")
    except InvalidArgument:
        return
    epochs = len(backward[0])
    pairs = [(front, middle) for middle in range(n_blocks + 1) for front in range(middle + 1)]
    savings = [saved(backward, FreezePlan(len(backward), paused(epochs, *pair), 0.0)) / total for pair in pairs]
    assert plan.reduction <= min(value for value in savings if value >= reduction - 1e-12) + 0.01
    assert plan.frozen in [paused(epochs, *pair) for pair in pairs]


@pytest.mark.parametrize("epochs", [1, 2, 3, 4, 5])
def test_the_paper_s_preset_trains_for_any_number_of_epochs_as_it_is_planned(parts, epochs):
    bill = spfde.plan(parts.model, torch.zeros(1, 2, 8, 8), spfde.presets.spfde, epochs, SAMPLES)
    session = spfde.attach(parts.model, parts.optimizer, parts.loader, spfde.presets.spfde, epochs=epochs)
    train(parts, session)
    assert [row.frozen_blocks for row in session.cost.rows] == list(bill.blueprint.freeze_plan.frozen)
    assert bill.blueprint.freeze_plan.asked == 0.2


def test_an_interval_of_one_epoch_is_not_to_be_shortened():
    with pytest.raises(InvalidArgument) as caught:
        solve(Savings(equal(3, 6), 54.0, 0.6, 1, 2))
    assert "shorten" not in str(caught.value)
    with pytest.raises(InvalidArgument) as caught:
        solve(Savings(equal(3, 6), 54.0, 0.6, 2, 2))
    assert "shorten update_interval_epochs" in str(caught.value)


def test_one_block_is_told_in_the_singular():
    with pytest.raises(InvalidArgument) as caught:
        solve(Savings(equal(2, 2), 12.0, 0.9, 1, 1))
    assert "with 1 block frozen" in str(caught.value)
