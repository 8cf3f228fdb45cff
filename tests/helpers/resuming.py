"""Runs that are saved and resumed: every method, and what two runs must have in common."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import torch

import spfde
from helpers.training import Parts, make_parts

METHODS = {
    "static": spfde.StaticSparse(sparsity=0.8),
    "set": spfde.SET(sparsity=0.8),
    "rigl": spfde.RigL(sparsity=0.8),
    "rigl-erk": spfde.RigL(sparsity=0.8, distribution="erk"),
    "mest-em": spfde.MEST(sparsity=0.8, soft_bound=False),
    "mest-ems": spfde.MEST(sparsity=0.8),
    "mest-gradient": spfde.MEST(sparsity=0.8, gradient_weight=0.5),
    "snip": spfde.SNIP(sparsity=0.8),
    "synflow-block": spfde.SynFlow(sparsity=0.8, iterations=5, structure=spfde.Block(rows=2, columns=3)),
    "deepr": spfde.DeepR(sparsity=0.8, noise=0.1),
    "dsr": spfde.DSR(sparsity=0.8, threshold=0.05),
    "snfs": spfde.SNFS(sparsity=0.8),
    "topkast": spfde.TopKAST(sparsity=0.8),
    "gmp": spfde.GMP(sparsity=0.8),
    "str": spfde.STR(sparsity=0.8, threshold_start=-3.0, threshold_decay=0.5),
    "set-block": spfde.SET(sparsity=0.8, structure=spfde.Block(rows=2, columns=3)),
    "mest-pattern": spfde.MEST(sparsity=0.8, structure=spfde.Patterns()),
    "rigl-kernel": spfde.RigL(sparsity=0.8, structure=spfde.Kernels()),
    "grasp": spfde.GraSP(sparsity=0.8),
    "set-itop": spfde.SETITOP(sparsity=0.8),
    "rigl-itop": spfde.RigLITOP(sparsity=0.8),
    "rigl-nm": spfde.RigL(sparsity=0.5, structure=spfde.NM(n=1, m=2)),
}


def recipe_with(method: spfde.sparsity.SparsityMethod | None) -> spfde.Recipe:
    return spfde.Recipe(
        sparsity=method,
        freezing=spfde.ProgressiveFreezing(flops_reduction=0.15),
        sieving=spfde.DataSieving(removed_fraction=0.25),
        learning_rate=spfde.BlockwiseCosine(),
        update_interval_epochs=2,
    )


def save(parts: Parts, session: spfde.Session) -> bytes:
    file = io.BytesIO()
    states = {
        "model": parts.model.state_dict(),
        "optimizer": parts.optimizer.state_dict(),
        "spfde": session.state_dict(),
        "global": torch.get_rng_state(),
    }
    torch.save(states, file)
    return file.getvalue()


def resume(
    saved: bytes,
    recipe: spfde.Recipe,
    attach: Callable[[Parts, spfde.Recipe], spfde.Session],
    **how: Any,
) -> tuple[Parts, spfde.Session]:
    parts = make_parts(seed=99, **how)
    session = attach(parts, recipe)
    load(saved, parts, session)
    return parts, session


def load(saved: bytes, parts: Parts, session: spfde.Session) -> None:
    states = torch.load(io.BytesIO(saved), weights_only=True)
    parts.model.load_state_dict(states["model"])
    parts.optimizer.load_state_dict(states["optimizer"])
    session.load_state_dict(states["spfde"])
    torch.set_rng_state(states["global"])


def everything(parts: Parts, session: spfde.Session) -> dict[str, Any]:
    state = session.state_dict()
    for row in state["parts"]["bill"]["rows"]:
        row["seconds"] = row["peak_memory_bytes"] = None  # measured: never the same twice
    state["clock"]["seconds"] = None
    return {"model": parts.model.state_dict(), "optimizer": parts.optimizer.state_dict(), "spfde": state}


def assert_equal(left: Any, right: Any, path: str = "") -> None:
    if isinstance(left, torch.Tensor):
        assert torch.equal(left, right), path
    elif isinstance(left, dict):
        assert left.keys() == right.keys(), path
        for key in left:
            assert_equal(left[key], right[key], f"{path}.{key}")
    elif isinstance(left, (list, tuple)):
        assert len(left) == len(right), path
        for number, (a, b) in enumerate(zip(left, right, strict=True)):
            assert_equal(a, b, f"{path}[{number}]")
    else:
        assert left == right, path
