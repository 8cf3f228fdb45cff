"""What each process of tests/test_distributed.py runs; in a module of its own, so that it can be started afresh."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

import spfde
from helpers.training import BATCH, EPOCHS, Parts, make_parts, step
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


def share_and_resume(rank: int, size: int, folder: str, _: str) -> None:
    """A neutral recipe, one that attaches before the group is there, a rank that looks at a batch, a resumed epoch."""
    early = _small(spfde.Recipe())
    join(rank, size, folder)
    found: dict[str, Any] = {"early": _refusal(lambda: next(early[1].epochs()))}

    parts, session = _small(spfde.Recipe())
    found["neutral"] = [int(i) for _ in session.loader for i in session.loader.current_indices]
    other = torch.utils.data.DataLoader(parts.loader.dataset, batch_sampler=session.loader.batch_sampler)
    found["remade"] = _refusal(lambda: next(iter(other)))

    parts, session = _small(spfde.Recipe())
    if rank == 0:
        next(iter(session.loader))
    found["looks"] = _refusal(lambda: _epoch(parts, session))

    for name, how in (("sieves", recipe("mest")), ("sparse", recipe("mest").replace(sieving=None))):
        parts, session = _small(how)
        _epoch(parts, session)
        wrapped = _wrapped(parts)
        x, y = next(iter(session.loader))
        step(wrapped, session, x, y)
        state = [session.state_dict(), parts.model.state_dict(), parts.optimizer.state_dict()]
        dist.broadcast_object_list(state, src=0)  # the first rank's alone
        parts, session = _small(how)
        parts.model.load_state_dict(state[1])
        parts.optimizer.load_state_dict(state[2])
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            session.load_state_dict(state[0])
        _epoch(parts, session)
        row = session.cost.rows[1]
        found[name] = {"samples": row.samples, "steps": row.steps, "said": any("anew" in str(w.message) for w in said)}
    torch.save(found, Path(folder) / f"rank{rank}.pt")
    dist.destroy_process_group()


def _small(how: spfde.Recipe) -> tuple[Parts, spfde.Session]:
    parts = make_parts()
    return parts, spfde.attach(parts.model, parts.optimizer, parts.loader, how, epochs=EPOCHS, engine="masked")


def _wrapped(parts: Parts) -> Parts:
    return replace(parts, model=DistributedDataParallel(parts.model, find_unused_parameters=True))


def _epoch(parts: Parts, session: spfde.Session) -> None:
    wrapped = _wrapped(parts)
    for x, y in session.loader:
        step(wrapped, session, x, y)
    session.end_epoch()


def _refusal(call: Callable[[], object]) -> str:
    try:
        call()
    except spfde.UsageError as error:
        return str(error)
    return "accepted"


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
