"""Criteria of your own: which weights are dropped, and which samples count as easy. One class each.

Once registered, a criterion is used from Python and has its name in recipes, TOML files and ``spfde methods``. On the
command line ``--plugin own_criterion`` imports the module first.

    python examples/own_criterion.py
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import spfde
from spfde.sieving import SievingCriterion
from spfde.sparsity import Criterion, DropGrow


@spfde.register("drop")
class Movement(Criterion):
    """Weights stay that their gradient moves away from zero, and those go that it moves there."""

    name = "movement"
    summary = "What moves away from zero stays."
    needs_gradient = True

    def score(self, weight: Tensor, gradient: Tensor | None) -> Tensor:
        return -weight * gradient


@spfde.register("sieving-criterion")
class Margin(SievingCriterion):
    """Samples are easy where the model prefers one class by far."""

    name = "margin"
    summary = "The largest lead of the most probable class is easiest."

    def from_logits(self, logits: Tensor, y: Tensor) -> Tensor:
        first, second = logits.softmax(1).topk(2).values.T
        return second - first


IN_PYTHON = spfde.Recipe(
    sparsity=DropGrow(sparsity=0.8, drop=Movement(), drop_fraction=0.2),
    sieving=spfde.DataSieving(removed_fraction=0.25, criterion="margin"),
)
IN_TOML = """
sparsity = { method = "drop-grow", sparsity = 0.8, drop = "movement", drop_fraction = 0.2 }
sieving = { removed_fraction = 0.25, criterion = "margin" }
"""


def train(recipe: spfde.Recipe, epochs: int = 20) -> float:
    """Train a small classifier, and return its loss on all samples."""
    torch.manual_seed(0)
    x = torch.randn(400, 10)
    y = (x[:, 0] * x[:, 1] > 0).long() + (x[:, 2] > 0.5).long()
    model = nn.Sequential(nn.Linear(10, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    session = spfde.attach(model, optimizer, DataLoader(TensorDataset(x, y), batch_size=40), recipe, epochs=epochs)
    for _ in session.epochs():
        for inputs, labels in session.loader:
            logits = model(inputs)
            F.cross_entropy(logits, labels).backward()
            optimizer.step()
            optimizer.zero_grad()
            session.observe(logits, labels)
    print(f"{len(session.partial_set)} samples in use, {session.explored:.0%} of the weights were active at some time")
    return F.cross_entropy(model(x), y).item()


if __name__ == "__main__":
    print(f"made in Python: loss {train(IN_PYTHON):.4f}")
    print(f"read from TOML: loss {train(spfde.Recipe.from_toml(IN_TOML)):.4f}")
