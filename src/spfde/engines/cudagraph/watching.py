"""Who else looks at a step: hooks that are not the library's, which a replay would not call."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import nn
from torch.optim import Optimizer

from spfde.core.hooks import is_ours
from spfde.core.torch_private import HOOKS, hooks_on_gradient, step_hooks_of


def hooks_of_others(model: nn.Module, optimizers: Sequence[Optimizer]) -> list[str]:
    """A clause for each thing that somebody else has hooked."""
    return [
        f"{where} has a hook, which is to see each step"
        for where, hook in _hooks(model, optimizers)
        if not is_ours(hook)
    ]


def _hooks(model: nn.Module, optimizers: Sequence[Optimizer]) -> Iterator[tuple[str, object]]:
    for name, module in model.named_modules():
        for table in HOOKS:
            yield from ((f"module '{name}'" if name else "the model", hook) for hook in vars(module)[table].values())
    for name, parameter in model.named_parameters():
        yield from ((f"the gradient of {name}", hook) for hook in hooks_on_gradient(parameter).values())
    for optimizer in optimizers:
        yield from ((f"the {type(optimizer).__name__}", hook) for hook in step_hooks_of(optimizer))
