"""What a session adds to a training step: few operations, whatever the number of layers, and no look at a value."""

from __future__ import annotations

import warnings
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

import spfde
from helpers.counting import Operations
from helpers.short import short
from helpers.training import BATCH, Residual, SmallNet, make_images
from spfde.recipe.presets import PRESETS

CHANGES_MASKS_EVERY_STEP = {"deepr", "str"}
"""How many weights are active there is known on the device alone."""


class DeepNet(SmallNet):
    """More of the same blocks."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(Residual(6) for _ in range(depth)))


def operations_of_a_step(
    recipe: spfde.Recipe, model: nn.Module, *, attached: bool = True, adam: bool = False
) -> Operations:
    """Of the fourth step in the second epoch: nothing is mutated, and nothing looked up for the first time."""
    torch.manual_seed(0)
    kind = torch.optim.AdamW if adam else torch.optim.SGD
    optimizer = kind(model.parameters(), lr=0.01, **({} if adam else {"momentum": 0.9}))
    loader = DataLoader(make_images(), BATCH)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        session = spfde.attach(model, optimizer, loader, recipe, epochs=8, engine="masked")
    if not attached:
        session.detach()
    epochs = session.epochs() if attached else range(2)
    for epoch in epochs:
        for number, (x, y) in enumerate(session.loader if attached else loader):
            operations = Operations()
            with operations:
                logits = model(x)
                F.cross_entropy(logits, y).backward()
                optimizer.step()
                optimizer.zero_grad()
                if attached:
                    session.observe(logits, y)
            if (epoch, number) == (1, 3):
                return operations
    raise AssertionError("a run has more steps")


def ours(recipe: spfde.Recipe, depth: int = 3, *, adam: bool = False) -> Counter[str]:
    """Operations of a step that are not the plain loop's."""
    with_session = operations_of_a_step(recipe, DeepNet(depth), adam=adam)
    return with_session.names - operations_of_a_step(recipe, DeepNet(depth), attached=False, adam=adam).names


@pytest.mark.parametrize("depth", [1, 6])
@pytest.mark.parametrize("adam", [False, True])
def test_masks_take_one_operation_for_gradients_and_one_for_weights_and_state(depth: int, adam: bool) -> None:
    assert ours(spfde.presets.mest, depth, adam=adam) == {"_foreach_mul_": 2}


TWO = [n for n in PRESETS if n not in {"dense", "spfde", "mest-de", "topkast", "snfs", *CHANGES_MASKS_EVERY_STEP}]


@pytest.mark.parametrize("name", short(TWO, set(TWO) - {"synflow", "grasp"}))
def test_every_method_that_changes_masks_at_times_takes_two_operations_a_step(name: str) -> None:
    assert ours(PRESETS[name].replace(update_interval_epochs=2)) == {"_foreach_mul_": 2}


def test_a_neutral_recipe_adds_no_operation() -> None:
    assert not ours(spfde.Recipe())


def test_a_report_takes_few_operations_however_many_layers_there_are() -> None:
    recipe = spfde.presets.spfde.replace(update_interval_epochs=2)
    found = ours(recipe)
    assert found["_foreach_mul_"] == 2
    # Which class wins, whether it is the right one, and a copy of that; and the bounds of the labels.
    assert found - Counter({"_foreach_mul_": 2}) == {"argmax": 1, "eq": 1, "clone": 1, "aminmax": 1}
    assert ours(recipe, 6) == found


@pytest.mark.parametrize(
    "name", short([name for name in PRESETS if name != "itop"], set(PRESETS) - {"synflow", "grasp"})
)
def test_no_step_looks_at_a_value_so_that_no_gpu_is_waited_for(name: str) -> None:
    operations = operations_of_a_step(PRESETS[name].replace(update_interval_epochs=2), SmallNet())
    assert (operations.reads > 0) == (name in CHANGES_MASKS_EVERY_STEP)


@pytest.mark.parametrize("criterion", ["forgetting", "loss", "el2n", "random", "top-loss"])
def test_no_criterion_looks_at_a_value_in_a_step(criterion: str) -> None:
    sieving = spfde.DataSieving(removed_fraction=0.25, criterion=criterion)
    recipe = spfde.Recipe(sieving=sieving, update_interval_epochs=2)
    assert operations_of_a_step(recipe, SmallNet()).reads == 0
