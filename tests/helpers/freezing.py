"""The small network in runs that freeze: the recipe, the session and the plan."""

from __future__ import annotations

from typing import Any

import torch

import spfde
from helpers.training import BATCH, SAMPLES, Parts

EPOCHS = 12


def freezing_recipe(
    freezing: spfde.ProgressiveFreezing, method: spfde.sparsity.SparsityMethod, **changes: Any
) -> spfde.Recipe:
    """All three savings, with this freezing and this method."""
    fields = {
        "sparsity": method,
        "freezing": freezing,
        "sieving": spfde.DataSieving(removed_fraction=0.25),
        "learning_rate": spfde.BlockwiseCosine(),
        "update_interval_epochs": 2,
    }
    return spfde.Recipe(**{**fields, **changes})


def attach(parts: Parts, recipe: spfde.Recipe, engine: str = "masked") -> spfde.Session:
    """A session of ``EPOCHS`` epochs."""
    return spfde.attach(parts.model, parts.optimizer, parts.loader, recipe, epochs=EPOCHS, seed=3, engine=engine)


def plan(parts: Parts, recipe: spfde.Recipe, epochs: int = EPOCHS) -> spfde.Plan:
    """What is planned for it."""
    return spfde.plan(parts.model, torch.zeros(1, 2, 8, 8), recipe, epochs, SAMPLES, batch_size=BATCH)
