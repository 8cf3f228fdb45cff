"""Sieving without classes: a regression with two outputs tells the sieve one loss a sample.

Where there is no right and wrong, a sample counts as learned when its loss is at most the median of its batch.

    python examples/per_sample_loss.py
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import spfde

RECIPE = spfde.Recipe(
    sparsity=spfde.SET(sparsity=0.7),
    freezing=spfde.ProgressiveFreezing(flops_reduction=0.10),
    sieving=spfde.DataSieving(removed_fraction=0.25),
)


def make_data(n: int, *, seed: int) -> TensorDataset:
    """Two smooth functions of eight numbers, with a little noise."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 8, generator=generator)
    y = torch.stack([torch.sin(x[:, :4].sum(1)), (x[:, 4:] ** 2).mean(1)], dim=1)
    return TensorDataset(x, y + 0.05 * torch.randn(y.shape, generator=generator))


def loss_per_sample(predicted: Tensor, y: Tensor) -> Tensor:
    return F.smooth_l1_loss(predicted, y, reduction="none").mean(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--epochs", type=int, default=12)
    options = parser.parse_args()

    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    loader = DataLoader(make_data(options.samples, seed=0), batch_size=50, shuffle=True)
    session = spfde.attach(model, optimizer, loader, RECIPE, epochs=options.epochs)
    # No BlockwiseCosine in the recipe: the learning rate is ours.
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=options.epochs)

    x_test, y_test = make_data(500, seed=1).tensors
    for epoch in session.epochs():
        for x, y in session.loader:
            loss = loss_per_sample(model(x), y)  # [N], not yet averaged
            loss.mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            session.observe(loss=loss)
        scheduler.step()
        with torch.no_grad():
            test_loss = float(loss_per_sample(model(x_test), y_test).mean())
        print(f"epoch {epoch}: test loss {test_loss:.4f}, {len(session.partial_set):,} samples in use")
    print(f"\nsamples used at least once: {session.sieve_turnover['ever_used']:,} of {options.samples:,}")
    print(session.cost)


if __name__ == "__main__":
    main()
