"""Each operator in single precision against PyTorch in double, over random shapes; and a run of fifty steps."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from helpers.native import needs_kernels, random_masks, relative_error, step, twin
from helpers.short import by_form

pytestmark = needs_kernels

MOST = 1e-5  # relative L2 error of an operator
DENSITIES = [0.0, 0.01, 0.1, 0.5, 1.0]


class Joined(nn.Module):
    """An operator on the sum of two convolutions of single pixels: a region needs weights of its own."""

    def __init__(self, channels: int, operator: nn.Module) -> None:
        super().__init__()
        # A norm takes away what a bias adds: its gradient is nothing but rounding.
        bias = not isinstance(operator, nn.BatchNorm2d)
        self.first, self.second = (nn.Conv2d(channels, channels, 1, bias=bias) for _ in range(2))
        self.operator = operator

    def forward(self, x: Tensor) -> Tensor:
        return self.operator(self.first(x) + self.second(x))


class Added(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + x) + x


OPERATORS: dict[str, Callable[[int], nn.Module]] = {
    "BatchNorm2d": nn.BatchNorm2d,
    "BatchNorm2d in evaluation": lambda channels: nn.BatchNorm2d(channels).eval(),
    "ReLU": lambda _: nn.ReLU(),
    "ReLU6": lambda _: nn.ReLU6(),
    "SiLU": lambda _: nn.SiLU(),
    "GELU": lambda _: nn.GELU(),
    "add": lambda _: Added(),
    "MaxPool2d": lambda _: nn.MaxPool2d(3, 2, 1),
    "AvgPool2d": lambda _: nn.AvgPool2d((2, 3), (1, 2), (1, 0), count_include_pad=False),
    "AdaptiveAvgPool2d": lambda _: nn.AdaptiveAvgPool2d(1),
    "AdaptiveMaxPool2d": lambda _: nn.AdaptiveMaxPool2d(1),
    "depthwise Conv2d": lambda channels: nn.Conv2d(channels, channels, 3, 2, 1, groups=channels),
}


def errors(model: nn.Module, masks: dict[str, Tensor], x: Tensor) -> dict[str, float]:
    """Relative errors of the output, the gradients and the statistics."""
    reference, engine = twin(model, masks, torch.float32)
    ours, expected = step(model, x), step(reference.double(), x.double())
    engine.detach()
    # A gradient that cancels out to nothing has no digits of its own.
    floor = 0.05 * max(float(value.double().norm()) for name, value in expected.items() if "grad" in name)
    found = {}
    for name, value in expected.items():
        value = value * masks.get(name.removesuffix(".grad"), 1)
        size = max(float(value.double().norm()), floor if "grad" in name else 0.0, 1e-6)
        found[name] = float((ours[name].double() - value).norm()) / size
    return found


@pytest.mark.parametrize("name", OPERATORS)
@given(
    st.sampled_from([1, 2, 7, 8, 9, 16, 17, 33]), st.integers(2, 6), st.integers(3, 11), st.integers(3, 11),
    st.integers(0, 999),
)  # fmt: skip
@settings(max_examples=by_form(4, 10), deadline=None)
def test_an_operator_in_single_precision_is_right(
    name: str, batch: int, channels: int, height: int, width: int, seed: int
) -> None:
    torch.manual_seed(seed)
    model = Joined(channels, OPERATORS[name](channels))
    found = errors(model, {}, torch.randn(batch, channels, height, width))
    assert max(found.values()) < MOST, found


@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("empty", ["nothing", "a row", "a column"])
@given(st.integers(0, 999))
@settings(max_examples=by_form(2, 4), deadline=None)
def test_a_sparse_convolution_and_linear_layer_in_single_precision_are_right(
    density: float, empty: str, seed: int
) -> None:
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    sizes = [int(torch.randint(1, most, (), generator=generator)) for most in (4, 18, 40, 9, 9)]
    stride, channels, out, height, width = sizes
    layers = [
        (nn.Conv2d(channels, out, 3, stride, 1), (5, channels, height, width)),
        (nn.Linear(channels, out), (3, 7, channels)),
    ]
    for layer, shape in layers:
        model = nn.Sequential(layer)
        masks = random_masks(model, density, seed)
        if empty == "a row":
            masks["0.weight"][0] = False
        elif empty == "a column":
            masks["0.weight"][:, 0] = False
        layer.weight.data.mul_(masks["0.weight"])
        found = errors(model, masks, torch.randn(shape))
        assert max(found.values()) < MOST, found


class Adding(nn.Module):
    """Convolutions whose input is added to something: its gradient comes from several sides."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.stem, self.one, self.two = (nn.Conv2d(channels, 6, 3, padding=1) for channels in (3, 6, 6))
        self.norm, self.head = nn.BatchNorm2d(6), nn.Conv2d(6, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        found = {
            "to what it makes": lambda: x + self.one(x),
            "to what it makes, normalised": lambda: F.silu(self.norm(self.one(x)) + x),
            "to what two make, one after the other": lambda: F.silu(self.two(F.silu(self.one(x))) + x),
            "to what two make, side by side": lambda: F.silu(self.one(x) + x) + self.two(x),
            "twice": lambda: F.silu(self.one(x) + x) + x,
        }[self.how]()
        out: Tensor = self.head(found)
        return out


@pytest.mark.parametrize(
    "how",
    [
        "to what it makes",
        "to what it makes, normalised",
        "to what two make, one after the other",
        "to what two make, side by side",
        "twice",
    ],
)
def test_what_a_convolution_reads_may_be_added(how: str) -> None:
    """A gradient is written over another one only where nobody reads that any more, another thread neither."""
    torch.manual_seed(2)
    before = torch.get_num_threads()
    model = Adding(how)
    masks = random_masks(model, 0.5, 2)
    for name, mask in masks.items():
        model.get_parameter(name).data.mul_(mask)
    torch.set_num_threads(4)  # for one group of images: bands of rows, whose threads read beyond their own
    try:
        found = errors(model, masks, torch.randn(5, 3, 64, 7))
    finally:
        torch.set_num_threads(before)
    assert max(found.values()) < MOST, found


class Deep(nn.Module):
    """A residual net that ends in something smooth."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.convs = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1, bias=False) for _ in range(4))
        self.norms = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(4))
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.relu(norm(conv(x)) + x)
        return self.fc(x.mean((2, 3)))


def fifty_steps(model: nn.Module, masks: dict[str, Tensor], dtype: torch.dtype) -> list[float]:
    """Losses of a plain run under fixed masks."""
    generator = torch.Generator().manual_seed(5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for _ in range(50):
        x = torch.randn(16, 3, 8, 8, generator=generator).to(dtype)
        y = torch.randint(4, (16,), generator=generator)
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            if name in masks:
                parameter.grad.mul_(masks[name])
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def test_fifty_steps_stay_as_near_to_the_exact_run_as_pytorchs_own() -> None:
    """Rounding at zeros of ReLUs grows with the steps in PyTorch, too; a fault would grow faster."""
    torch.manual_seed(0)
    native = Deep()
    masks = {name: mask for name, mask in random_masks(native, 0.2).items() if name.startswith("convs")}
    masked, engine = twin(native, masks, torch.float32)
    exact = copy.deepcopy(masked).double()
    runs = [
        fifty_steps(model, masks, dtype)
        for model, dtype in ((native, torch.float32), (masked, torch.float32), (exact, torch.float64))
    ]
    assert len(engine.taken) == 1
    ours, theirs = (max(abs(a - b) for a, b in zip(run, runs[2], strict=True)) for run in runs[:2])
    assert ours < 10 * theirs + 1e-5
    assert ours < 1e-3
    for (name, weight), other in zip(native.named_parameters(), exact.parameters(), strict=True):
        assert relative_error(weight, other) < 1e-3, name


def test_a_gradient_that_differs_at_zeros_of_relus_differs_nowhere_else() -> None:
    """Both engines round; where a ReLU's input has another sign, and only there, their gradients part."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
    reference, _ = twin(model, {}, torch.float32)
    x = torch.randn(64, 3, 12, 12)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    one, other = model(ours), reference(theirs)
    flipped = (one > 0) != (other > 0)
    assert float(torch.max(one, other)[flipped].max() if flipped.any() else 0.0) < 1e-5
    # With the gradient cut where the signs differ, what is left is rounding.
    weights = torch.randn(one.shape) * ~flipped
    (one * weights).sum().backward()
    (other * weights).sum().backward()
    assert ours.grad is not None
    assert theirs.grad is not None
    assert relative_error(ours.grad, theirs.grad) < MOST
