"""The timeline: what happens in each epoch, worked by hand for every method and every way to freeze."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import spfde
from helpers.masking import timeline_of
from spfde.core.errors import StateMismatch
from spfde.core.registry import registered
from spfde.freezing.schemes import paused
from spfde.planning.timeline import Counts, Timeline
from spfde.sparsity import DSR, GMP, MEST, SET, SNFS, STR, DeepR, DropGrow, Gradient, RigL, SparsityMethod, TopKAST

METHODS = registered("method")

TARGET, UNITS = 100, 1000
"""Of each layer at sparsity 0.9."""


def planned(method: SparsityMethod | None, n_layers: int = 1, units: int = UNITS, **timeline: Any) -> Timeline:
    """The timeline of layers "a", "b", … of so many weights, each a block unless told otherwise."""
    layers = {name: nn.Parameter(torch.zeros(1, units)) for name in "abcd"[:n_layers]}
    return timeline_of(layers, method, **timeline)


def column(timeline: Timeline, field: str, name: str = "a") -> list[Any]:
    """A field of a layer in all epochs."""
    return [getattr(row.layers[name], field) for row in timeline]


# --- methods ----------------------------------------------------------------------------------------------------------


def test_the_soft_bound_decays_to_the_target() -> None:
    timeline = planned(MEST(sparsity=0.9), epochs=160, interval=5)
    assert [timeline[epoch].layers["a"].active for epoch in (0, 89, 90, 119, 120, 159)] == [
        150,
        150,
        125,
        125,
        100,
        100,
    ]


def test_the_soft_bound_changes_at_update_epochs_only() -> None:
    # 20 epochs, an update every 4: the first decay (11.25) shows at epoch 12, the second (15) at epoch 16.
    timeline = planned(MEST(sparsity=0.9), epochs=20, interval=4)
    assert column(timeline, "active") == [150] * 12 + [125] * 4 + [100] * 4
    assert column(timeline, "survive") == [100, 150, 150, 150] * 3 + [100, 125, 125, 125] + [100] * 4
    assert column(timeline, "mutates") == [True, False, False, False] * 4 + [True, False, False, False]


def test_the_last_epoch_is_at_target_even_when_it_is_no_update_epoch() -> None:
    timeline = planned(MEST(sparsity=0.9, soft_bound_steps=(0.05,), decay_at=()), epochs=6, interval=4)
    assert column(timeline, "active") == [150] * 5 + [100]
    assert column(timeline, "to_target") == [False] * 5 + [True]
    assert column(timeline, "mutates")[-1]
    assert [row.update for row in timeline] == [True, False, False, False, True, False]
    assert [row.masks.last for row in timeline] == [False] * 5 + [True]


def test_the_soft_bound_never_exceeds_the_layer_and_leaves_dense_layers_alone() -> None:
    assert column(planned(MEST(sparsity=0.02), units=100, epochs=3), "active") == [100, 100, 98]
    dense = planned(MEST(sparsity=0.9, overrides={"a": 0.0}), 2, epochs=3)
    assert column(dense, "active") == column(dense, "gradient") == column(dense, "survive") == [UNITS] * 3
    assert not any(column(dense, "mutates") + column(dense, "to_target"))


def test_nothing_is_dropped_at_epoch_zero_nor_in_the_last_epoch() -> None:
    timeline = planned(SET(sparsity=0.9, decay="constant"), epochs=4)
    assert column(timeline, "survive") == [100, 70, 70, 100]
    assert column(timeline, "active") == [100] * 4
    assert column(timeline, "mutates") == [False, True, True, False]


def test_a_run_of_one_epoch_is_at_target_throughout() -> None:
    for method in (MEST(sparsity=0.9), GMP(sparsity=0.9), STR(sparsity=0.9), TopKAST(sparsity=0.9)):
        (row,) = planned(method, epochs=1)
        assert (row.layers["a"].active, row.layers["a"].gradient) == (TARGET, TARGET)


def test_rigl_computes_a_dense_gradient_in_one_step_of_each_mutation() -> None:
    # 0.3 along a cosine that ends at 0.75 of the run: 0.225 and 0.075 of 100 go at epochs 2 and 4, nothing at 6.
    timeline = planned(RigL(sparsity=0.9), epochs=8, interval=2)
    assert [column(timeline, "survive")[epoch] for epoch in (0, 2, 4, 6)] == [100, 78, 93, 100]
    expected = ["none", "none", "one step", "none", "one step", "none", "none", "none"]
    assert [row.masks.dense_gradients for row in timeline] == expected


def test_no_dense_gradient_is_computed_where_all_that_would_grow_is_frozen() -> None:
    timeline = planned(RigL(sparsity=0.9), epochs=8, interval=2, frozen={4: 1})
    assert [row.epoch for row in timeline if row.masks.dense_gradients == "one step"] == [2]
    two = planned(RigL(sparsity=0.9), 2, epochs=8, interval=2, frozen={4: 1})
    assert [row.epoch for row in two if row.masks.dense_gradients == "one step"] == [2, 4]


def test_growth_by_gradient_under_a_soft_bound_needs_one_at_epoch_zero_too() -> None:
    timeline = planned(DropGrow(sparsity=0.9, grow=Gradient(), soft_bound=0.05), epochs=6, interval=2)
    assert [row.epoch for row in timeline if row.masks.dense_gradients == "one step"] == [0, 2, 4]


def test_snfs_computes_dense_gradients_until_its_last_mutation() -> None:
    timeline = planned(SNFS(sparsity=0.9), epochs=7, interval=2)
    assert column(timeline, "mutates") == [False, False, True, False, True, False, False]
    assert [row.masks.dense_gradients for row in timeline] == ["every step"] * 4 + ["none"] * 3
    assert column(timeline, "active") == [TARGET] * 7


def test_a_wider_set_of_weights_receives_gradients_under_topkast() -> None:
    timeline = planned(TopKAST(sparsity=0.9, exploration=0.15), epochs=6, interval=2)
    assert column(timeline, "active") == [100] * 6
    assert column(timeline, "gradient") == [250] * 5 + [100]
    stops = planned(TopKAST(sparsity=0.9, exploration=0.15, stop_fraction=0.5), epochs=6, interval=2)
    assert column(stops, "gradient") == [250] * 4 + [100] * 2
    assert column(stops, "mutates") == [False, False, True, False, False, False]


def test_what_has_come_to_its_target_receives_no_wider_gradient_any_more() -> None:
    # Its latent weights were given up at the last update before it was frozen; a thaw does not bring them back.
    timeline = planned(TopKAST(sparsity=0.9), epochs=10, interval=2, frozen={4: 1, 6: 0})
    assert column(timeline, "gradient") == [200, 200] + [100] * 8


def test_gmp_falls_along_its_cubic_schedule_and_never_rises() -> None:
    method = GMP(sparsity=0.9, stop_fraction=0.8)
    timeline = planned(method, epochs=10, interval=2)
    assert column(timeline, "active") == [1000, 1000, 480, 480, 213, 213, 114, 114, 100, 100]
    assert column(timeline, "survive") == column(timeline, "active")
    # Frozen from epoch 4 to 5 it comes to its target at epoch 2, and stays there when it trains again.
    thawed = planned(method, epochs=10, interval=2, frozen={4: 1, 6: 0})
    assert column(thawed, "active") == [1000, 1000] + [100] * 8


def test_str_is_taken_to_be_dense_until_it_stops() -> None:
    timeline = planned(STR(sparsity=0.9), epochs=8, interval=2)
    assert column(timeline, "active") == [1000] * 6 + [100] * 2


@pytest.mark.parametrize("method", [DSR(sparsity=0.9, stop_fraction=0.5), DeepR(sparsity=0.9)], ids=lambda m: m.name)
def test_methods_that_keep_the_total_keep_the_counts_as_far_as_is_known(method: SparsityMethod) -> None:
    timeline = planned(method, epochs=6)
    assert column(timeline, "active") == column(timeline, "gradient") == [TARGET] * 6
    mutates = [False, True, True, False, False, False] if method.name == "dsr" else [False] * 6
    assert column(timeline, "mutates") == mutates


# --- freezing ---------------------------------------------------------------------------------------------------------


def test_a_block_comes_to_its_target_one_update_before_it_is_frozen() -> None:
    timeline = planned(MEST(sparsity=0.9), 2, epochs=20, interval=2, frozen={6: 1})
    assert column(timeline, "active") == [150] * 4 + [100] * 16
    assert column(timeline, "survive")[:8] == [100, 150, 100, 150, 100, 100, 100, 100]
    assert column(timeline, "mutates")[:8] == [True, False, True, False, True, False, False, False]
    assert column(timeline, "to_target")[:8] == [False, False, False, False, True, False, True, False]
    assert column(timeline, "frozen") == [False] * 6 + [True] * 14
    assert column(timeline, "active", "b") == [150] * 12 + [125] * 4 + [100] * 4
    assert not any(column(timeline, "frozen", "b"))


def test_a_block_that_is_frozen_between_two_updates_has_been_at_its_target_for_an_interval_or_more() -> None:
    # Frozen at epoch 10 with an update every 4: 8 would be too late, so it is pruned at 4, and left alone at 8.
    timeline = planned(MEST(sparsity=0.9), 2, epochs=20, interval=4, frozen={10: 1})
    assert column(timeline, "active") == [150] * 4 + [100] * 16
    assert [epoch for epoch, mutates in enumerate(column(timeline, "mutates")) if mutates] == [0, 4]
    assert column(timeline, "frozen") == [False] * 10 + [True] * 10
    changes = planned(SET(sparsity=0.9, decay="constant"), epochs=20, interval=4, frozen={10: 1})
    assert [epoch for epoch, mutates in enumerate(column(changes, "mutates")) if mutates] == [4]
    # Frozen an epoch after an update, it has been at its target since the update before that one.
    assert column(planned(MEST(sparsity=0.9), epochs=20, interval=4, frozen={9: 1}), "active") == [150] * 4 + [100] * 16
    assert column(planned(MEST(sparsity=0.9), epochs=20, interval=4, frozen={8: 1}), "active") == [150] * 4 + [100] * 16


def test_a_block_that_is_frozen_in_the_first_interval_starts_at_its_target() -> None:
    timeline = planned(MEST(sparsity=0.9), epochs=8, interval=4, frozen={3: 1})
    assert column(timeline, "active") == [100] * 8


def test_weights_still_change_places_at_the_update_before_freezing() -> None:
    timeline = planned(SET(sparsity=0.9, decay="constant"), epochs=8, interval=2, frozen={4: 1})
    assert [timeline[epoch].layers["a"].survive for epoch in (0, 2, 4, 6)] == [100, 70, 100, 100]
    assert column(timeline, "mutates") == [False, False, True] + [False] * 5


def test_layers_that_share_with_others_may_change_at_the_update_before_freezing() -> None:
    timeline = planned(DSR(sparsity=0.9), 2, epochs=8, interval=2, frozen={4: 1})
    assert column(timeline, "mutates") == [False, False, True] + [False] * 5


@pytest.mark.parametrize("method", [MEST(sparsity=0.9), GMP(sparsity=0.9), STR(sparsity=0.9)], ids=lambda m: m.name)
def test_what_is_frozen_from_the_start_is_at_its_target_from_the_start(method: SparsityMethod) -> None:
    timeline = planned(method, 2, epochs=6, interval=2, frozen={0: 1})
    assert column(timeline, "active") == [TARGET] * 6
    assert column(timeline, "to_target") == [True] + [False] * 5
    assert timeline[0].layers["b"].active > TARGET


def test_masks_wait_through_a_pause_as_they_are() -> None:
    # Front blocks train one epoch in four: of the updates, every second, that is 0 and 4, the last before the end.
    frozen = dict(enumerate(paused(8, 1, 1)))
    timeline = planned(MEST(sparsity=0.9), epochs=8, interval=2, frozen=frozen, pauses=True)
    assert column(timeline, "frozen") == [False, True, True, True] * 2
    assert column(timeline, "active") == [150] * 4 + [100] * 4
    assert column(timeline, "to_target") == [False, False, False, False, True, False, False, False]
    assert column(timeline, "mutates") == [True, False, False, False, True, False, False, False]


def test_a_pause_that_ends_before_the_last_epoch_leaves_the_pruning_to_it() -> None:
    frozen = dict(enumerate(paused(9, 1, 1)))
    timeline = planned(MEST(sparsity=0.9), epochs=9, interval=2, frozen=frozen, pauses=True)
    assert column(timeline, "active") == [150] * 8 + [100]


def test_after_a_thaw_masks_go_on_from_their_target() -> None:
    timeline = planned(MEST(sparsity=0.9), epochs=20, interval=2, frozen={6: 1, 10: 0})
    # Under the soft bound again from the first update of the thaw; its second stage starts at 11.25, its last at 15.
    assert column(timeline, "active") == [150] * 4 + [100] * 6 + [150] * 2 + [125] * 4 + [100] * 4
    assert not any(column(timeline, "to_target")[7:19])


def small_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*[nn.Linear(10, 10) for _ in range(6)], nn.Linear(10, 3))


SCHEMES = {
    "single-shot": {"start_epoch": 8},
    "single-shot-resume": {"start_epoch": 8, "resume_epochs": 4},
    "periodic": {"flops_reduction": 0.2},
    "delayed-periodic": {"flops_reduction": 0.2, "start_epoch": 4},
}
# Five of six blocks may be frozen; how many of them pause is what the solver finds (see the tests of freezing).
FROZEN = {
    "single-shot": [0] * 8 + [1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 5, 5],
    "single-shot-resume": [0] * 8 + [1, 1, 2, 2, 3, 3, 4, 4, 0, 0, 0, 0],
    "periodic": [0, 1, 1, 1] * 5,
    "delayed-periodic": [0, 0, 0, 0] + [0, 3, 1, 3] * 4,
}


def net_timeline(method: SparsityMethod | None, scheme: str, **recipe: Any) -> Timeline:
    freezing = spfde.ProgressiveFreezing(**{"flops_reduction": 0.0, "scheme": scheme, **SCHEMES[scheme]})
    made = spfde.Recipe(sparsity=method, freezing=freezing, update_interval_epochs=2, **recipe)
    return spfde.plan(small_net(), torch.zeros(1, 10), made, 20, 100).timeline


@pytest.mark.parametrize("scheme", SCHEMES)
def test_blocks_are_frozen_as_the_scheme_says_and_their_layers_with_them(scheme: str) -> None:
    timeline = net_timeline(MEST(sparsity=0.8), scheme)
    assert [row.frozen_blocks for row in timeline] == list(timeline.frozen) == FROZEN[scheme]
    # A block a layer; the first is dense.
    for block, name in enumerate(["1.weight", "2.weight", "3.weight", "4.weight", "5.weight"], start=1):
        assert column(timeline, "frozen", name) == [count > block for count in FROZEN[scheme]]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", METHODS)
def test_counts_are_one_story_from_epoch_to_epoch(name: str, scheme: str) -> None:
    timeline = net_timeline(METHODS[name](sparsity=0.8), scheme)
    rows = timeline.rows
    for layer, first in rows[0].layers.items():
        before = first
        for row in rows:
            now = row.layers[layer]
            assert 0 < now.survive <= now.active <= now.gradient <= 100
            assert row.epoch == 0 or now.survive <= before.active
            assert not now.frozen or not now.mutates or row.epoch == 0
            if not now.mutates and row.epoch:
                assert now.active == now.survive == before.active
            assert now.active == now.target or not (now.to_target or row.masks.last)
            assert not (now.to_target and not (row.update or row.masks.last))
            before = now
        assert before.active == before.gradient == before.target == 20


# --- samples and rates ------------------------------------------------------------------------------------------------


def test_circular_sieving_moves_samples_at_updates_but_the_first_and_the_last_epoch() -> None:
    sieving = spfde.DataSieving(removed_fraction=0.2)
    timeline = planned(None, epochs=9, interval=2, samples=50, sieving=sieving)
    assert [row.samples for row in timeline] == [40] * 9
    assert [row.epoch for row in timeline if row.sieve_update] == [2, 4, 6]


def test_samples_move_out_of_step_and_all_come_back_for_the_last_epochs() -> None:
    # 0.2 of 50 in 9 epochs are 90: 15 in each of the 6 before the last three.
    sieving = spfde.DataSieving(removed_fraction=0.2, full_last=0.3, offset_epochs=1)
    timeline = planned(None, epochs=9, interval=2, samples=50, sieving=sieving)
    assert [row.samples for row in timeline] == [35] * 6 + [50] * 3
    assert [row.epoch for row in timeline if row.sieve_update] == [1, 3, 5, 6]


def test_one_time_removal_leaves_samples_out_from_one_update_on() -> None:
    # A half of ten epochs, rounded to an update: epoch 6. 12 of 50 samples go.
    sieving = spfde.OneTimeRemoval(removed_fraction=0.24, at_fraction=0.5)
    timeline = planned(None, epochs=10, interval=2, samples=50, sieving=sieving)
    assert [row.samples for row in timeline] == [50] * 6 + [38] * 4
    assert [row.epoch for row in timeline if row.sieve_update] == [6]


@pytest.mark.parametrize(
    "sieving", [None, spfde.DataSieving(removed_fraction=0), spfde.OneTimeRemoval(removed_fraction=0)]
)
def test_without_sieving_all_samples_are_in_use(sieving: Any) -> None:
    timeline = planned(None, epochs=4, samples=50, sieving=sieving)
    assert [(row.samples, row.sieve_update) for row in timeline] == [(50, False)] * 4
    assert all(row.layers == {} and row.rates == () for row in timeline)


def test_each_block_has_a_cosine_to_its_freeze_epoch_and_the_head_to_the_end() -> None:
    timeline = planned(None, 2, epochs=8, frozen={4: 1}, learning_rate=spfde.BlockwiseCosine())
    first, second, head = zip(*[row.rates for row in timeline], strict=True)
    assert first == pytest.approx([1.0, 0.853553, 0.5, 0.146447, 0.0, 0.0, 0.0, 0.0], abs=1e-6)
    assert head[:5] == pytest.approx([1.0, 0.961940, 0.853553, 0.691342, 0.5], abs=1e-6)
    assert second == head


def test_a_warm_up_comes_first() -> None:
    timeline = planned(None, epochs=6, learning_rate=spfde.BlockwiseCosine(warmup_epochs=2))
    assert [row.rates[-1] for row in timeline] == pytest.approx([0.5, 1.0, 1.0, 0.853553, 0.5, 0.146447], abs=1e-6)


def test_what_trains_again_takes_the_rate_of_the_never_frozen() -> None:
    timeline = planned(None, epochs=8, frozen={4: 1, 6: 0}, learning_rate=spfde.BlockwiseCosine())
    rates = [row.rates for row in timeline]
    assert [block for block, _ in rates[4:6]] == [0.0, 0.0]
    assert all(block == head > 0 for block, head in rates[6:])


def test_a_pause_ends_no_learning_rate() -> None:
    frozen = dict(enumerate(paused(8, 1, 1)))
    timeline = planned(None, epochs=8, frozen=frozen, pauses=True, learning_rate=spfde.BlockwiseCosine())
    assert all(block == head for block, head in (row.rates for row in timeline))


# --- what data decide -------------------------------------------------------------------------------------------------


def counts(timeline: Timeline, epoch: int, **changes: dict[str, float]) -> dict[str, Counts]:
    """What the plan says, but for what is changed of the layers named."""
    actual = {}
    for name, plan in timeline[epoch].layers.items():
        fields = {"target": plan.target, "active": plan.active, "now": plan.active, "gradient": plan.gradient}
        actual[name] = Counts(**{**fields, **changes.get(name, {})})
    return actual


@pytest.mark.parametrize("method", [MEST(sparsity=0.9), TopKAST(sparsity=0.9), GMP(sparsity=0.9)], ids=lambda m: m.name)
def test_what_came_as_planned_amends_nothing(method: SparsityMethod) -> None:
    timeline, plan = (planned(method, 2, epochs=8, interval=2, frozen={4: 1}) for _ in range(2))
    for epoch in range(8):
        timeline.amend(epoch, counts(timeline, epoch))
    assert timeline.rows == plan.rows
    assert timeline.state_dict() == plan.state_dict()


def test_what_came_otherwise_takes_the_plans_place_and_the_rest_follows() -> None:
    timeline = planned(DSR(sparsity=0.9), 2, epochs=6, interval=2)
    moved = {"a": {"target": 120, "active": 120, "now": 120, "gradient": 120}}
    timeline.amend(2, counts(timeline, 2, **moved))
    assert column(timeline, "active") == [100, 100, 120, 120, 120, 120]
    assert column(timeline, "target") == [100, 100, 120, 120, 120, 120]
    assert column(timeline, "gradient") == [100, 100, 120, 120, 120, 120]
    assert column(timeline, "active", "b") == [100] * 6


def test_a_layer_that_changes_within_an_epoch_has_its_mean_there_and_goes_on_from_its_end() -> None:
    timeline = planned(STR(sparsity=0.9), epochs=8, interval=2)
    timeline.amend(0, counts(timeline, 0, a={"active": 987.5, "now": 900, "gradient": 987.5}))
    assert column(timeline, "active") == [987.5, 900, 900, 900, 900, 900, 100, 100]
    assert column(timeline, "survive") == [1000, 900, 900, 900, 900, 900, 100, 100]
    assert column(timeline, "gradient") == column(timeline, "active")


def test_what_settles_early_stays_where_it_has_settled() -> None:
    timeline = planned(STR(sparsity=0.9), 2, epochs=8, interval=2)
    settled = {"target": 130, "active": 400.0, "now": 130, "gradient": 400.0}
    timeline.amend(1, counts(timeline, 1, a=settled, b={**settled, "target": 70, "now": 70}))
    assert column(timeline, "active") == [1000, 400.0] + [130] * 6
    assert column(timeline, "active", "b") == [1000, 400.0] + [70] * 6


def test_an_epoch_may_be_amended_twice_and_the_second_counts() -> None:
    timeline = planned(DSR(sparsity=0.9), epochs=6, interval=2)
    for count in (120, 130):
        timeline.amend(0, counts(timeline, 0, a={"target": count, "active": count, "now": count, "gradient": count}))
    assert column(timeline, "active") == [130] * 6


def test_a_block_may_be_frozen_earlier_than_planned() -> None:
    timeline = planned(MEST(sparsity=0.9), 2, epochs=20, interval=2, frozen={10: 1, 12: 2})
    first_rows = timeline.rows[:4]
    timeline.freeze(1, since=6)
    assert timeline.frozen == (0,) * 6 + (1,) * 6 + (2,) * 8
    assert timeline.rows[:4] == first_rows
    assert column(timeline, "active") == [150] * 4 + [100] * 16
    assert column(timeline, "to_target")[:8] == [False, False, False, False, True, False, True, False]
    assert column(timeline, "active", "b") == [150] * 10 + [100] * 10


def test_freezing_later_than_planned_changes_nothing() -> None:
    timeline, plan = (planned(MEST(sparsity=0.9), 2, epochs=20, interval=2, frozen={6: 1, 8: 2}) for _ in range(2))
    timeline.freeze(1, since=10)
    assert timeline.rows == plan.rows


def test_what_was_amended_before_stays_amended_when_a_block_is_frozen() -> None:
    timeline = planned(DSR(sparsity=0.9), 2, epochs=12, interval=2, frozen={8: 1})
    timeline.amend(2, counts(timeline, 2, a={"target": 120, "active": 120, "now": 120, "gradient": 120}))
    timeline.amend(3, counts(timeline, 3))
    timeline.freeze(1, since=6)
    assert column(timeline, "active") == [100, 100] + [120] * 10
    assert column(timeline, "frozen") == [False] * 6 + [True] * 6


# --- the most ---------------------------------------------------------------------------------------------------------


def test_the_most_that_a_layer_ever_has_is_that_of_its_densest_epoch() -> None:
    assert planned(MEST(sparsity=0.9), epochs=20, interval=2).most_active() == {"a": 150}
    assert planned(GMP(sparsity=0.9), epochs=20, interval=2).most_active() == {"a": 1000}
    assert planned(SET(sparsity=0.9), epochs=20, interval=2).most_active() == {"a": 100}


@pytest.mark.parametrize("name", ["dsr", "snfs", "snip", "str"])
def test_where_data_decide_a_layer_may_have_all_its_weights(name: str) -> None:
    assert planned(METHODS[name](sparsity=0.9), 2, epochs=4).most_active() == {"a": UNITS, "b": UNITS}


# --- rows and states --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("epoch", [-1, 4, 100])
def test_there_is_no_epoch_outside_the_run(epoch: int) -> None:
    timeline = planned(SET(sparsity=0.9), epochs=4)
    assert len(timeline) == len(timeline.rows) == 4
    with pytest.raises(IndexError):
        timeline[epoch]


def test_the_order_in_which_epochs_are_asked_for_does_not_matter() -> None:
    forwards, backwards = (planned(MEST(sparsity=0.9), 2, epochs=9, interval=2, frozen={4: 1}) for _ in range(2))
    rows = [backwards[epoch] for epoch in reversed(range(9))]
    assert list(forwards) == rows[::-1]


def test_the_whole_timeline_is_written_as_json_with_equal_epochs_once() -> None:
    freezing = {"epochs": 20, "interval": 2, "frozen": {6: 1}}
    timeline = planned(MEST(sparsity=0.9), 2, **freezing, learning_rate=spfde.BlockwiseCosine())
    written = json.loads(json.dumps(timeline.to_dict(), allow_nan=False))
    assert (written["epochs"], written["interval"], written["blocks"]) == (20, 2, ["a", "b"])
    assert sum(count for count, _ in written["rows"]) == 20
    epochs = [row for count, row in written["rows"] for _ in range(count)]
    for row, own in zip(timeline, epochs, strict=True):
        assert (own["update"], own["frozen_blocks"], own["samples"]) == (row.update, row.frozen_blocks, row.samples)
        assert (own["sieve_update"], own["dense_gradients"]) == (row.sieve_update, row.masks.dense_gradients)
        for name, plan in row.layers.items():
            assert dict(zip(written["layer_fields"], own["layers"][name], strict=True)) == vars(plan)
    assert written["rates"] == [list(row.rates) for row in timeline]


def test_a_long_run_is_written_in_few_rows() -> None:
    names = [f"layer{index}" for index in range(50)]
    layers = {name: nn.Parameter(torch.zeros(1, 100)) for name in names}
    frozen = {1000 + 20 * index: index + 1 for index in range(30)}
    timeline = timeline_of(layers, SET(sparsity=0.9, stop_fraction=0.3), epochs=2000, interval=20, frozen=frozen)
    written = timeline.to_dict()
    # Two for each update, and two for each block that comes to its target and is frozen.
    assert len(written["rows"]) <= 2 * 100 + 2 * 30
    assert len(timeline.state_dict()["layers"]) <= 2 * 100 + 2 * 30
    assert written["rates"] == []


def amended() -> Timeline:
    timeline = planned(DSR(sparsity=0.9), 2, epochs=12, interval=2, frozen={8: 1})
    timeline.amend(2, counts(timeline, 2, a={"target": 120, "active": 117.5, "now": 120, "gradient": 117.5}))
    timeline.freeze(1, since=6)
    return timeline


def test_a_saved_timeline_goes_on_with_all_that_was_amended() -> None:
    timeline = amended()
    state = json.loads(json.dumps(timeline.state_dict()))
    other = planned(DSR(sparsity=0.9), 2, epochs=12, interval=2, frozen={8: 1})
    assert other.rows != timeline.rows
    other.rows  # noqa: B018  # worked out before, and forgotten
    other.load_state_dict(state)
    assert other.rows == timeline.rows
    assert other.state_dict() == timeline.state_dict()
    assert other.frozen == timeline.frozen


def test_a_timeline_may_be_saved_before_anything_was_asked_of_it() -> None:
    one, other = (planned(MEST(sparsity=0.9), epochs=6) for _ in range(2))
    other.load_state_dict(one.state_dict())
    assert other.rows == one.rows


def _damaged(state: dict[str, Any], change: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    copy = json.loads(json.dumps(state))
    change(copy)
    return copy


def _layer(state: dict[str, Any]) -> list[Any]:
    return state["layers"][0][1]["a"]


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state.pop("frozen"),
        lambda state: state.pop("layers"),
        lambda state: state.pop("after"),
        lambda state: state.update(rest=1),
        lambda state: state.update(frozen=5),
        lambda state: state.update(frozen=state["frozen"][:-1]),
        lambda state: state["frozen"].__setitem__(0, 3),
        lambda state: state["frozen"].__setitem__(0, -1),
        lambda state: state["frozen"].__setitem__(0, True),
        lambda state: state.update(layers=[3]),
        lambda state: state.update(layers=[[1]]),
        lambda state: state["layers"][0].__setitem__(0, 13),
        lambda state: state["layers"][0].__setitem__(0, 10**15),
        lambda state: state["layers"][0].__setitem__(0, -1),
        lambda state: state["layers"][0].__setitem__(0, "1"),
        lambda state: state["layers"][0].__setitem__(1, None),
        lambda state: state["layers"][0][1].pop("a"),
        lambda state: state["layers"][0][1].update(c=[1] * 7),
        lambda state: _layer(state).pop(),
        lambda state: _layer(state).append(1),
        lambda state: _layer(state).__setitem__(0, "100"),
        lambda state: _layer(state).__setitem__(1, -1),
        lambda state: _layer(state).__setitem__(2, 1001),
        lambda state: _layer(state).__setitem__(3, None),
        lambda state: _layer(state).__setitem__(4, 1),
        lambda state: _layer(state).__setitem__(5, None),
        lambda state: state.update(after=3),
        lambda state: state.update(after=[]),
        lambda state: state["after"].__setitem__(0, 100),
        lambda state: state["after"].__setitem__(0, "2"),
        lambda state: state["after"].__setitem__(1, {}),
    ],
)
def test_a_damaged_state_is_refused_and_changes_nothing(change: Callable[[dict[str, Any]], None]) -> None:
    timeline = amended()
    rows = timeline.rows
    with pytest.raises(StateMismatch):
        timeline.load_state_dict(_damaged(timeline.state_dict(), change))
    assert timeline.rows == rows


@pytest.mark.parametrize("state", [None, [], 3, "text"])
def test_what_is_no_state_is_refused(state: Any) -> None:
    with pytest.raises(StateMismatch):
        planned(SET(sparsity=0.9), epochs=4).load_state_dict(state)


def test_a_state_of_other_layers_is_refused() -> None:
    timeline = planned(SET(sparsity=0.9), 2, epochs=4)
    assert timeline.rows
    with pytest.raises(StateMismatch, match="layers"):
        planned(SET(sparsity=0.9), 1, epochs=4, blocks=[("a",), ()]).load_state_dict(timeline.state_dict())
