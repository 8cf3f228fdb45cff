"""What the native engine does beside the passes: numbers outside of masks, running statistics, masked gradients."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import spfde
from helpers.native import kernels, needs_kernels, random_masks
from helpers.short import by_form
from helpers.training import EPOCHS, Parts, make_parts, step
from spfde.engines.native.model import NativeModel
from spfde.sparsity import together

pytestmark = needs_kernels


def test_what_lies_outside_a_mask_is_found_and_set_to_positive_zero() -> None:
    tensor, mask = torch.tensor([1.0, 0.0, -0.0, 2.0]), torch.tensor([True, True, False, False])
    outside = kernels(torch.float32).outside([tensor], [mask])
    assert outside is not None
    assert outside.is_any()
    version = tensor._version
    outside.clear()
    assert tensor.tolist() == [1.0, 0.0, 0.0, 0.0]
    assert not tensor.signbit().any()
    assert tensor._version == version + 1
    outside.clear()
    assert tensor._version == version + 1, "nothing was written"


def test_a_negative_zero_outside_of_a_mask_is_no_weight() -> None:
    outside = kernels(torch.float32).outside([torch.tensor([-0.0, 1.0])], [torch.tensor([False, True])])
    assert outside is not None
    assert not outside.is_any()


@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_of_any_tensors_all_that_lies_outside_is_cleared_and_nothing_else(data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64]))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    tensors, masks = [], []
    for _ in range(data.draw(st.integers(1, 3))):
        shape = data.draw(st.sampled_from([(1,), (255,), (257,), (40_000,), (3, 5), (9, 4, 3, 3), (40, 33, 5, 5)]))
        tensor = torch.randn(shape, generator=generator, dtype=dtype)
        tensor[torch.rand(shape, generator=generator) < data.draw(st.sampled_from([0.0, 0.9, 1.0]))] = 0
        if data.draw(st.booleans()):
            tensor.view(-1)[-1] = torch.nan
        if len(shape) == 4 and data.draw(st.booleans()):
            tensor = tensor.contiguous(memory_format=torch.channels_last)
        share = data.draw(st.sampled_from([0.0, 0.2, 1.0]))
        masks.append(torch.empty_like(tensor, dtype=torch.bool).copy_(torch.rand(shape, generator=generator) < share))
        tensors.append(tensor)
    expected = [torch.where(mask, tensor, 0) for tensor, mask in zip(tensors, masks, strict=True)]
    outside = kernels(dtype).outside(tensors, masks)
    assert outside is not None
    assert outside.is_any() == any(
        bool(((tensor != 0) & ~mask).any()) for tensor, mask in zip(tensors, masks, strict=True)
    )
    outside.clear()
    for tensor, wanted in zip(tensors, expected, strict=True):
        assert torch.equal(tensor.nan_to_num(7), wanted.nan_to_num(7))
    assert not outside.is_any()


@pytest.mark.parametrize("kind", ["another type", "gaps", "a mask that lies otherwise"])
def test_tensors_that_the_kernels_cannot_read_as_they_lie_are_left_to_others(kind: str) -> None:
    tensor, mask = torch.zeros(4, 6), torch.zeros(4, 6).bool()
    if kind == "another type":
        tensor = tensor.bfloat16()
    elif kind == "gaps":
        tensor, mask = tensor[:, ::2], mask[:, ::2]
    else:
        mask = mask.t().contiguous().t()
    assert kernels(torch.float32).outside([tensor], [mask]) is None


def attached(recipe: spfde.Recipe) -> tuple[Parts, spfde.Session]:
    parts = make_parts()
    session = spfde.attach(
        parts.model, parts.optimizer, parts.loader, recipe, epochs=EPOCHS, seed=3, engine="native"
    )  # fmt: skip
    return parts, session


def test_a_step_neither_multiplies_gradients_nor_weights_with_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    parts, session = attached(spfde.Recipe(sparsity=spfde.SET(sparsity=0.8)))
    products: list[int] = []
    monkeypatch.setattr(together, "multiply_each_", lambda numbers, factors: products.append(len(numbers)))
    x, y = next(iter(parts.loader))
    for _ in range(2):
        step(parts, session, x, y)
    assert not products
    for name, mask in session.masks.items():
        parameter = parts.model.get_parameter(name)
        assert not bool((parameter * ~mask).any()), name
        assert not bool((parts.optimizer.state[parameter]["momentum_buffer"] * ~mask).any()), name


def test_weights_and_state_that_somebody_wrote_outside_of_the_masks_are_zero_after_a_step() -> None:
    parts, session = attached(spfde.Recipe(sparsity=spfde.SET(sparsity=0.8)))
    x, y = next(iter(parts.loader))
    step(parts, session, x, y)
    name, mask = next(iter(session.masks.items()))
    parameter = parts.model.get_parameter(name)
    state = parts.optimizer.state[parameter]
    state["momentum_buffer"].data.fill_(1.0)
    step(parts, session, x, y)
    assert not bool((parameter * ~mask).any())
    assert not bool((state["momentum_buffer"] * ~mask).any())
    assert bool((state["momentum_buffer"] * mask).any())
    parameter.data.fill_(1.0)
    step(parts, session, x, y)
    assert not bool((parameter * ~mask).any())


def told_of(model: nn.Module, masks: dict[str, Tensor], dense: frozenset[str] = frozenset()) -> list[set[str]]:
    """By backward pass the names of the gradients that the engine says come masked."""
    told: list[set[str]] = []
    NativeModel(
        model,
        kernels(torch.float32),
        masks=lambda: dict(masks),
        dense_gradients=lambda: dense,
        masked_already=lambda gradients: told.append(set(gradients)),
    )
    return told


def test_gradients_of_active_weights_alone_are_announced_and_others_not() -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1))
    masks = random_masks(model, 0.5)
    del masks["2.weight"]
    told = told_of(model, masks, frozenset({"1.weight"}))
    model(torch.randn(4, 2, 6, 6)).sum().backward()
    assert told == [{"0.weight"}]
    assert not bool((model[0].weight.grad * ~masks["0.weight"]).any())


def test_a_mask_that_changes_between_the_passes_is_not_that_of_the_gradient() -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1))
    masks = random_masks(model, 0.5)
    told = told_of(model, masks)
    out = model(torch.randn(4, 2, 6, 6))
    masks["0.weight"] = ~masks["0.weight"]
    out.sum().backward()
    assert told == [{"1.weight"}]


def test_a_weight_of_two_convolutions_is_announced_only_where_both_are_masked() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
            self.two.weight = self.one.weight

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.two(F.relu(self.one(x))))

    model = Twice()
    told = told_of(model, random_masks(model, 0.5))
    model(torch.randn(4, 4, 6, 6)).sum().backward()
    assert all(not names for names in told)


def test_running_statistics_tell_that_they_were_written_to() -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4))
    told_of(model, random_masks(model, 0.5))
    norm = model[1]
    before = norm.running_mean._version, norm.running_var._version
    model(torch.randn(4, 2, 6, 6))
    assert (norm.running_mean._version, norm.running_var._version) > before
    assert int(norm.num_batches_tracked) == 1


@pytest.mark.parametrize("momentum", [0.0, 0.1, 0.5, 1.0, None])
def test_running_statistics_move_as_pytorch_moves_them(momentum: float | None) -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4, momentum=momentum))
    masks = random_masks(model, 0.5)
    with torch.no_grad():
        model[0].weight.mul_(masks["0.weight"])
        model[1].running_mean.fill_(10)
    plain = copy.deepcopy(model)
    NativeModel(model, masks=lambda: masks, dense_gradients=frozenset)
    for at in range(3):
        x = torch.randn(4, 2, 6, 6) + at
        model(x), plain(x)
    for name, expected in plain[1].named_buffers():
        assert torch.allclose(model[1].get_buffer(name), expected, rtol=1e-5, atol=1e-6), name


def test_running_statistics_follow_another_momentum_and_stay_where_they_are_not_kept() -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4))
    masks, norm = random_masks(model, 0.5), model[1]
    NativeModel(model, masks=lambda: masks, dense_gradients=frozenset)
    x = torch.randn(4, 2, 6, 6)
    model(x)
    norm.momentum = 1.0
    model(x)
    mean = model[0](x).mean((0, 2, 3)).detach()
    assert torch.allclose(norm.running_mean, mean, atol=1e-5)
    norm.track_running_stats = False
    model(2 * x)
    assert torch.allclose(norm.running_mean, mean, atol=1e-5)
    assert int(norm.num_batches_tracked) == 2


def test_batches_that_are_counted_in_another_type_are_left_to_pytorch() -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4))
    model[1].num_batches_tracked = torch.tensor(0.0)
    masks = random_masks(model, 0.5)
    NativeModel(model, masks=lambda: masks, dense_gradients=frozenset)
    with pytest.warns(UserWarning, match="does not count its batches in int64"):
        model(torch.randn(4, 2, 6, 6))
    assert float(model[1].num_batches_tracked) == 1.0


def test_a_count_that_becomes_another_type_in_place_is_left_to_pytorch_from_then_on() -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4))
    masks, x = random_masks(model, 0.5), torch.randn(4, 2, 6, 6)
    NativeModel(model, masks=lambda: masks, dense_gradients=frozenset)
    model(x)
    model[1].num_batches_tracked.data = model[1].num_batches_tracked.data.float()
    with pytest.warns(UserWarning, match="does not count its batches in int64"):
        model(x)
    assert float(model[1].num_batches_tracked) == 2.0
    model.eval()
    model(x)


def test_a_mask_of_any_bytes_holds() -> None:
    tensor, mask = torch.tensor([1.5, 2.5, 3.5]), torch.tensor([255, 0, 2], dtype=torch.uint8).view(torch.bool)
    outside = kernels(torch.float32).outside([tensor], [mask])
    assert outside is not None
    outside.clear()
    assert tensor.tolist() == [1.5, 0.0, 3.5]


@settings(deadline=None, max_examples=by_form(20, 40))
@given(data=st.data())
def test_statistics_are_those_of_what_is_stored_however_far_from_zero(data: st.DataObject) -> None:
    width = data.draw(st.sampled_from([5, 8, 16]))
    batch, seed = data.draw(st.sampled_from([3, 16, 20])), data.draw(st.integers(0, 100))
    generator = torch.Generator().manual_seed(seed)
    conv, norm = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4, momentum=1.0)
    conv.weight.data = torch.randn(4, 4, 3, 3, generator=generator) / 6
    conv.bias.data = torch.tensor([0.0, -2.0, 30.0, 1000.0])[torch.randperm(4, generator=generator)]
    model = nn.Sequential(conv, norm)
    told_of(model, random_masks(model, 0.5, seed))
    x = torch.randn(batch, 4, width, width, generator=generator)
    with torch.autocast("cpu", torch.bfloat16):
        stored = nn.Sequential(conv)
        told_of(stored, {"0.weight": conv.weight != 0})
        y = stored(x).detach().double()
        model(x)
    mean, variance = y.mean(dim=(0, 2, 3)), y.var(dim=(0, 2, 3))
    assert torch.allclose(norm.running_mean.double(), mean, rtol=1e-6, atol=1e-6)
    assert torch.allclose(norm.running_var.double(), variance, rtol=1e-3, atol=1e-9)
