"""Listening to blocks: the right modules, the right tensors, and a model that does not notice."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from spfde.analysis import BlockOutputs, output_modules
from spfde.analysis.outputs import output_graph
from spfde.app.train.models import build_model
from spfde.core.errors import InvalidArgument
from spfde.model.blocks import find_blocks
from spfde.model.trace import trace


class Chain(nn.Module):
    """A plain chain with one activation for all, dropout and a pool in front of the head."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.norm = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)
        self.two = nn.Conv2d(4, 6, 3)
        self.relu, self.drop = nn.ReLU(), nn.Dropout(0.5)
        self.pool, self.head = nn.AdaptiveAvgPool2d(1), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.norm(self.one(x)))
        x = self.relu(self.drop(self.two(x)))
        return self.head(self.pool(x).flatten(1))  # type: ignore[no-any-return]


def images(n: int, side: int = 8) -> Tensor:
    return torch.randn(n, 1, side, side, generator=torch.Generator().manual_seed(0))


def modules_of(model: nn.Module, x: Tensor) -> list[str | None]:
    return output_modules(model, find_blocks(model, trace(model, x)), x)


def test_a_residual_net_is_heard_at_its_blocks_and_its_head() -> None:
    model = build_model("resnet8", num_classes=3, in_channels=1, image_size=8)
    assert modules_of(model, images(1)) == ["layer1.0", "layer2.0", "layer3.0", "fc"]


def test_a_chain_is_heard_behind_the_norm_and_activation_of_each_layer() -> None:
    # The activation runs twice and belongs to the first block; the second ends with the pool before the head.
    assert modules_of(Chain(), images(1)) == ["relu", "pool", "head"]


def test_outputs_are_those_of_the_forward_pass_the_first_time_that_a_module_runs() -> None:
    model = Chain().eval()
    x = images(5)
    with torch.no_grad():
        first = model.relu(model.norm(model.one(x)))
        logits = model(x)
    with BlockOutputs(model, ["relu", "head"]) as outputs:
        found = outputs(x)
    assert list(found) == ["relu", "head"]
    assert torch.equal(found["relu"], first)
    assert torch.equal(found["head"], logits)


def test_the_graph_gives_the_same_as_the_hooks_and_follows_the_weights() -> None:
    model = build_model("resnet8", num_classes=3, in_channels=1, image_size=8).eval()
    names = ["layer1.0", "layer3.0", "fc"]
    graph = output_graph(model, names)
    for _ in range(2):
        with BlockOutputs(model, names) as outputs, torch.inference_mode():
            expected = outputs(images(4))
            for mine, theirs in zip(graph(images(4)), expected.values(), strict=True):
                assert torch.equal(mine, theirs)
        with torch.no_grad():
            model.get_submodule("layer1.0").conv1.weight.mul_(2.0)  # type: ignore[union-attr, operator]


def test_the_graph_computes_nothing_behind_the_last_output() -> None:
    graph = output_graph(Chain(), ["relu"])
    assert [node.target for node in graph.graph.nodes if node.op == "call_module"] == ["one", "norm", "relu"]


@pytest.mark.parametrize("what", ["modules", "hooks", "graph"])
def test_the_model_and_the_generators_stay_as_they_were(what: str) -> None:
    model = Chain().train()
    model.norm.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()  # noqa: NPY002
    if what == "modules":
        modules_of(model, images(2))
    elif what == "hooks":
        with BlockOutputs(model, ["two", "drop"]) as outputs:
            found = outputs(images(2))
        assert torch.equal(found["two"], found["drop"]), "dropout is off"
    else:
        output_graph(model, ["relu", "head"])
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert str(np.random.get_state()) == str(states[2])  # noqa: NPY002
    assert not any(module._forward_hooks for module in model.modules())


def test_hooks_are_gone_after_an_error_too() -> None:
    model = Chain()
    with pytest.raises(RuntimeError, match=r"size|shape|channel"), BlockOutputs(model, ["one"]) as outputs:
        outputs(torch.zeros(1, 5, 8, 8))
    assert not any(module._forward_hooks for module in model.modules())


class Odd(nn.Module):
    """A module that gives a tuple, one that never runs, and a branch that no trace can follow."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.idle = nn.LSTM(4, 5, batch_first=True), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Any:
        return self.rnn(x)[0] if float(x.sum()) > 0 else x


def test_the_first_tensor_of_a_tuple_is_taken() -> None:
    model, x = Odd(), torch.ones(3, 2, 4)
    with BlockOutputs(model, ["rnn"]) as outputs:
        assert torch.equal(outputs(x)["rnn"], model.rnn(x)[0])


def test_bad_names_and_models_are_named() -> None:
    with pytest.raises(InvalidArgument, match=r"modules='onne': is no module of the model\. Did you mean 'one'"):
        BlockOutputs(Chain(), ["onne"])
    with pytest.raises(InvalidArgument, match="modules='idle': did not run"), BlockOutputs(Odd(), ["idle"]) as outputs:
        outputs(torch.ones(1, 2, 4))
    with pytest.raises(InvalidArgument, match=r"its forward cannot be traced .* Use BlockOutputs"):
        output_graph(Odd(), ["rnn"])
    silent = Chain()
    silent.add_module("idle", nn.Linear(2, 2))
    with pytest.raises(InvalidArgument, match="modules='idle': does not run"):
        output_graph(silent, ["idle"])
