"""What each process of tests/test_distributed.py runs; in a module of its own, so that it can be started afresh."""

from __future__ import annotations

import copy
import dataclasses
import datetime
import functools
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import (
    ConcatDataset,
    DataLoader,
    Dataset,
    DistributedSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
)

import spfde
from helpers.training import BATCH, EPOCHS, SAMPLES, Parts, make_images, make_parts, step
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
    # A rank that waits for one that has ended is to fail, and not to wait for half an hour.
    patience, meet = datetime.timedelta(seconds=60), f"file://{folder}/meet"
    dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=size, timeout=patience)


def leave(rank: int, folder: str, result: object) -> NoReturn:
    """Save what the rank has found, and end it: gloo's threads may abort an interpreter that winds down."""
    torch.save(result, Path(folder) / f"rank{rank}.pt")
    dist.barrier()
    os._exit(0)


def train(rank: int, size: int, folder: str, method: str) -> None:
    join(rank, size, folder)
    _train(rank, folder, recipe(method))


def train_on_the_highest_losses(rank: int, size: int, folder: str, _: str) -> None:
    join(rank, size, folder)
    sieving = spfde.DataSieving(removed_fraction=0.25, criterion="top-loss", full_last=0.25, offset_epochs=1)
    _train(rank, folder, recipe("set").replace(sieving=sieving))


def _train(rank: int, folder: str, recipe: spfde.Recipe) -> None:
    parts = make_parts()
    session = spfde.attach(parts.model, parts.optimizer, parts.loader, recipe, epochs=EPOCHS)
    model = DistributedDataParallel(parts.model, find_unused_parameters=True)
    seen: list[list[list[int]]] = []
    left_out: list[list[int]] = []
    for _ in session.epochs():
        seen.append([])
        left_out.append(session.removed_set.tolist())
        for x, y in session.loader:
            seen[-1].append(session.loader.current_indices.tolist())
            logits = model(x)
            F.cross_entropy(logits, y).backward()
            parts.optimizer.step()
            parts.optimizer.zero_grad()
            session.observe(logits, y)
    result: dict[str, Any] = {
        "left out": left_out,
        "seen": seen,
        "masks": dict(session.masks),
        "weights": {name: p.detach() for name, p in parts.model.named_parameters()},
        "partial": session.partial_set,
        "removed": session.removed_set,
        "cost": session.cost.state_dict()["rows"],
        "frozen": session.frozen_blocks,
        "batch": BATCH,
    }
    leave(rank, folder, result)


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
    leave(rank, folder, found)


def _small(how: spfde.Recipe) -> tuple[Parts, spfde.Session]:
    parts = make_parts()
    return parts, spfde.attach(parts.model, parts.optimizer, parts.loader, how, epochs=EPOCHS, engine="masked")


def _wrapped(parts: Parts) -> Parts:
    return dataclasses.replace(parts, model=DistributedDataParallel(parts.model, find_unused_parameters=True))


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


def begin(rank: int, size: int, folder: str, _: str) -> None:
    """The first half of runs that go on with other ranks: amid an epoch, and at the bottom of one."""
    join(rank, size, folder)
    leave(rank, folder, begin_runs(rank))


def begin_runs(rank: int = 0) -> dict[str, Any]:
    """By name: the states of an epoch and its first batch on each rank, or of an epoch that sieves; and what was seen.

    The first rank's states are those that are kept.
    """
    found = {}
    for name, how in OTHER_RANKS.items():
        parts, session = _small(how)
        seen = _train_rank(parts, session, stop_after=1 if name == "amid" else None)
        if name != "amid":
            session.end_epoch()
        states = parts.model.state_dict(), parts.optimizer.state_dict(), session.state_dict()
        found[name] = {"states": states if rank == 0 else None, "seen": seen}
    return found


def go_on(rank: int, size: int, folder: str, _: str) -> None:
    """The second half; the states lie in the folder."""
    join(rank, size, folder)
    leave(rank, folder, go_on_runs(torch.load(Path(folder) / "states.pt", weights_only=True)))


def go_on_runs(states: dict[str, Any]) -> dict[str, Any]:
    """By name: what was seen in the epoch that goes on, and its row of the bill."""
    found = {}
    for name, how in OTHER_RANKS.items():
        parts, session = _small(how)
        parts.model.load_state_dict(states[name][0])
        parts.optimizer.load_state_dict(states[name][1])
        session.load_state_dict(states[name][2])
        seen = _train_rank(parts, session)
        session.end_epoch()
        row = session.cost.rows[-1]
        found[name] = {"seen": seen[-1], "samples": row.samples, "steps": row.steps, "partial": session.partial_set}
    return found


def _train_rank(parts: Parts, session: spfde.Session, stop_after: int | None = None) -> list[list[int]]:
    """Two epochs where one is to be stopped, else one; the ids that this rank was dealt, by epoch."""
    wrapped, seen = parts, list[list[int]]()
    if torch.distributed.is_initialized():
        wrapped = dataclasses.replace(parts, model=DistributedDataParallel(parts.model))
    for _ in range(1 if stop_after is None else 2):
        seen.append([])
        for number, (x, y) in enumerate(session.loader):
            if seen[1:] and number == stop_after:
                return seen
            seen[-1] += session.loader.current_indices.tolist()
            step(wrapped, session, x, y)
        if stop_after is not None:
            session.end_epoch()
    return seen


OTHER_RANKS = {"amid": recipe("mest").replace(sieving=None), "bottom": recipe("mest")}


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
    leave(rank, folder, messages)


def do_not_do_the_same(rank: int, size: int, folder: str, _: str) -> None:
    """What is said where each rank has other data, and where the first one alone observes, verifies or loads."""
    join(rank, size, folder)
    found = {name: _shard(make(rank)) for name, make in SHARDS.items()}
    whole = DataLoader(make_images(), BATCH, sampler=DistributedSampler(make_images(), size, rank))
    found["dealt out by the sampler"] = _shard(whole)
    for what in ("observes", "verifies", "loads", "loads amid"):
        found[what] = _refusal(lambda what=what: _alone(rank, what))
    leave(rank, folder, found)


def _sieving_by_loss() -> spfde.Recipe:
    return spfde.Recipe(sieving=spfde.DataSieving(removed_fraction=0.25), update_interval_epochs=2)


def _shuffled(dataset: Any) -> DataLoader:
    return DataLoader(dataset, BATCH, shuffle=True, generator=torch.Generator().manual_seed(0))


SHARDS: dict[str, Callable[[int], DataLoader]] = {
    "same": lambda rank: _shuffled(Subset(make_images(), range(20))),
    "length": lambda rank: _shuffled(Subset(make_images(), range(20 + rank))),
    "indices": lambda rank: _shuffled(Subset(make_images(), range(rank, SAMPLES, 2))),
    "in a subset": lambda rank: DataLoader(Subset(Subset(make_images(), range(rank, SAMPLES, 2)), range(10)), BATCH),
    "joined": lambda rank: DataLoader(ConcatDataset([Subset(make_images(), [rank]), make_images()]), BATCH),
    "tensors": lambda rank: _shuffled(TensorDataset(*(own[rank::2] for own in make_images().tensors))),
    "labels": lambda rank: _shuffled(_Labelled([(i + rank) % 4 for i in range(SAMPLES)])),
    "sampler": lambda rank: DataLoader(
        make_images(),
        BATCH,
        sampler=SubsetRandomSampler(range(rank, SAMPLES, 2), generator=torch.Generator().manual_seed(0)),
    ),
    "batch size": lambda rank: DataLoader(make_images(), BATCH + rank),
}
"""Loaders by rank: by what they differ in."""


class _Labelled(Dataset):
    def __init__(self, targets: list[int]) -> None:
        self.targets = targets

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.zeros(2, 8, 8), self.targets[index]


def _shard(loader: DataLoader) -> str:
    parts = make_parts()
    try:
        session = spfde.attach(parts.model, parts.optimizer, loader, spfde.Recipe(), epochs=1, engine="masked")
    except spfde.InvalidArgument as error:
        return str(error)
    session.detach()
    return "accepted"


def _alone(rank: int, what: str) -> None:
    """Train, and let the first rank alone do something; ends at the first error."""
    how = _sieving_by_loss() if what == "observes" else spfde.Recipe(sparsity=spfde.SET(sparsity=0.8))
    parts, session = _small(how)
    if what.startswith("loads"):
        wrapped = _wrapped(parts)
        for _ in session.epochs():
            for x, y in session.loader:
                step(wrapped, session, x, y)
                if what == "loads amid":
                    break
            break
        if what == "loads":
            session.end_epoch()
        states = [copy.deepcopy(own.state_dict()) for own in (parts.model, parts.optimizer, session)]
        parts, session = _small(how)
        if rank == 0:
            for own, state in zip((parts.model, parts.optimizer, session), states, strict=True):
                own.load_state_dict(state)
    wrapped = _wrapped(parts)
    for _ in session.epochs():
        for x, y in session.loader:
            if what == "observes" and rank == 0:
                step(wrapped, session, x, y)
            else:
                step(wrapped, None, x, y)
        if what == "verifies" and rank == 0:
            session.verify()


def refusals(rank: int, size: int, folder: str, _: str) -> None:
    """What is said where ranks drift apart, and with each kind of wrapper: by the name of the case."""
    join(rank, size, folder)
    cases = {
        "no wrapper": lambda: _one_run(spfde.Recipe(sparsity=spfde.SET(sparsity=0.8)), wrap=None),
        "all used": lambda: _one_run(recipe("set"), wrap={}),
        "static graph": lambda: _one_run(recipe("set"), wrap={"find_unused_parameters": True, "static_graph": True}),
        "wrapped frozen": _thaw_after_wrapping,
        "one rank replaced": lambda: _one_run(recipe("set"), wrap={"find_unused_parameters": True}, spoils=rank == 1),
        "sharded optimizer": _sharded_optimizer,
        **{f"one rank: {name}": functools.partial(_spoiled, rank, name) for name in SPOILT},
    }
    said: dict[str, tuple[str, int]] = {}
    for name, case in cases.items():
        session = None
        dist.barrier()
        try:
            session = case()
            said[name] = "nothing", session.epoch
        except spfde.SpfdeError as error:
            said[name] = str(error), getattr(error, "epoch", 0)
    leave(rank, folder, said)


@dataclasses.dataclass
class Spoilt:
    """What the first rank alone does amid its training."""

    rank: int
    what: str

    def observe(self, session: spfde.Session, logits: torch.Tensor, y: torch.Tensor, number: int) -> None:
        if self.rank or number:
            session.observe(logits, y)
        elif self.what == "labels":
            # Those on an accelerator are looked at when the epoch ends.
            session._sampling._observer._bounds.append(torch.tensor([0, 99]))
            session._sampling._observer._n_classes = 4
            session.observe(logits, y)
        elif self.what != "report":
            session.observe(logits, y)

    def losses(self, session: spfde.Session) -> None:
        if self.what != "weights" or self.rank:
            session.loss_weights()

    def at_bottom(self, session: spfde.Session, parts: Parts) -> None:
        if self.rank:
            return
        if self.what == "rate":
            parts.optimizer.param_groups[0]["lr"] *= 0.5
        elif self.what == "arrivals":
            never = [torch.nn.Parameter(torch.zeros(1))]
            session._freezing._arrivals._expected, session._freezing._arrivals._steps = {"blocks.2": never}, 1


SPOILT = {
    "rate": (spfde.Recipe(learning_rate=spfde.BlockwiseCosine()), "Recipe(learning_rate=None)"),
    "arrivals": (spfde.Recipe(freezing=spfde.ProgressiveFreezing(flops_reduction=0.15)), "use_reentrant=False"),
    "report": (spfde.Recipe(sieving=spfde.DataSieving(removed_fraction=0.25)), "observe"),
    "labels": (spfde.Recipe(sieving=spfde.DataSieving(removed_fraction=0.25)), "loss="),
    "weights": (spfde.Recipe(sieving=spfde.DataSieving(removed_fraction=0.25, rescale_loss=True)), "loss_weights"),
}
"""By what the first rank does: the recipe, and what its error names."""


def _spoiled(rank: int, what: str) -> Any:
    parts = make_parts()
    how = SPOILT[what][0].replace(update_interval_epochs=2)
    session = spfde.attach(parts.model, parts.optimizer, parts.loader, how, epochs=EPOCHS, engine="masked")
    model = DistributedDataParallel(parts.model, find_unused_parameters=True)
    spoilt = Spoilt(rank, what)
    for _ in session.epochs():
        for number, (x, y) in enumerate(session.loader):
            logits = model(x)
            spoilt.losses(session)
            F.cross_entropy(logits, y).backward()
            parts.optimizer.step()
            parts.optimizer.zero_grad()
            spoilt.observe(session, logits, y, number)
        spoilt.at_bottom(session, parts)
    return session


def _one_run(how: spfde.Recipe, wrap: dict[str, Any] | None, *, spoils: bool = False, epochs: int = EPOCHS) -> Any:
    parts = make_parts()
    session = spfde.attach(parts.model, parts.optimizer, parts.loader, how, epochs=epochs, engine="masked")
    model = parts.model if wrap is None else DistributedDataParallel(parts.model, **wrap)
    _loop(parts, session, model, spoils=spoils)
    return session


def _loop(parts: Any, session: Any, model: Any, *, spoils: bool = False, stop: int | None = None) -> None:
    try:
        for epoch in session.epochs():
            for x, y in session.loader:
                logits = model(x)
                F.cross_entropy(logits, y).backward()
                parts.optimizer.step()
                parts.optimizer.zero_grad()
                session.observe(logits, y)
            if spoils:
                parts.model.fc.weight = torch.nn.Parameter(parts.model.fc.weight.detach())
            if epoch == stop:
                return
    except spfde.SpfdeError as error:
        error.epoch = session.epoch
        raise


def _thaw_after_wrapping() -> Any:
    freezing = spfde.ProgressiveFreezing(flops_reduction=0.1, scheme="single-shot-resume", resume_epochs=2)
    how = spfde.Recipe(freezing=freezing, update_interval_epochs=2)

    def start() -> Any:
        parts = make_parts()
        return parts, spfde.attach(parts.model, parts.optimizer, parts.loader, how, epochs=10, engine="masked")

    parts, session = start()
    _loop(parts, session, DistributedDataParallel(parts.model, find_unused_parameters=True), stop=6)
    assert session.frozen_blocks
    states = parts.model.state_dict(), parts.optimizer.state_dict(), session.state_dict()
    parts, session = start()
    parts.model.load_state_dict(states[0])
    parts.optimizer.load_state_dict(states[1])
    session.load_state_dict(states[2])
    _loop(parts, session, DistributedDataParallel(parts.model))
    return session


def _sharded_optimizer() -> Any:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    parts = make_parts()
    kind = torch.optim.SGD
    parts.optimizer = ZeroRedundancyOptimizer(parts.model.parameters(), kind, lr=0.05, momentum=0.9)
    freezing = spfde.ProgressiveFreezing(flops_reduction=0.15)
    how = spfde.Recipe(sparsity=spfde.SET(sparsity=0.8), freezing=freezing, update_interval_epochs=2)
    session = spfde.attach(parts.model, parts.optimizer, parts.loader, how, epochs=EPOCHS, engine="masked")
    _loop(parts, session, DistributedDataParallel(parts.model, find_unused_parameters=True))
    weights = dict(parts.model.named_parameters())
    for name, mask in session.masks.items():
        assert not weights[name].detach()[~mask].any()
        for state in session._setting.optimizer.states_of(weights[name]):
            assert not state["momentum_buffer"][~mask].any()
    return session
