"""The four schemes: timelines worked by hand, and what holds for any costs."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spfde.core.errors import InvalidArgument
from spfde.freezing import FreezePlan, ProgressiveFreezing, Savings, paused, solve

SCHEMES = ("single-shot", "single-shot-resume", "periodic", "delayed-periodic")


def saved(backward: Sequence[Sequence[float]], plan: FreezePlan) -> float:
    """The saving, block by block: each is summed over the epochs in which it is frozen."""
    total = 0.0
    for index, flops in enumerate(backward):
        total += sum(flop for flop, count in zip(flops, plan.frozen, strict=True) if count > index)
    return total


def equal(n_blocks: int, epochs: int, flops: float = 2.0) -> list[list[float]]:
    return [[flops] * epochs for _ in range(n_blocks)]


def test_single_shot_and_resume_by_hand():
    # Two of three blocks may be frozen, 2 FLOPs an epoch each, of 90 FLOPs in all (3 blocks x 3 x 10 epochs). The last
    # two epochs train everything. From epoch 4: 4 + 2 epochs, 12 FLOPs, 13.3 %; from epoch 2: 6 + 4 epochs, 20 FLOPs.
    plan = solve(Savings(equal(3, 10), 90.0, 0.2, 2, 2), scheme="single-shot-resume", resume_epochs=2)
    assert plan.frozen == (0, 0, 1, 1, 2, 2, 2, 2, 0, 0)
    assert plan.freeze_epochs == (2, 4, None)
    assert plan.start_epoch == 2
    assert plan.resume_epoch == 8
    assert plan.reduction == pytest.approx(20 / 90)
    assert plan.learning_stops == (2, 4, 10)


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
    at_once = solve(Savings(equal(4, 16), 192.0, 0.2, 2, 4), scheme="periodic")
    assert max(at_once.frozen) < max(plan.frozen)


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


# --- at target in time -----------------------------------------------------------------------------------------------


def test_a_block_settles_in_its_last_interval_before_it_is_frozen_for_good():
    plan = FreezePlan(3, (0, 0, 0, 0, 1, 1, 2, 2, 2, 2), 0.0)
    assert [plan.settles(0, epoch, 2) for epoch in range(10)] == [False] * 2 + [True] * 8
    assert [plan.settles(1, epoch, 2) for epoch in range(10)] == [False] * 4 + [True] * 6
    assert not any(plan.settles(2, epoch, 2) for epoch in range(10))
    assert [plan.last_turn(0, epoch, 2) for epoch in range(10)] == [0, 0, 2, 2, 2, 2, 2, 2, 2, 2]


def test_a_block_that_resumes_is_no_longer_held_at_its_target_from_its_first_update_epoch_on():
    plan = FreezePlan(2, (0, 0, 0, 0, 1, 1, 1, 0, 0, 0), 0.0)
    # Thawed in epoch 7, it may mutate at the update epoch 8.
    assert [plan.settles(0, epoch, 2) for epoch in range(10)] == [False] * 2 + [True] * 6 + [False] * 2
    assert plan.last_turn(0, 7, 2) == 2


def test_a_block_that_pauses_keeps_its_mask_until_its_last_update_epoch():
    plan = FreezePlan(3, paused(12, 1, 2), 0.0, pauses=True)
    # An update epoch every three epochs: the front trains at 0 and never again on an update epoch before the last
    # epoch; the middle at 0 and 6.
    assert [plan.last_turn(0, epoch, 3) for epoch in range(12)] == [0] * 12
    assert all(plan.settles(0, epoch, 3) for epoch in range(12))
    assert [plan.settles(1, epoch, 3) for epoch in range(12)] == [False] * 6 + [True] * 6
    assert not any(plan.settles(2, epoch, 3) for epoch in range(12))


def test_a_block_that_trains_in_the_last_epoch_is_pruned_there_and_settles_not_before():
    plan = FreezePlan(2, paused(9, 1, 1), 0.0, pauses=True)
    assert plan.frozen[-1] == 0
    assert not any(plan.settles(0, epoch, 3) for epoch in range(9))


def test_a_block_frozen_from_the_first_epoch_on_has_no_update_epoch_and_is_at_target():
    plan = FreezePlan(1, (1, 1, 1, 1), 0.0)
    assert plan.last_turn(0, 3, 2) is None
    assert plan.settles(0, 0, 2)


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
@given(costs(), st.sampled_from(SCHEMES), st.floats(0.01, 0.6))
def test_the_target_is_met_by_a_front_of_allowed_blocks_or_refused(cost, scheme, reduction):
    backward, total, interval, n_blocks = cost
    try:
        plan = solve(Savings(backward, total, reduction, interval, n_blocks), scheme=scheme)
    except InvalidArgument as error:
        most = float(str(error).split("most possible is ")[1].split(",")[0])
        assert most < reduction
        if most > 0:
            solve(Savings(backward, total, most, interval, n_blocks), scheme=scheme)
        return
    assert plan.reduction >= reduction - 1e-9
    assert plan.reduction == pytest.approx(saved(backward, plan) / total)
    assert len(plan.frozen) == len(backward[0])
    assert all(0 <= count <= n_blocks for count in plan.frozen)
    assert plan.n_blocks == len(plan.freeze_epochs) == len(backward)
    for block, at in enumerate(plan.freeze_epochs):
        assert at == next((epoch for epoch, count in enumerate(plan.frozen) if count > block), None)
    if not plan.pauses:
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


@settings(max_examples=100, deadline=None)
@given(costs(), st.sampled_from(SCHEMES), st.floats(0.01, 0.4))
def test_what_is_at_target_is_a_front_and_holds_all_that_is_frozen_in_the_end(cost, scheme, reduction):
    backward, total, interval, n_blocks = cost
    try:
        plan = solve(Savings(backward, total, reduction, interval, n_blocks), scheme=scheme)
    except InvalidArgument:
        return
    for epoch in range(len(plan.frozen)):
        settles = [plan.settles(block, epoch, interval) for block in range(plan.n_blocks)]
        assert settles == sorted(settles, reverse=True)
        if not plan.pauses:
            assert all(settles[: plan.frozen[epoch]])
    assert all(settles[: plan.frozen[-1]])
