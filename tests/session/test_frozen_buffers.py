"""A frozen block stays as it is, whoever wrote its norms."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import spfde
from spfde.freezing.freezer import Freezer
from spfde.model.blocks import Block


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.mean.lerp_(x.detach().mean(0), 0.1)
        return x - self.mean


class Replaced(InPlace):
    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        return x - self.mean


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("average", torch.zeros(8))
        self.register_buffer("spread", torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.average, self.spread, training=self.training)


class Always(InPlace):
    def forward(self, x: Tensor) -> Tensor:
        self.mean.lerp_(x.detach().mean(0), 0.1)
        return x - self.mean


class Codebook(nn.Module):
    """Counts how often each entry is used, in evaluation mode, too, and drops those that never are."""

    def __init__(self, kind: torch.dtype = torch.long) -> None:
        super().__init__()
        self.register_buffer("usage", torch.zeros(8, dtype=kind))

    def forward(self, x: Tensor) -> Tensor:
        self.usage = self.usage + (x.detach().abs().sum(0) > 0).to(self.usage.dtype)
        return x * (self.usage > 0)


class Parametric(nn.Module):
    """Its statistic is a parameter without a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(8), requires_grad=False)

    @torch.no_grad()
    def follow(self, x: Tensor) -> None:
        self.mean.lerp_(x.detach().mean(0), 0.1)

    def forward(self, x: Tensor) -> Tensor:
        self.follow(x)
        return x - self.mean


class Plain(nn.Module):
    """Its statistic is no buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = torch.zeros(8)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.mean = self.mean.lerp(x.detach().mean(0), 0.1)
        return x - self.mean


class Looked(nn.Module):
    """Keeps its output for others to read."""

    def forward(self, x: Tensor) -> Tensor:
        self.seen = 2 * x
        return x


class Hidden(InPlace):
    def forward(self, x: Tensor) -> Tensor:
        self.mean.data = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        return x - self.mean


class Flagged(nn.Module):
    """Raises a flag at every third call."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("flag", torch.tensor(False))
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.flag = torch.tensor(self.calls % 3 == 0)
        return x


class Counter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x


def run(norm: type[nn.Module], decay: float = 1.0) -> tuple[nn.Module, dict[str, Tensor], list[str]]:
    """The norm of the first block, what it was when that was frozen, and what was said."""
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(8, 8), norm(), nn.ReLU()) for _ in range(3)]
    model = nn.Sequential(*blocks, nn.Linear(8, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    data = DataLoader(TensorDataset(torch.randn(16, 8), torch.arange(16) % 4), batch_size=8)
    freezing = spfde.ProgressiveFreezing(flops_reduction=0.1)
    recipe = spfde.Recipe(freezing=freezing, update_interval_epochs=1)
    kept: dict[str, Tensor] = {}
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        session = spfde.attach(model, optimizer, data, recipe, epochs=6)
        for _ in session.epochs():
            model.train()
            if session.frozen_blocks and not kept:
                kept = {name: value.clone() for name, value in blocks[0][1].state_dict().items()}
            for x, y in session.loader:
                F.cross_entropy(model(x), y).backward()
                optimizer.step()
                optimizer.zero_grad()
                with torch.no_grad():
                    for weight in model.parameters() if decay != 1 else ():
                        weight *= decay
    assert kept or norm in (nn.Identity, Plain, Looked)
    return blocks[0][1], kept, [str(warning.message) for warning in heard]


@pytest.mark.parametrize("norm", [InPlace, Replaced, Functional])
def test_statistics_of_a_hand_written_norm_are_still_in_a_frozen_block(norm: type[nn.Module]) -> None:
    module, kept, said = run(norm)
    assert all(value.equal(kept[name]) for name, value in module.state_dict().items())
    assert not said
    assert not module.training


@pytest.mark.parametrize("norm", [Always, Hidden, Parametric, Plain])
def test_what_changes_in_evaluation_mode_too_is_named_once(norm: type[nn.Module]) -> None:
    _, _, said = run(norm)
    own = "0.1.mean changes" if norm is Parametric else f"0.1.mean of {norm.__name__}"
    assert sum(own in text.replace(", 1.1", " changes, 1.1") for text in said) == 1


def test_weights_of_frozen_blocks_that_are_written_by_hand_are_named_once() -> None:
    _, _, said = run(nn.Identity, decay=0.999)
    assert sum("0.0.weight, 0.0.bias" in text for text in said) == 1


def test_outputs_that_a_module_keeps_are_no_fault() -> None:
    _, _, said = run(Looked)
    assert not said


def test_a_frozen_model_that_is_converted_is_no_fault() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    freezer = Freezer(
        model, [Block("0", ("0.weight", "0.bias"), ("0",), 0, 1, 1)], torch.optim.SGD(model.parameters(), lr=0.1)
    )
    freezer.freeze_to(1)
    model.to(torch.float64)
    assert not freezer.changed()
    freezer.freeze_to(0)
    freezer.freeze_to(1)
    model[0].bias.data += 1.0
    assert freezer.changed() == ["0.bias"]


def test_whole_numbers_that_change_while_frozen_are_named() -> None:
    _, _, said = run(Codebook)
    assert sum("0.1.usage of Codebook" in text for text in said) == 1


def test_a_flag_that_changes_while_frozen_is_named() -> None:
    _, _, said = run(Flagged)
    assert sum("0.1.flag of Flagged" in text for text in said) == 1


def test_a_counter_goes_on_without_a_word() -> None:
    module, kept, said = run(Counter)
    assert module.calls > kept["calls"]
    assert not said
