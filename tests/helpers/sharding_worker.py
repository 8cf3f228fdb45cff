"""What each process of tests/session/test_sharding.py runs."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.utils.data import DataLoader, TensorDataset

import spfde
from helpers.distributed_worker import join, leave
from helpers.sharded_runs import (
    ALL,
    CASES,
    EPOCHS,
    FREEZING,
    MORE_CASES,
    SAVED,
    Net,
    attach,
    local,
    make_case,
    resume,
    run,
    run_and_save,
    state_of,
    whole,
)
from helpers.training import make_parts
from spfde.sparsity.sharded import ShardedWeight


def _said(call: Callable[[], object]) -> str:
    try:
        call()
    except spfde.SpfdeError as error:
        return str(error)
    return "accepted"


def _refused(prepare: Callable[[nn.Module], None] | None = None, recipe: Any = None, **options: Any) -> str:
    torch.manual_seed(0)
    model = Net()
    prepare = prepare or (lambda model: fully_shard(model, mesh=_mesh()))
    prepare(model)
    before = {name: whole(p) for name, p in model.named_parameters()}
    recipe = recipe or spfde.Recipe(sparsity=spfde.SET(**ALL))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    options = {"sample": torch.zeros(1, 12), "samples_per_epoch": 8, "epochs": EPOCHS, **options}
    said = _said(lambda: spfde.attach(model, optimizer, None, recipe, **options))
    changed = [name for name, p in model.named_parameters() if not torch.equal(whole(p), before[name])]
    return said if not changed else f"changed {changed}"


def _mesh() -> Any:
    return init_device_mesh("cpu", (dist.get_world_size(),))


def _in_two_dimensions(model: nn.Module) -> None:
    names = ("replicate", "shard")
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(), 1), mesh_dim_names=names))


def _in_part(model: nn.Module) -> None:
    for block in model.blocks:  # type: ignore[union-attr]
        fully_shard(block, mesh=_mesh())


def _by_columns(model: nn.Module) -> None:
    fully_shard(
        model, mesh=_mesh(), shard_placement_fn=lambda p: Shard(1) if p.dim() == 2 and p.shape[1] == 12 else None
    )


def _by_tensor(model: nn.Module) -> None:
    model.fc.weight = nn.Parameter(distribute_tensor(model.fc.weight, _mesh(), [Shard(0)]))  # type: ignore[union-attr]


def _flatten(model: nn.Module) -> None:
    model.stem = FullyShardedDataParallel(model.stem, device_id=torch.device("cpu"))


def _sparse(method: type[spfde.SparsityMethod], **fields: Any) -> Callable[[], str]:
    return lambda: _refused(recipe=spfde.Recipe(sparsity=method(sparsity=0.7, **fields)))


REFUSED: dict[str, tuple[Callable[[], str], str]] = {
    "a method over all layers": (_sparse(spfde.DSR), "sparsity"),
    "momentum over all layers": (_sparse(spfde.SNFS), "sparsity"),
    "masks that change each step": (_sparse(spfde.STR), "sparsity"),
    "rewiring": (_sparse(spfde.DeepR), "sparsity"),
    "latent weights": (_sparse(spfde.TopKAST), "sparsity"),
    "pruning at initialisation": (_sparse(spfde.SynFlow), "sparsity"),
    "a structure": (_sparse(spfde.SET, structure=spfde.Block(rows=1, columns=7)), "structure"),
    "adaptive freezing": (
        lambda: _refused(
            recipe=spfde.Recipe(
                sparsity=spfde.SET(**ALL),
                freezing=spfde.ProgressiveFreezing(flops_reduction=0.1, criterion="structure"),
            )
        ),
        "criterion",
    ),
    "another engine": (lambda: _refused(engine="native"), "engine"),
    "compiled blocks": (lambda: _refused(compile=True), "compile"),
    "a cache": (
        lambda: _refused(recipe=spfde.Recipe(freezing=FREEZING), cache=spfde.PrefixCache(variants=1)),
        "cache",
    ),
    "two dimensions of ranks": (
        lambda: _refused(_in_two_dimensions),
        "mesh of one dimension",
    ),
    "columns": (lambda: _refused(_by_columns), "shard_placement_fn"),
    "parts of the model": (lambda: _refused(_in_part), "fully_shard(model)"),
    "tensor parallelism": (lambda: _refused(_by_tensor), "DTensor"),
    "the older FSDP": (lambda: _refused(_flatten), "fully_shard"),
}
"""What is refused, and a word of what is said."""


def _sharded_later() -> str:
    """What is said of a model that is sharded after ``attach``."""
    parts = make_parts()
    recipe = spfde.Recipe(sparsity=spfde.SET(sparsity=0.8))
    session = spfde.attach(parts.model, parts.optimizer, parts.loader, recipe, epochs=2, engine="masked")
    fully_shard(parts.model, mesh=_mesh())
    return _said(lambda: next(session.epochs()))


def _drifted() -> str:
    """What is said where one rank draws masks of its own."""
    model, optimizer = make_case(CASES["set"], sharded=True)
    session = attach(CASES["set"], model, optimizer)
    session.begin_epoch()
    session._setting.generator.manual_seed(dist.get_rank())
    return _said(session.verify)


def _loses_a_weight() -> str:
    """What is said where the parts of a mask do not add up."""
    model, optimizer = make_case(CASES["set"], sharded=True)
    session = attach(CASES["set"], model, optimizer)
    session.begin_epoch()
    if not dist.get_rank():
        session.masks["stem.weight"].to_local().fill_(False)
    return _said(session.verify)


def _sieved() -> dict[str, Any]:
    """Batches that the session deals out, samples that are sieved, half precision, and one infinite gradient."""
    torch.manual_seed(0)
    model = Net()
    mixed = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    fully_shard(model, mesh=_mesh(), mp_policy=mixed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.1)
    weight, is_spoilt = model.stem.weight, False

    def spoil(_: Tensor) -> None:
        """One rank finds no number where a weight might grow."""
        if is_spoilt and dist.get_rank():
            local(weight.grad)[~local(session.masks["stem.weight"])] = torch.inf

    weight.register_post_accumulate_grad_hook(spoil)
    data = TensorDataset(torch.randn(40, 12), torch.randint(4, (40,)))
    loader = DataLoader(data, batch_size=4, shuffle=True, generator=torch.Generator().manual_seed(0))
    recipe = spfde.Recipe(
        sparsity=spfde.RigL(**ALL), sieving=spfde.DataSieving(removed_fraction=0.25), update_interval_epochs=2
    )
    session = spfde.attach(model, optimizer, loader, recipe, epochs=5)
    seen: list[list[int]] = []
    masks, outside = [], 0
    for epoch in session.epochs():
        seen.append([])
        if epoch == 2:
            masks.append({name: whole(mask) for name, mask in session.masks.items()})
        for number, (x, y) in enumerate(session.loader):
            seen[-1] += session.loader.current_indices.tolist()
            is_spoilt = epoch == 2 and not number  # a mutation waits for this gradient
            logits = model(x).float()
            F.cross_entropy(logits, y).backward()
            optimizer.step()
            optimizer.zero_grad()
            session.observe(logits, y)
            if epoch == 2 and number < 2:
                masks.append({name: whole(mask) for name, mask in session.masks.items()})
        for name, mask in session.masks.items():
            parameter = model.get_parameter(name)
            values = [local(parameter), *state_of(optimizer, parameter)]
            outside += sum(int(value[~local(mask)].count_nonzero()) for value in values)
    pairs = itertools.pairwise(masks)
    return {
        "seen": seen,
        "changed": [sum(int((mask != later[name]).sum()) for name, mask in now.items()) for now, later in pairs],
        "outside": outside,
        "partial": session.partial_set,
        "said": str(session),
        "type": weight.dtype,
    }


def _by_hand() -> dict[str, Tensor]:
    """A weight of three rows, of which the first rank has two: chosen by magnitude, and then mutated."""
    weight = torch.tensor([[5.0, -1.0], [2.0, -4.0], [3.0, 6.0]])
    model = nn.Sequential(nn.Linear(2, 3, bias=False))
    model[0].weight.data.copy_(weight)
    fully_shard(model, mesh=_mesh())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)
    method = spfde.SET(sparsity=0.5, dense_first=False, dense_head=False, init="magnitude")
    session = spfde.attach(
        model, optimizer, None, spfde.Recipe(sparsity=method), epochs=2, samples_per_epoch=1, sample=torch.zeros(1, 2)
    )
    layer = session._masks.masker.layers["0.weight"]  # type: ignore[attr-defined]
    found = {"first own": layer.mask.clone(), "first": whole(session.masks["0.weight"])}
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    momentum = state_of(optimizer, layer.parameter)
    found["momentum before"] = momentum[0].clone()
    gradient = torch.tensor([[0.0, 1.0], [9.0, 2.0], [3.0, 0.0]])
    layer.mutate(2, 3, drop_score=layer.whole(layer.local.detach()).abs(), grow_score=gradient)
    found |= {"own": layer.mask, "mask": whole(session.masks["0.weight"]), "weight": whole(layer.parameter)}
    return {**found, "momentum": momentum[0], "explored": torch.tensor(session.explored)}


def _inferred() -> bool:
    """Whether masks that are taken from zeros are those that made them, under another seed."""
    model, optimizer = make_case(CASES["static"], sharded=True)
    first = attach(CASES["static"], model, optimizer)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    first.detach()
    other = attach(CASES["static"], model, optimizer, seed=1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(weights[name])
    other.infer_masks()
    return all(torch.equal(local(mask), local(other.masks[name])) for name, mask in first.masks.items())


def _gathered() -> list[set[str]]:
    """The layers of which there are whole tensors, whenever one more is gathered in a mutation by gradients."""
    model, optimizer = make_case(CASES["rigl"], sharded=True)
    session = attach(CASES["rigl"], model, optimizer)
    session.begin_epoch()
    session.end_epoch()
    alive: list[tuple[str, weakref.ref[Tensor]]] = []
    seen: list[set[str]] = []
    gather = ShardedWeight.whole

    def note(layer: ShardedWeight, own: Tensor) -> Tensor:
        made = gather(layer, own)
        alive.append((layer.name, weakref.ref(made)))
        seen.append({name for name, tensor in alive if tensor() is not None})
        return made

    with mock.patch.object(ShardedWeight, "whole", note):
        session.begin_epoch()
        F.cross_entropy(model(torch.randn(4, 12)), torch.arange(4)).backward()
        optimizer.step()
    return seen


SETS = {"cases": CASES, "more": MORE_CASES}


def compare(rank: int, size: int, folder: str, which: str) -> None:
    """By case of a set: see ``train``; and, with ``which`` empty, all that two processes show."""
    join(rank, size, folder)
    if which:
        leave(rank, folder, {name: run(case, sharded=True) for name, case in SETS[which].items()})
    found: dict[str, Any] = {name: run(case, sharded=True) for name, case in CASES.items() if name != SAVED}
    case, of_one = CASES[SAVED], torch.load(Path(folder) / "one.pt")
    found[SAVED], saved = run_and_save(case, sharded=True)
    of_one["session"]["parts"]["engine"]["name"] = "native"  # which computes no sharded model
    files = [saved]
    dist.broadcast_object_list(files)  # the first rank writes one for all
    (saved,) = files
    own = found[SAVED].pop("own")
    found["saved"] = saved
    found["resumed"] = {
        "with the states of each rank": resume(case, saved, sharded=True, own=own),
        "loaded before attach": resume(case, saved, sharded=True, first="load"),
        "saved by one process": resume(case, of_one, sharded=True),
    }
    found["refused"] = {name: call() for name, (call, _) in REFUSED.items()}
    found["sharded later"], found["drifted"], found["loses"] = _sharded_later(), _drifted(), _loses_a_weight()
    found["inferred"] = _inferred()
    found["sieved"], found["by hand"], found["gathered"] = _sieved(), _by_hand(), _gathered()
    leave(rank, folder, found)


def go_on(rank: int, size: int, folder: str, _: str) -> None:
    """Resume what other ranks have saved."""
    join(rank, size, folder)
    leave(rank, folder, resume(CASES[SAVED], torch.load(Path(folder) / "saved.pt"), sharded=True))
