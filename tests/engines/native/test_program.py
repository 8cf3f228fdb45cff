from __future__ import annotations

import copy
import gc

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from helpers.native import assert_same_step, kernels, needs_kernels, random_masks, step, twin
from helpers.short import by_form, short
from spfde.app.train.models import build_model
from spfde.engines.native.model import NativeModel
from spfde.model.blocks import find_blocks
from spfde.model.trace import trace

pytestmark = needs_kernels


def shaken(model: nn.Module) -> nn.Module:
    """The model in double precision, its norms with scales and shifts of their own."""
    generator = torch.Generator().manual_seed(3)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and module.affine:
            module.weight.data.uniform_(0.5, 1.5, generator=generator)
            module.bias.data.normal_(0, 0.3, generator=generator)
    return model.double()


def check(model: nn.Module, x: Tensor, *, density: float = 0.3, n_steps: int = 2) -> None:
    model = shaken(model)
    masks = random_masks(model, density)
    reference, engine = twin(model, masks)
    for _ in range(n_steps):
        assert_same_step(model, reference, masks, x.double())
    engine.detach()


class Residuals(nn.Module):
    """Values that are read by several others, added twice, and added to themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1, bias=False)
        self.norm, self.c = nn.BatchNorm2d(6), nn.Conv2d(6, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        u = F.relu(self.norm(h))
        v = self.b(u) + h
        w = F.relu6(self.b(v) + v + u)
        z = (self.c(w) + w) + w
        z = z + z
        return z.sum((2, 3)) + torch.tanh(w).mean((2, 3))


class PreActivation(nn.Module):
    """Norms that follow an addition, not a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.n1, self.c1 = nn.Conv2d(3, 5, 3, padding=1), nn.BatchNorm2d(5), nn.Conv2d(5, 5, 3, padding=1)
        self.n2, self.c2 = nn.BatchNorm2d(5, momentum=None), nn.Conv2d(5, 5, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.c1(F.silu(self.n1(x)))
        return x + self.c2(F.gelu(self.n2(x)))


def test_a_hand_worked_convolution_comes_out() -> None:
    conv = nn.Conv2d(1, 1, 3, padding=1, bias=False).double()
    conv.weight.data.zero_()
    conv.weight.data[0, 0, 0, 1] = 2.0  # the pixel above
    conv.weight.data[0, 0, 1, 1] = 1.0
    masks = {"weight": conv.weight != 0}
    model = nn.Sequential(conv)
    masks = {"0.weight": masks["weight"]}
    twin(model, masks)
    x = torch.arange(4.0, dtype=torch.float64).view(1, 1, 2, 2).requires_grad_()
    out = model(x)
    assert out.flatten().tolist() == [0.0, 1.0, 2.0, 3.0 + 2.0]
    out.sum().backward()
    assert x.grad is not None
    assert x.grad.flatten().tolist() == [3.0, 3.0, 1.0, 1.0]
    assert conv.weight.grad is not None
    assert conv.weight.grad[0, 0].tolist() == [[0, 1.0, 0], [0, 6.0, 0], [0, 0, 0]]


@pytest.mark.parametrize("name", short(["resnet8", "resnet20", "vgg19"], ["resnet8", "resnet20"]))
def test_a_built_in_model_computes_as_in_pytorch(name: str) -> None:
    model = build_model(name, num_classes=10, in_channels=3, image_size=(16, 16))
    check(model, torch.randn(5, 3, 16, 16), n_steps=1 if name == "vgg19" else 2)


def test_values_that_are_read_many_times_get_the_sum_of_their_gradients() -> None:
    check(Residuals(), torch.randn(8, 3, 9, 9))


def test_norms_that_follow_no_convolution_measure_the_batch_themselves() -> None:
    check(PreActivation(), torch.randn(5, 3, 6, 7))


def test_every_operator_in_odd_shapes() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 5, 5, 2, 2),
        nn.GELU(),
        nn.MaxPool2d(3, 2, 1),
        nn.Conv2d(5, 10, 3, 1, 2, dilation=2, groups=5),
        nn.BatchNorm2d(10),
        nn.SiLU(),
        nn.AvgPool2d(2, 2, 1, count_include_pad=False),
        nn.Conv2d(10, 4, (1, 3), 3),
        nn.ReLU6(),
        nn.BatchNorm2d(4, affine=False),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
    check(model, torch.randn(9, 3, 21, 19))


@pytest.mark.parametrize("training", [True, False])
def test_a_norm_without_running_statistics_always_uses_the_batch(training: bool) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False), nn.ReLU()).train(training)
    check(model, torch.randn(3, 3, 6, 6))


def test_in_evaluation_mode_norms_are_constants_and_gradients_still_flow() -> None:
    check(build_model("resnet8", num_classes=10, in_channels=3, image_size=(16, 16)).eval(), torch.randn(3, 3, 16, 16))


def test_without_gradients_the_result_is_the_same_and_nothing_is_kept() -> None:
    model = shaken(build_model("resnet8", num_classes=10, in_channels=3, image_size=(16, 16)).eval())
    masks = random_masks(model, 0.2)
    reference, engine = twin(model, masks)
    x = torch.randn(5, 3, 16, 16).double()
    with torch.no_grad():
        assert torch.allclose(model(x), reference(x), rtol=1e-10, atol=1e-12)
    without = engine._pool.bytes
    model(x).sum().backward()
    assert engine._pool.bytes > 2 * without


def test_a_frozen_front_gets_no_gradients_and_its_output_is_the_same() -> None:
    model = shaken(build_model("resnet8", num_classes=10, in_channels=3, image_size=(16, 16)))
    masks = random_masks(model, 0.3)
    for module in (model.conv1, model.bn1, model.layer1):
        module.eval().requires_grad_(False)
    reference, _ = twin(model, masks)
    x = torch.randn(6, 3, 16, 16).double()
    for net in (model, reference):
        net(x).square().sum().backward()
    for (name, ours), (_, theirs) in zip(model.named_parameters(), reference.named_parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None) == name.startswith(("conv1", "bn1", "layer1"))
        if theirs.grad is not None:
            expected = theirs.grad * masks.get(name, 1)
            assert torch.allclose(ours.grad, expected, rtol=1e-9, atol=1e-9 * float(expected.abs().max()))


@pytest.mark.parametrize("at_once", [pytest.param(0, marks=pytest.mark.long), None], ids=["by-groups", "together"])
def test_a_front_that_ends_within_a_residual_block_computes_the_same_and_gets_no_gradients(
    monkeypatch: pytest.MonkeyPatch, at_once: int | None
) -> None:
    if at_once is not None:
        monkeypatch.setattr("spfde.engines.native.region_plan.AT_ONCE_BYTES", at_once)
    model = shaken(build_model("resnet8", num_classes=10, in_channels=3, image_size=(8, 8)))
    masks = random_masks(model, 0.3)
    x = torch.randn(2 * kernels().lanes + 3, 3, 8, 8).double()
    layers = find_blocks(model, trace(model, x[:1]), by_layer=True).blocks
    assert len(layers) == 9
    reference, _ = twin(model, masks)
    for layer in layers:
        for net in (model, reference):
            parameters, modules = dict(net.named_parameters()), dict(net.named_modules())
            for name in layer.parameters:
                parameters[name].requires_grad_(False)
            for name in layer.modules:
                if isinstance(modules[name], nn.BatchNorm2d):
                    modules[name].eval()
        model.zero_grad()
        reference.zero_grad()
        out = [net(x) for net in (model, reference)]
        for found in out:
            found.square().sum().backward()
        assert torch.allclose(*out, rtol=1e-9)
        ours, theirs = ({n: p.grad for n, p in net.named_parameters()} for net in (model, reference))
        for name, expected in theirs.items():
            assert (ours[name] is None) == (expected is None), name
            if expected is not None:
                expected = expected * masks.get(name, 1)
                assert torch.allclose(ours[name], expected, rtol=1e-8, atol=1e-9 * float(expected.abs().max())), name


class FrozenFront(nn.Module):
    """A frozen front whose values are read behind it, leave the model, and go through every kind of step."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Conv2d(6, 6, 3, padding=1, bias=False)
        self.late, self.c = nn.BatchNorm2d(6), nn.Conv2d(6, 6, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        u = F.relu(self.norm(self.a(x)))
        v = F.max_pool2d(F.relu(self.b(u) + u), 3, 1, 1)
        z = F.relu(self.c(F.relu(self.late(v))) + v)
        return z.mean((2, 3)) + torch.tanh(u).mean((2, 3)) + v.mean((2, 3))


@pytest.mark.parametrize("training", [True, False])
def test_a_frozen_front_run_group_by_group_computes_the_same(monkeypatch: pytest.MonkeyPatch, training: bool) -> None:
    monkeypatch.setattr("spfde.engines.native.region_plan.AT_ONCE_BYTES", 0)
    model = shaken(FrozenFront())
    masks = random_masks(model, 0.3)
    for module in (model.a, model.norm, model.b):
        module.requires_grad_(False)
    model.norm.eval()
    model.late.train(training)
    reference, _ = twin(model, masks)
    x = torch.randn(2 * kernels().lanes + 3, 3, 9, 9).double()  # two groups, and one that is not full
    for net in (model, reference):
        net(x).square().sum().backward()
    for (name, ours), (_, theirs) in zip(model.named_parameters(), reference.named_parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None) == name.startswith(("a.", "norm.", "b."))
        if theirs.grad is not None:
            expected = theirs.grad * masks.get(name, 1)
            assert torch.allclose(ours.grad, expected, rtol=1e-9, atol=1e-9 * float(expected.abs().max()))
    with torch.no_grad():
        assert torch.allclose(model.eval()(x), reference.eval()(x), rtol=1e-9)


def test_a_frozen_front_run_group_by_group_takes_less_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    for at_once in (0, 1 << 30):
        monkeypatch.setattr("spfde.engines.native.region_plan.AT_ONCE_BYTES", at_once)
        model = shaken(build_model("resnet8", num_classes=10, in_channels=3, image_size=(16, 16))).eval()
        _, engine = twin(model, random_masks(model, 0.3))
        with torch.no_grad():
            model(torch.randn(4 * kernels().lanes, 3, 16, 16).double())
        taken.append(engine._pool.bytes)
    assert taken[0] < 0.5 * taken[1]


class UnusedPool(nn.Module):
    """Computes something that nobody reads."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.pool = nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv(x))
        self.pool(x)
        return x


def test_what_nobody_reads_is_not_missed() -> None:
    check(UnusedPool(), torch.randn(4, 3, 7, 7))


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[nn.Conv2d, Tensor, float]:
    groups = draw(st.sampled_from([1, 1, 1, 2, 3]))
    channels, out = groups * draw(st.integers(1, 5)), groups * draw(st.integers(1, 5))
    kernel = (draw(st.integers(1, 5)), draw(st.integers(1, 4)))
    dilation = (draw(st.integers(1, 2)), draw(st.integers(1, 3)))
    padding = (draw(st.integers(0, 3)), draw(st.integers(0, 3)))
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilation, strict=True)]
    size = [draw(st.integers(max(1, r - 2 * p), r + 12)) for r, p in zip(reach, padding, strict=True)]
    torch.manual_seed(draw(st.integers(0, 99)))
    conv = nn.Conv2d(
        channels, out, kernel, draw(st.integers(1, 4)), padding, dilation, groups, bias=draw(st.booleans())
    )
    batch = draw(st.sampled_from([1, 2, 7, 8, 9, 17]))
    return conv.double(), torch.randn(batch, channels, *size).double(), draw(st.sampled_from([0, 0.1, 0.5, 1]))


@given(convolutions(), st.booleans())
@settings(max_examples=by_form(30, 150), deadline=None)
def test_any_convolution_equals_pytorchs(case: tuple[nn.Conv2d, Tensor, float], channels_last: bool) -> None:
    conv, x, density = case
    model = nn.Sequential(conv)
    masks = random_masks(model, density)
    if channels_last:
        model, x = model.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)
    if masks["0.weight"].shape[0] > 1:
        masks["0.weight"][0] = False  # a row without a weight
        conv.weight.data[0] = 0
    reference, engine = twin(model, masks)
    assert_same_step(model, reference, masks, x)
    engine.detach()


@given(st.sampled_from([0.01, 0.1, 0.5, 1.0]), st.integers(1, 20), st.integers(1, 40), st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_in_single_precision_the_error_is_that_of_rounding(density: float, batch: int, width: int, seed: int) -> None:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1), nn.SiLU(), nn.Conv2d(6, 3, 3, stride=2))
    masks = random_masks(model, density)
    reference, engine = twin(model, masks, torch.float32)
    x = torch.randn(batch, 4, 5, width + 2)
    ours, theirs, expected = step(model, x), step(reference, x), step(reference.double(), x.double())
    for name, value in expected.items():
        mask = masks.get(name.removesuffix(".grad"))
        value = value if mask is None else value * mask
        # Sums that cancel out keep few digits, in PyTorch too.
        rounding = float((theirs[name].double() - expected[name]).norm())
        allowed = max(1e-5 * float(value.norm()), 1e-8, 3 * rounding)
        assert float((ours[name].double() - value).norm()) < allowed, name
    engine.detach()


def test_the_variance_of_a_channel_far_from_zero_keeps_its_digits() -> None:
    model = nn.Sequential(nn.Conv2d(1, 1, 1, bias=False), nn.BatchNorm2d(1, momentum=1.0))
    model[0].weight.data.fill_(1.0)
    NativeModel(model, kernels(torch.float32), masks=dict, dense_gradients=frozenset)
    x = 10_000 + torch.randn(16, 1, 12, 12)
    model(x)
    assert float(model[1].running_var) == pytest.approx(float(x.double().var()), rel=1e-3)


@pytest.mark.parametrize("act", [nn.GELU(), nn.SiLU()], ids=["gelu", "silu"])
def test_activations_in_single_precision_are_right_everywhere(act: nn.Module) -> None:
    conv = nn.Conv2d(1, 1, 1, bias=False)
    conv.weight.data.fill_(1.0)
    special = torch.tensor([0.0, -0.0, 1e-30, -1e-30, 87.5, -87.5, 200.0, -200.0, 1e30, -1e30])
    x = torch.cat([torch.linspace(-12, 12, 8 * 3000), special, torch.zeros(6)]).view(8, 1, 1, -1).requires_grad_()
    exact = x.detach().double().requires_grad_()
    model = nn.Sequential(conv, copy.deepcopy(act))
    twin(model, {}, dtype=torch.float32)
    out, expected = model(x), act(exact)
    out.sum().backward()
    expected.sum().backward()
    assert x.grad is not None
    assert exact.grad is not None
    size = exact.detach().abs().clamp_min(1.0)
    assert float(((out.detach().double() - expected.detach()) / size).abs().max()) < 3e-7
    assert float((x.grad.double() - exact.grad).abs().max()) < 2e-6
    assert not bool(out.isnan().any())


def test_gradcheck_of_a_block_with_everything_fused() -> None:
    model = shaken(
        nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3), nn.GELU(), nn.Conv2d(3, 2, 3), nn.SiLU())
    )
    random_masks(model, 0.6)
    NativeModel(model, kernels(), masks=dict, dense_gradients=frozenset)
    x = torch.randn(3, 2, 5, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(model, (x,), atol=1e-6)


def test_two_forward_passes_before_their_backward_passes_do_not_disturb_each_other() -> None:
    model = shaken(build_model("resnet8", num_classes=4, in_channels=3, image_size=(12, 12)))
    masks = random_masks(model, 0.3)
    reference, _ = twin(model, masks)
    x1, x2 = torch.randn(2, 5, 3, 12, 12).double()
    for net in (model, reference):
        first, second = net(x1), net(x2)
        first.sum().backward()
        second.square().sum().backward()
    for (name, ours), theirs in zip(model.named_parameters(), reference.parameters(), strict=True):
        expected = theirs.grad * masks.get(name, 1)
        assert torch.allclose(ours.grad, expected, rtol=1e-8, atol=1e-9 * float(expected.abs().max()) + 1e-12), name


def test_a_second_backward_pass_through_a_kept_graph_gives_the_same() -> None:
    model = shaken(nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 1, 3)))
    twin(model, {})
    out = model(torch.randn(4, 2, 8, 8).double()).sum()
    out.backward(retain_graph=True)
    once = [p.grad.clone() for p in model.parameters()]
    out.backward()
    assert all(torch.equal(p.grad, 2 * g) for p, g in zip(model.parameters(), once, strict=True))


def test_a_weight_that_is_changed_before_the_backward_pass_is_an_error() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 3)).double()
    twin(model, {})
    out = model(torch.randn(4, 2, 8, 8).double()).sum()
    with torch.no_grad():
        model[0].weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


def test_buffers_are_used_again_and_freed_when_the_engine_goes() -> None:
    model = shaken(build_model("resnet8", num_classes=4, in_channels=3, image_size=(12, 12)))
    _, engine = twin(model, {})
    x = torch.randn(8, 3, 12, 12).double()
    model(x).sum().backward()
    after_one = engine._pool.bytes
    for _ in range(3):
        model(x).sum().backward()
    assert engine._pool.bytes == after_one
    engine.detach()
    gc.collect()
    assert engine._pool.bytes == 0


def test_a_batch_of_one_number_a_channel_is_refused_in_training_as_pytorch_does() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3)).double()
    reference, _ = twin(model, {})
    for net in (reference, model):
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            net(torch.randn(1, 2, 3, 3).double())


def test_a_nan_in_the_input_comes_out() -> None:
    model = nn.Sequential(nn.Conv2d(1, 1, 1), nn.ReLU(), nn.MaxPool2d(2)).double()
    twin(model, {})
    x = torch.zeros(1, 1, 2, 2).double()
    x[0, 0, 1, 1] = float("nan")
    assert model(x).isnan().all()


def test_a_copy_of_the_model_computes_in_pytorch() -> None:
    model = shaken(nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)))
    twin(model, {})
    clone = copy.deepcopy(model)
    x = torch.randn(2, 1, 5, 5).double()
    assert torch.allclose(clone(x), model(x))
    clone[0].weight.data.zero_()
    clone[0].bias.data.zero_()
    assert not torch.allclose(clone(x), model(x)), "the copy has weights of its own"
