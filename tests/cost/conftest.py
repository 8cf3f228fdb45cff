"""The paper's ResNet-32 (widths 32-64-128, 1x1 convolution shortcuts), for the figures that must come out."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spfde.cost.flops import ModelCost, model_cost
from spfde.model.trace import trace


class Block(nn.Module):
    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        stride = 1 if inputs == width else 2
        self.first = nn.Conv2d(inputs, width, 3, stride, 1, bias=False)
        self.second = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.shortcut = nn.Identity() if stride == 1 else nn.Conv2d(inputs, width, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.second(F.relu(self.first(x))) + self.shortcut(x))


@pytest.fixture(scope="session")
def resnet32() -> ModelCost:
    widths = [32, *(width for width in (32, 64, 128) for _ in range(5))]
    with torch.device("meta"):
        model = nn.Sequential(
            nn.Conv2d(3, 32, 3, padding=1, bias=False),
            *(Block(inputs, width) for inputs, width in itertools.pairwise(widths)),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(128, 100),
        )
    return model_cost(trace(model, torch.zeros(1, 3, 32, 32)), model)


@pytest.fixture(scope="session")
def frozen_layers(resnet32: ModelCost) -> Callable[[int], tuple[bool, ...]]:
    """Which layers of the ResNet-32 are in the stem and the first so many residual blocks; none for 0."""

    def frozen(n_blocks: int) -> tuple[bool, ...]:
        front = {str(index) for index in range(n_blocks + 1)} if n_blocks else set()
        return tuple(layer.name.partition(".")[0] in front for layer in resnet32.layers)

    return frozen
