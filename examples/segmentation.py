"""A task for each pixel: a U-Net finds discs in noise, and samples are sieved by their loss.

Its front is no chain: what the encoder computes is read again by the decoder. Blocks are found in the order in which
they run, and freezing them from the front still cuts the backward pass off.

    python examples/segmentation.py
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import spfde

RECIPE = spfde.Recipe(
    sparsity=spfde.MEST(sparsity=0.8),
    freezing=spfde.ProgressiveFreezing(flops_reduction=0.05),
    sieving=spfde.DataSieving(removed_fraction=0.20, criterion="loss"),
    learning_rate=spfde.BlockwiseCosine(),
)


class Unit(nn.Module):
    """Two convolutions, each with its norm."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(x)))


class UNet(nn.Module):
    """Two levels down, two levels up, with a connection at each level."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.down1, self.down2, self.bottom = Unit(1, width), Unit(width, 2 * width), Unit(2 * width, 4 * width)
        self.up2, self.up1 = Unit(6 * width, 2 * width), Unit(3 * width, width)
        self.head = nn.Conv2d(width, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        first = self.down1(x)
        second = self.down2(F.max_pool2d(first, 2))
        x = F.interpolate(self.bottom(F.max_pool2d(second, 2)), scale_factor=2)
        x = F.interpolate(self.up2(torch.cat([x, second], 1)), scale_factor=2)
        return self.head(self.up1(torch.cat([x, first], 1)))[:, 0]


def make_data(n: int, *, seed: int, side: int = 24) -> TensorDataset:
    """Images [1, side, side] with a disc each, in noise, and which pixels belong to it."""
    generator = torch.Generator().manual_seed(seed)
    centre = side * (0.25 + 0.5 * torch.rand(n, 2, 1, 1, generator=generator))
    radius = side * (0.1 + 0.15 * torch.rand(n, 1, 1, generator=generator))
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    inside = ((rows - centre[:, 0]) ** 2 + (columns - centre[:, 1]) ** 2 <= radius**2).float()
    return TensorDataset(inside[:, None] + 0.8 * torch.randn(n, 1, side, side, generator=generator), inside)


def loss_per_sample(logits: Tensor, inside: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, inside, reduction="none").mean((1, 2))


def overlap(logits: Tensor, inside: Tensor) -> float:
    """Intersection over union of all discs together."""
    found = logits > 0
    return float((found & (inside > 0)).sum() / (found | (inside > 0)).sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=600)
    parser.add_argument("--epochs", type=int, default=12)
    options = parser.parse_args()

    torch.manual_seed(0)
    model = UNet()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    loader = DataLoader(make_data(options.samples, seed=0), batch_size=20, shuffle=True)
    session = spfde.attach(model, optimizer, loader, RECIPE, epochs=options.epochs)
    print("blocks:", ", ".join(block.name for block in session.blueprint.partition.blocks))

    x_test, y_test = make_data(100, seed=1).tensors
    for epoch in session.epochs():
        model.train()
        for x, y in session.loader:
            loss = loss_per_sample(model(x), y)  # [N], averaged over the pixels
            loss.mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            session.observe(loss=loss)
        model.eval()
        with torch.no_grad():
            test = overlap(model(x_test), y_test)
        print(f"epoch {epoch}: overlap {test:.3f}, {session.frozen_blocks} blocks frozen")
    print(session.cost)


if __name__ == "__main__":
    main()
