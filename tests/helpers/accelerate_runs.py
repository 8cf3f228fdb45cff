"""A small loop with Accelerate, for tests of its integration and for the processes that they start."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs

import spfde
from helpers.training import make_parts
from spfde.integrations.accelerate import attach

RECIPE = spfde.Recipe(
    sparsity=spfde.MEST(sparsity=0.8),
    freezing=spfde.ProgressiveFreezing(flops_reduction=0.15),
    sieving=spfde.DataSieving(removed_fraction=0.2),
    update_interval_epochs=2,
)
EPOCHS = 8


class Run:
    """The loop that Accelerate's documentation shows, with a session; saves at the end of each epoch where told to."""

    def __init__(
        self, recipe: Any = RECIPE, *, prepared: str = "before", accumulation: int = 1, **options: Any
    ) -> None:
        unused = DistributedDataParallelKwargs(find_unused_parameters=True)
        self.accelerator = Accelerator(
            cpu=True, gradient_accumulation_steps=accumulation, kwargs_handlers=[unused], **options
        )
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

    def train(self, folder: Path | None = None, *, kill_after: int = -1) -> None:
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
                if len(self.losses) == kill_after:
                    os.kill(os.getpid(), signal.SIGKILL)
            if folder is not None:
                self.accelerator.save_state(str(folder / f"epoch{epoch}"))


def run_until_killed(folder: Path, after: int) -> None:
    """Train with a checkpoint an epoch, until the process is killed."""
    Run().train(folder, kill_after=after)


def train_rank(folder: Path, prepared: str) -> None:
    run = Run(prepared=prepared)
    run.train()
    samples = [row.samples for row in run.session.cost.rows]
    torch.save(
        {"weights": dict(run.net.named_parameters()), "samples": samples},
        folder / f"rank{run.accelerator.process_index}.pt",
    )
    run.accelerator.end_training()  # a process that leaves its group open may abort at its end


if __name__ == "__main__":
    folder, how = Path(sys.argv[1]), sys.argv[2]
    run_until_killed(folder, int(how)) if how.isdigit() else train_rank(folder, how)
