from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor
from torch.utils._pytree import tree_flatten

from helpers.training import SmallNet
from spfde.model.trace import Trace, trace
from spfde.planning import blueprint

_TRACES: dict[Any, Trace] = {}


@pytest.fixture(autouse=True)
def equal_networks_are_traced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thousand sessions of one small network are made here, and to trace it would be half of their time."""

    def known(model: Any, sample: Any, **options: Any) -> Trace:
        leaves, form = tree_flatten(sample)
        if type(model) is not SmallNet or not all(isinstance(leaf, Tensor) for leaf in leaves):
            return trace(model, sample, **options)
        weights = [(name, p.shape, p.dtype, p.device, p.requires_grad) for name, p in model.named_parameters()]
        inputs = [(leaf.shape, leaf.dtype) for leaf in leaves]
        key = (repr(model), *weights, repr(form), *inputs, *sorted(options.items()))
        if key not in _TRACES:
            _TRACES[key] = trace(model, sample, **options)
        return _TRACES[key]

    monkeypatch.setattr(blueprint, "trace", known)
