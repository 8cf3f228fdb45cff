"""Equal networks are traced once: thousands of runs of few small networks are made in the tests."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from spfde.model import trace as module

#: Networks whose passes follow from their types, their settings and the shapes of their tensors.
NETWORKS = (
    "helpers.training.SmallNet",
    "helpers.transformers_runs.Classifier",
    "spfde.app.train.models.CifarResNet",
)
_PLAIN = (bool, int, float, str, type(None))
_TRACES: dict[Hashable, module.Trace] = {}


@pytest.fixture(autouse=True)
def equal_networks_are_traced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """To trace them would be half of the time of a small run."""
    usual = module._traced

    def known(model: nn.Module, sample: Any, **options: Any) -> module.Trace:
        key = _key(model, sample, options)
        if key is None:
            return usual(model, sample, **options)
        if key not in _TRACES:
            _TRACES[key] = usual(model, sample, **options)
        return _TRACES[key]

    monkeypatch.setattr(module, "_traced", known)


def _key(model: nn.Module, sample: Any, options: dict[str, Any]) -> Hashable | None:
    """What a trace follows from; None where that is not certain."""
    leaves, form = tree_flatten(sample)
    is_known = f"{type(model).__module__}.{type(model).__qualname__}" in NETWORKS
    is_certain = is_known and all(type(leaf) is Tensor for leaf in leaves)
    if not is_certain or torch.is_autocast_enabled("cpu") or any(_is_changed(part) for part in model.modules()):
        return None
    settings = [
        (name, type(part), *((key, value) for key, value in vars(part).items() if isinstance(value, _PLAIN)))
        for name, part in model.named_modules()
    ]
    tensors = [*model.named_parameters(), *model.named_buffers(), *enumerate(leaves)]
    shapes = [(name, t.shape, t.stride(), t.dtype, t.device, t.requires_grad) for name, t in tensors]
    return repr(model), repr(form), *settings, *shapes, *sorted(options.items())


def _is_changed(part: nn.Module) -> bool:
    """Does something compute its weights, or has its pass been replaced?"""
    return "parametrizations" in part._modules or "forward" in vars(part) or bool(part._forward_pre_hooks)
