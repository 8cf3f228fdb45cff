"""A small net, a small data set and the ordinary loop, for tests of the session."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import spfde

EPOCHS = 8
SAMPLES = 40
BATCH = 8


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + x)


class SmallNet(nn.Module):
    """A stem, three residual blocks, dropout and a classifier: 8x8 images with 2 channels, 4 classes."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 6, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(6)
        self.blocks = nn.Sequential(Residual(6), Residual(6), Residual(6))
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(F.relu(self.bn(self.stem(x))))
        return self.fc(self.dropout(x.mean((2, 3))))


class Images(TensorDataset):
    """Random images; a TensorDataset, so that workers can pickle it."""


def make_images(n: int = SAMPLES) -> Images:
    generator = torch.Generator().manual_seed(0)
    return Images(torch.randn(n, 2, 8, 8, generator=generator), torch.randint(4, (n,), generator=generator))


@dataclass
class Parts:
    model: nn.Module
    optimizer: torch.optim.Optimizer
    loader: DataLoader[Any]


def make_parts(
    *,
    seed: int = 0,
    own_generator: bool = True,
    workers: int = 0,
    persistent: bool = False,
    drop_last: bool = False,
) -> Parts:
    torch.manual_seed(seed)
    model = SmallNet()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-2)
    loader = DataLoader(
        make_images(),
        batch_size=BATCH,
        shuffle=True,
        generator=torch.Generator().manual_seed(seed) if own_generator else None,
        num_workers=workers,
        persistent_workers=persistent,
        drop_last=drop_last,
    )
    return Parts(model, optimizer, loader)


def step(parts: Parts, session: spfde.Session | None, x: Tensor, y: Tensor) -> Tensor:
    logits = parts.model(x)
    loss = F.cross_entropy(logits, y)
    loss.backward()
    parts.optimizer.step()
    parts.optimizer.zero_grad()
    if session is not None:
        session.observe(logits, y)
    return loss.detach()


def train(
    parts: Parts,
    session: spfde.Session,
    *,
    at_bottom: Callable[[int], None] | None = None,
    at_top: Callable[[int], None] | None = None,
) -> list[float]:
    """The contract's loop; returns the losses."""
    losses = []
    for epoch in session.epochs():
        parts.model.train()
        if at_top is not None:
            at_top(epoch)
        losses += [float(step(parts, session, x, y)) for x, y in session.loader]
        if at_bottom is not None:
            at_bottom(epoch)
    return losses
