"""ITOP: how many weights have ever been active."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import spfde
from spfde.sparsity.structure import Unstructured
from spfde.sparsity.weight import MaskedWeight


def test_the_union_of_masks_by_hand() -> None:
    parameter = nn.Parameter(torch.ones(10))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    weight = MaskedWeight("w", parameter, Unstructured(), 2, optimizer=optimizer, generator=torch.Generator())
    assert weight.n_explored == 0
    for taken in ({0, 1}, {1, 2}, {9}, {0, 9}):
        weight.set_mask(torch.tensor([place in taken for place in range(10)]), len(taken))
    assert weight.n_explored == 4
    assert len(weight.explored) == 2


@pytest.mark.parametrize("name", ["set-itop", "rigl-itop", "static", "deepr", "gmp"])
def test_a_session_counts_the_weights_that_have_been_active_at_some_time(name: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 20), nn.Linear(20, 20), nn.Linear(20, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loader = DataLoader(TensorDataset(torch.randn(20, 4), torch.randint(3, (20,))), batch_size=8)
    recipe = spfde.presets.get(name).replace(update_interval_epochs=1)
    session = spfde.attach(model, optimizer, loader, recipe, epochs=6, engine="masked")
    seen: dict[str, torch.Tensor] = {}

    def look() -> None:
        for layer, mask in session.masks.items():
            seen[layer] = seen.get(layer, torch.zeros_like(mask)) | mask
        assert session.explored == sum(int(union.sum()) for union in seen.values()) / (160 + 400)

    look()
    shares = [session.explored]
    for _ in session.epochs():
        look()
        for x, y in session.loader:
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
            look()
        shares.append(session.explored)
    assert shares == sorted(shares)
    assert shares[0] == pytest.approx(1.0 if name == "gmp" else 0.1)
    assert (shares[-1] > shares[0]) == (name in ("set-itop", "rigl-itop", "deepr"))
