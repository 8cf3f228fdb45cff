"""SpFDE in the pattern of timm's train.py: its optimizer, scheduler, mixup, loss scaler and averaged weights.

Six lines are new; they are marked. Needs the extra `vision`.

    python examples/in_timm.py
"""

from __future__ import annotations

import argparse

import timm
import torch
from timm.data import Mixup
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV2, NativeScaler
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import spfde
from spfde.app.data.datasets import load_data
from spfde.app.train.augment import normalise

RECIPE = spfde.Recipe(
    sparsity=spfde.MEST(sparsity=0.8),
    freezing=spfde.ProgressiveFreezing(flops_reduction=0.10),
    # Mixed samples have no class that they are right about: the loss says how hard each one was.
    sieving=spfde.DataSieving(removed_fraction=0.2, criterion="loss"),
    update_interval_epochs=2,
)  # learning_rate stays None, for timm's scheduler sets the rates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--epochs", type=int, default=10)
    options = parser.parse_args()

    torch.manual_seed(0)
    data = load_data("fashion-mini", root="data")
    x, y = data.train.images[: options.samples], data.train.labels[: options.samples]
    loader = DataLoader(
        TensorDataset(normalise(x, data.mean, data.std), y), batch_size=50, shuffle=True, drop_last=True
    )
    size = {"img_size": 28, "patch_size": 7, "in_chans": 1, "embed_dim": 48, "depth": 4, "num_heads": 3}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=10, **size)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=2e-3, weight_decay=0.05)
    scheduler, _ = create_scheduler_v2(optimizer, sched="cosine", num_epochs=options.epochs, warmup_epochs=1)
    mixup = Mixup(mixup_alpha=0.2, num_classes=10, label_smoothing=0.1)
    loss_of = nn.CrossEntropyLoss(reduction="none")  # one loss a sample, where timm's takes the mean
    scaler = NativeScaler(device="cpu")
    ema = ModelEmaV2(model, decay=0.99)
    session = spfde.attach(model, optimizer, loader, RECIPE, epochs=options.epochs)  # new

    for epoch in session.epochs():  # new
        model.train()
        for x, y in session.loader:  # new
            x, target = mixup(x, y)
            loss = loss_of(model(x), target)
            optimizer.zero_grad()
            scaler(loss.mean(), optimizer, parameters=model.parameters())
            session.observe(loss=loss)  # new
            ema.update(model)
        scheduler.step(epoch + 1)
        print(f"epoch {epoch}: loss {loss.mean():.3f}, {session.frozen_blocks} blocks frozen")
    for name, mask in session.masks.items():  # new: the average of many masks is denser than the last one
        ema.module.get_parameter(name).data.mul_(mask)  # new
    print(session.cost)


if __name__ == "__main__":
    main()
