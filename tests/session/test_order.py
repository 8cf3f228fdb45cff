"""In which order the states of the model, the optimizer and the session are loaded, and what is refused."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch

import spfde
from helpers.resuming import EPOCHS, METHODS, Loop, assert_equal, bottom, finish, recipe_with, top
from helpers.short import short
from helpers.training import make_parts

WITHOUT_SPARSITY = spfde.Recipe(
    freezing=spfde.ProgressiveFreezing(flops_reduction=0.15),
    sieving=spfde.DataSieving(removed_fraction=0.25),
    update_interval_epochs=2,
)


def weights_first(recipe: spfde.Recipe, saved: bytes) -> Any:
    """A trainer's order: a fresh model has loaded its weights when attach runs; the optimizer's state comes last."""
    states = torch.load(io.BytesIO(saved), weights_only=True)
    parts = make_parts(seed=99)
    parts.model.load_state_dict(states["model"])
    options = {"epochs": EPOCHS, "seed": 3, "engine": "masked", "state": states["spfde"]}
    session = spfde.attach(parts.model, parts.optimizer, parts.loader, recipe, **options)
    assert_equal(dict(parts.model.state_dict()), dict(states["model"]))
    parts.optimizer.load_state_dict(states["optimizer"])
    torch.set_rng_state(states["global"])
    return parts, session


@pytest.mark.parametrize("method", short(METHODS))
def test_weights_loaded_before_attach_go_on_bit_for_bit_with_every_method(method: str) -> None:
    loop = Loop(recipe_with(method))
    saved, end = loop.states()
    assert_equal(finish(*weights_first(loop.recipe, saved[bottom(2)])), end)


def test_weights_loaded_before_attach_go_on_from_the_top_of_an_epoch_too() -> None:
    loop = Loop(recipe_with("mest-gradient"))
    saved, end = loop.states()
    assert_equal(finish(*weights_first(loop.recipe, saved[top(4)])), end)


def test_without_sparsity_weights_loaded_before_attach_go_on_bit_for_bit() -> None:
    saved, end = Loop(WITHOUT_SPARSITY).states()
    assert_equal(finish(*weights_first(WITHOUT_SPARSITY, saved[bottom(4)])), end)


def test_an_optimizer_that_was_loaded_before_attach_keeps_its_momentum_under_the_saved_masks() -> None:
    loop = Loop(spfde.Recipe(sparsity=spfde.MEST(sparsity=0.8), update_interval_epochs=2))
    saved, end = loop.states()
    states = torch.load(io.BytesIO(saved[bottom(3)]), weights_only=True)
    parts = make_parts(seed=99)
    parts.model.load_state_dict(states["model"])
    parts.optimizer.load_state_dict(states["optimizer"])
    options = {"epochs": EPOCHS, "seed": 3, "engine": "masked", "state": states["spfde"]}
    session = spfde.attach(parts.model, parts.optimizer, parts.loader, loop.recipe, **options)
    torch.set_rng_state(states["global"])
    assert_equal(finish(parts, session), end)


def test_an_optimizers_state_with_groups_that_block_wise_rates_have_split_fits_after_attach_alone() -> None:
    saved, end = Loop(recipe_with("mest-ems")).states()
    states = torch.load(io.BytesIO(saved[bottom(3)]), weights_only=True)
    parts = make_parts(seed=99)
    with pytest.raises(ValueError, match="parameter group"):  # PyTorch's own
        parts.optimizer.load_state_dict(states["optimizer"])
    assert "comes after" in str(spfde.attach.__doc__)
    assert_equal(finish(*weights_first(recipe_with("mest-ems"), saved[bottom(3)])), end)


def test_a_state_under_other_weights_is_refused_and_leaves_them_as_they_were() -> None:
    loop = Loop(recipe_with("mest-ems"))
    saved, _ = loop.states()
    state = torch.load(io.BytesIO(saved[bottom(3)]), weights_only=True)["spfde"]
    parts = make_parts(seed=99)
    before = copy.deepcopy(parts.model.state_dict())
    groups = len(parts.optimizer.param_groups)
    options = {"epochs": EPOCHS, "seed": 3, "engine": "masked"}
    with pytest.raises(spfde.StateMismatch, match="outside the mask"):
        spfde.attach(parts.model, parts.optimizer, parts.loader, loop.recipe, **options, state=state)
    assert_equal(dict(parts.model.state_dict()), dict(before))
    assert len(parts.optimizer.param_groups) == groups
    spfde.attach(parts.model, parts.optimizer, parts.loader, loop.recipe, **options).detach()


@pytest.mark.parametrize("method", ["mest-ems", "str", "deepr"])
def test_a_state_loaded_after_attach_has_zeroed_its_weights_is_refused_with_the_order(method: str) -> None:
    loop = Loop(recipe_with(method))
    saved, _ = loop.states()
    states = torch.load(io.BytesIO(saved[bottom(3)]), weights_only=True)
    parts = make_parts(seed=99)
    parts.model.load_state_dict(states["model"])
    options = {"epochs": EPOCHS, "seed": 4, "engine": "masked"}
    session = spfde.attach(parts.model, parts.optimizer, parts.loader, loop.recipe, **options)
    parts.optimizer.load_state_dict(states["optimizer"])
    with pytest.raises(spfde.StateMismatch, match=r"state=") as caught:
        session.load_state_dict(states["spfde"])
    assert "attach" in str(caught.value)
    assert session.epoch == 0
