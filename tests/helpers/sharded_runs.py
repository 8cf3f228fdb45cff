"""Runs of tests/session/test_sharding.py, on a whole model and on a sharded one.

All ranks train on the same batches, so that two of them come to the gradients of one process, bit for bit.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import init_device_mesh
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import spfde

EPOCHS, BATCHES, SAVED_AT = 5, 2, 3


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(7, 7), nn.Linear(7, 7)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(F.relu(self.first(x)))


class Net(nn.Module):
    """Rows of 7 and 4: uneven over two ranks and over three, of which the last has none of the classifier's."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(12, 7)
        self.blocks = nn.Sequential(Block(), Block(), Block())
        self.fc = nn.Linear(7, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.blocks(F.relu(self.stem(x))))


@dataclass
class Case:
    """A run by what is special about it."""

    method: spfde.SparsityMethod | None = None
    freezing: spfde.ProgressiveFreezing | None = None
    learning_rate: spfde.BlockwiseCosine | None = None
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.SGD
    options: dict[str, Any] = field(default_factory=lambda: {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.05})
    shard: dict[str, Any] = field(default_factory=dict)
    passes: int = 1
    """Backward passes of a step."""
    syncs_each: bool = False
    """Whether gradients are reduced in each of them."""
    clips: bool = False
    compiles: str = ""
    """What ``torch.compile`` compiles: "blocks", in their places, or the "model"."""
    keeps_whole: bool = False
    """Whether parameters stay whole behind a backward pass."""

    @property
    def recipe(self) -> spfde.Recipe:
        return spfde.Recipe(
            sparsity=self.method,
            freezing=self.freezing,
            learning_rate=self.learning_rate,
            update_interval_epochs=1,
        )


ADAM = {"lr": 0.01, "weight_decay": 0.1}
ALL = {"sparsity": 0.7, "dense_first": False, "dense_head": False}
FREEZING = spfde.ProgressiveFreezing(flops_reduction=0.1)
THAWS = spfde.ProgressiveFreezing(flops_reduction=0.05, scheme="single-shot-resume", resume_epochs=1)
CASES: dict[str, Case] = {
    "static": Case(spfde.StaticSparse(**ALL), optimizer=torch.optim.AdamW, options=ADAM, clips=True),
    "set": Case(spfde.SET(**ALL), FREEZING, spfde.BlockwiseCosine()),
    "mest": Case(spfde.MEST(gradient_weight=0.5, soft_bound=True, **ALL), FREEZING),
    "rigl": Case(spfde.RigL(**ALL), passes=2, syncs_each=True),
}
MORE_CASES: dict[str, Case] = {
    "erk, by magnitude": Case(spfde.SET(distribution="erk", init="magnitude", **ALL), THAWS),
    "gmp": Case(spfde.GMP(**ALL)),
    "rigl, accumulated": Case(
        spfde.RigL(**ALL),
        optimizer=torch.optim.AdamW,
        options=ADAM,
        passes=2,
        shard={"reshard_after_forward": False},
    ),
    "rigl-itop": Case(spfde.RigLITOP(**ALL), FREEZING),
    "dense, frozen": Case(None, FREEZING, spfde.BlockwiseCosine()),
    "compiled blocks": Case(spfde.RigL(**ALL), FREEZING, compiles="blocks"),
    "compiled model": Case(spfde.SET(**ALL), FREEZING, compiles="model"),
    "whole behind the backward pass": Case(spfde.RigL(**ALL), FREEZING, keeps_whole=True),
}


def make_case(case: Case, *, sharded: bool) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = Net()
    if sharded:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for block in model.blocks:
            fully_shard(block, mesh=mesh, **case.shard)
        fully_shard(model, mesh=mesh, **case.shard)
        if case.keeps_whole:
            model.set_reshard_after_backward(False)
        for block in model.blocks if case.compiles == "blocks" else ():
            block.compile(backend="aot_eager")
    return model, case.optimizer(model.parameters(), **case.options)


def attach(case: Case, model: nn.Module, optimizer: torch.optim.Optimizer, **options: Any) -> spfde.Session:
    samples = BATCHES * 4 * case.passes
    return spfde.attach(
        model, optimizer, None, case.recipe, epochs=EPOCHS, samples_per_epoch=samples, sample=torch.zeros(1, 12),
        **options,
    )  # fmt: skip


def whole(tensor: Tensor) -> Tensor:
    """A copy of all of it."""
    return tensor.full_tensor().clone() if isinstance(tensor, DTensor) else tensor.detach().clone()


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def state_of(optimizer: torch.optim.Optimizer, parameter: Tensor) -> list[Tensor]:
    return [local(v) for v in optimizer.state[parameter].values() if isinstance(v, Tensor) and v.dim()]


def train(
    case: Case,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    session: spfde.Session,
    at_top: Callable[[int], None] = lambda epoch: None,
    given: Any = None,
) -> dict[str, Any]:
    """Train to the end; what there is to compare."""
    found: dict[str, Any] = {"masks": [], "outside": 0, "counts": [], "planned": [], "frozen": [], "grads": []}
    parameters, given = dict(model.named_parameters()), model if given is None else given
    while session.epoch < EPOCHS:
        at_top(session.epoch)
        session.begin_epoch()
        generator = torch.Generator().manual_seed(session.epoch)
        for _ in range(BATCHES):
            for number in range(case.passes):
                x, y = torch.randn(4, 12, generator=generator), torch.randint(4, (4,), generator=generator)
                if hasattr(model, "set_requires_gradient_sync"):
                    model.set_requires_gradient_sync(case.syncs_each or number == case.passes - 1)
                F.cross_entropy(given(x), y).backward()
            masks = {name: local(mask) for name, mask in session.masks.items()}
            gradients = {name: p.grad for name, p in parameters.items() if name in masks and p.grad is not None}
            found["outside"] += sum(int(local(g)[~masks[name]].count_nonzero()) for name, g in gradients.items())
            if case.clips:
                nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            for name, mask in session.masks.items():
                values = [local(parameters[name]), *state_of(optimizer, parameters[name])]
                found["outside"] += sum(int(value[~local(mask)].count_nonzero()) for value in values)
            found["grads"] = sorted(name for name, p in parameters.items() if p.grad is not None)
            optimizer.zero_grad()
        row = session.timeline[session.epoch]
        found["masks"].append({name: whole(mask) for name, mask in session.masks.items()})
        found["counts"].append({name: int(mask.sum()) for name, mask in found["masks"][-1].items()})
        found["planned"].append({name: own.active for name, own in row.layers.items()})
        found["frozen"].append(session.frozen_blocks)
        with torch.no_grad():
            model(torch.zeros(1, 12))  # an evaluation leaves the root's parameters whole
        session.end_epoch()
    found["explored"], found["density"] = session.explored, session.density
    found["cost"] = [(row.training_flops, row.compressed_weight_bytes) for row in session.cost.rows]
    session.detach()
    found["weights"] = {name: whole(p) for name, p in parameters.items()}
    return found


def run(case: Case, *, sharded: bool) -> dict[str, Any]:
    model, optimizer = make_case(case, sharded=sharded)
    given = torch.compile(model, backend="aot_eager") if sharded and case.compiles == "model" else model
    return train(case, model, optimizer, attach(case, given, optimizer), given=given)


# --- states ----------------------------------------------------------------------------------------------------------

FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)
SAVED = "mest"


def save(model: nn.Module, optimizer: torch.optim.Optimizer, session: spfde.Session) -> dict[str, Any]:
    """What one rank may write for all: the tensors are whole. Every rank calls it."""
    return {
        "session": session.state_dict(),
        "model": get_model_state_dict(model, options=FULL),
        "optimizer": get_optimizer_state_dict(model, optimizer, options=FULL),
    }


def load(model: nn.Module, optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    saved = copy.deepcopy(saved)
    # This takes a step, so that the optimizer has a state, and the step masks the weights: they are loaded behind it.
    set_optimizer_state_dict(model, optimizer, saved["optimizer"], options=FULL)
    set_model_state_dict(model, saved["model"], options=FULL)


def run_and_save(case: Case, *, sharded: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """A run to its end, and what was saved amid of it."""
    model, optimizer = make_case(case, sharded=sharded)
    session = attach(case, model, optimizer)
    saved: dict[str, Any] = {}

    def note(epoch: int) -> None:
        if epoch == SAVED_AT:
            saved.update(copy.deepcopy(save(model, optimizer, session)))
            # As each rank has them.
            saved["own"] = copy.deepcopy([model.state_dict(), optimizer.state_dict()])

    found = train(case, model, optimizer, session, note)
    own = saved.pop("own")
    return {**found, "own": own}, saved


def resume(
    case: Case, saved: dict[str, Any], *, sharded: bool, first: str = "attach", own: Any = None
) -> dict[str, Any]:
    """A run from there to the end: attached before the states are loaded, or behind that."""
    model, optimizer = make_case(case, sharded=sharded)
    if first == "load":
        load(model, optimizer, saved)
        return train(case, model, optimizer, attach(case, model, optimizer, state=saved["session"]))
    session = attach(case, model, optimizer)
    if own is None:
        load(model, optimizer, saved)
    else:
        model.load_state_dict(own[0])
        optimizer.load_state_dict(own[1])
    session.load_state_dict(saved["session"])
    return train(case, model, optimizer, session)
