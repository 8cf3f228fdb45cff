"""A copy of a model on fake tensors: what a trace runs in the model's place.

What belongs to the model is copied, so that the trace changes nothing of it: modules, tensors, lists, settings. A model
may also hold what is not its own, such as a trainer, a loader, a logger or a session. That is neither copied nor looked
into: the copy holds the same.
"""

from __future__ import annotations

import copy
import enum
import types
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader, Dataset

from spfde.core.sharding import is_dtensor
from spfde.core.torch_private import (
    BUFFERS,
    MODULES,
    PARAMETERS,
    FakeTensorMode,
    class_under_fsdp,
    hooks_to_copy,
    is_of_fsdp,
    storage_id,
)

_ATOMS = (
    *(bool, int, float, complex, str, bytes, type(None), type(...), type, enum.Enum, range, slice),
    *(types.FunctionType, types.BuiltinFunctionType, types.ModuleType, property, np.generic, np.dtype),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size),
)
_CONTAINERS = (list, dict, tuple, set, frozenset, deque)
_NOT_ITS_OWN = (Optimizer, LRScheduler, DataLoader, Dataset)
# A larger structure is no part of a model: such as a trainer with all that it knows.
_MOST_OBJECTS = 20_000


def fake_copy(model: nn.Module, fake: FakeTensorMode) -> tuple[nn.Module, dict[int, Tensor]]:
    """A copy of the model on fake tensors, and the fake one of each parameter and buffer by the id of the real one."""
    memo: dict[int, Any] = {}
    side_by_side = _views_side_by_side(list(model.parameters()))
    for p in model.parameters():
        if id(p) in side_by_side or is_dtensor(p):
            # Told apart by its storage, so it gets one of its own; a sharded one as a whole.
            with fake:
                made = torch.empty_strided(p.shape, p.stride(), dtype=p.dtype, device=p.device)
        else:
            made = fake.from_tensor(p.detach())
        memo[id(p)] = nn.Parameter(made, requires_grad=p.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = fake.from_tensor(buffer.detach())
    stand_ins: dict[int, Tensor] = dict(memo)
    own = {id(module) for module in model.modules()}
    for module in model.modules():
        # The user's own hooks may record, count or hold anything: the copy has none of them. Those of torch's weight
        # norm, spectral norm and pruning compute the weight, so they stay.
        memo.update(hooks_to_copy(module, _computes_a_weight))
        for name, value in vars(module).items():
            is_plain = name not in (PARAMETERS, BUFFERS, MODULES) and not is_of_fsdp(name)
            if is_plain and id(value) not in memo:
                _prepare(value, own, memo, fake)
    try:
        return _copied(model, dict(memo)), stand_ins
    except Exception:  # an attribute says only now that it cannot be copied
        shared = {id(value): value for module in model.modules() for value in _objects_of(module, own)}
        return _copied(model, {**shared, **memo}), stand_ins


def _copied(model: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """A deep copy. Modules that FSDP has sharded refuse to be copied: those of the copy are what they were before."""
    before = {id(m): (m, kind.__new__(kind)) for m in model.modules() if (kind := class_under_fsdp(m)) is not None}
    memo.update({key: made for key, (_, made) in before.items()})
    for module, made in before.values():
        # As deepcopy does it: a module leaves out what it cannot hand on, such as a compiled call.
        state: dict[str, Any] = module.__getstate__()  # type: ignore[no-untyped-call]
        own = {name: value for name, value in state.items() if not is_of_fsdp(name)}
        made.__setstate__(copy.deepcopy(own, memo))  # type: ignore[no-untyped-call]
    copied: nn.Module = copy.deepcopy(model, memo)
    return copied


def _views_side_by_side(parameters: Sequence[nn.Parameter]) -> set[int]:
    """Ids of the parameters that share their storage with others."""
    of_storage: dict[int, list[nn.Parameter]] = {}
    for p in parameters:
        if p.layout == torch.strided and type(p) is nn.Parameter:
            of_storage.setdefault(storage_id(p), []).append(p)
    return {id(p) for group in of_storage.values() if len(group) > 1 for p in group}


def _computes_a_weight(hook: object) -> bool:
    return isinstance(hook, BasePruningMethod) or type(hook).__module__.startswith("torch.nn.utils")


def _objects_of(module: nn.Module, own: set[int]) -> list[Any]:
    """What a module holds besides tensors, modules, lists and numbers."""
    kinds = (Tensor, torch.Generator, *_ATOMS, *_CONTAINERS)
    kept = [value for name, value in vars(module).items() if not is_of_fsdp(name)]
    values = [item for value in kept for item in (_items(value) if _is_list(value) else (value,))]
    return [value for value in values if not isinstance(value, kinds) and id(value) not in own]


def _prepare(value: Any, own: set[int], memo: dict[int, Any], fake: FakeTensorMode) -> None:
    """Tell ``deepcopy`` what to take for the tensors in an attribute, and for what is not the model's own."""
    for item in _items(value) if _is_list(value) else (value,):
        found = _inside(item, own)
        if found is None:
            memo[id(item)] = item
            continue
        for each in found:
            if id(each) in memo:
                continue
            if isinstance(each, torch.Generator):
                memo[id(each)] = each.clone_state()
            else:
                made = fake.from_tensor(each.detach())
                memo[id(each)] = nn.Parameter(made, each.requires_grad) if isinstance(each, nn.Parameter) else made


def _inside(value: Any, own: set[int]) -> list[Tensor | torch.Generator] | None:
    """The tensors and generators in a value; None for what is not the model's own, or cannot be copied."""
    found: list[Tensor | torch.Generator] = []
    waiting, seen = [value], set[int]()
    while waiting:
        at = waiting.pop()
        if isinstance(at, _ATOMS) or id(at) in seen or id(at) in own:
            continue
        seen.add(id(at))
        if len(seen) > _MOST_OBJECTS or isinstance(at, _NOT_ITS_OWN):
            return None
        if isinstance(at, (Tensor, torch.Generator)):
            found.append(at)
        elif isinstance(at, types.MethodType):
            waiting.append(at.__self__)
        elif hasattr(type(at), "__deepcopy__") and not isinstance(at, nn.Module):
            continue  # it says itself what its copy is
        elif _is_list(at):
            waiting.extend(_items(at))
            waiting.extend(getattr(at, "__dict__", {}).values())
        elif hasattr(at, "__dict__"):
            waiting.extend(vars(at).values())
        else:  # a lock, a file, an iterator
            return None
    return found


def _is_list(value: object) -> bool:
    return isinstance(value, _CONTAINERS)


def _items(container: Any) -> Iterable[Any]:
    return [*container.keys(), *container.values()] if isinstance(container, Mapping) else container
