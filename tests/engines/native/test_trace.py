"""What a trace must not lose: writes in place, randomness, state that a forward pass changes."""

from __future__ import annotations

import copy
import operator
import random
import types
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import spfde
from helpers.native import kernels, needs_kernels, relative_error, twin
from spfde.engines.native.graph import capture
from spfde.engines.native.model import NativeModel

pytestmark = needs_kernels

SAMPLE = torch.zeros(2, 3, 9, 9)


class Net(nn.Module):
    """Two convolutions and whatever ``way`` does with them."""

    def __init__(self, way: Callable[[Net, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.odd = nn.Conv2d(3, 6, 3, stride=(2, 1), padding=1)  # one that stays in PyTorch
        self.relu, self.leaky = nn.ReLU(inplace=True), nn.LeakyReLU(0.01, inplace=True)
        self.hardtanh, self.drop = nn.Hardtanh(inplace=True), nn.Dropout(0.5, inplace=True)
        self.way = way

    def forward(self, x: Tensor) -> Tensor:
        return self.way(self, x)


def check(model: nn.Module, *, n_regions: int | None = None, backward: bool = True) -> None:
    """Output and gradients are PyTorch's; ``backward=False`` where PyTorch has none, as a value it needs is gone."""
    model.double()
    reference, engine = twin(model, {})
    x = torch.randn(2, 3, 9, 9, dtype=torch.float64)
    for net in (model, reference):
        net.zero_grad()
    out, expected = model(x.clone()), reference(x.clone())
    assert relative_error(out, expected) < 1e-12
    if n_regions is not None:
        assert len(engine.taken) == n_regions
    if not backward:
        return
    out.square().sum().backward()
    expected.square().sum().backward()
    for (name, ours), theirs in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None), name
        if ours.grad is not None:
            assert relative_error(ours.grad, theirs.grad) < 1e-10, name


# --- writes in place -------------------------------------------------------------------------------------------------


def discarded(what: Callable[[Net, Tensor], object]) -> Callable[[Net, Tensor], Tensor]:
    def way(net: Net, x: Tensor) -> Tensor:
        y = net.a(x)
        what(net, y)
        return net.b(y)

    return way


@pytest.mark.parametrize(
    "what",
    [
        lambda net, y: net.relu(y),
        lambda net, y: y.relu_(),
        lambda net, y: F.relu(y, inplace=True),
        lambda net, y: net.leaky(y),
        lambda net, y: net.hardtanh(y),
        lambda net, y: y.mul_(0.5),
        lambda net, y: y.add_(y),
        lambda net, y: operator.iadd(y, 1.0),
        lambda net, y: torch.relu_(y),
    ],
    ids=["ReLU", "relu_", "F.relu", "LeakyReLU", "Hardtanh", "mul_", "add_", "iadd", "torch.relu_"],
)
def test_a_write_in_place_whose_result_is_thrown_away_is_not_lost(what: Callable[[Net, Tensor], object]) -> None:
    check(Net(discarded(what)))


def test_in_place_activations_in_a_chain_are_taken() -> None:
    def way(net: Net, x: Tensor) -> Tensor:
        return net.relu(net.b(net.relu(net.a(x))))

    check(Net(way), n_regions=1)


def test_who_read_before_a_write_keeps_the_value_of_then() -> None:
    def way(net: Net, x: Tensor) -> Tensor:
        y = net.odd(x)
        z = net.b(y)  # runs late, with the activation: y was written into by then
        y.mul_(0.0)
        return F.relu(z) + y

    check(Net(way), backward=False)


def test_an_addition_in_place_is_seen_through_another_name() -> None:
    def way(net: Net, x: Tensor) -> Tensor:
        y = net.a(x)
        shortcut = y
        y += net.b(y)
        return net.b(y) + shortcut

    check(Net(way), n_regions=1, backward=False)


def test_an_addition_in_place_after_a_residual_was_read() -> None:
    def way(net: Net, x: Tensor) -> Tensor:
        y = net.a(x)
        z = net.b(y)
        z += y
        z.add_(y)
        return z

    check(Net(way), n_regions=1)


def test_a_write_through_a_view_is_refused_where_the_base_is_read_later() -> None:
    def way(net: Net, x: Tensor) -> Tensor:
        y = net.a(x)
        y.flatten(1).mul_(0.5)
        return net.b(y)

    with pytest.raises(spfde.InvalidArgument, match="writes in place what is read otherwise later"):
        capture(Net(way), SAMPLE)


def test_a_write_into_a_view_that_alone_is_read_is_fine() -> None:
    def way(net: Net, x: Tensor) -> Tensor:
        return net.leaky(net.b(net.a(x)).flatten(1))

    check(Net(way))


def test_a_write_into_the_models_input_is_refused_or_left_to_pytorch_with_its_module() -> None:
    with pytest.raises(spfde.InvalidArgument, match="writes into its input"):
        capture(Net(lambda net, x: net.b(net.a(net.relu(x)))), SAMPLE)

    def inner(net: Net, x: Tensor) -> Tensor:
        x.mul_(0.5)
        return net.a(x)

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.inner = nn.Conv2d(3, 3, 1), Net(inner)

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x)
            return self.inner(y)

    # Inside the block its input is a value like others.
    check(Outer(), n_regions=2)


def test_a_module_that_cannot_be_entered_may_write_into_what_it_is_given() -> None:
    class Writes(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if x.shape[0] > 1000:
                return x
            x.mul_(0.5)
            return x + 1

    def way(net: Net, x: Tensor) -> Tensor:
        y = net.a(x)
        z = net.b(y)
        return net.opaque(y) + z  # type: ignore[operator]

    model = Net(way)
    model.opaque = Writes()
    check(model, backward=False)

    def late(net: Net, x: Tensor) -> Tensor:
        y = net.a(x)
        return net.opaque(y) + net.b(y)  # type: ignore[operator]

    model = Net(late)
    model.opaque = Writes()
    with pytest.raises(spfde.InvalidArgument, match="writes in place what is read otherwise later"):
        capture(model, SAMPLE)


# --- state and randomness --------------------------------------------------------------------------------------------


def impure(net: Net, x: Tensor, kind: str) -> Tensor:
    y = net.a(x)
    if kind == "random" and net.training and random.random() < 0.5:
        return net.b(y)
    if kind == "constant":
        y = y + torch.randn(6, 1, 1)
    if kind == "item":
        y = y * float(torch.rand(()))
    if kind == "attribute":
        net.n += 1
    if kind == "list":
        net.log.append(1)
    if kind == "buffer":
        net.count += 1
    if kind == "method":
        net.count.add_(1)
    return net.b(y + net.b(y))


def impure_net(kind: str) -> Net:
    model = Net(lambda net, x: impure(net, x, kind))
    model.n, model.log = 0, []
    model.register_buffer("count", torch.zeros(()))
    return model


KINDS = ["random", "constant", "item", "attribute", "list", "buffer", "method"]


@pytest.mark.parametrize("kind", KINDS)
def test_what_would_happen_at_the_trace_alone_is_refused_and_has_not_happened(kind: str) -> None:
    model = impure_net(kind)
    before = random.getstate(), torch.get_rng_state()
    with pytest.raises(spfde.InvalidArgument, match="cannot be traced"):
        capture(model, SAMPLE)
    assert (model.n, model.log, float(model.count)) == (0, [], 0.0)
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])
    assert not any(name.startswith("_tensor_constant") for name in vars(model))


@pytest.mark.parametrize("kind", ["attribute", "list", "buffer", "method"])
def test_a_block_that_counts_stays_in_pytorch_and_goes_on_counting(kind: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), impure_net(kind), nn.Conv2d(6, 3, 1), nn.ReLU())
    reference, engine = twin(model, {}, torch.float32)
    x = torch.randn(2, 3, 9, 9)
    for _ in range(3):
        assert relative_error(model(x), reference(x)) < 1e-5
    inner, theirs = model[1], reference[1]
    assert (inner.n, len(inner.log), float(inner.count)) == (theirs.n, len(theirs.log), float(theirs.count))
    assert engine._n_captures == 1, "its counters are its own affair"
    assert [node.kind for region in engine.taken for node in region.ops] == ["conv", "conv", "act"]
    assert any(text.startswith("1 (Net; ") for text in engine.left)


def test_a_block_that_draws_draws_each_time() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), impure_net("random"), nn.Conv2d(6, 3, 1))
    twin(model, {}, torch.float32)
    x = torch.randn(2, 3, 9, 9)
    assert len({float(model(x).sum().detach()) for _ in range(30)}) == 2


class BatchMoments(nn.Module):
    """Knows of no statistics but the batch's."""

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, None, None, training=True)


class OwnNorm(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training)


def test_norms_with_a_forward_of_their_own_stay_in_pytorch_and_take_one_trace_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    passes = []
    model = nn.Sequential(
        *[module for _ in range(3) for module in (nn.Conv2d(3, 3, 1, bias=False), OwnNorm(3), nn.ReLU())]
    )
    monkeypatch.setattr(
        fx.Tracer, "trace", lambda *args, _of=fx.Tracer.trace, **kw: passes.append(1) or _of(*args, **kw)
    )
    captured = capture(model, SAMPLE)
    assert len(passes) == 1
    assert captured.left[0] == "1 (OwnNorm; keeps statistics by a forward of its own)"
    monkeypatch.undo()
    check(model)


def test_statistics_of_a_single_value_stop_no_trace() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), BatchMoments(), nn.Conv2d(4, 2, 1))
    captured = capture(model, torch.zeros(1, 3, 3, 3))  # one value a channel: a batch has more
    assert [node.kind for region in captured.regions for node in region.ops] == ["conv", "conv"]
    assert captured.left == ("batch_norm",)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        model(torch.zeros(1, 3, 3, 3))


def test_a_buffer_is_read_anew_in_each_pass() -> None:
    def way(net: Net, x: Tensor) -> Tensor:
        return net.b(net.a(x) * net.scale)

    model = Net(way)
    model.register_buffer("scale", torch.ones(()))
    reference, _ = twin(model, {}, torch.float32)
    x = torch.randn(2, 3, 9, 9)
    model(x)
    for net in (model, reference):
        net.scale.fill_(3.0)
    assert relative_error(model(x), reference(x)) < 1e-5


def test_a_forward_that_was_put_on_the_instance_is_not_passed_over() -> None:
    model = Net(lambda net, x: net.b(net.a(x)))
    model.forward = types.MethodType(lambda self, x: type(self).forward(self, x) + 100.0, model)  # type: ignore[method-assign]
    with pytest.raises(spfde.InvalidArgument, match="the instance has a forward of its own"):
        NativeModel(model, kernels(), masks=dict, dense_gradients=frozenset)


def test_a_copy_of_an_attached_model_can_be_attached_itself() -> None:
    model = Net(lambda net, x: net.b(net.a(x)))
    twin(model, {}, torch.float32)
    model(SAMPLE)
    clone = copy.deepcopy(model)
    twin(clone, {}, torch.float32)
    assert torch.equal(clone(SAMPLE), model(SAMPLE))


# --- shapes ----------------------------------------------------------------------------------------------------------


def test_an_addition_that_broadcasts_stays_in_pytorch_with_the_reason() -> None:
    def way(net: Net, x: Tensor) -> Tensor:
        y = net.a(x)
        return net.b(y + net.one(y))  # type: ignore[operator]

    model = Net(way)
    model.one = nn.Conv2d(6, 1, 1)
    captured = capture(model, SAMPLE)
    assert "add (adds values of different shapes)" in captured.left
    check(model)


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (nn.Conv2d(3, 4, 3, stride=(2, 1)), r"stride=(2, 1) differs"),
        (nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), "padding_mode='reflect'"),
        (nn.MaxPool2d(2, ceil_mode=True), "ceil_mode"),
        (nn.MaxPool2d(2, dilation=2), "dilation"),
        (nn.AdaptiveAvgPool2d(4), r"its windows differ: (9, 9) to (4, 4)"),
        (nn.GELU("tanh"), "approximate"),
        (nn.Dropout(0.5), "drops at random"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_what_is_left_comes_with_the_reason(layer: nn.Module, reason: str) -> None:
    captured = capture(nn.Sequential(nn.Conv2d(3, 3, 1), layer), SAMPLE)
    assert len(captured.left) == 1
    assert reason in captured.left[0]


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize(
    "layer",
    [nn.AdaptiveAvgPool2d(3), nn.AdaptiveMaxPool2d((3, 1)), nn.AdaptiveMaxPool2d(1), nn.AdaptiveAvgPool2d((None, 1)),
     nn.Conv2d(6, 4, 4, padding="same"), nn.Conv2d(6, 4, (2, 3), padding="same", dilation=3)],
    ids=["avg", "max", "max1", "none", "same", "dilated"],
)  # fmt: skip
def test_adaptive_pooling_into_equal_windows_and_uneven_same_padding_are_taken(layer: nn.Module) -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 1), layer, nn.Conv2d(4 if isinstance(layer, nn.Conv2d) else 6, 2, 1))
    assert capture(model, SAMPLE).left == ()
    check(model, n_regions=1)


def test_an_adaptive_pool_follows_the_image_when_that_is_another() -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 1), nn.AdaptiveAvgPool2d(3), nn.ReLU(), nn.Conv2d(6, 2, 1))
    reference, _ = twin(model, {}, torch.float32)
    model(torch.randn(2, 3, 9, 9))
    for side in (6, 10, 12):
        x = torch.randn(2, 3, side, side)
        with pytest.warns(
            UserWarning, match=f"leaves a part of the model to PyTorch: it pools images of {side}x{side}"
        ):
            assert relative_error(model(x), reference(x)) < 1e-5


def test_dropout_that_does_not_drop_cuts_nothing() -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 1), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(6, 2, 1)).eval()
    check(model, n_regions=1)
    assert len(capture(model.train(), SAMPLE).regions) == 2
