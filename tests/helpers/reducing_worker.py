"""What each process of tests/session/test_reducing.py runs: the same runs with whole gradients and with sparse ones."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

import spfde
from helpers.distributed_worker import join, leave
from helpers.training import Parts, make_parts

EPOCHS = 4
FREEZING = spfde.ProgressiveFreezing(flops_reduction=0.15)
RESUMING = spfde.ProgressiveFreezing(flops_reduction=0.1, scheme="single-shot-resume", resume_epochs=2)


def recipe(sparsity: Any = None, freezing: Any = FREEZING) -> spfde.Recipe:
    return spfde.Recipe(sparsity=sparsity, freezing=freezing, update_interval_epochs=1)


def run(
    how: spfde.Recipe,
    *,
    is_sparse: bool = True,
    first: str = "attach",
    prepare: Callable[[nn.Module], None] = lambda model: None,
    accumulate: int = 1,
    epochs: int = EPOCHS,
    each: Callable[[Parts, Any, Any], None] = lambda parts, session, wrapped: None,
    hook: Any = None,
    attach: dict[str, Any] | None = None,
    **wrap: Any,
) -> dict[str, Any]:
    """Train; what there is to compare at the end."""
    parts = make_parts()
    prepare(parts.model)
    wrapped = DistributedDataParallel(parts.model, **wrap) if first == "wrap" else None
    given = parts.model if wrapped is None else wrapped
    session = spfde.attach(
        given, parts.optimizer, parts.loader, how, epochs=epochs, engine="masked", sparse_allreduce=is_sparse,
        **(attach or {}),
    )  # fmt: skip
    wrapped = wrapped or DistributedDataParallel(parts.model, **wrap)
    if hook is not None:
        wrapped.register_comm_hook(None, hook)
    frozen, shares = [], []
    for _ in session.epochs():
        before = session.gradient_bytes
        for number, (x, y) in enumerate(session.loader):
            steps = (number + 1) % accumulate == 0
            with contextlib.nullcontext() if steps else wrapped.no_sync():
                F.cross_entropy(wrapped(x), y).backward()
            if steps:
                parts.optimizer.step()
                assert all(p.grad is None for p in parts.model.parameters() if not p.requires_grad)
                parts.optimizer.zero_grad()
            each(parts, session, wrapped)
        frozen.append(session.frozen_blocks)
        sent, whole = (now - then for now, then in zip(session.gradient_bytes, before, strict=True))
        shares.append((sent, whole))
    session.detach()
    return {
        "weights": copy.deepcopy(dict(parts.model.state_dict())),
        "masks": dict(session.masks),
        "frozen": frozen,
        "bytes": shares,
        "kept": (parts, wrapped),
    }


def both(how: spfde.Recipe, **options: Any) -> dict[str, Any]:
    """The run with sparse gradients, and whether the one with whole ones comes to the same weights, bit for bit."""
    sparse, whole = (run(how, is_sparse=is_sparse, **options) for is_sparse in (True, False))
    names = sparse["weights"]
    equal = [name for name in names if torch.equal(names[name], whole["weights"][name])]
    sparse["differ"] = sorted(set(names) - set(equal))
    sparse["bytes whole"] = whole["bytes"]
    return {key: value for key, value in sparse.items() if key != "kept"}


def compare(rank: int, size: int, folder: str, which: str) -> None:
    """By case: see ``both``."""
    join(rank, size, folder)
    leave(
        rank,
        folder,
        {which: (CASES | MORE_CASES)[which]()} if which else {name: case() for name, case in CASES.items()},
    )


def _half(model: nn.Module) -> None:
    model.fc.bfloat16().__class__ = _Half


class _Half(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.bfloat16()).float()


MEST = recipe(spfde.MEST(sparsity=0.8, soft_bound=True))
CASES: dict[str, Callable[[], dict[str, Any]]] = {
    "wrapped after attach": lambda: both(MEST),
    "wrapped before, views": lambda: both(MEST, first="wrap", gradient_as_bucket_view=True),
    "rigl": lambda: both(recipe(spfde.RigL(sparsity=0.8))),
    "accumulated": lambda: both(MEST, accumulate=2),
    "thaws": lambda: both(recipe(spfde.SET(sparsity=0.8), RESUMING), epochs=7),
}
MORE_CASES: dict[str, Callable[[], dict[str, Any]]] = {
    "static graph": lambda: both(MEST, static_graph=True),
    "unused, small buckets": lambda: both(MEST, first="wrap", find_unused_parameters=True, bucket_cap_mb=0.001),
    "topkast": lambda: both(recipe(spfde.TopKAST(sparsity=0.8))),
    "str": lambda: both(recipe(spfde.STR(sparsity=0.8))),
    "channels last": lambda: both(MEST, prepare=lambda model: model.to(memory_format=torch.channels_last)),
    "two types": lambda: both(MEST, prepare=_half, gradient_as_bucket_view=True),
    "dense": lambda: both(recipe(None)),
}
"""Runs by what is special about them."""


def others(rank: int, size: int, folder: str, _: str) -> None:
    """Hooks of others, what cannot follow, parameters that a loop switches off, what is left behind."""
    join(rank, size, folder)
    found: dict[str, Any] = {}
    half = run(MEST, first="attach", hook=default_hooks.fp16_compress_hook, epochs=4)
    found["hook"] = half["bytes"][-1], half["frozen"][-1]
    found["switched off"] = run(MEST, each=_take_turns, epochs=4, find_unused_parameters=True)["weights"]

    parts = make_parts()
    wrapped = DistributedDataParallel(parts.model)
    state = powerSGD_hook.PowerSGDState(None)
    wrapped.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
    try:
        spfde.attach(wrapped, parts.optimizer, parts.loader, MEST, epochs=4)
    except spfde.InvalidArgument as error:
        found["powerSGD"] = str(error)

    left = run(MEST, epochs=4)
    parts, wrapped = left["kept"]
    x, y = next(iter(parts.loader))
    F.cross_entropy(wrapped(x + rank), y).backward()
    grads = {name: p.grad for name, p in parts.model.named_parameters()}
    found["detached"] = grads, {name: bool(grads[name][~mask].any()) for name, mask in left["masks"].items()}
    found["said"] = _said_of_running_session()
    leave(rank, folder, found)


def _take_turns(parts: Parts, session: spfde.Session, wrapped: nn.Module) -> None:
    """The classifier learns in every second step."""
    parts.model.fc.requires_grad_(not parts.model.fc.weight.requires_grad)


def _said_of_running_session() -> str:
    parts = make_parts()
    session = spfde.attach(parts.model, parts.optimizer, parts.loader, MEST, epochs=4, engine="masked")
    wrapped = DistributedDataParallel(parts.model)
    x, y = next(iter(session.loader))
    F.cross_entropy(wrapped(x), y).backward()
    return str(session)
