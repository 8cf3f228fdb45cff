"""bf16 storage, under autocast: against PyTorch in double precision, within the bound of rounding."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from helpers.native import needs_kernels, random_masks, relative_error, variant_kernels, variants
from spfde.app.train.models import build_model
from spfde.engines.native.model import NativeModel

pytestmark = needs_kernels

UNIT = 2.0**-8  # relative error of a number that is rounded to bf16


def step(model: nn.Module, x: Tensor, *, half: bool) -> dict[str, Tensor]:
    """Output and gradients after a pass forward and back, under autocast or not."""
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        out = model(x)
    flowing = torch.randn(out.shape, generator=torch.Generator().manual_seed(7)).bfloat16()
    out.backward(flowing.to(out.dtype))
    assert x.grad is not None
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"output": out.detach(), "input": x.grad, **gradients}


def compare(model: nn.Module, masks: dict[str, Tensor], x: Tensor, variant: str) -> dict[str, tuple[float, float]]:
    """Relative errors of the engine and of PyTorch's own autocast against double precision."""
    plain, exact = copy.deepcopy(model), copy.deepcopy(model).double()
    engine = NativeModel(model, variant_kernels(variant), masks=lambda: masks, dense_gradients=frozenset)
    ours, theirs = step(model, x, half=True), step(plain, x, half=True)
    expected = step(exact, x.double(), half=False)
    engine.detach()
    found = {}
    for name, value in expected.items():
        mask = masks.get(name, torch.tensor(1))
        assert not bool((ours[name] * (mask == 0)).any()), f"{name} has a gradient where there is no weight"
        found[name] = relative_error(ours[name], value * mask), relative_error(theirs[name] * mask, value * mask)
    return found


def test_small_integers_come_out_exactly() -> None:
    conv = nn.Conv2d(2, 1, (1, 3), padding=(0, 1), bias=False)
    conv.weight.data = torch.tensor([[[[1.0, 2.0, 0.0]], [[0.0, 0.0, 3.0]]]])
    model = nn.Sequential(conv)
    masks = {"0.weight": conv.weight != 0}
    NativeModel(model, variant_kernels("this processor"), masks=lambda: masks, dense_gradients=frozenset)
    x = torch.tensor([[[[1.0, 2.0, 4.0]], [[8.0, 16.0, 32.0]]]]).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x)
    assert out.dtype == torch.bfloat16
    assert out.flatten().tolist() == [2.0 + 48.0, 1.0 + 4.0 + 96.0, 2.0 + 8.0]
    out.sum().backward()
    assert x.grad is not None
    assert x.grad[0, :, 0].tolist() == [[3.0, 3.0, 2.0], [0.0, 3.0, 3.0]]
    assert conv.weight.grad is not None
    assert conv.weight.grad.dtype == torch.float32
    assert conv.weight.grad.flatten().tolist() == [3.0, 7.0, 0.0, 0.0, 0.0, 48.0]


@variants()
@given(
    batch=st.sampled_from([1, 3, 8, 16, 17, 33]), channels=st.integers(1, 9), out=st.integers(1, 9),
    kernel=st.tuples(st.integers(1, 5), st.integers(1, 5)), stride=st.integers(1, 3), dilation=st.integers(1, 2),
    groups=st.sampled_from([1, 1, 2, 3]), size=st.tuples(st.integers(9, 20), st.integers(9, 34)),
    density=st.sampled_from([0.0, 0.05, 0.3, 1.0]), seed=st.integers(0, 999),
)  # fmt: skip
@settings(max_examples=20, deadline=None)
def test_any_convolution_keeps_the_bound_of_rounding(
    variant: str, batch: int, channels: int, out: int, kernel: tuple[int, int], stride: int, dilation: int, groups: int,
    size: tuple[int, int], density: float, seed: int,
) -> None:  # fmt: skip
    torch.manual_seed(seed)
    padding = (kernel[0] // 2, kernel[1] // 2)
    conv = nn.Conv2d(channels * groups, out * groups, kernel, stride, padding, dilation, groups, bias=False)
    masks = random_masks(nn.Sequential(conv), density, seed)
    model, exact = nn.Sequential(conv), copy.deepcopy(conv).double()
    absolute = copy.deepcopy(exact)
    absolute.weight.data.abs_()
    engine = NativeModel(model, variant_kernels(variant), masks=lambda: masks, dense_gradients=frozenset)
    x = torch.randn(batch, channels * groups, *size)
    ours, expected = step(model, x, half=True), step(exact, x.double(), half=False)
    engine.detach()
    # Of each product both factors are rounded, of each sum the result; sums themselves are of 24 bits.
    size_of = x.double().abs().requires_grad_()
    made = absolute(size_of)
    flowing = torch.randn(made.shape, generator=torch.Generator().manual_seed(7)).bfloat16().double().abs()
    made.backward(flowing)
    assert size_of.grad is not None
    assert absolute.weight.grad is not None
    bounds = {"output": made.detach(), "input": size_of.grad, "weight": absolute.weight.grad}
    for name, bound in bounds.items():
        mask = masks["0.weight"] if name == "weight" else 1
        found = ours["0.weight" if name == "weight" else name].double()
        assert bool(((found - expected[name] * mask).abs() <= 3.1 * UNIT * bound * mask + 1e-30).all()), name


class Block(nn.Module):
    """A residual block at a change of stage."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.n = nn.Conv2d(12, 24, 3, 2, 1, bias=False), nn.BatchNorm2d(24)
        self.b, self.m = nn.Conv2d(24, 24, 3, padding=1, bias=False), nn.BatchNorm2d(24)
        self.c, self.o = nn.Conv2d(12, 24, 1, 2, bias=False), nn.BatchNorm2d(24)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(x)
        return F.relu(self.m(self.b(F.relu(self.n(self.a(x))))) + self.o(self.c(x)))


@variants()
@pytest.mark.parametrize("batch", [1, 5, 35])
def test_a_block_is_as_near_to_the_exact_one_as_pytorchs_autocast(variant: str, batch: int) -> None:
    torch.manual_seed(0)
    model = Block()
    found = compare(model, random_masks(model, 0.3), torch.randn(batch, 12, 12, 20), variant)
    for name, (ours, theirs) in found.items():
        assert ours < 2 * theirs + 2 * UNIT, (name, ours, theirs)
        assert ours < (0.01 if name == "output" else 0.15), (name, ours)


class Blocks(nn.Module):
    """Residual blocks one behind the other: convolutions read, and store, what comes of an addition and a ReLU."""

    def __init__(self, activation: type[nn.Module]) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.convolutions = nn.ModuleList(nn.Conv2d(16, 16, 3, padding=1, bias=False) for _ in range(4))
        self.norms = nn.ModuleList(nn.BatchNorm2d(16) for _ in range(4))
        self.activation = activation()

    def forward(self, x: Tensor) -> Tensor:
        x = self.activation(self.norm(self.stem(x)))
        for at in (0, 2):
            y = self.activation(self.norms[at](self.convolutions[at](x)))
            x = self.activation(self.norms[at + 1](self.convolutions[at + 1](y)) + x)
        return x.mean(dim=(2, 3))


@variants()
@pytest.mark.parametrize("batch", [4, 21, 32])
@pytest.mark.parametrize("activation", [nn.ReLU, nn.SiLU])
def test_a_chain_of_blocks_is_as_near_to_the_exact_one_as_pytorchs_autocast(
    variant: str, batch: int, activation: type[nn.Module]
) -> None:
    torch.manual_seed(0)
    model = Blocks(activation)
    found = compare(model, random_masks(model, 0.3), torch.randn(batch, 3, 16, 18), variant)
    for name, (ours, theirs) in found.items():
        assert ours < 1.5 * theirs + UNIT, (name, ours, theirs)
        assert ours < (0.02 if name == "output" else 0.25), (name, ours)


@variants()
@pytest.mark.parametrize("structure", ["columns", "inputs"])
def test_pairs_of_weights_are_multiplied_as_such(variant: str, structure: str) -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.Conv2d(8, 8, 3, padding=1, bias=False))
    masks = {}
    for name, p in model.named_parameters():
        half = torch.rand(8, 4 if structure == "inputs" else 8, 3, 3) < 0.2
        masks[name] = half.repeat_interleave(2, 1) if structure == "inputs" else half | half.roll(1, 3)
        p.data.mul_(masks[name])
    found = compare(model, masks, torch.randn(16, 8, 8, 8), variant)
    assert max(ours for ours, _ in found.values()) < 2 * UNIT, found


@pytest.mark.parametrize("training", [True, False])
def test_a_network_with_every_kind_of_step_computes_in_half_precision(training: bool) -> None:
    torch.manual_seed(2)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 5, 2, 2), nn.BatchNorm2d(8), nn.GELU(), nn.AvgPool2d(2, 2, 1),
        nn.Conv2d(8, 8, 3, padding="same", groups=2), nn.SiLU(), nn.Conv2d(8, 6, 1), nn.AdaptiveAvgPool2d(1),
    ).train(training)  # fmt: skip
    found = compare(model, random_masks(model, 0.5), torch.randn(19, 3, 21, 23), "this processor")
    assert all(ours < 2 * theirs + 2 * UNIT for name, (ours, theirs) in found.items() if name != "0.bias"), found


def test_tokens_are_computed_in_half_precision() -> None:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(20, 33), nn.GELU(), nn.Linear(33, 17))
    found = compare(model, random_masks(model, 0.3), torch.randn(3, 50, 20), "this processor")
    assert all(ours < 2 * theirs + 2 * UNIT for ours, theirs in found.values()), found


def test_memory_is_about_half_of_that_in_single_precision() -> None:
    model = build_model("resnet8", num_classes=10, in_channels=3, image_size=(32, 32))
    masks = random_masks(model, 0.2)
    taken = []
    for half in (False, True):
        engine = NativeModel(model, variant_kernels("this processor"), masks=lambda: masks, dense_gradients=frozenset)
        step(model, torch.randn(16, 3, 32, 32), half=half)
        taken.append(engine._pool.bytes)
        engine.detach()
    assert taken[1] < 0.65 * taken[0]


def test_a_nan_in_the_input_comes_out_and_other_images_are_as_they_were() -> None:
    torch.manual_seed(4)
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Conv2d(3, 2, 3))
    masks = random_masks(model, 1.0)
    NativeModel(model, variant_kernels("this processor"), masks=lambda: masks, dense_gradients=frozenset)
    x = torch.randn(3, 2, 6, 6)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        before = model(x)
        x[1, 0, 2, 2] = float("nan")
        after = model(x)
    assert bool(after[1].isnan().any())
    assert torch.equal(after[[0, 2]], before[[0, 2]])


def test_under_autocast_to_bf16_nothing_is_said_and_without_it_all_is_single_precision() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 3))
    masks = random_masks(model, 0.5)
    NativeModel(model, variant_kernels("this processor"), masks=lambda: masks, dense_gradients=frozenset)
    x = torch.randn(2, 2, 6, 6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with torch.autocast("cpu", torch.bfloat16):
            assert model(x).dtype == torch.bfloat16
        assert model(x).dtype == torch.float32


def test_a_channel_that_is_constant_is_normalised_to_nothing() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3, eps=1e-12))
    masks = {"0.weight": torch.zeros(3, 2, 3, 3).bool()}
    model[0].weight.data.zero_()
    model[0].bias.data = torch.tensor([0.3, 3.3, -100.7])  # none of them a number of bf16
    NativeModel(model, variant_kernels("this processor"), masks=lambda: masks, dense_gradients=frozenset)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(torch.randn(20, 2, 8, 8))
    assert bool((out == 0).all())


def test_a_mean_far_from_zero_is_that_of_what_is_stored() -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4))
    masks = random_masks(model, 0.5)
    model[0].bias.data.fill_(60.0)
    plain = copy.deepcopy(model)
    NativeModel(model, variant_kernels("this processor"), masks=lambda: masks, dense_gradients=frozenset)
    with torch.autocast("cpu", torch.bfloat16):
        x = torch.randn(32, 2, 8, 8)
        out, expected = model(x).float(), plain(x).float()
    out, expected = out.detach(), expected.detach()
    assert float(out.mean(dim=(0, 2, 3)).abs().max()) < 1e-2
    assert float((out.std(dim=(0, 2, 3)) - expected.std(dim=(0, 2, 3))).abs().max()) < 1e-2
