"""What the documentation takes for granted: a tiny model, its optimizer, a loader, a path."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import spfde

Names = dict[str, object]


@pytest.fixture
def new_names(tmp_path: Path) -> Callable[[], Names]:
    """Makes the names anew, with the same weights and data each time."""

    def make() -> Names:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 3))
        loader = DataLoader(TensorDataset(torch.randn(20, 4), torch.randint(3, (20,))), batch_size=8, shuffle=True)
        return {
            "model": model,
            "optimizer": torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
            "loader": loader,
            "path": tmp_path / "checkpoint.pt",
            "torch": torch,
            "spfde": spfde,
        }

    return make
