"""2:4 layers for sparse tensor cores: which they are, and what is said where there are none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import spfde
from spfde.errors import InvalidArgument, UsageError
from spfde.export import is_two_four, semi_structured, to_semi_structured


def mask(rows: str) -> Tensor:
    return torch.tensor([[bit == "1" for bit in row] for row in rows.split()])


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ("1100 0101", True),
        ("11000110 00000001", True),
        ("1110 0101", False),
        ("01111000", False),  # 4:8, with three in the first four
        ("11000011", True),  # 4:8 that is 2:4 as well
        ("110", False),
    ],
)
def test_two_of_each_four_along_the_inputs(rows: str, expected: bool) -> None:
    assert is_two_four(mask(rows)) is expected


def test_two_of_four_along_the_outputs_do_not_count() -> None:
    assert not is_two_four(mask("1100 1100").T.contiguous())


def test_convolutions_are_not_taken() -> None:
    assert not is_two_four(torch.zeros(8, 8, 1, 1, dtype=torch.bool))


def two_four_model(dtype: torch.dtype = torch.float16) -> tuple[nn.Module, dict[str, Tensor]]:
    model = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 4), nn.Linear(4, 2)).to(dtype)
    masks = {"0.weight": mask("11000110 " * 4), "2.weight": mask("1110 " * 4), "3.weight": mask("0101 " * 2)}
    with torch.no_grad():
        for name, keep in masks.items():
            model.get_parameter(name).masked_fill_(~keep, 0)
    return model, masks


def test_masks_of_a_two_four_recipe_are_found() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    loader = DataLoader(TensorDataset(torch.randn(8, 8), torch.randint(8, (8,))), batch_size=4)
    recipe = spfde.Recipe(sparsity=spfde.StaticSparse(sparsity=0.5, structure=spfde.NM(n=2, m=4)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    session = spfde.attach(model, optimizer, loader, recipe, epochs=1, engine="masked")
    assert [name for name, found in session.masks.items() if is_two_four(found)] == ["1.weight"]
    with pytest.raises(UsageError, match="the model is on cpu"):
        to_semi_structured(model.half(), session.masks)


def test_on_a_cpu_it_says_what_hardware_it_needs() -> None:
    model, masks = two_four_model()
    with pytest.raises(UsageError, match=r"capability 8\.0.*the model is on cpu"):
        to_semi_structured(model, masks)


def test_masks_that_are_not_two_four_are_refused() -> None:
    model, masks = two_four_model()
    with pytest.raises(InvalidArgument, match=r"none of its 1 masks is 2:4"):
        to_semi_structured(model, {"2.weight": masks["2.weight"]})


@pytest.fixture
def hardware(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Pretends that every device has sparse tensor cores; the list says what would be converted."""
    converted: list[Tensor] = []

    def convert(weight: Tensor) -> Tensor:
        converted.append(weight)
        return weight.clone()

    monkeypatch.setattr(semi_structured, "_check_hardware", lambda devices: None)
    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", convert)
    return converted


def test_linear_layers_with_such_a_mask_are_converted_in_a_copy(hardware: list[Any]) -> None:
    model, masks = two_four_model()
    found = to_semi_structured(model, masks)
    assert len(hardware) == 2
    assert torch.equal(hardware[0], model.get_parameter("0.weight"))
    assert torch.equal(hardware[1], model.get_parameter("3.weight"))
    assert model.training
    assert not found.training
    assert found.get_parameter("0.weight") is not model.get_parameter("0.weight")
    assert not found.get_parameter("0.weight").requires_grad
    assert model.get_parameter("0.weight").requires_grad


def test_types_and_weights_that_do_not_fit_are_named_together(hardware: list[Any]) -> None:
    model, masks = two_four_model(torch.float32)
    with torch.no_grad():
        model.get_parameter("3.weight").fill_(1)
    with pytest.raises(InvalidArgument) as caught:
        to_semi_structured(model, masks)
    assert [problem.argument for problem in caught.value.problems] == ["0.weight", "3.weight", "3.weight"]
    assert hardware == []
