"""What a trace holds for: what the model's forward reads, and nothing that it carries along."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helpers.native import kernels, needs_kernels, random_masks, relative_error
from spfde.engines.native.model import NativeModel

pytestmark = needs_kernels

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))


class Metric(nn.Module):
    """Counts along, in a tensor, a number, a list and a buffer that are others after each step."""

    def __init__(self) -> None:
        super().__init__()
        self.right, self.calls, self.seen = torch.zeros(()), 0, list[int]()
        self.register_buffer("mean", torch.zeros(()))

    def update(self, logits: Tensor) -> None:
        self.right = self.right + logits.detach().sum()
        self.mean = 0.9 * self.mean + self.right
        self.calls += 1
        self.seen.append(self.calls)


class Net(nn.Module):
    scale = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3)
        self.fc, self.metric = nn.Linear(8, 4), Metric()
        self.blocks = nn.ModuleList([nn.Conv2d(8, 8, 1)])
        self.settings = SimpleNamespace(negative=False)
        self.factors, self.steps, self.average = [1.0], 0, torch.zeros(3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.a(x)))
        for block in self.blocks:
            x = block(x)
        x = self.fc(self.b(x).mean((2, 3))) * self.scale * self.factors[0]
        return -x if self.settings.negative else x


def attached(model: nn.Module) -> tuple[Any, NativeModel]:
    masks = random_masks(model, 0.3)
    engine = NativeModel(model, kernels(torch.float32), masks=lambda: masks, dense_gradients=frozenset, sample=X)
    return model, engine


CARRIED: dict[str, Callable[[Net], object]] = {
    "metric": lambda model: model.metric.update(model.fc.weight),
    "number": lambda model: setattr(model, "steps", model.steps + 1),
    "tensor": lambda model: setattr(model, "average", model.average + 1),
    "new attribute": lambda model: setattr(model, f"note{len(vars(model))}", 1),
    "tensor on a layer": lambda model: setattr(model.a, "activity", torch.rand(3)),
    "number on a layer": lambda model: setattr(model.norm, "calls", len(vars(model)) + torch.rand(()).item()),
    "module": lambda model: setattr(model.metric, "inner", nn.Linear(1, 1)),
}


@pytest.mark.parametrize("what", CARRIED)
def test_what_forward_does_not_read_may_change_at_every_step(what: str) -> None:
    model, engine = attached(Net())
    for _ in range(3):
        model(X).sum().backward()
        CARRIED[what](model)
    assert engine._n_captures == 1


def _wider(model: Net) -> None:
    model.blocks.append(nn.Conv2d(8, 8, 1))


READ: dict[str, Callable[[Net], object]] = {
    "number of the class": lambda model: setattr(model, "scale", 2.0),
    "entry of a list": lambda model: model.factors.__setitem__(0, 3.0),
    "setting": lambda model: setattr(model.settings, "negative", True),
    "layer": lambda model: setattr(model, "b", nn.Conv2d(8, 8, 3, bias=False)),
    "longer list of layers": _wider,
    "parameter": lambda model: setattr(model.b, "bias", nn.Parameter(torch.ones(8))),
    "buffer": lambda model: setattr(model.norm, "running_mean", torch.ones(8)),
    "setting of a layer": lambda model: setattr(model.norm, "eps", 1.0),
    "method": lambda model: setattr(model.b, "forward", lambda x: nn.Conv2d.forward(model.b, x) * 2),
}


@pytest.mark.parametrize("what", READ)
def test_what_forward_reads_is_seen_when_it_changes(what: str) -> None:
    model, _ = attached(Net())
    model.eval()
    before = model(X)
    READ[what](model)
    reference = copy.deepcopy(model)
    reference.forward = lambda x: Net.forward(reference, x)
    assert relative_error(model(X), reference(X)) < 1e-5
    assert relative_error(model(X), before) > 1e-3


def test_a_metric_that_forward_reads_is_followed() -> None:
    class Scaled(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + self.metric.calls

    model, _ = attached(Scaled())
    model.eval()
    before = model(X)
    model.metric.update(before)
    assert torch.allclose(model(X), before + 1, atol=1e-5)


def test_a_model_that_cannot_be_traced_is_not_tried_again_at_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    class Undecided(Net):
        def forward(self, x: Tensor) -> Tensor:
            out = super().forward(x)
            return out if self.training or float(out.detach().sum()) < 1e9 else -out

    model, engine = attached(Undecided())
    model.eval()
    with pytest.warns(UserWarning, match="leaves the model to PyTorch"):
        model(X)
    tried = engine._n_captures
    for _ in range(3):
        model(X)
        model.metric.update(X)
        model.steps += 1
    assert engine._n_captures == tried
