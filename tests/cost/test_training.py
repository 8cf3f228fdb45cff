from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spfde.cost import EpochCost
from spfde.cost.flops import ModelCost
from spfde.cost.training import epoch_cost, share, total_cost

FORWARD = (100, 40, 20)
ALL_ACTIVE = (False, False, False)


def check_bill(cost: EpochCost) -> None:
    saved = cost.saved_by_sparsity + cost.saved_by_freezing + cost.saved_by_sieving
    assert cost.dense_training_flops - saved + cost.dense_gradient_flops == cost.training_flops


def test_dense_training_costs_three_forward_passes() -> None:
    cost = epoch_cost(FORWARD, (1.0, 1.0, 1.0), ALL_ACTIVE, samples=7, population=7)
    assert cost == EpochCost(3 * 160 * 7, 3 * 160 * 7, 0, 0, 0, 0)


def test_sparsity_freezing_and_sieving_are_credited_in_this_order_by_hand() -> None:
    cost = epoch_cost(FORWARD, (1.0, 0.25, 0.5), (True, True, False), samples=6, population=10)
    # A sample: dense 480, sparse 3 (100 + 10 + 10) = 360, frozen 100 + 10 + 30 = 140.
    assert cost == EpochCost(6 * 140, 10 * 480, 10 * 120, 10 * 220, 4 * 140, 0)
    check_bill(cost)


def test_dense_gradients_add_the_inactive_weights_of_unfrozen_layers() -> None:
    cost = epoch_cost(
        FORWARD, (0.5, 0.25, 0.5), (True, False, False), samples=10, population=10, dense_gradient_samples=4
    )
    assert cost.dense_gradient_flops == 4 * (30 + 10)
    assert cost.training_flops == 10 * (50 + 3 * 10 + 3 * 10) + 160
    check_bill(cost)


def test_samples_beyond_the_population_are_a_negative_saving() -> None:
    cost = epoch_cost(FORWARD, (1.0, 1.0, 1.0), ALL_ACTIVE, samples=12, population=10)
    assert cost.saved_by_sieving == -2 * 480
    check_bill(cost)


def test_freezing_saves_exactly_the_backward_pass_of_the_frozen_layers() -> None:
    density = (0.31, 0.77, 0.13)
    cost = epoch_cost(FORWARD, density, (True, True, False), samples=9, population=9)
    # Twice the sparse forward pass: 9 x 100 x 0.31 and 9 x 40 x 0.77, rounded.
    assert cost.saved_by_freezing == 2 * 279 + 2 * 277


def test_a_share_is_exact_beyond_the_precision_of_floats() -> None:
    huge = 3**40
    assert share(huge, 1.0) == huge
    assert share(huge, 0.5) == (huge + 1) // 2
    assert [share(n, 0.5) for n in (1, 2, 3)] == [1, 1, 2]


def test_the_active_count_of_a_weight_is_recovered_from_its_density() -> None:
    numel, active, positions = 9 * 128 * 128, 14_746, 64
    assert share(2 * numel * positions * 50_000, active / numel) == 2 * active * positions * 50_000


layers = st.lists(st.tuples(st.integers(0, 10**12), st.floats(0, 1), st.booleans()), min_size=1, max_size=6).map(
    lambda rows: tuple(zip(*rows, strict=True))
)


@given(layers, st.integers(0, 10**7), st.integers(0, 10**7), st.integers(0, 10**5))
def test_the_savings_always_add_up_and_are_never_negative_within_the_population(
    net: tuple[tuple[int, ...], tuple[float, ...], tuple[bool, ...]], seen: int, unseen: int, gradients: int
) -> None:
    forward, density, frozen = net
    cost = epoch_cost(
        forward, density, frozen, samples=seen, population=seen + unseen, dense_gradient_samples=gradients
    )
    check_bill(cost)
    assert min(cost.saved_by_sparsity, cost.saved_by_freezing, cost.saved_by_sieving, cost.dense_gradient_flops) >= 0


@given(st.lists(st.integers(0, 10**15), max_size=6), st.integers(0, 10**9))
def test_a_neutral_epoch_costs_exactly_what_the_dense_one_costs(forward: list[int], samples: int) -> None:
    cost = epoch_cost(forward, [1.0] * len(forward), [False] * len(forward), samples=samples, population=samples)
    assert cost.training_flops == cost.dense_training_flops == 3 * sum(forward) * samples


def test_costs_of_epochs_add_up_and_no_epochs_cost_nothing() -> None:
    epoch = epoch_cost(FORWARD, (1.0, 0.25, 0.5), (True, False, False), samples=6, population=10)
    assert total_cost([epoch, epoch]).training_flops == 2 * epoch.training_flops
    assert total_cost([]) == EpochCost(0, 0, 0, 0, 0, 0)


def test_resnet32_on_cifar100_costs_1_32e16_flops_dense_and_a_tenth_at_90_percent(resnet32: ModelCost) -> None:
    assert resnet32.forward_flops / 2 == pytest.approx(275.6e6, rel=1e-3)
    never = [False] * len(resnet32.layers)

    def run(density: float) -> EpochCost:
        return total_cost(
            epoch_cost(resnet32.forward, [density] * len(never), never, samples=50_000, population=50_000)
            for _ in range(160)
        )

    assert run(1.0).training_flops == pytest.approx(1.32e16, rel=5e-3)
    assert run(0.1).training_flops / run(1.0).training_flops == pytest.approx(0.1, rel=1e-9)


def test_gradients_may_reach_beyond_the_mask_without_being_dense_and_overhead_is_charged_as_it_is() -> None:
    """Density 0.25, gradients at 0.75, 10 FLOPs forward, 4 samples: 30 - 10 = 20 more; and 7 for scores."""
    cost = epoch_cost(
        [10],
        [0.25],
        [False],
        samples=4,
        population=4,
        dense_gradient_samples=4,
        gradient_density=[0.75],
        overhead_flops=7,
    )
    assert cost.dense_gradient_flops == 20
    assert cost.overhead_flops == 7
    assert cost.training_flops == 3 * 10 + 20 + 7
