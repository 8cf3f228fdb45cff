"""Runs that are saved and resumed, and what they must have in common with one that never stopped."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch

import spfde
from helpers.training import EPOCHS, Parts, make_parts, train

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


SCHEMES = {
    "single-shot": spfde.ProgressiveFreezing(flops_reduction=0.15),
    "single-shot-resume": spfde.ProgressiveFreezing(flops_reduction=0.1, scheme="single-shot-resume"),
    "periodic": spfde.ProgressiveFreezing(flops_reduction=0.25, scheme="periodic"),
    "delayed-periodic": spfde.ProgressiveFreezing(flops_reduction=0.15, scheme="delayed-periodic"),
}


def recipe_with(method: str, scheme: str = "single-shot") -> spfde.Recipe:
    """All savings with a method of ``METHODS`` and freezing of ``SCHEMES``; an update every second epoch."""
    return spfde.Recipe(
        sparsity=METHODS[method],
        freezing=SCHEMES[scheme],
        sieving=spfde.DataSieving(removed_fraction=0.25),
        learning_rate=spfde.BlockwiseCosine(),
        update_interval_epochs=2,
    )


def top(epoch: int) -> int:
    """The moment before an epoch's first batch; moments are counted through a run, from 0."""
    return 2 * epoch


def bottom(epoch: int) -> int:
    """The moment after an epoch's last batch."""
    return 2 * epoch + 1


MOMENTS = range(2 * EPOCHS)


class Stopped(Exception):
    """The run was killed."""


@dataclass(frozen=True)
class Loop:
    """What a run is made of, so that it can be started and resumed: arguments of ``attach`` and of the loader."""

    recipe: spfde.Recipe
    engine: str = "masked"
    epochs: int = EPOCHS
    workers: int = 0
    persistent: bool = False
    own_generator: bool = True

    def start(self, seed: int = 0) -> tuple[Parts, spfde.Session]:
        parts = make_parts(
            seed=seed, workers=self.workers, persistent=self.persistent, own_generator=self.own_generator
        )
        options = {"epochs": self.epochs, "seed": 3, "engine": self.engine}
        return parts, spfde.attach(parts.model, parts.optimizer, parts.loader, self.recipe, **options)

    def resume(self, saved: bytes) -> tuple[Parts, spfde.Session]:
        """A fresh run, of other weights, that has loaded a state."""
        parts, session = self.start(seed=99)
        load(saved, parts, session)
        return parts, session

    def states(self) -> tuple[dict[int, bytes], dict[str, Any]]:
        """The states at every moment of a run that never stops, and what it ends with."""
        parts, session = self.start()
        saved: dict[int, bytes] = {}
        end = finish(
            parts,
            session,
            at_top=lambda epoch: saved.update({top(epoch): save(parts, session)}),
            at_bottom=lambda epoch: saved.update({bottom(epoch): save(parts, session)}),
        )
        return saved, end

    def end_with_stops(self, moments: Iterable[int]) -> dict[str, Any]:
        """What a run ends with that is stopped at these moments, in ascending order, and resumed from nothing but its
        state each time: whatever one of them lacks is lost, and shows now or later."""
        parts, session = self.start()
        for moment in moments:
            state = _stop_at(moment, parts, session)
            session.detach()
            parts, session = self.resume(state)
        return finish(parts, session)


def _stop_at(moment: int, parts: Parts, session: spfde.Session) -> bytes:
    states: list[bytes] = []

    def look(now: int) -> None:
        if now == moment:
            states.append(save(parts, session))
            raise Stopped

    with suppress(Stopped):
        train(parts, session, at_top=lambda epoch: look(top(epoch)), at_bottom=lambda epoch: look(bottom(epoch)))
    return states[0]


def finish(parts: Parts, session: spfde.Session, **hooks: Callable[[int], object]) -> dict[str, Any]:
    """Train to the end; everything that there is then."""
    train(parts, session, **hooks)
    end = copy.deepcopy(everything(parts, session))
    session.detach()
    return end


def save(parts: Parts, session: spfde.Session) -> bytes:
    """A checkpoint as a user writes it, and the global generator's state."""
    file = io.BytesIO()
    states = {
        "model": parts.model.state_dict(),
        "optimizer": parts.optimizer.state_dict(),
        "spfde": session.state_dict(),
        "global": torch.get_rng_state(),
    }
    torch.save(states, file)
    return file.getvalue()


def load(saved: bytes, parts: Parts, session: spfde.Session) -> None:
    states = torch.load(io.BytesIO(saved), weights_only=True)
    parts.model.load_state_dict(states["model"])
    parts.optimizer.load_state_dict(states["optimizer"])
    session.load_state_dict(states["spfde"])
    torch.set_rng_state(states["global"])


def everything(parts: Parts, session: spfde.Session) -> dict[str, Any]:
    """What two equal runs have in common: all states but for what was measured."""
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
