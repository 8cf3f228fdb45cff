"""A small Lightning run, for tests of the callback and for the processes that they start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler

import spfde
from helpers.training import BATCH, SmallNet, make_images
from spfde.integrations.lightning import SpfdeCallback

RECIPE = spfde.Recipe(
    sparsity=spfde.MEST(sparsity=0.8),
    freezing=spfde.ProgressiveFreezing(flops_reduction=0.15),
    sieving=spfde.DataSieving(removed_fraction=0.2),
    update_interval_epochs=2,
)
SPARSE = spfde.Recipe(sparsity=spfde.MEST(sparsity=0.8), update_interval_epochs=2)


class Module(pl.LightningModule):
    """The small net with its data and SGD; says how each batch went."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = SmallNet()
        self.losses: list[float] = []

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.net.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-2)

    def loader(self, *, shuffle: bool) -> DataLoader[Any]:
        return DataLoader(
            make_images(),
            batch_size=BATCH,
            shuffle=shuffle,
            generator=torch.Generator().manual_seed(0) if shuffle else None,
        )

    def train_dataloader(self) -> Any:
        return self.loader(shuffle=True)

    def val_dataloader(self) -> Any:
        return self.loader(shuffle=False)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
        logits = self.net(batch[0])
        loss = F.cross_entropy(logits, batch[1])
        self.losses.append(loss.item())
        return {"loss": loss, "logits": logits, "y": batch[1]}

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val", F.cross_entropy(self.net(batch[0]), batch[1]))


class OwnBatches(BatchSampler):
    """A batch sampler of one's own: the session does not know how it would batch the partial set."""


class Batched(Module):
    """With batches that cannot be sieved, nor dealt out by the session."""

    def train_dataloader(self) -> Any:
        images = make_images()
        return DataLoader(images, batch_sampler=OwnBatches(SequentialSampler(images), BATCH, drop_last=False))


class Manual(Module):
    """The same with manual optimization, reporting through the session itself."""

    def __init__(self, callback: SpfdeCallback) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.report = lambda *values: callback.session and callback.session.observe(*values)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        logits = self.net(batch[0])
        loss = F.cross_entropy(logits, batch[1])
        self.manual_backward(loss)
        optimizer.step()
        self.report(logits, batch[1])
        self.losses.append(loss.item())


def trainer(callback: Any, *others: Any, **options: Any) -> pl.Trainer:
    """A trainer on the CPU that prints and, without a checkpoint callback, writes nothing."""
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False)
    saves = any(isinstance(other, ModelCheckpoint) for other in others)
    callbacks = [*([] if callback is None else [callback]), *others]
    settings = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 8,
        "limit_val_batches": 0,
        "num_sanity_val_steps": 0,
        "enable_checkpointing": saves,
        **options,
    }
    return pl.Trainer(callbacks=callbacks, **quiet, **settings)


def saving(folder: Path, **when: Any) -> ModelCheckpoint:
    return ModelCheckpoint(folder, filename="{epoch}-{step}", save_top_k=-1, **when)


def train_rank(folder: Path) -> None:
    """One of several processes: trains, and leaves its weights and the samples that it was dealt."""
    refused = []
    try:
        trainer(SpfdeCallback(SPARSE), devices=2, strategy="ddp").fit(Batched())
    except spfde.InvalidArgument as error:
        refused += [problem.argument for problem in error.problems]
    callback, module = SpfdeCallback(RECIPE, engine="masked"), Module()
    trainer(callback, devices=2, strategy="ddp").fit(module)
    assert callback.session is not None
    samples = [row.samples for row in callback.session.cost.rows]
    found = {"weights": dict(module.net.named_parameters()), "samples": samples, "refused": refused}
    torch.save(found, Path(folder, f"rank{module.global_rank}.pt"))


if __name__ == "__main__":
    import sys

    train_rank(Path(sys.argv[1]))
