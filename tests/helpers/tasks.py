"""Tasks far from ResNets on images, each with the blocks that it should have and its cost counted by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helpers.models import UNet

SAMPLES = 16


@dataclass(frozen=True)
class Task:
    """A model with its data.

    Attributes:
        make: the model, with weights from the global generator.
        x: inputs of all samples.
        y: their targets.
        loss: one loss a sample, from the model's output and targets.
        blocks: names of the blocks in order of execution.
        dense: multiply-adds of one forward pass in layers that stay dense, by hand.
        masked: those in layers that are masked, by hand.
    """

    make: Callable[[], nn.Module]
    x: Tensor
    y: Tensor
    loss: Callable[[Tensor, Tensor], Tensor]
    blocks: Sequence[str]
    dense: int
    masked: int


def class_loss(logits: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(logits, y, reduction="none")


def pixel_loss(logits: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(logits, y, reduction="none").mean((1, 2))


def token_loss(logits: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="none").view(y.shape).mean(1)


def regression_loss(predicted: Tensor, y: Tensor) -> Tensor:
    return (predicted - y).square().mean(1)


def _random(*shape: int) -> Tensor:
    return torch.randn(SAMPLES, *shape, generator=torch.Generator().manual_seed(0))


def _classes(n: int, *shape: int) -> Tensor:
    return torch.randint(n, (SAMPLES, *shape), generator=torch.Generator().manual_seed(1))


def vision_transformer() -> Task:
    width, tokens = 12, 17  # 16x16 images in patches of 4x4, and the class token
    patches = 16 * (3 * 4 * 4) * width
    projections = tokens * width * (3 * width + width + 2 * 4 * width)
    products = 2 * tokens * tokens * width
    return Task(
        make=lambda: timm.create_model(
            "vit_tiny_patch16_224", img_size=16, patch_size=4, embed_dim=width, depth=4, num_heads=3, num_classes=4
        ),
        x=_random(3, 16, 16),
        y=_classes(4),
        loss=class_loss,
        blocks=[f"blocks.{index}" for index in range(4)],
        dense=patches + 4 * products + width * 4,
        masked=4 * projections,
    )


def convnext() -> Task:
    dims, sides, depths = (8, 12, 16, 20), (8, 4, 2, 1), (2, 2, 2, 2)
    stem = 8 * 8 * (3 * 4 * 4) * 8
    depthwise = sum(depth * side**2 * 7 * 7 * dim for dim, side, depth in zip(dims, sides, depths, strict=True))
    pointwise = sum(depth * side**2 * 2 * 4 * dim**2 for dim, side, depth in zip(dims, sides, depths, strict=True))
    lowered = sum(side**2 * 2 * 2 * before * dim for before, dim, side in zip(dims, dims[1:], sides[1:], strict=False))
    return Task(
        make=lambda: timm.create_model("convnext_atto", depths=depths, dims=dims, num_classes=4),
        x=_random(3, 32, 32),
        y=_classes(4),
        loss=class_loss,
        blocks=[f"stages.{stage}.blocks.{index}" for stage in range(4) for index in range(depths[stage])],
        dense=stem + depthwise + 20 * 4,
        masked=pointwise + lowered,
    )


def mobilenet() -> Task:
    # Channels in, expanded, squeezed (0: no squeeze-and-excitation), and out; kernel; sides before and after.
    rows = [
        (8, 40, 0, 16, 3, 8, 4), (16, 56, 0, 16, 3, 4, 4),
        (16, 64, 16, 24, 5, 4, 2), (24, 144, 40, 24, 5, 2, 2), (24, 144, 40, 24, 5, 2, 2),
        (24, 72, 24, 24, 5, 2, 2), (24, 72, 24, 24, 5, 2, 2),
        (24, 144, 40, 48, 5, 2, 1), (48, 288, 72, 48, 5, 1, 1), (48, 288, 72, 48, 5, 1, 1),
    ]  # fmt: skip
    stem = 16 * 16 * (3 * 3 * 3) * 16
    first_depthwise, first_masked = 8 * 8 * 9 * 16, 2 * 16 * 8 + 8 * 8 * 16 * 8
    depthwise = sum(after**2 * kernel**2 * wide for _, wide, _, _, kernel, _, after in rows)
    pointwise = sum(
        before**2 * inputs * wide + 2 * wide * squeezed + after**2 * wide * outputs
        for inputs, wide, squeezed, outputs, _, before, after in rows
    )
    return Task(
        make=lambda: timm.create_model("mobilenetv3_small_050", num_classes=4),
        x=_random(3, 32, 32),
        y=_classes(4),
        loss=class_loss,
        blocks=[f"blocks.{stage}.{index}" for stage, n in enumerate((1, 2, 3, 2, 3)) for index in range(n)],
        dense=stem + first_depthwise + depthwise + 1024 * 4,
        masked=first_masked + pointwise + 48 * 288 + 288 * 1024,
    )


def segmentation() -> Task:
    def unit(side: int, inputs: int, outputs: int) -> int:
        return side**2 * 9 * (inputs * outputs + outputs * outputs)

    first = 8 * 8 * 9 * 3 * 4
    units = unit(8, 3, 4) + unit(4, 4, 8) + unit(2, 8, 8) + unit(4, 16, 8) + unit(8, 8, 4)
    lifted = 2 * 2 * 4 * 8 * 8 + 4 * 4 * 4 * 8 * 4  # each pixel of the lower level makes four
    return Task(
        make=UNet,
        x=_random(3, 8, 8),
        y=_classes(2, 8, 8),
        loss=pixel_loss,
        blocks=["down1", "down2", "bottom", "up2", "up1"],
        dense=first + 8 * 8 * 4 * 2,
        masked=units - first + lifted,
    )


class CharacterModel(nn.Module):
    """Reads characters from left to right and says the next one."""

    def __init__(self, vocabulary: int = 11, length: int = 6, width: int = 8, depth: int = 3) -> None:
        super().__init__()
        self.characters = nn.Embedding(vocabulary, width)
        self.positions = nn.Parameter(0.1 * torch.randn(length, width))
        layer = nn.TransformerEncoderLayer(width, 2, 2 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.head = nn.Linear(width, vocabulary)
        self.register_buffer("ahead", nn.Transformer.generate_square_subsequent_mask(length), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.encoder(self.characters(ids) + self.positions, mask=self.ahead))


def text() -> Task:
    width, length, vocabulary = 8, 6, 11
    taken_in = length * width * 3 * width
    others = length * width * (width + 2 * 2 * width)
    products = 2 * length * length * width
    return Task(
        make=CharacterModel,
        x=_classes(vocabulary, length),
        y=_classes(vocabulary, length).roll(-1, 1),
        loss=token_loss,
        blocks=[f"encoder.layers.{index}" for index in range(3)],
        dense=taken_in + 3 * products + length * width * vocabulary,
        masked=2 * taken_in + 3 * others,
    )


def _mlp(outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(5, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 20), nn.ReLU(), nn.Linear(20, 16), nn.ReLU(),
        nn.Linear(16, outputs),
    )  # fmt: skip


def tabular() -> Task:
    return Task(
        make=lambda: _mlp(3),
        x=_random(5),
        y=_classes(3),
        loss=class_loss,
        blocks=["0", "3", "5"],
        dense=5 * 16 + 16 * 3,
        masked=16 * 20 + 20 * 16,
    )


def regression() -> Task:
    return Task(
        make=lambda: _mlp(2),
        x=_random(5),
        y=_random(2),
        loss=regression_loss,
        blocks=["0", "3", "5"],
        dense=5 * 16 + 16 * 2,
        masked=16 * 20 + 20 * 16,
    )


TASKS: dict[str, Callable[[], Task]] = {
    "timm-vit": vision_transformer,
    "timm-convnext": convnext,
    "timm-mobilenetv3": mobilenet,
    "unet": segmentation,
    "text-transformer": text,
    "tabular": tabular,
    "regression": regression,
}
