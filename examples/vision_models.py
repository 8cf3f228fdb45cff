"""Networks from timm as they are: a vision transformer, a ConvNeXt and a MobileNetV3, on coloured stripes.

Blocks are found for each; depthwise convolutions stay dense. Needs the extra `vision`.

    python examples/vision_models.py --model convnext
"""

from __future__ import annotations

import argparse

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import spfde

RECIPE = spfde.presets.spfde.replace(sparsity=spfde.MEST(sparsity=0.8))
CLASSES, SIDE = 4, 32
MODELS = {
    "vit": ("vit_tiny_patch16_224", {"img_size": SIDE, "patch_size": 8, "embed_dim": 48, "depth": 6, "num_heads": 3}),
    "convnext": ("convnext_atto", {"depths": (2, 2, 2, 2), "dims": (16, 24, 32, 48)}),
    "mobilenetv3": ("mobilenetv3_small_050", {}),
}


def make_data(n: int, *, seed: int) -> TensorDataset:
    """Images [3, 32, 32] of stripes in one of four directions, in noise."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(CLASSES, (n,), generator=generator)
    angle = (y * torch.pi / CLASSES)[:, None, None]
    rows, columns = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    phase = 2 * torch.pi * torch.rand(n, 1, 1, generator=generator)
    stripes = torch.sin(0.8 * (rows * torch.cos(angle) + columns * torch.sin(angle)) + phase)
    colour = torch.rand(n, 3, 1, 1, generator=generator)
    return TensorDataset(stripes[:, None] * colour + 0.5 * torch.randn(n, 3, SIDE, SIDE, generator=generator), y)


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    model.eval()
    with torch.no_grad():
        return float((model(x).argmax(1) == y).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="vit")
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--epochs", type=int, default=10)
    options = parser.parse_args()

    torch.manual_seed(0)
    name, settings = MODELS[options.model]
    model = timm.create_model(name, num_classes=CLASSES, **settings)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    loader = DataLoader(make_data(options.samples, seed=0), batch_size=50, shuffle=True)
    session = spfde.attach(model, optimizer, loader, RECIPE, epochs=options.epochs)
    print("blocks:", ", ".join(block.name for block in session.blueprint.partition.blocks))
    print(f"masked: {len(session.masks)} weights; engine {session.engine}: {session.engine_reason}")

    x_test, y_test = make_data(200, seed=1).tensors
    for epoch in session.epochs():
        model.train()
        for x, y in session.loader:
            logits = model(x)
            F.cross_entropy(logits, y).backward()
            optimizer.step()
            optimizer.zero_grad()
            session.observe(logits, y)
        print(f"epoch {epoch}: accuracy {accuracy(model, x_test, y_test):.3f}, {session.frozen_blocks} blocks frozen")
    print(session.cost)


if __name__ == "__main__":
    main()
