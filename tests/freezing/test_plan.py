"""When blocks are frozen, at any epoch or at update epochs: by hand, the paper's table, and for any costs."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spfde.core.errors import InvalidArgument
from spfde.freezing import ProgressiveFreezing, Savings
from spfde.freezing.plan import FreezePlan, blocks_to_freeze, delays
from spfde.freezing.schemes import solve

EPOCHS, INTERVAL = 160, 5


def convolution(inputs: int, outputs: int, kernel: int, size: int) -> int:
    """Forward FLOPs of one sample: two per multiply-add."""
    return 2 * inputs * outputs * kernel * kernel * size * size


def resnet32_layers() -> tuple[list[list[int]], int]:
    """Forward FLOPs of the layers of each of the 15 basic blocks of ResNet-32 (32-64-128) at 32 pixels; and the head's.

    The stem leads the first block; the 1x1 convolution of the shortcut is in its block.
    """
    blocks = []
    for stage, (width, size) in enumerate([(32, 32), (64, 16), (128, 8)]):
        for index in range(5):
            inputs = width // 2 if stage > 0 and index == 0 else width
            block = [convolution(inputs, width, 3, size), convolution(width, width, 3, size)]
            if inputs != width:
                block.append(convolution(inputs, width, 1, size))
            blocks.append(block)
    blocks[0].insert(0, convolution(3, 32, 3, 32))
    return blocks, 2 * 128 * 100


def resnet32_plan(reduction: float, density, *, dense_ends: bool) -> FreezePlan:
    """The plan for 160 epochs in which epoch ``e`` runs at ``density(e)``; the stem and the head dense, or not."""
    blocks, head = resnet32_layers()
    backward, total = [[0.0] * EPOCHS for _ in blocks], 0.0
    for epoch in range(EPOCHS):
        for index, layers in enumerate(blocks):
            for position, flops in enumerate(layers):
                is_stem = index == 0 and position == 0
                active = flops * (1.0 if is_stem and dense_ends else density(epoch))
                backward[index][epoch] += 2 * active
                total += 3 * active
        total += 3 * head * (1.0 if dense_ends else density(epoch))
    n_blocks = blocks_to_freeze([len(block) for block in blocks], sum(map(len, blocks)) + 1, 2 / 3)
    return solve(Savings(backward, total, reduction, INTERVAL, n_blocks, timing="update"))


def constant(epoch: int) -> float:
    return 0.1


def soft_bound(epoch: int) -> float:
    return 0.15 if epoch < 90 else 0.125 if epoch < 120 else 0.1


def test_two_thirds_of_resnet32_are_the_stem_and_ten_of_fifteen_blocks():
    blocks, _ = resnet32_layers()
    sizes = [len(block) for block in blocks]
    assert sizes == [3, 2, 2, 2, 2, 3, 2, 2, 2, 2, 3, 2, 2, 2, 2]
    assert blocks_to_freeze(sizes, 34, 2 / 3) == 10


def test_the_dense_resnet32_costs_what_the_literature_says():
    blocks, head = resnet32_layers()
    forward = sum(map(sum, blocks)) + head
    assert 3 * forward * 50_000 * EPOCHS == pytest.approx(1.32e16, rel=0.01)


@pytest.mark.parametrize("dense_ends", [True, False])
@pytest.mark.parametrize(
    ("reduction", "start"), [(0.10, 100), (0.15, 85), (0.20, 65), (0.25, 47.5), (0.30, 30), (0.35, 12.5)]
)
def test_start_epochs_of_resnet32_at_constant_density_are_those_of_the_paper(reduction, start, dense_ends):
    plan = resnet32_plan(reduction, constant, dense_ends=dense_ends)
    assert plan.start_epoch == pytest.approx(start, abs=5)
    assert reduction <= plan.reduction < reduction + 0.025


@pytest.mark.parametrize("dense_ends", [True, False])
@pytest.mark.parametrize(
    ("reduction", "start"), [(0.10, 90), (0.15, 75), (0.20, 55), (0.25, 40), (0.30, 25), (0.35, 7.5)]
)
def test_start_epochs_of_resnet32_under_the_soft_bound_are_those_of_the_paper(reduction, start, dense_ends):
    plan = resnet32_plan(reduction, soft_bound, dense_ends=dense_ends)
    assert plan.start_epoch == pytest.approx(start, abs=5)
    assert reduction <= plan.reduction < reduction + 0.025


def test_a_plan_worked_by_hand():
    # Two blocks of 2 FLOPs an epoch, ten epochs, 60 in all; 0.25 needs 15. Two epochs apart from epoch 5 they save
    # 5 + 3 epochs, 16 FLOPs; from epoch 6 it would be 4 + 2 epochs, 12 FLOPs. An epoch less would save 14.
    backward = [[2.0] * 10, [2.0] * 10, [2.0] * 10]
    plan = solve(Savings(backward, 60.0, 0.25, 2, 2))
    assert plan.freeze_epochs == (5, 7, None)
    assert plan.start_epoch == 5
    assert plan.reduction == pytest.approx(16 / 60)
    assert [plan.frozen[epoch] for epoch in (0, 4, 5, 6, 7, 9)] == [0, 0, 1, 1, 2, 2]


def test_at_update_epochs_worked_by_hand():
    # From epoch 4: 6 + 4 epochs are saved, 20 FLOPs, a third. From epoch 6 it would be 12 FLOPs, a fifth.
    plan = solve(Savings([[2.0] * 10, [2.0] * 10, [2.0] * 10], 60.0, 0.25, 2, 2, timing="update"))
    assert plan.freeze_epochs == (4, 6, None)
    assert plan.reduction == pytest.approx(20 / 60)


def test_the_last_block_waits_until_it_is_needed():
    # From epoch 6 both blocks would save 12 of 60, from 7 on 8; 0.14 needs 8.4, and the first saves 8 from epoch 6.
    backward = [[2.0] * 10, [2.0] * 10]
    assert solve(Savings(backward, 60.0, 0.14, 2, 2)).freeze_epochs == (6, 9)
    # At 0.13, which is 7.8, the start is epoch 7, where both are needed, two epochs apart.
    assert solve(Savings(backward, 60.0, 0.13, 2, 2)).freeze_epochs == (7, 9)


def test_at_update_epochs_freezing_stops_as_soon_as_the_target_is_met():
    backward = [[2.0] * 10, [2.0] * 10]
    assert solve(Savings(backward, 60.0, 0.14, 2, 2, timing="update")).freeze_epochs == (6, 8)
    assert solve(Savings(backward, 60.0, 0.13, 2, 2, timing="update")).freeze_epochs == (6, None)


def test_the_first_starts_earlier_where_the_others_can_then_wait_for_a_nearer_plan():
    # 3 and 2 FLOPs an epoch, 100 in all, 10 epochs, two apart: from epoch 6 they save 12 + 4, from epoch 7 9 + 2. An
    # epoch less of the second makes 14 of 16. For 13 that is one too much, and no start is nearer: from epoch 5 the
    # first alone saves 15.
    backward = [[3.0] * 10, [2.0] * 10]
    assert solve(Savings(backward, 100.0, 0.14, 2, 2)).freeze_epochs == (6, 9)
    assert solve(Savings(backward, 100.0, 0.13, 2, 2)).freeze_epochs == (6, 9)
    # 17 FLOPs: from epoch 5 15 + 6, of which two epochs of the second can go: 15 + 2. 18: from epoch 5 19, and from
    # epoch 4 the first alone, exactly 18.
    assert solve(Savings(backward, 100.0, 0.17, 2, 2)).freeze_epochs == (5, 9)
    assert solve(Savings(backward, 100.0, 0.18, 2, 2)).freeze_epochs == (4, None)


def test_no_block_comes_less_than_an_interval_after_the_one_before():
    # Of three equal blocks the last is needed no more, and the second waits as long; the third is not frozen before it.
    plan = solve(Savings([[1.0] * 12] * 3, 100.0, 0.14, 3, 3))
    at = [epoch for epoch in plan.freeze_epochs if epoch is not None]
    assert plan.reduction == pytest.approx(0.14)
    assert all(after - before >= 3 for before, after in itertools.pairwise(at))


def test_the_layers_of_a_block_are_spread_over_its_interval_by_hand():
    assert delays([3, 1, 2], 2, "exact") == (0, 0, 1, 2, 4, 5)
    assert delays([2, 3], 5, "exact") == (0, 2, 5, 6, 8)
    assert delays([3, 1, 2], 2, "update") == (0, 0, 0, 2, 4, 4)
    assert delays([1, 1, 1], 4, "exact") == delays([1, 1, 1], 4, "update") == (0, 4, 8)


def test_layers_are_frozen_by_their_delays_by_hand():
    # One block of two layers and one of one, 1 FLOP an epoch each, 8 epochs, 100 FLOPs in all. From epoch 4, two epochs
    # to an interval, they save 4 + 3 + 2; 0.08 needs 8, so that the last is frozen an epoch later.
    savings = Savings([[1.0] * 8] * 3, 100.0, 0.08, 2, 3, delays=delays([2, 1], 2, "exact"))
    assert solve(savings).freeze_epochs == (4, 5, 7)


def test_a_target_that_is_met_exactly_is_met():
    plan = solve(Savings([[0.1] * 10], 3.0, 0.1, 1, 1))
    assert plan.start_epoch == 7


def test_costs_that_change_over_time_are_taken_at_their_epoch():
    assert Savings([[1.0, 2.0, 4.0, 8.0]], 48.0, 0.1, 1, 1).reduction((0, 0, 1, 1)) == 12 / 48
    assert Savings([[1.0, 2.0], [5.0, 7.0]], 32.0, 0.1, 1, 2).reduction((2, 1)) == (1 + 5 + 2) / 32


def test_no_reduction_freezes_nothing():
    plan = solve(Savings([[1.0] * 4, [1.0] * 4], 12.0, 0.0, 1, 2))
    assert plan == FreezePlan(2, (0, 0, 0, 0), 0.0)
    assert plan.freeze_epochs == (None, None)
    assert plan.start_epoch is None
    assert plan.frozen[3] == 0


def test_a_target_out_of_reach_is_refused_with_the_most_possible_and_that_can_be_reached():
    backward, total = [[2.0] * 10, [2.0] * 10], 60.0
    with pytest.raises(InvalidArgument, match=r"flops_reduction=0.9.*most possible is 0\.466") as error:
        solve(Savings(backward, total, 0.9, 2, 2))
    assert "flops_reduction=0.466 at most" in str(error.value)
    assert solve(Savings(backward, total, 0.466, 2, 2)).start_epoch == 2


def test_a_run_of_one_interval_has_no_epoch_to_freeze_at():
    with pytest.raises(InvalidArgument, match=r"most possible is 0\.000"):
        solve(Savings([[1.0] * 5], 20.0, 0.01, 5, 1))


def test_a_given_start_epoch_is_kept_and_blocks_are_frozen_until_the_target_is_met():
    backward = [[2.0] * 10] * 3
    # 18 FLOPs: the first block saves 16 from epoch 2 on.
    plan = solve(Savings(backward, 90.0, 0.2, 2, 3), start_epoch=2)
    assert plan.freeze_epochs == (2, 9, None)
    assert solve(Savings(backward, 90.0, 0.2, 2, 3, timing="update"), start_epoch=2).freeze_epochs == (2, 4, None)
    assert solve(Savings(backward, 90.0, 0.2, 2, 3), start_epoch=3).freeze_epochs == (3, 8, None)
    everything = solve(Savings(backward, 90.0, 0.0, 2, 3), start_epoch=2)
    assert everything.freeze_epochs == (2, 4, 6)


@pytest.mark.parametrize(("start", "message"), [(3, "Pass 2 or 4"), (10, "within the run"), (8, "start earlier")])
def test_a_start_epoch_that_cannot_be_is_refused(start, message):
    with pytest.raises(InvalidArgument, match=message):
        solve(Savings([[2.0] * 10], 30.0, 0.2, 2, 1, timing="update"), start_epoch=start)


def test_the_nearest_whole_block_is_taken_and_the_fewer_in_a_tie():
    assert blocks_to_freeze([2, 2, 2], 6, 0.5) == 1
    assert blocks_to_freeze([2, 2, 2], 6, 0.51) == 2
    assert blocks_to_freeze([4, 1], 6, 0.1) == 1
    assert blocks_to_freeze([1, 1, 1], 4, 1.0) == 3
    assert blocks_to_freeze([], 1, 0.5) == 0


@pytest.mark.parametrize(
    "fields",
    [
        {"flops_reduction": 1.0},
        {"flops_reduction": -0.1},
        {"fraction": 0.0},
        {"start_epoch": -1},
        {"scheme": "perpetual"},
        {"unit": "channel"},
        {"timing": "at once"},
    ],
)
def test_a_technique_with_a_bad_field_is_refused_by_name(fields):
    with pytest.raises(InvalidArgument, match=next(iter(fields))):
        ProgressiveFreezing(**fields)


@st.composite
def problems(draw):
    epochs = draw(st.integers(2, 40))
    interval = draw(st.integers(1, 6))
    n = draw(st.integers(1, 6))
    flops = st.floats(0.1, 10.0)
    backward = [
        [flop * density for density in draw(st.lists(st.floats(0.05, 1.0), min_size=epochs, max_size=epochs))]
        for flop in draw(st.lists(flops, min_size=n, max_size=n))
    ]
    total = 1.5 * sum(map(sum, backward)) * draw(st.floats(1.0, 1.5))
    return backward, total, interval, epochs, draw(st.integers(1, n))


@settings(max_examples=150, deadline=None)
@given(problems(), st.floats(0.01, 0.6), st.lists(st.integers(1, 3), min_size=6, max_size=6))
def test_little_more_is_saved_than_was_asked_for_and_never_less(problem, reduction, sizes):
    backward, total, interval, _, n_blocks = problem
    wait = delays(sizes, interval, "exact")
    exact = Savings(backward, total, reduction, interval, n_blocks, delays=wait)
    try:
        plan = solve(exact)
    except InvalidArgument:
        assert exact.reduction(solve(exact, as_far_as_possible=True).frozen) < reduction
        return
    assert plan.reduction >= reduction - 1e-9
    # Half a point, or less than what an epoch of some block saves.
    most = max(max(block) for block in backward[:n_blocks]) / total
    assert plan.reduction < reduction + max(0.005, most) + 1e-9
    at = [epoch for epoch in plan.freeze_epochs if epoch is not None]
    assert plan.freeze_epochs == (*at, *[None] * (len(backward) - len(at)))
    assert len(at) <= n_blocks
    assert at[0] >= interval
    assert list(plan.frozen) == sorted(plan.frozen)
    gaps = [after - before for before, after in itertools.pairwise(wait)]
    assert all(after - before >= gap for before, after, gap in zip(at, at[1:], gaps, strict=False))
    # No block but the first could wait an epoch longer.
    saved = plan.reduction * total
    for index in range(1, len(at)):
        if index + 1 == len(at) or at[index + 1] - at[index] > gaps[index]:
            assert (saved - backward[index][at[index]]) / total < reduction + 1e-9


@settings(max_examples=60, deadline=None)
@given(problems(), st.floats(0.01, 0.6))
def test_at_any_epoch_no_more_is_saved_than_at_update_epochs_up_to_half_a_point(problem, reduction):
    backward, total, interval, _, n_blocks = problem
    exact, update = (
        solve(Savings(backward, total, reduction, interval, n_blocks, timing=timing), as_far_as_possible=True)
        for timing in ("exact", "update")
    )
    if update.reduction >= reduction:
        assert exact.reduction <= max(update.reduction, reduction + 0.005) + 1e-9


@settings(max_examples=60, deadline=None)
@given(problems(), st.floats(0.01, 0.6))
def test_at_update_epochs_the_latest_start_that_reaches_the_target_is_chosen(problem, reduction):
    backward, total, interval, epochs, n_blocks = problem

    def saving(start: int) -> float:
        return sum(sum(block[start + index * interval :]) for index, block in enumerate(backward[:n_blocks])) / total

    try:
        plan = solve(Savings(backward, total, reduction, interval, n_blocks, timing="update"))
    except InvalidArgument:
        assert saving(interval) < reduction
        return
    assert plan.reduction >= reduction - 1e-9
    assert plan.start_epoch is not None
    assert plan.start_epoch > 0
    assert plan.start_epoch % interval == 0
    assert saving(plan.start_epoch + interval) < reduction
    frozen = [at for at in plan.freeze_epochs if at is not None]
    assert frozen == [plan.start_epoch + index * interval for index in range(len(frozen))]
    assert plan.freeze_epochs == (*frozen, *[None] * (len(backward) - len(frozen)))
    assert len(frozen) <= n_blocks
    assert all(at < epochs for at in frozen)
    # One block fewer would fall short.
    assert sum(sum(backward[index][at:]) for index, at in enumerate(frozen[:-1])) / total < reduction
    counts = [plan.frozen[epoch] for epoch in range(epochs)]
    assert counts == sorted(counts)


@settings(max_examples=40, deadline=None)
@given(problems(), st.floats(0.01, 0.3), st.floats(0.01, 0.3))
def test_at_update_epochs_a_higher_target_never_starts_later(problem, one, other):
    backward, total, interval, _, n_blocks = problem

    def start(reduction: float) -> int:
        try:
            plan = solve(Savings(backward, total, reduction, interval, n_blocks, timing="update"))
        except InvalidArgument:
            return 0
        assert plan.start_epoch is not None
        return plan.start_epoch

    assert start(max(one, other)) <= start(min(one, other))
