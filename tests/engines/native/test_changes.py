"""A model that changes after the engine was attached, calls of other kinds, and what is left when all is over."""

from __future__ import annotations

import copy
import gc
import types
import warnings
import weakref
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import spfde
from helpers.native import kernels, needs_kernels, random_masks, relative_error, twin
from spfde.app.train.models import build_model
from spfde.engines.native.model import NativeModel
from spfde.engines.native.program import Program

pytestmark = needs_kernels

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    scale = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.b, self.fc = nn.Conv2d(8, 8, 3, padding=1, stride=2), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.a(x)))
        return self.fc(self.b(x).mean((2, 3))) * self.scale


def attached(density: float = 0.3) -> tuple[Net, dict[str, Tensor], NativeModel]:
    model = Net().eval()
    masks = {name: mask for name, mask in random_masks(model, density).items() if name in ("a.weight", "b.weight")}
    _, engine = twin(model, masks, torch.float32)
    model(X)
    return model, masks, engine


def assert_follows(model: nn.Module) -> None:
    """The model computes what a copy of it computes in PyTorch."""
    assert relative_error(model(X), copy.deepcopy(model)(X)) < 1e-5


# --- changes ---------------------------------------------------------------------------------------------------------


def test_weights_may_change_their_layout_in_memory() -> None:
    model, _, _ = attached()
    assert_follows(model.to(memory_format=torch.channels_last))
    state = {name: value.clone(memory_format=torch.contiguous_format) for name, value in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    assert_follows(model)


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward"])
def test_a_hook_that_comes_later_is_called_and_one_that_went_is_not(kind: str) -> None:
    model, _, _ = attached()
    calls: list[int] = []
    handle = getattr(model.norm, f"register_{kind}_hook")(lambda *_: calls.append(1))
    model(X).sum().backward()
    assert calls == [1]
    handle.remove()
    model(X).sum().backward()
    assert calls == [1]


def test_a_hook_on_every_module_is_called_for_each() -> None:
    model, _, _ = attached()
    seen: list[str] = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(type(module).__name__))
    try:
        model(X)
    finally:
        handle.remove()
    assert seen == ["Conv2d", "BatchNorm2d", "Conv2d", "Linear", "Net"]


def test_a_replaced_module_parameter_or_attribute_is_seen() -> None:
    model, _, engine = attached()
    model.fc = nn.Linear(8, 4)
    assert_follows(model)
    model.b.bias = nn.Parameter(torch.full((8,), 3.0))
    assert_follows(model)
    model.scale = 3.0
    assert_follows(model)
    n = engine._n_captures
    model.scale = float("3.0")
    model(X)
    assert engine._n_captures == n, "an equal number is no change"


def test_a_part_in_another_mode_than_the_model_computes_in_its_own() -> None:
    class Dropping(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.dropout(x, 0.5, training=self.training)

    model = nn.Sequential(nn.Conv2d(3, 4, 3), Dropping(), nn.Conv2d(4, 4, 3))
    _, engine = twin(model, {}, torch.float32)
    assert not torch.equal(model(X), model(X))
    model[1].eval()
    assert torch.equal(model(X), model(X))
    model[1].train()
    assert not torch.equal(model(X), model(X))
    assert engine._n_captures == 2, "the first capture was kept"


def test_a_mode_that_cannot_be_traced_is_computed_by_pytorch() -> None:
    class Undecided(Net):
        def forward(self, x: Tensor) -> Tensor:
            out = super().forward(x)
            if not self.training and float(out.sum()) > 1e9:
                return -out
            return out

    model = Undecided()
    engine = NativeModel(model, kernels(torch.float32), masks=dict, dense_gradients=frozenset, sample=X)
    assert len(engine.taken) == 1
    model.eval()
    with pytest.warns(UserWarning, match="leaves the model to PyTorch as it is now: its forward cannot be traced"):
        model(X)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(model(X), copy.deepcopy(model)(X)), "and it is told once"
    assert engine.taken == ()
    model.train()
    model(X)
    assert len(engine.taken) == 1


def test_a_model_that_never_stays_as_it_is_gets_a_warning() -> None:
    model, _, _ = attached()
    for step in range(62):
        model.scale = float(step)
        model(X)
    model.scale = -1.0
    with pytest.warns(UserWarning, match="traced the model 64 times"):
        model(X)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_parameters_in_another_precision_are_computed_by_pytorch(dtype: torch.dtype) -> None:
    model, _, engine = attached()
    model.to(dtype)
    with warnings.catch_warnings(record=True) as told:
        out = model(X.to(dtype))
    assert torch.equal(out, copy.deepcopy(model)(X.to(dtype)))
    assert str(dtype) in " ".join([*(str(warning.message) for warning in told), *engine.left])


# --- the forward pass ------------------------------------------------------------------------------------------------


def test_detach_leaves_a_wrapper_that_came_later() -> None:
    model, _, engine = attached()
    inside = model.forward
    model.forward = lambda x: inside(x) * 0 + 7  # type: ignore[method-assign]
    assert bool((model(X) == 7).all())
    model.train()
    assert bool((model(X) == 7).all()), "another mode is traced as before"
    model.eval()
    engine.detach()
    assert bool((model(X) == 7).all())
    del model.forward
    assert_follows(model)


def test_a_wrapper_on_a_part_is_called() -> None:
    model, _, _ = attached()
    model.b.forward = types.MethodType(lambda self, x: nn.Conv2d.forward(self, x) * 2, model.b)  # type: ignore[method-assign]
    assert_follows(model)


# --- other calls -----------------------------------------------------------------------------------------------------


def test_an_image_without_a_batch_and_a_batch_without_images() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3))
    reference, _ = twin(model, {}, torch.float32)
    model(X)
    for x in (X[0], X[:0]):
        with pytest.warns(UserWarning, match="leaves a part of the model to PyTorch"):
            out = model(x)
        assert torch.allclose(out, reference(x), atol=1e-6)


def test_a_batch_without_images_trains_as_in_pytorch() -> None:
    model, _, _ = attached()
    model.train()
    with pytest.warns(UserWarning, match="got batches of 0"):
        model(X[:0]).sum().backward()
    assert model.b.weight.grad is not None


def test_plain_tensors_in_place_of_the_parameters_get_their_gradients() -> None:
    model, _, _ = attached()
    tensors = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    out = torch.func.functional_call(model, tensors, (X,))
    gradients = torch.autograd.grad(out.square().sum(), list(tensors.values()))
    model(X).square().sum().backward()
    assert model.fc.weight.grad is not None
    assert relative_error(gradients[list(tensors).index("fc.weight")], model.fc.weight.grad) < 1e-4
    assert relative_error(gradients[list(tensors).index("norm.weight")], model.norm.weight.grad) < 1e-4


def test_a_second_derivative_is_an_error_with_the_remedy() -> None:
    model, _, _ = attached()
    x = X.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    with pytest.raises(spfde.UsageError, match=r"no second derivatives.*masked"):
        gradient.square().sum().backward()


class Mixed(nn.Module):
    """Something in PyTorch between two regions, which autocast gives another precision."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.odd = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, stride=(2, 1))
        self.b, self.fc = nn.Conv2d(8, 8, 3), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.b(F.relu(self.odd(self.a(x)))).mean((2, 3)))


def test_under_autocast_to_fp16_the_kernels_compute_in_single_precision() -> None:
    model = Mixed()
    reference, engine = twin(model, {}, torch.float32)
    with pytest.warns(UserWarning, match="float32 under autocast to float16"), torch.autocast("cpu", torch.float16):
        out = model(X)
    assert len(engine.taken) == 2
    assert relative_error(out, reference(X)) < 2e-2
    out.float().sum().backward()
    assert model.a.weight.grad is not None
    assert model.a.weight.grad.dtype == torch.float32


# --- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["masked", "native"])
def test_a_session_that_was_never_detached_goes_with_its_model(engine: str) -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loader = DataLoader(TensorDataset(torch.randn(8, 3, 8, 8), torch.randint(4, (8,))), batch_size=4)
    recipe = spfde.Recipe(sparsity=spfde.MEST(sparsity=0.8), update_interval_epochs=1)
    session = spfde.attach(model, optimizer, loader, recipe, epochs=3, engine=engine)
    for _ in range(2):
        F.cross_entropy(model(X), torch.zeros(4, dtype=torch.long)).backward()
        optimizer.step()
    left = [weakref.ref(thing) for thing in (model, session, optimizer, session._computing.engine)]
    del model, session, optimizer
    gc.collect()
    assert [ref() for ref in left] == [None] * 4


def test_the_model_alone_keeps_the_engine_alive() -> None:
    model, _, engine = attached()
    kept = weakref.ref(engine)
    del engine
    gc.collect()
    assert kept() is not None
    clone = copy.deepcopy(model)
    del model
    gc.collect()
    assert kept() is None
    clone(X)


def resnet() -> tuple[nn.Module, NativeModel]:
    model = build_model("resnet8", num_classes=4, in_channels=3, image_size=(16, 16))
    return model, NativeModel(model, kernels(torch.float32), masks=dict, dense_gradients=frozenset)


def train(model: nn.Module, *shape: int, times: int = 6) -> None:
    for _ in range(times):
        model(torch.randn(*shape)).sum().backward()


def test_buffers_of_other_shapes_are_given_back() -> None:
    model, engine = resnet()
    train(model, 16, 3, 16, 16)
    usual = engine._pool.bytes
    for batch, side in ((3, 16), (5, 16), (16, 12), (16, 20)):
        train(model, batch, 3, side, side)
    model.eval()
    with torch.no_grad():
        for _ in range(6):
            model(torch.randn(64, 3, 16, 16))
        evaluating = engine._pool.bytes
        assert evaluating < 4 * usual
    model.train()
    train(model, 16, 3, 16, 16)
    assert engine._pool.bytes == usual


def test_an_evaluation_does_not_add_to_the_memory_of_training() -> None:
    model, engine = resnet()
    train(model, 16, 3, 16, 16)
    usual = engine._pool.bytes
    model.eval()
    with torch.no_grad():
        model(torch.randn(16, 3, 16, 16))
    assert engine._pool.bytes < 0.7 * usual


def test_frozen_blocks_give_their_buffers_back() -> None:
    model, engine = resnet()
    train(model, 16, 3, 32, 32)
    usual = engine._pool.bytes
    layers = [name for name, _ in model.named_parameters()]
    for name in layers[: len(layers) // 2]:
        model.get_parameter(name).requires_grad_(False)
    for module in list(model.modules())[: len(list(model.modules())) // 2]:
        if isinstance(module, nn.BatchNorm2d):
            module.train(False)
    train(model, 16, 3, 32, 32)
    assert engine._pool.bytes < 0.8 * usual


def test_switching_at_every_step_keeps_the_buffers() -> None:
    model, engine = resnet()
    found = set()
    for n in range(12):
        model.train(n % 2 == 0)
        train(model, 16, 3, 16, 16, times=1)
        if n >= 4:
            found.add(engine._pool.bytes)
    assert len(found) == 1


# --- weights that others bring ---------------------------------------------------------------------------------------


def _swap(model: nn.Module, other: nn.Module) -> None:
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        mine.data, theirs.data = theirs.data, mine.data


def _average(model: nn.Module, other: nn.Module) -> None:
    with torch.no_grad():
        for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
            mine.lerp_(theirs, 0.5)


def _copy(model: nn.Module, other: nn.Module) -> None:
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        mine.data.copy_(theirs)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    "bring",
    [
        lambda model, other: model.load_state_dict(other.state_dict()),
        lambda model, other: model.load_state_dict(other.state_dict(), assign=True),
        _swap,
        _copy,
        _average,
    ],
    ids=["load", "assign", "swap", "copy", "average"],
)
def test_weights_outside_the_masks_are_computed_with_and_the_kernels_come_back_without_them(
    bring: Callable[[nn.Module, nn.Module], object], training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    played: list[int] = []
    play = Program.forward
    monkeypatch.setattr(Program, "forward", lambda *args: (played.append(1), play(*args))[1])
    model, masks, _ = attached()
    model.train(training)
    before = copy.deepcopy(model.state_dict())
    model(X)
    bring(model, Net())
    assert not all(bool((model.state_dict()[name][~mask] == 0).all()) for name, mask in masks.items())
    played.clear()
    assert_follows(model)
    assert not played
    model.load_state_dict(before)
    assert_follows(model)
    assert played


def test_weights_outside_the_masks_learn_as_in_pytorch() -> None:
    model, _, _ = attached()
    model.load_state_dict(Net().state_dict())
    reference = copy.deepcopy(model)
    for each in (model, reference):
        each(X).square().sum().backward()
    for (name, ours), expected in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert ours.grad is not None, name
        assert relative_error(ours.grad, expected.grad) < 1e-5, name
