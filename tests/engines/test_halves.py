"""A model cut behind its frozen layers: put together, the halves are the model."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers.models import SmallResNet, TextModel, UNet, images
from spfde.engines.cudagraph.front import in_halves, outputs_of
from spfde.engines.halves import Halves, fixed_nodes
from spfde.engines.trace import copy_shared, trace


def halves_of(model: nn.Module, sample: Any, frozen: Collection[str]) -> Halves | None:
    names = [name for name, _ in model.named_parameters() if name.startswith(tuple(frozen))]
    traced = trace(model, sample)
    copy_shared(traced)
    return in_halves(traced, model, fixed_nodes(traced, model, names))


def put_together(halves: Halves, *inputs: Tensor, **named: Tensor) -> Tensor:
    out: Tensor = halves.back(*halves.front(*inputs, **named), *halves.given(*inputs, **named))
    return out


def modules_of(half: nn.Module) -> set[str]:
    return {str(node.target) for node in half.graph.nodes if node.op == "call_module"}  # type: ignore[union-attr]


class Tokens(nn.Module):
    """Sizes, positions and a mask that both ends of the model read."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(7, 4), nn.Parameter(torch.randn(1, 5, 4))
        self.first, self.second, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        n, length = ids.shape
        x = (self.tokens(ids) + self.positions[:, :length]) * mask[..., None]
        x = torch.relu_(self.first(x))
        x = (self.second(x) + self.positions[:, :length]) * mask[..., None]
        return self.head(x.view(n, length * 4)[:, :4])


class Rewriting(nn.Module):
    """Behind the front two things read one value, and the front itself writes into it afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        y = self.c(x)
        return y + self.b(x.relu_())


@pytest.mark.parametrize(
    ("model", "inputs", "frozen"),
    [
        (SmallResNet(), (images(),), ("stem", "norm", "stage1")),
        (UNet(), (images(),), ("down1", "down2")),
        (TextModel(tied=False), (torch.randint(11, (3, 5)),), ("tokens", "positions")),
        (Tokens(), (torch.randint(7, (3, 5)), torch.ones(3, 5)), ("tokens", "positions", "first")),
        (Rewriting(), (torch.randn(2, 3),), ("a", "b")),
    ],
)
def test_the_halves_put_together_are_the_model(
    model: nn.Module, inputs: tuple[Tensor, ...], frozen: tuple[str, ...]
) -> None:
    model.eval()
    halves = halves_of(model, inputs, frozen)
    assert halves is not None
    assert torch.equal(put_together(halves, *inputs), model(*inputs))
    called = modules_of(halves.front), modules_of(halves.back)
    assert not called[0] & called[1]
    assert all(name.startswith(frozen) for name in called[0])
    assert called[0]


def test_sizes_and_positions_are_made_again_and_inputs_handed_over_as_they_are() -> None:
    model, ids, mask = Tokens(), torch.randint(7, (3, 5)), torch.rand(3, 5)
    halves = halves_of(model, (ids, mask), ("tokens", "positions", "first"))
    assert halves is not None
    (kept,) = halves.front(ids, mask)
    assert kept.shape == (3, 5, 4)
    given = halves.given(ids, mask)
    assert any(value is mask for value in given)
    assert outputs_of(halves.front.graph, model, (ids, mask)) == [((5, 4), torch.float32)]


def test_what_is_not_one_value_a_sample_cannot_be_kept() -> None:
    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x).transpose(0, 1)).transpose(0, 1)

    model = Turned()
    halves = halves_of(model, torch.zeros(1, 1, 3), ("a",))
    assert halves is not None
    found = outputs_of(halves.front.graph, model, torch.zeros(1, 1, 3))
    assert isinstance(found, str)


def test_nothing_of_the_model_changes_while_it_is_cut() -> None:
    model = SmallResNet()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    halves = halves_of(model, images(1), ("stem",))
    assert halves is not None
    outputs_of(halves.front.graph, model, images(1))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
