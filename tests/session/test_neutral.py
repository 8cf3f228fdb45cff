"""A neutral recipe trains bit for bit like the plain loop."""

from __future__ import annotations

import pytest
import torch

import spfde
from helpers.training import EPOCHS, make_parts, step, train

NEUTRAL = {
    "nothing": spfde.Recipe(),
    "sparsity 0": spfde.Recipe(sparsity=spfde.MEST(sparsity=0.0)),
    "RigL at 0": spfde.Recipe(sparsity=spfde.RigL(sparsity=0.0)),
    "freezing nothing": spfde.Recipe(freezing=spfde.ProgressiveFreezing(flops_reduction=0.0)),
    "removing nothing": spfde.Recipe(sieving=spfde.DataSieving(removed_fraction=0.0)),
    "all of these": spfde.Recipe(
        sparsity=spfde.SET(sparsity=0.0),
        freezing=spfde.ProgressiveFreezing(flops_reduction=0.0),
        sieving=spfde.DataSieving(removed_fraction=0.0),
    ),
}


def plain_run(**how: bool) -> tuple[list[float], dict[str, torch.Tensor], torch.Tensor]:
    parts = make_parts(**how)
    torch.manual_seed(7)
    losses = [float(step(parts, None, x, y)) for _ in range(EPOCHS) for x, y in parts.loader]
    return losses, parts.model.state_dict(), torch.get_rng_state()


@pytest.mark.parametrize("recipe", NEUTRAL.values(), ids=NEUTRAL)
@pytest.mark.parametrize("how", [{}, {"own_generator": False}, {"drop_last": True}], ids=str)
def test_a_neutral_recipe_trains_bit_for_bit_like_the_plain_loop(recipe: spfde.Recipe, how: dict[str, bool]) -> None:
    losses, weights, generator = plain_run(**how)
    parts = make_parts(**how)
    torch.manual_seed(7)
    before = torch.get_rng_state()
    session = spfde.attach(parts.model, parts.optimizer, parts.loader, recipe, epochs=EPOCHS)
    assert torch.equal(torch.get_rng_state(), before), "attach drew from the global generator"
    assert train(parts, session) == losses
    assert all(torch.equal(value, weights[name]) for name, value in parts.model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), generator)


@pytest.mark.parametrize("recipe", NEUTRAL.values(), ids=NEUTRAL)
def test_a_neutral_recipe_costs_exactly_the_dense_flops(recipe: spfde.Recipe) -> None:
    parts = make_parts()
    session = spfde.attach(parts.model, parts.optimizer, parts.loader, recipe, epochs=2)
    train(parts, session)
    cost = session.cost.totals.cost
    assert cost.training_flops == cost.dense_training_flops > 0
    assert session.engine == "masked"


def test_attach_leaves_batch_norm_statistics_and_the_loader_alone() -> None:
    parts = make_parts()
    before = {name: value.clone() for name, value in parts.model.state_dict().items()}
    drawn = parts.loader.generator.get_state()
    spfde.attach(parts.model, parts.optimizer, parts.loader, spfde.Recipe(), epochs=2)
    assert all(torch.equal(value, before[name]) for name, value in parts.model.state_dict().items())
    assert torch.equal(parts.loader.generator.get_state(), drawn)
