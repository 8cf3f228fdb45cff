"""A small run in the Trainer of Hugging Face, for tests of the callback and for the processes that they start."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

import spfde
from helpers.training import BATCH, SmallNet, make_images
from spfde.integrations.transformers import SpfdeCallback

RECIPE = spfde.Recipe(
    sparsity=spfde.MEST(sparsity=0.8),
    freezing=spfde.ProgressiveFreezing(flops_reduction=0.15),
    sieving=spfde.DataSieving(removed_fraction=0.2),
    update_interval_epochs=2,
)
EPOCHS = 8


class Items(Dataset[dict[str, Tensor]]):
    """The small images as the Trainer wants them."""

    def __init__(self) -> None:
        self.images = make_images()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        x, y = self.images[index]
        return {"x": x, "labels": y}


class Classifier(SmallNet):
    """The small net with the Trainer's way of calling."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__()

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:  # type: ignore[override]
        logits = super().forward(x)
        if labels is None:
            return {"logits": logits}
        loss = F.cross_entropy(logits, labels)
        return {"loss": loss, "logits": logits}


def trainer(
    folder: Path, callback: Any = None, *others: Any, model: Any = None, kind: Any = Trainer, **named: Any
) -> Trainer:
    """A Trainer on the CPU that prints nothing and, unless told, saves nothing."""
    options = {
        "output_dir": str(folder),
        "num_train_epochs": EPOCHS,
        "per_device_train_batch_size": BATCH,
        "use_cpu": True,
        "report_to": [],
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "learning_rate": 0.01,
        "lr_scheduler_type": "constant",
        **named,
    }
    return kind(
        model=Classifier() if model is None else model,
        args=TrainingArguments(**options),
        train_dataset=Items(),
        eval_dataset=Items(),
        callbacks=[*([] if callback is None else [callback]), *others],
    )


def train_rank(folder: Path) -> None:
    """One of several processes: trains, and leaves its weights and the samples that it was dealt."""
    callback = SpfdeCallback(RECIPE, engine="masked")
    run = trainer(Path(folder), callback, ddp_find_unused_parameters=False)
    run.train()
    assert callback.session is not None
    samples = [row.samples for row in callback.session.cost.rows]
    found = {"weights": dict(run.model.named_parameters()), "samples": samples, "steps": run.state.global_step}
    torch.save(found, Path(folder, f"rank{run.args.process_index}.pt"))


if __name__ == "__main__":
    train_rank(Path(sys.argv[1]))
