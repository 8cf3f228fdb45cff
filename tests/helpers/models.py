"""Small models for the tests of this room, each with a trait that freezing must cope with."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from spfde.model.blocks import Partition, find_blocks
from spfde.model.trace import trace


class Residual(nn.Module):
    """Two convolutions and a shortcut, with a 1x1 convolution where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))) + self.shortcut(x))


class SmallResNet(nn.Module):
    """A stem, four residual blocks and a head, defined back to front."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 3)
        self.stage2 = nn.Sequential(Residual(4, 8, 2), Residual(8, 8))
        self.stage1 = nn.ModuleList([Residual(4, 4), Residual(4, 4)])
        self.norm = nn.BatchNorm2d(4)
        self.stem = nn.Conv2d(3, 4, 3, 1, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        for block in self.stage1:
            x = block(x)
        return self.head(self.stage2(x).mean((2, 3)))


class DoubleConv(nn.Sequential):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(
            nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU(), nn.Conv2d(outputs, outputs, 3, padding=1), nn.ReLU()
        )


class Unit(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.body = DoubleConv(inputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class UNet(nn.Module):
    """Skip connections from the encoder across the blocks to the decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2, self.bottom = Unit(3, 4), Unit(4, 8), Unit(8, 8)
        self.lift2, self.up2 = nn.ConvTranspose2d(8, 8, 2, 2), Unit(16, 8)
        self.lift1, self.up1 = nn.ConvTranspose2d(8, 4, 2, 2), Unit(8, 4)
        self.out = nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        skip1 = self.down1(x)
        skip2 = self.down2(nn.functional.max_pool2d(skip1, 2))
        x = self.bottom(nn.functional.max_pool2d(skip2, 2))
        x = self.up2(torch.cat([self.lift2(x), skip2], 1))
        return self.out(self.up1(torch.cat([self.lift1(x), skip1], 1)))


class TextModel(nn.Module):
    """Token and position embeddings, encoder layers, and a head that may share the token embedding's weight."""

    def __init__(self, *, tied: bool) -> None:
        super().__init__()
        self.tokens = nn.Embedding(11, 8)
        self.positions = nn.Parameter(torch.randn(1, 5, 8))
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        self.head = nn.Linear(8, 11, bias=False)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.encoder(self.tokens(ids) + self.positions))


class Wrapped(nn.Module):
    """A trunk that is a single submodule with its layers as plain attributes."""

    class Trunk(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.third, self.second, self.first = nn.Linear(6, 5), nn.Linear(7, 6), nn.Linear(4, 7)

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.third(torch.relu(self.second(torch.relu(self.first(x))))))

    def __init__(self) -> None:
        super().__init__()
        self.backbone = Wrapped.Trunk()
        self.classifier = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.backbone(x))


def mlp() -> nn.Sequential:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(12, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3)
    )


def images(n: int = 4, size: int = 8) -> Tensor:
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(0))


def partition(model: nn.Module, sample: Tensor, blocks: tuple[str, ...] | None = None) -> Partition:
    return find_blocks(model, trace(model, sample), blocks=blocks)
