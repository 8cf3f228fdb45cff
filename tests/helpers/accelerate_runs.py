"""A small loop with Accelerate, for tests of its integration and for the processes that they start."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler, TensorDataset

import spfde
from helpers.training import BATCH, make_images, make_parts
from spfde.integrations.accelerate import attach

RECIPE = spfde.Recipe(
    sparsity=spfde.MEST(sparsity=0.8),
    freezing=spfde.ProgressiveFreezing(flops_reduction=0.15),
    sieving=spfde.DataSieving(removed_fraction=0.2),
    update_interval_epochs=2,
)
EPOCHS = 8


class Numbered(TensorDataset):
    """Samples that know their index."""

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        return (*super().__getitem__(index), index)


class Run:
    """The loop that Accelerate's documentation shows, with a session; saves at the end of each epoch where told to."""

    def __init__(
        self, recipe: Any = RECIPE, *, prepared: str = "before", accumulation: int = 1, **options: Any
    ) -> None:
        self.accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulation, **options)
        parts = make_parts()
        self.net = parts.model
        whole = parts.model, parts.optimizer, parts.loader
        how: Any = {"epochs": EPOCHS, "engine": "masked"}
        if prepared == "before":
            whole = self.accelerator.prepare(*whole)
        self.session = attach(self.accelerator, *whole, recipe, **how)
        if prepared == "after":
            whole = (*self.accelerator.prepare(*whole[:2]), None)
        self.model, self.optimizer = whole[:2]
        self.accelerator.register_for_checkpointing(self.session)
        self.losses: list[float] = []

    def train(self, folder: Path | None = None) -> None:
        for epoch in self.session.epochs():
            self.model.train()
            for x, y in self.session.loader:
                with self.accelerator.accumulate(self.model):
                    logits = self.model(x)
                    loss = F.cross_entropy(logits, y)
                    self.accelerator.backward(loss)
                    self.optimizer.step()
                    self.optimizer.zero_grad()
                self.session.observe(logits, y)
                self.losses.append(loss.item())
            if folder is not None:
                self.accelerator.save_state(str(folder / f"epoch{epoch}"))


def train_rank(folder: Path, prepared: str) -> None:
    run = Run(prepared=prepared)
    run.train()
    samples = [row.samples for row in run.session.cost.rows]
    torch.save(
        {"weights": dict(run.net.named_parameters()), "samples": samples},
        folder / f"rank{run.accelerator.process_index}.pt",
    )
    run.accelerator.end_training()  # a process that leaves its group open may abort at its end


def gather_rank(folder: Path) -> None:
    """Leave the samples that ``gather_for_metrics`` gives in each epoch, beside those in use."""
    accelerator = Accelerator(cpu=True)
    parts = make_parts()
    images = Numbered(*make_images().tensors)
    loader = DataLoader(images, batch_size=6, shuffle=True)
    recipe = RECIPE.model_copy(update={"freezing": None})
    model, optimizer = accelerator.prepare(parts.model, parts.optimizer)
    session = attach(accelerator, model, optimizer, loader, recipe, epochs=EPOCHS, engine="masked")
    gathered, partial = [], []
    for _ in session.epochs():
        partial.append(session.partial_set.tolist())
        gathered.append(list[int]())
        for x, y, index in session.loader:
            session.observe(model(x), y)
            gathered[-1] += accelerator.gather_for_metrics(index.tolist(), use_gather_object=True)
        gathered[-1].sort()
    torch.save({"gathered": gathered, "partial": partial}, folder / f"rank{accelerator.process_index}.pt")
    accelerator.end_training()


class OwnBatches(BatchSampler):
    """A batch sampler of one's own: the session does not know how it would batch the partial set."""


def stream_rank(folder: Path) -> None:
    """Leave the samples that this rank trained on, where Accelerate deals out the batches."""
    accelerator = Accelerator(cpu=True)
    parts = make_parts()
    sampler = OwnBatches(SequentialSampler(make_images()), BATCH, drop_last=False)
    loader = DataLoader(Numbered(*make_images().tensors), batch_sampler=sampler)
    recipe = RECIPE.model_copy(update={"freezing": None, "sieving": None})
    model, optimizer = accelerator.prepare(parts.model, parts.optimizer)
    session = attach(accelerator, model, optimizer, loader, recipe, epochs=EPOCHS, engine="masked")
    seen: list[int] = []
    for _ in session.epochs():
        seen.clear()
        for x, y, index in session.loader:
            accelerator.backward(F.cross_entropy(model(x), y))
            optimizer.step()
            optimizer.zero_grad()
            seen += index.tolist()
    samples = [row.samples for row in session.cost.rows]
    torch.save({"seen": seen, "samples": samples}, folder / f"rank{accelerator.process_index}.pt")
    accelerator.end_training()


if __name__ == "__main__":
    folder, how = Path(sys.argv[1]), sys.argv[2]
    if how in ("gather", "stream"):
        (gather_rank if how == "gather" else stream_rank)(folder)
    else:
        train_rank(folder, how)
    # What was to be seen is on disk. Gloo's threads, torn down with the process, abort one in some of many.
    sys.stdout.flush()
    os._exit(0)
