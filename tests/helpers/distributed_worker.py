"""What each process of tests/test_distributed.py runs; in a module of its own, so that it can be started afresh."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

import spfde
from helpers.training import BATCH, EPOCHS, make_parts
from spfde.core.registry import find


def recipe(method: str) -> spfde.Recipe:
    return spfde.Recipe(
        sparsity=find("method", method, argument="method")(sparsity=0.8),
        freezing=spfde.ProgressiveFreezing(flops_reduction=0.15),
        sieving=spfde.DataSieving(removed_fraction=0.25),
        learning_rate=spfde.BlockwiseCosine(),
        update_interval_epochs=2,
    )


def join(rank: int, size: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=size)


def train(rank: int, size: int, folder: str, method: str) -> None:
    join(rank, size, folder)
    parts = make_parts()
    session = spfde.attach(parts.model, parts.optimizer, parts.loader, recipe(method), epochs=EPOCHS)
    model = DistributedDataParallel(parts.model, find_unused_parameters=True)
    seen: list[list[list[int]]] = []
    for _ in session.epochs():
        seen.append([])
        for x, y in session.loader:
            seen[-1].append(session.loader.current_indices.tolist())
            logits = model(x)
            F.cross_entropy(logits, y).backward()
            parts.optimizer.step()
            parts.optimizer.zero_grad()
            session.observe(logits, y)
    result: dict[str, Any] = {
        "seen": seen,
        "masks": dict(session.masks),
        "weights": {name: p.detach() for name, p in parts.model.named_parameters()},
        "partial": session.partial_set,
        "removed": session.removed_set,
        "cost": session.cost.state_dict()["rows"],
        "frozen": session.frozen_blocks,
        "batch": BATCH,
    }
    torch.save(result, Path(folder) / f"rank{rank}.pt")
    dist.destroy_process_group()


def attach_with_other_seeds(rank: int, size: int, folder: str, _: str) -> None:
    join(rank, size, folder)
    messages = []
    for model_seed, loader_seed, seed in ((rank, 0, 0), (0, rank, 0), (0, 0, rank)):
        parts = make_parts(seed=model_seed)
        parts.loader.generator.manual_seed(loader_seed)
        try:
            spfde.attach(parts.model, parts.optimizer, parts.loader, recipe("mest"), epochs=EPOCHS, seed=seed)
            messages.append("accepted")
        except spfde.InvalidArgument as error:
            messages.append(str(error))
    torch.save(messages, Path(folder) / f"rank{rank}.pt")
    dist.destroy_process_group()
