"""Whether optimizers, sessions and wrappers fit the model: looked at by ``attach``, before anything is changed."""

from __future__ import annotations

import threading
import weakref
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.optim import Optimizer

from spfde.core.errors import Problem
from spfde.core.optimizers import Optimizers
from spfde.core.say import counted
from spfde.core.torch_private import layers_of_wrapping, steps_can_be_hooked
from spfde.model.sample import unwrap
from spfde.recipe.recipe import Recipe
from spfde.session.reducing import find_problem
from spfde.session.sharding import check_sharding

if TYPE_CHECKING:
    from spfde.session.session import Session

_SESSIONS: weakref.WeakSet[Session] = weakref.WeakSet()
"""The sessions that there are."""
_NOTING = threading.Lock()  # a set that grows in one thread cannot be iterated in another


def note_session(session: Session) -> None:
    """Remember a session that is attached now."""
    with _NOTING:
        _SESSIONS.add(session)


def _sessions() -> list[Session]:
    with _NOTING:
        return list(_SESSIONS)


def are_optimizers(given: object) -> bool:
    """One optimizer, or a list or tuple of some."""
    several = given if isinstance(given, (list, tuple)) else [given]
    return bool(several) and all(isinstance(each, Optimizer) for each in several)


def check_model(
    model: nn.Module, optimizers: Optimizers, recipe: Recipe, machine: Mapping[str, object]
) -> list[Problem]:
    """All problems of the model, its wrappers and its optimizers with each other, and of how it is to be computed."""
    inner = unwrap(model)
    unusable = check_sharding(inner, recipe, machine) or _check_values(inner)
    if unusable:
        return unusable
    return [
        *_check_coverage(inner, optimizers),
        *(problem for optimizer in optimizers.each for problem in _check_hooks(optimizer, recipe)),
        *_check_unattached(inner, optimizers),
        *_check_wrappers(model, recipe),
    ]


def _check_unattached(model: nn.Module, optimizers: Optimizers) -> list[Problem]:
    """Two sessions on one parameter would undo each other's masks."""
    sessions = _sessions()
    for name, targets in (("model", [model]), ("optimizer", optimizers.each)):
        for target in targets:
            if any(session.holds(target) for session in sessions):
                rule = "has a session already"
                return [Problem(name, type(target).__name__, rule, "Call detach() on that session first.")]
    own = {id(p) for p in model.parameters()}
    for session in sessions:
        shared = session.holds_parameters(own)
        if shared:
            rule = f"shares {counted(shared, 'parameter')} with {session.name_of_model}, which has a session already"
            remedy = "Attach one session, to the outer of the two modules, or call detach() on the other first."
            return [Problem("model", type(model).__name__, rule, remedy)]
    return []


def _check_values(model: nn.Module) -> list[Problem]:
    """Are there any? On the meta device tensors are shapes alone."""
    named = [*model.named_parameters(), *model.named_buffers()]
    found = [name for name, tensor in named if tensor.is_meta]
    if not found:
        return []
    rule = f"is on the meta device, as {len(found)} of {len(named)} parameters and buffers are: they have no values"
    remedy = (
        "Call model.to_empty(device=...) and load or initialise the weights, make the optimizer, and attach then; "
        "spfde.plan takes the model as it is."
    )
    return [Problem("model", _some(found), rule, remedy)]


def _check_wrappers(model: nn.Module, recipe: Recipe) -> list[Problem]:
    """Can DistributedDataParallel follow what is frozen?"""
    if not recipe.freezes:
        return []
    wrappers = [each for each in layers_of_wrapping(model) if isinstance(each, nn.parallel.DistributedDataParallel)]
    return [problem for wrapper in wrappers if (problem := find_problem(wrapper)) is not None]


def _check_hooks(optimizer: Optimizer, recipe: Recipe) -> list[Problem]:
    """Can the optimizer's steps be hooked, and does freezing keep a parameter from moving?"""
    name = type(optimizer).__name__
    try:
        optimizer.register_step_pre_hook(lambda *_: None).remove()
    except AttributeError:
        return [
            Problem("optimizer", name, "has no step hooks", "Attach to the optimizer inside it, or before wrapping it.")
        ]
    if not steps_can_be_hooked(optimizer):
        rule = "runs no step hooks: its class skips Optimizer.__init__, and a scheduler has wrapped its step since"
        remedy = "Attach before the scheduler is made, or call optimizer.zero_grad() once before that."
        return [Problem("optimizer", name, rule, remedy)]
    if not isinstance(optimizer, torch.optim.LBFGS):
        return []
    if recipe.sparsity is not None and recipe.sparsity.refuses_closures:
        rule = f"runs the model within its step, and {recipe.sparsity.name} exchanges the weights for that long"
        remedy = "Take an optimizer that steps without a closure, such as SGD or AdamW."
        return [Problem("optimizer", name, rule, remedy)]
    if recipe.freezes:
        remedy = "Take an optimizer that skips parameters without a gradient, such as SGD or AdamW."
        return [Problem("optimizer", name, "moves parameters that have no gradient, and so frozen ones", remedy)]
    return []


def _check_coverage(model: nn.Module, optimizers: Optimizers) -> list[Problem]:
    """Is every trainable parameter stepped by one optimizer, and nothing else?"""
    names = {id(p): name for name, p in model.named_parameters()}
    held = [p for group in optimizers.param_groups for p in group["params"]]
    counts = Counter(id(p) for p in held)
    foreign = [tuple(p.shape) for p in held if id(p) not in names]
    missing = [names[id(p)] for p in model.parameters() if p.requires_grad and id(p) not in counts]
    twice = [names[key] for key, count in counts.items() if count > 1 and key in names]
    problems = []
    if foreign:
        problems.append(
            Problem(
                "optimizer",
                f"{counted(len(foreign), 'parameter')} of shape {', '.join(map(str, foreign[:3]))}",
                "holds parameters that are not the model's",
                "Make the optimizer from model.parameters(), after the model is complete.",
            )
        )
    if missing:
        problems.append(
            Problem(
                "optimizer",
                _some(missing),
                f"lacks {counted(len(missing), 'trainable parameter')} of the model",
                "Add them to the optimizer, pass all optimizers as a list, or set requires_grad=False on them.",
            )
        )
    if twice:
        rule = f"holds {counted(len(twice), 'parameter')} more than once"
        problems.append(Problem("optimizer", _some(twice), rule, "Give each parameter to one optimizer alone."))
    return problems


def _some(names: Sequence[str] | Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:3]) + (" …" if len(names) > 3 else "")
