"""Activation checkpointing behind a frozen front."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

import spfde

EPOCHS = 8


class Deep(nn.Module):
    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(16, 16), nn.ReLU()) for _ in range(4)])
        self.head, self.reentrant = nn.Linear(16, 3), reentrant

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x) if self.reentrant is None else checkpoint(layer, x, use_reentrant=self.reentrant)
        return self.head(x)


def train(reentrant: bool | None, freezes: Callable[[int], bool] = lambda step: False) -> nn.Module:
    """``freezes``: the third layer by hand, at a step after the session's first block is frozen."""
    torch.manual_seed(0)
    model = Deep(reentrant)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loader = DataLoader(TensorDataset(torch.randn(48, 16), torch.randint(3, (48,))), batch_size=4)
    recipe = spfde.Recipe(freezing=spfde.ProgressiveFreezing(flops_reduction=0.2), update_interval_epochs=2)
    session = spfde.attach(model, optimizer, loader, recipe, epochs=EPOCHS, engine="masked")
    since = -1
    for _ in session.epochs():
        for number, (x, y) in enumerate(session.loader):
            # From the first epoch on, as gradient checkpointing of embeddings does: the input needs a gradient there.
            trains = not session.frozen_blocks
            since += not trains
            if since >= 0 and freezes(since):
                model.layers[2].requires_grad_(False)
            F.cross_entropy(model(x.requires_grad_(trains)), y).backward()
            optimizer.step()
            optimizer.zero_grad()
            assert number < 12
    return model


def test_what_is_checkpointed_without_reentry_learns_as_without() -> None:
    ours, plain = train(False).state_dict(), train(None).state_dict()
    assert all(torch.allclose(ours[name], plain[name]) for name in plain)


@pytest.mark.filterwarnings("ignore")  # PyTorch's own, which nobody reads
def test_layers_that_get_no_gradient_behind_a_frozen_front_are_an_error_with_the_remedy() -> None:
    with pytest.raises(spfde.UsageError, match="use_reentrant=False"):
        train(True)


@pytest.mark.filterwarnings("ignore:.* do not learn any more:UserWarning")
@pytest.mark.parametrize("at", [0, 1])
def test_a_block_that_the_user_freezes_is_not_waited_for(at: int) -> None:
    before = train(None, lambda step: step < 0).layers[2][0].weight
    after = train(None, lambda step: step == at).layers[2][0].weight
    assert not torch.equal(before, after)
