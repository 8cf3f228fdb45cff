"""2:4 layers for sparse tensor cores: which they are, and what is said where there are none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import spfde
from spfde.core.errors import InvalidArgument, UsageError
from spfde.export import semi_structured, to_semi_structured
from spfde.export.semi_structured import is_two_four


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
    model = nn.Sequential(nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 64), nn.Linear(64, 32)).to(dtype)
    masks = {
        "0.weight": mask(f"{'11000110' * 16} " * 64),
        "2.weight": mask(f"{'1110' * 16} " * 64),
        "3.weight": mask(f"{'0101' * 16} " * 32),
    }
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


@pytest.fixture(params=["cutlass", "cusparselt"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Which of PyTorch's two kernels converts."""
    base = torch.sparse.SparseSemiStructuredTensor
    monkeypatch.setattr(base, "_FORCE_CUTLASS", request.param == "cutlass")
    return str(request.param)


def linear_layers(*shapes: tuple[int, int], dtype: torch.dtype = torch.float16) -> tuple[nn.Module, dict[str, Tensor]]:
    """Layers of these inputs and outputs, their weights all zero, with 2:4 masks."""
    model = nn.Sequential(*(nn.Linear(*shape) for shape in shapes)).to(dtype)
    masks = {}
    for index, (inputs, outputs) in enumerate(shapes):
        nn.init.zeros_(model.get_parameter(f"{index}.weight"))
        masks[f"{index}.weight"] = mask(f"{'1100' * (inputs // 4)} " * outputs)
    return model, masks


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_shapes_that_torch_cannot_take_are_named_with_one_that_fits(
    hardware: list[Any], backend: str, dtype: torch.dtype
) -> None:
    model, masks = linear_layers((64, 64), (48, 24), (8, 64), dtype=dtype)
    with pytest.raises(InvalidArgument) as caught:
        to_semi_structured(model, masks)
    least = {"cutlass": "32 outputs and 64 inputs", "cusparselt": "16 outputs and 16 inputs"}[backend]
    fits = {"cutlass": "nn.Linear(64, 32)", "cusparselt": "nn.Linear(48, 32)"}[backend]
    first, second = map(str, caught.value.problems)
    assert first.startswith(f"1.weight=(24, 48): PyTorch's kernel takes multiples of {least} of {dtype}. ")
    assert fits in first
    assert second.startswith("2.weight=(64, 8): ")
    assert hardware == []


def test_the_least_shape_that_fits_is_converted(hardware: list[Any], backend: str) -> None:
    model, masks = linear_layers((64, 32) if backend == "cutlass" else (16, 16))
    to_semi_structured(model, masks)
    assert len(hardware) == 1


def test_a_torch_that_names_no_shapes_judges_them_itself(
    hardware: list[Any], backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for kernel in (torch.sparse.SparseSemiStructuredTensorCUTLASS, torch.sparse.SparseSemiStructuredTensorCUSPARSELT):
        monkeypatch.delattr(kernel, "_DTYPE_SHAPE_CONSTRAINTS")
    to_semi_structured(*linear_layers((48, 24)))
    assert len(hardware) == 1
