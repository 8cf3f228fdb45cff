"""Equal networks are traced once: thousands of runs of few small networks are made in the tests."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_flatten

from spfde.core.torch_private import HOOKS
from spfde.engines import trace as graphs
from spfde.engines.stand_in import has_own_forward, stands_in
from spfde.model import trace as module
from spfde.model.sample import call_arguments

#: Networks whose passes follow from their types, their settings and the shapes of their tensors.
NETWORKS = (
    "helpers.training.SmallNet",
    "helpers.transformers_runs.Classifier",
    "spfde.app.train.models.CifarResNet",
)
_PLAIN = (bool, int, float, str, type(None))
_TRACES: dict[Hashable, module.Trace] = {}
_GRAPHS: dict[Hashable, graphs.Traced] = {}


@pytest.fixture(autouse=True)
def equal_networks_are_traced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """To trace them, for the bill and for an engine, would be half of the time of a small run."""
    usual, follow = module._traced, graphs._follow

    def known(model: nn.Module, sample: Any, **options: Any) -> module.Trace:
        key = None if any(_is_changed(part) for part in model.modules()) else _key(model, sample, options)
        if key is None:
            return usual(model, sample, **options)
        if key not in _TRACES:
            _TRACES[key] = usual(model, sample, **options)
        return _TRACES[key]

    def followed(model: nn.Module, sample: Any, tracer: Any, *, training: bool | None) -> graphs.Traced:
        options = {"training": training, "leaves": str(tracer.leaves)}
        key = None if _is_watched(model) else _key(model, call_arguments(sample), options)
        if key is None:
            return follow(model, sample, tracer, training=training)
        if key not in _GRAPHS:
            _GRAPHS[key] = _copied(follow(model, sample, tracer, training=training))
        return _copied(_GRAPHS[key])

    monkeypatch.setattr(module, "_traced", known)
    monkeypatch.setattr(graphs, "_follow", followed)


def _key(model: nn.Module, sample: Any, options: dict[str, Any]) -> Hashable | None:
    """What a trace follows from; None where that is not certain."""
    leaves, form = tree_flatten(sample)
    is_known = f"{type(model).__module__}.{type(model).__qualname__}" in NETWORKS
    is_certain = is_known and all(type(leaf) is Tensor for leaf in leaves)
    if not is_certain or torch.is_autocast_enabled("cpu"):
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


def _is_watched(model: nn.Module) -> bool:
    """As ``_is_changed``, inside of a model: an engine stands in for the whole, and its own hooks run around that."""
    return any(
        "parametrizations" in part._modules
        or has_own_forward(part)
        or (part is not model and (stands_in(part) or any(getattr(part, hooks) for hooks in HOOKS)))
        for part in model.modules()
    )


def _copied(traced: graphs.Traced) -> graphs.Traced:
    """Whoever gets a graph changes it."""
    graph, made = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in traced.graph.nodes:
        made[node] = graph.node_copy(node, lambda source: made[source])
    facts = {
        made[node]: replace(
            fact,
            writes=tuple(made[each] for each in fact.writes),
            returned=None if fact.returned is None else made[fact.returned],
        )
        for node, fact in traced.facts.items()
        if node in made
    }
    shared = {made[node] for node in traced.shared if node in made}
    return replace(traced, graph=graph, facts=facts, shared=shared)
