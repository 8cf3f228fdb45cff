"""SpFDE in Lightning: a callback, and a training_step that says how each batch went. Needs the extra `lightning`.

python examples/in_lightning.py
python examples/in_lightning.py --samples 10000 --epochs 20     # the whole set: minutes
"""

from __future__ import annotations

import argparse
import logging
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import spfde
from spfde.app.data.datasets import load_data
from spfde.app.train.augment import normalise
from spfde.app.train.models import build_model
from spfde.integrations.lightning import SpfdeCallback

RECIPE = spfde.presets.spfde.replace(sparsity=spfde.MEST(sparsity=0.8), update_interval_epochs=2)


class Classifier(pl.LightningModule):
    """A ResNet-8; all that is new is what training_step returns beside the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.net = build_model("resnet8", num_classes=10, in_channels=1, image_size=28)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.net.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> dict[str, Tensor]:
        x, y = batch
        logits = self.net(x)
        return {"loss": F.cross_entropy(logits, y), "logits": logits, "y": y}

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        x, y = batch
        self.log("accuracy", (self.net(x).argmax(1) == y).float().mean())


def images(part: Any, count: int, data: Any) -> TensorDataset:
    return TensorDataset(normalise(part.images[:count], data.mean, data.std), part.labels[:count])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--epochs", type=int, default=10)
    options = parser.parse_args()

    pl.seed_everything(0, verbose=False)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    data = load_data("fashion-mini", root="data")
    train = DataLoader(images(data.train, options.samples, data), batch_size=64, shuffle=True)
    test = DataLoader(images(data.test, options.samples // 5, data), batch_size=256)

    callback = SpfdeCallback(RECIPE)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = pl.Trainer(
        max_epochs=options.epochs, callbacks=[callback], accelerator="cpu", enable_model_summary=False, **quiet
    )
    trainer.fit(Classifier(), train, test)
    print(f"accuracy {trainer.callback_metrics['accuracy']:.3f}, density {callback.session.density:.2f}")
    print(callback.session.cost)


if __name__ == "__main__":
    main()
