"""Gradual magnitude pruning: dense at first, the smallest weights go along a cubic schedule, nothing grows."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import spfde
from helpers.masking import HandRun
from spfde.core.errors import InvalidArgument
from spfde.sparsity import GMP


def test_the_cubic_schedule_by_hand() -> None:
    method = GMP(sparsity=0.9, stop_fraction=0.8)
    progress = [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    # 0.9 of a thousand weights go; of these (1 - p / 0.8)^3 are left.
    left = [1.0, 0.75**3, 0.125, 0.25**3, 0.0, 0.0]
    counts = [1000, 480, 213, 114, 100, 100]
    assert [method.mutation_counts(100, 1000, 1000, p) for p in progress] == [(n, n) for n in counts]
    assert [100 + 900 * share for share in left] == pytest.approx([1000, 479.6875, 212.5, 114.0625, 100, 100])


def test_pruning_starts_late_and_from_an_initial_sparsity_on_request() -> None:
    method = GMP(sparsity=0.9, initial_sparsity=0.5, start_fraction=0.25, stop_fraction=0.75)
    assert [method.mutation_counts(100, 1000, 500, p)[1] for p in (0.0, 0.25, 0.5, 0.75)] == [500, 500, 150, 100]
    assert method.first_count(100, 1000) == 500


def test_a_layer_that_has_come_to_its_target_early_stays_there() -> None:
    assert GMP(sparsity=0.9).mutation_counts(100, 1000, 100, 0.1) == (100, 100)


@given(st.integers(1, 500), st.floats(0, 0.99), st.floats(0, 1), st.floats(0, 1))
def test_the_count_falls_and_stays_between_the_start_and_the_target(
    n_units: int, initial: float, early: float, late: float
) -> None:
    target = max(1, n_units // 10)
    method = GMP(sparsity=0.9, initial_sparsity=initial)
    first = method.first_count(target, n_units)
    counts = [method.mutation_counts(target, n_units, first, p)[1] for p in sorted((early, late))]
    assert target <= counts[1] <= counts[0] <= first <= n_units


def test_a_start_behind_the_stop_is_refused() -> None:
    with pytest.raises(InvalidArgument, match=r"start_fraction.*stop_fraction"):
        GMP(sparsity=0.9, start_fraction=0.5, stop_fraction=0.5)


def test_the_smallest_go_and_none_returns() -> None:
    weights = [0.1 * (1 + (7 * place) % 20) for place in range(20)]
    run = HandRun(GMP(sparsity=0.9, stop_fraction=0.8), {"w": weights}, epochs=10, momentum=0.9)
    counts, before = [], set(range(20))
    for epoch in range(10):
        run.begin_epoch(epoch)
        now = set(run.active())
        assert now <= before
        assert all(abs(run.weight()[kept]) >= max([weights[gone] for gone in before - now], default=0) for kept in now)
        before = now
        counts.append(len(now))
        run.step(w=[0.0] * 20)
    # 18 of 20 go: 2 + 18 (1 - epoch / 8)^3, rounded half up.
    assert counts == [20, 14, 10, 6, 4, 3, 2, 2, 2, 2]


def test_a_checkpoint_that_is_sparser_than_planned_grows_nothing() -> None:
    run = HandRun(GMP(sparsity=0.9), {"w": [0.1 * (1 + place) for place in range(20)]})
    run.begin_epoch(0)
    run.step(w=[0.0] * 20)
    with torch.no_grad():
        run.weights["w"][0, :15] = 0.0
    run.infer_masks()
    for epoch in range(1, 10):
        run.begin_epoch(epoch)
        assert len(run.active()) <= 5
    assert run.active() == [18, 19]


def test_the_bill_follows_the_falling_density() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 10), nn.Linear(10, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loader = DataLoader(TensorDataset(torch.randn(20, 4), torch.randint(3, (20,))), batch_size=8)
    recipe = spfde.Recipe(sparsity=GMP(sparsity=0.9, stop_fraction=1.0), update_interval_epochs=1)
    bill = spfde.plan(model, torch.zeros(1, 4), recipe, 4, 20, batch_size=8)
    session = spfde.attach(model, optimizer, loader, recipe, epochs=4, engine="masked")
    for _ in session.epochs():
        for x, y in session.loader:
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
    # 8 + 72 (1 - epoch / 4)^3 of 80 weights in the middle layer; the last epoch is at target.
    assert [row.training_flops for row in session.cost.rows] == [3 * 20 * 2 * (62 + n) for n in (80, 38, 17, 8)]
    assert session.cost.totals.cost == bill.cost
