"""Top-KAST: the model computes with set A, the larger set B learns, and nothing moves the rest."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import spfde
from helpers.masking import HandRun
from spfde.core.errors import StateMismatch
from spfde.sparsity import StaticSparse, TopKAST

# At sparsity 0.8 set A is the first two of these ten, and with a fifth more set B the first four.
TEN = [0.9, -0.8, 0.7, -0.6, 0.5, -0.4, 0.3, -0.2, 0.1, -0.05]


def _run(**fields: float) -> HandRun:
    method = TopKAST(sparsity=0.8, exploration=0.2, **{"penalty": 0.5, **fields})
    run = HandRun(method, {"w": TEN}, momentum=0.9, weight_decay=0.1, epochs=5)
    run.begin_epoch(0)
    return run


def _latent(run: HandRun) -> list[float]:
    weight = run.strategy_state["latents"]["w"]["weight"]
    return [round(value, 6) for value in weight.flatten().tolist()]


def test_the_model_computes_with_the_largest_and_gradients_reach_the_next_ones() -> None:
    run = _run()
    assert run.weight() == [0.9, -0.8, *[0.0] * 8]
    assert run.active() == [0, 1]
    assert run.masker.density == 0.2
    assert run.masker.layers["w"].n_gradient == 4
    (run.weights["w"] * torch.arange(1.0, 11.0)).sum().backward()
    assert run.weights["w"].grad is not None
    assert run.weights["w"].grad.tolist() == [[1, 2, 3, 4, 0, 0, 0, 0, 0, 0]]


def test_a_step_by_hand_moves_set_b_and_nothing_else() -> None:
    run = _run()
    run.step(w=[1.0] * 10)
    # SGD with weight decay: w - 0.1 (1 + 0.1 w); then A shrinks by 0.1 * 0.5, and B outside A by that over 0.2.
    inside = [(0.9 - 0.109) * 0.95, (-0.8 - 0.092) * 0.95, (0.7 - 0.107) * 0.75, (-0.6 - 0.094) * 0.75]
    assert _latent(run) == pytest.approx([*inside, *TEN[4:]])
    assert run.weight() == pytest.approx([*inside[:2], *[0.0] * 8], abs=1e-6)
    assert run.momentum() == pytest.approx([1.09, 0.92, 1.07, 0.94, *[0.0] * 6])


def test_momentum_moves_set_b_and_nothing_else() -> None:
    run = _run(penalty=0.0)
    run.step(w=[1.0] * 10)
    before = _latent(run)
    run.step(w=[0.0] * 10)
    buffer = [0.9 * m + 0.1 * w for m, w in zip([1.09, 0.92, 1.07, 0.94], before, strict=False)]
    assert _latent(run)[:4] == pytest.approx([w - 0.1 * b for w, b in zip(before, buffer, strict=False)], abs=1e-6)
    assert _latent(run)[4:] == TEN[4:]


def test_at_an_update_epoch_the_sets_are_chosen_anew_by_magnitude() -> None:
    run = _run(penalty=0.0)
    run.step(w=[0.0, 0.0, -5.0, 0.0] + [0.0] * 6)  # pushes the third, from B, to 1.19 and past all others
    assert run.active() == [0, 1]
    run.begin_epoch(1)
    assert run.active() == [0, 2]
    assert run.weight()[2] == pytest.approx(0.7 + 0.5 - 0.1 * 0.07)
    assert run.weight()[1] == 0.0
    assert _latent(run)[1] == pytest.approx(-0.8 * 0.99)  # out of A, and not forgotten


def test_the_penalty_lets_an_outsider_take_a_place_in_set_b() -> None:
    run = _run()
    run.step(w=[0.0] * 10)
    run.begin_epoch(1)
    # The fourth has shrunk to 0.6 * 0.99 * 0.75 = 0.4455, and the fifth was left at 0.5.
    run.step(w=[1.0] * 10)
    assert [place for place, value in enumerate(run.momentum()) if value] == [0, 1, 2, 4]
    assert _latent(run)[3] == pytest.approx(-0.4455)


def test_from_the_stop_fraction_on_the_sparse_weights_learn_alone() -> None:
    run = _run(stop_fraction=0.5)
    run.step(w=[1.0] * 10)
    run.begin_epoch(3)
    assert run.masker.layers["w"].n_gradient == 2
    assert run.strategy_state["latents"] == {"w": {}}
    active = run.active()
    run.step(w=[1.0] * 10)
    assert run.active() == active == [0, 1]
    assert [value for place, value in enumerate(run.momentum()) if place not in active] == [0.0] * 8


def test_the_bill_charges_the_wider_weight_gradient_but_in_the_last_epoch() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 10), nn.Linear(10, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loader = DataLoader(TensorDataset(torch.randn(20, 4), torch.randint(3, (20,))), batch_size=8)
    recipe = spfde.Recipe(sparsity=TopKAST(sparsity=0.9, exploration=0.25))
    bill = spfde.plan(model, torch.zeros(1, 4), recipe, 4, 20, batch_size=8)
    session = spfde.attach(model, optimizer, loader, recipe, epochs=4, engine="masked")
    for _ in session.epochs():
        for x, y in session.loader:
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
    # The middle layer alone is masked: 80 weights, 8 of them in A and 20 more in B.
    extra = 20 * 2 * 20
    sparse = 3 * 20 * 2 * (32 + 8 + 30)
    assert [row.dense_gradient_flops for row in session.cost.rows] == [extra, extra, extra, 0]
    assert [row.training_flops for row in session.cost.rows] == [sparse + extra] * 3 + [sparse]
    assert session.cost.totals.cost == bill.cost


def test_a_state_with_damaged_weights_behind_its_mask_is_refused_and_nothing_has_changed() -> None:
    run = _run()
    run.step(w=[1.0] * 10)
    state = run.masker.state_dict()
    run.step(w=[1.0] * 10)
    before = _latent(run)
    state["strategy"]["latents"]["w"].pop("reach")
    with pytest.raises(StateMismatch, match="reach"):
        run.masker.load_state_dict(state)
    assert _latent(run) == before
    assert run.masker.layers["w"].n_gradient == 4


def test_weights_behind_masks_are_refused_by_a_method_that_keeps_none() -> None:
    state = _run().masker.state_dict()
    other = HandRun(StaticSparse(sparsity=0.8), {"w": [0.0] * 10})
    with pytest.raises(StateMismatch, match="pending"):
        other.masker.load_state_dict(state)
