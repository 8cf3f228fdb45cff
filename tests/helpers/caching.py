"""Sessions with a prefix cache, and the loop that augments by seeds."""

from __future__ import annotations

import io

import torch
from torch import Tensor

import spfde
from helpers.training import EPOCHS, Parts, make_parts, step

RECIPE = spfde.Recipe(
    sparsity=spfde.MEST(sparsity=0.8),
    freezing=spfde.ProgressiveFreezing(flops_reduction=0.0, start_epoch=2),
    sieving=spfde.DataSieving(removed_fraction=0.25),
    update_interval_epochs=2,
)
ONE = spfde.PrefixCache(1)


def attach(
    parts: Parts,
    recipe: spfde.Recipe = RECIPE,
    engine: str = "native",
    cache: spfde.PrefixCache | None = ONE,
) -> spfde.Session:
    return spfde.attach(
        parts.model, parts.optimizer, parts.loader, recipe, epochs=EPOCHS, seed=3, engine=engine, cache=cache
    )


def shifted(x: Tensor, seeds: Tensor) -> Tensor:
    """An augmentation that follows its seeds."""
    return torch.stack([torch.roll(image, int(seed % 3), 2) for image, seed in zip(x, seeds, strict=True)])


def train_cached(parts: Parts, session: spfde.Session) -> list[float]:
    losses = []
    for _ in session.epochs():
        parts.model.train()
        for x, y in session.loader:
            losses.append(float(step(parts, session, shifted(x, session.augmentation_seeds()), y)))
    return losses


def go_on(saved: bytes, cache: spfde.PrefixCache | None, engine: str = "native") -> Parts:
    """The run that was saved, attached anew with that cache and trained to its end."""
    parts = make_parts(seed=5)
    session = attach(parts, engine=engine, cache=cache)
    states = torch.load(io.BytesIO(saved), weights_only=False)
    for part, state in zip((parts.model, parts.optimizer, session), states, strict=True):
        part.load_state_dict(state)  # type: ignore[attr-defined]
    train_cached(parts, session)
    return parts


def train_and_save(parts: Parts, session: spfde.Session, stop: int) -> bytes:
    """Train to the end; what was saved at the top of epoch ``stop``."""
    file = io.BytesIO()
    for epoch in session.epochs():
        if epoch == stop:
            torch.save([parts.model.state_dict(), parts.optimizer.state_dict(), session.state_dict()], file)
        for x, y in session.loader:
            step(parts, session, shifted(x, session.augmentation_seeds()), y)
    return file.getvalue()
