"""DSR: one threshold that adapts, and weights that move to the layers that keep more of theirs."""

import pytest
import torch

from helpers.masking import HandRun
from spfde.sparsity import DSR
from spfde.sparsity.redistribution import LayerView, share_out


def _view(n_units: int, *scores: float, momentum: float = 0.0) -> LayerView:
    return LayerView(n_units, torch.tensor(scores), momentum)


# A fourth of eight active weights is two; a tenth either way leaves nothing but two.
LAYERS = [_view(10, 0.0005, 0.002, 0.003, 0.5), _view(8, 0.0001, 0.0002, 0.9, 0.8)]


def test_a_mutation_by_hand_gives_in_proportion_to_what_each_layer_kept() -> None:
    memory = {"threshold": 1e-3}
    method = DSR(sparsity=0.5, drop_fraction=0.25, threshold=1e-3)
    # One falls in the first layer and two in the second; three go back in the proportion 3:2, that is 1.8 and 1.2.
    assert method.allot(LAYERS, progress=0.0, memory=memory) == [(3, 5), (2, 3)]
    # Three are more than the two that were wanted.
    assert memory == {"threshold": 5e-4}


@pytest.mark.parametrize(
    ("threshold", "dropped", "adapted"), [(1e-4, 0, 2e-4), (4e-4, 2, 4e-4), (1e-3, 3, 5e-4), (0.6, 5, 0.3)]
)
def test_the_threshold_doubles_after_too_few_and_halves_after_too_many(
    threshold: float, dropped: int, adapted: float
) -> None:
    memory = {"threshold": threshold}
    turnovers = DSR(sparsity=0.5, drop_fraction=0.25).allot(LAYERS, progress=0.5, memory=memory)
    assert 8 - sum(keep for keep, _ in turnovers) == dropped
    assert memory["threshold"] == pytest.approx(adapted)


@pytest.mark.parametrize(("tolerance", "adapted"), [(0.4, 5e-4), (0.5, 1e-3)])
def test_within_the_tolerance_the_threshold_stays(tolerance: float, adapted: float) -> None:
    memory = {"threshold": 1e-3}
    DSR(sparsity=0.5, drop_fraction=0.25, tolerance=tolerance).allot(LAYERS, progress=0.0, memory=memory)
    assert memory["threshold"] == adapted  # three dropped for two wanted


def test_a_weight_at_the_threshold_stays() -> None:
    memory = {"threshold": 0.25}
    (turnover,) = DSR(sparsity=0.5, drop_fraction=0.5).allot([_view(4, 0.25, 0.24)], progress=0.0, memory=memory)
    assert turnover == (1, 2)


def test_a_layer_never_loses_its_last_weight() -> None:
    memory = {"threshold": 0.1}
    layers = [_view(9, 0.01, 0.02), _view(9, 0.5, 0.5)]
    turnovers = DSR(sparsity=0.5, drop_fraction=0.25).allot(layers, progress=0.0, memory=memory)
    assert turnovers == [(1, 1), (2, 3)]  # one goes back by 1:2, to the larger claim


def test_a_full_layer_hands_on_what_it_cannot_take() -> None:
    layers = [_view(4, 1.0, 1.0, 1.0, 1.0), _view(9, 1.0, 1.0, 1.0)]
    # Two were dropped in each; 2:1 would give the first layer more than its two free places.
    assert share_out(layers, [2, 1], claims=[9.0, 1.0]) == [(2, 4), (1, 3)]


def test_nothing_moves_after_the_stop_fraction() -> None:
    memory = {"threshold": 1e-3}
    turnovers = DSR(sparsity=0.5, stop_fraction=0.5).allot(LAYERS, progress=0.5, memory=memory)
    assert turnovers == [(4, 4), (4, 4)]
    assert memory == {"threshold": 1e-3}


def test_weights_move_between_layers_and_start_from_nothing() -> None:
    method = DSR(sparsity=0.5, drop_fraction=0.25, threshold=0.1)
    weights = {"w": [0.01, 0.5, 0.6, 0.7] * 2, "v": [0.02, 0.03, 0.04, 0.9] * 2}
    run = HandRun(method, weights, momentum=0.9)
    run.begin_epoch(0)
    run.step(w=[0.0] * 8, v=[0.0] * 8)
    for buffer in (run.optimizer.state[p]["momentum_buffer"] for p in run.weights.values()):
        buffer.fill_(1.0)
    kept = {name: [p for p in run.active(name) if abs(run.weight(name)[p]) >= 0.1] for name in weights}
    dropped = 8 - sum(map(len, kept.values()))
    assert dropped > 0
    run.begin_epoch(1)
    assert sum(len(run.active(name)) for name in weights) == 8
    for name, places in kept.items():
        assert set(places) <= set(run.active(name))
        rest = set(range(8)) - set(places)
        assert all(run.weight(name)[place] == 0.0 == run.momentum(name)[place] for place in rest)
    assert run.targets == {name: len(run.active(name)) for name in weights}
    expected = 0.05 if dropped > 2 else 0.1 if dropped == 2 else 0.2
    assert run.strategy_state["memory"] == {"threshold": expected}


def test_a_frozen_layer_neither_gives_nor_takes() -> None:
    method = DSR(sparsity=0.5, drop_fraction=0.25, threshold=0.55)
    run = HandRun(method, {"w": [0.5] * 8, "v": [0.5, 0.6] * 4}, frozen={1: 1})
    run.begin_epoch(0)
    frozen = run.active("w")
    for epoch in range(1, 5):
        run.begin_epoch(epoch)
        assert run.active("w") == frozen
        assert len(run.active("v")) == 4
