"""What the user freezes and thaws in the run is billed as it is, and said."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import spfde

N = 24
FLOPS = [2 * 8 * 16, 2 * 16 * 16, 2 * 16 * 4]


def parts(
    recipe: spfde.Recipe | None = None, frozen: tuple[int, ...] = ()
) -> tuple[nn.Sequential, torch.optim.Optimizer, spfde.Session]:
    torch.manual_seed(0)
    layers = nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)
    model = nn.Sequential(*layers)
    for index in frozen:
        model[index].requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    data = DataLoader(TensorDataset(torch.randn(N, 8), torch.arange(N) % 4), batch_size=4)
    return model, optimizer, spfde.attach(model, optimizer, data, recipe or spfde.Recipe(), epochs=4, engine="masked")


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor, y: torch.Tensor) -> None:
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    optimizer.zero_grad()


def run(*args: object, change: tuple[int, bool], at: str = "top") -> tuple[spfde.Session, list[str]]:
    """Four epochs; at the top or the bottom of the third one a layer's ``requires_grad`` is set."""
    model, optimizer, session = parts(*args)
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        for epoch in session.epochs():
            if (epoch, at) == (2, "top"):
                model[change[0]].requires_grad_(change[1])
            for x, y in session.loader:
                step(model, optimizer, x, y)
            if (epoch, at) == (1, "bottom"):
                model[change[0]].requires_grad_(change[1])
    return session, [str(w.message) for w in heard]


@pytest.mark.parametrize("at", ["top", "bottom"])
def test_layers_that_the_user_thaws_are_billed_from_that_epoch_on(at: str) -> None:
    session, said = run(None, (0,), change=(0, True), at=at)
    rows = [row.training_flops for row in session.cost.rows]
    # The input of the second layer needs a gradient only where the first one learns.
    frozen, whole = N * (FLOPS[0] + 3 * FLOPS[1] + 3 * FLOPS[2]), 3 * N * sum(FLOPS)
    assert rows == [frozen, frozen, whole, whole]
    assert [row.dense_training_flops for row in session.cost.rows] == rows
    assert sum("0.weight, 0.bias learn" in text for text in said) == 1
    assert "requires_grad: 0.weight, 0.bias learn" in str(session)


def test_layers_that_the_user_freezes_are_billed_from_that_epoch_on() -> None:
    session, said = run(change=(0, False))
    frozen, whole = N * (FLOPS[0] + 3 * FLOPS[1] + 3 * FLOPS[2]), 3 * N * sum(FLOPS)
    assert [row.training_flops for row in session.cost.rows] == [whole, whole, frozen, frozen]
    assert sum("0.weight, 0.bias do not learn" in text for text in said) == 1


def test_a_layer_between_that_is_frozen_still_hands_gradients_on() -> None:
    session, _ = run(change=(2, False))
    between = N * (3 * FLOPS[0] + 2 * FLOPS[1] + 3 * FLOPS[2])
    assert session.cost.rows[2].training_flops == between


def test_what_the_session_freezes_is_no_change_of_the_users() -> None:
    recipe = spfde.Recipe(freezing=spfde.ProgressiveFreezing(flops_reduction=0.1), update_interval_epochs=1)
    model, optimizer, session = parts(recipe)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in session.epochs():
            for x, y in session.loader:
                step(model, optimizer, x, y)
    assert session.frozen_blocks
    assert "requires_grad" not in str(session)


def test_a_weight_that_learned_nothing_at_attach_is_named_where_it_stays_dense() -> None:
    recipe = spfde.Recipe(sparsity=spfde.SET(sparsity=0.5, dense_first=False), update_interval_epochs=1)
    session, said = run(recipe, (2,), change=(2, True))
    assert "2.weight" not in session.masks
    assert any("2.weight, 2.bias learn" in text and "dense" in text for text in said)


def test_parameters_that_are_switched_on_and_off_in_turn_learn_all() -> None:
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Linear(8, 4), nn.Linear(4, 1)])

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = model

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(torch.tanh(self.first(x)))

    both = Both()
    optimizers = [torch.optim.SGD(part.parameters(), lr=0.1) for part in (both.first, both.second)]
    data = DataLoader(TensorDataset(torch.randn(N, 8), torch.arange(N) % 4), batch_size=4)
    session = spfde.attach(both, optimizers, data, spfde.Recipe(), epochs=1, engine="masked")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in session.epochs():
            for x, _y in session.loader:
                for own, optimizer in zip((both.first, both.second), optimizers, strict=True):
                    both.requires_grad_(False)
                    own.requires_grad_(True)
                    both(x).mean().backward()
                    optimizer.step()
                    optimizer.zero_grad()
    assert session.cost.rows[0].training_flops == 2 * 3 * N * (2 * 8 * 4 + 2 * 4)
