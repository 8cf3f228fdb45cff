"""Frozen means frozen, and undone means as before."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from helpers.compiling import RECOMPILE_LIMIT, recompile_limit
from helpers.models import SmallResNet, images, partition
from spfde.core.errors import StateMismatch
from spfde.freezing.freezer import Freezer, recompile_warning
from spfde.model.blocks import find_blocks
from spfde.model.trace import trace

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1, foreach=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.1, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.1, momentum=0.9),
}


def make(optimizer: str = "sgd") -> tuple[nn.Module, torch.optim.Optimizer, Freezer]:
    torch.manual_seed(0)
    model = SmallResNet()
    opt = OPTIMIZERS[optimizer](model.parameters())
    return model, opt, Freezer(model, partition(model, images()).blocks, opt)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, *, set_to_none: bool = True) -> None:
    model.train()
    F.cross_entropy(model(images()), torch.tensor([0, 1, 2, 0])).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=set_to_none)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_frozen_weight_is_not_moved_by_momentum_or_weight_decay(optimizer, set_to_none):
    model, opt, freezer = make(optimizer)
    step(model, opt, set_to_none=set_to_none)
    freezer.freeze_to(2)
    before = copy.deepcopy(model.state_dict())
    for _ in range(2):
        step(model, opt, set_to_none=set_to_none)
    frozen = freezer.frozen_parameters
    assert {"stem.weight", "norm.bias", "stage1.1.conv2.weight"} <= frozen
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == (name in frozen)
        assert not (name in frozen and parameter.grad is not None)


def test_the_optimizer_state_of_frozen_parameters_is_freed_and_its_groups_are_not_touched():
    model, opt, freezer = make("adam")
    step(model, opt)
    n_states, group = len(opt.state), opt.param_groups[0]["params"][:]
    freezer.freeze_to(1)
    step(model, opt)
    assert len(opt.state) == n_states - len(freezer.frozen_parameters)
    assert all(a is b for a, b in zip(opt.param_groups[0]["params"], group, strict=True))


def test_batch_norm_of_frozen_blocks_keeps_its_statistics_under_train():
    model, opt, freezer = make()
    step(model, opt)
    freezer.freeze_to(1)
    before = copy.deepcopy(model.state_dict())
    model.eval()
    step(model, opt)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert "stage1.1.bn1.running_mean" in changed
    assert not any(name.startswith(("norm.", "stage1.0.")) for name in changed)
    assert not model.norm.training
    assert model.stage1[1].bn1.training


@pytest.mark.parametrize("mode", [True, False])
def test_unfreezing_restores_what_each_parameter_and_module_had(mode):
    model, _, freezer = make()
    model.stage1[0].conv1.weight.requires_grad_(False)
    model.stage1[0].bn1.eval()
    freezer.freeze_to(3)
    assert freezer.n_frozen == 3
    if not mode:
        model.eval()
    freezer.freeze_to(0)
    assert freezer.n_frozen == 0
    assert freezer.frozen_parameters == frozenset()
    without_grad = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert without_grad == ["stage1.0.conv1.weight"]
    assert model.norm.training == mode
    assert not model.stage1[0].bn1.training
    assert not any("train" in vars(module) for module in model.modules())
    assert all(set(vars(module)) == set(vars(nn.BatchNorm2d(1))) for module in [model.norm, model.stage1[0].bn1])
    model.train()
    assert all(module.training for module in model.modules())


def test_a_train_method_that_the_user_put_on_a_norm_comes_back():
    model, _, freezer = make()

    def mine(mode: bool = True) -> nn.Module:
        return model.norm

    model.norm.train = mine
    freezer.freeze_to(1)
    assert model.norm.train is not mine
    freezer.freeze_to(0)
    assert model.norm.train is mine


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_block_that_thaws_trains_on_with_optimizer_state_that_begins_anew(optimizer):
    model, opt, freezer = make(optimizer)
    step(model, opt)
    freezer.freeze_to(3)
    step(model, opt)
    before = copy.deepcopy(model.state_dict())
    freezer.freeze_to(1)
    frozen = freezer.frozen_parameters
    thawed = [p for name, p in model.named_parameters() if "stage1.1" in name or "stage2.0" in name]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.requires_grad and p not in opt.state for p in thawed)
    step(model, opt)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == (name in frozen)
    assert not torch.equal(model.stage1[1].bn1.running_mean, before["stage1.1.bn1.running_mean"])
    assert torch.equal(model.norm.running_mean, before["norm.running_mean"])
    if optimizer.startswith("adam"):
        assert all(opt.state[p]["step"] == 1 for p in thawed)


def test_a_block_is_frozen_and_thawed_many_times_and_leaves_no_trace():
    model, opt, freezer = make()
    model.stage1[1].conv2.weight.requires_grad_(False)
    plain = {name: set(vars(module)) for name, module in model.named_modules()}
    for count in (2, 1, 3, 0, 4, 0):
        freezer.freeze_to(count)
        step(model, opt)
        frozen = freezer.frozen_parameters
        for name, parameter in model.named_parameters():
            assert parameter.requires_grad == (name not in frozen and name != "stage1.1.conv2.weight")
    assert {name: set(vars(module)) for name, module in model.named_modules()} == plain
    assert all(module.training for module in model.modules())


def test_parameters_outside_the_optimizer_are_frozen_too():
    model = SmallResNet()
    opt = torch.optim.SGD(model.head.parameters(), lr=0.1)
    Freezer(model, partition(model, images()).blocks, opt).freeze_to(1)
    assert not model.stem.weight.requires_grad


def test_a_deep_copy_of_a_frozen_model_stays_frozen_and_apart():
    model, _, freezer = make()
    freezer.freeze_to(1)
    twin = copy.deepcopy(model).eval().train()
    assert not twin.norm.training
    assert twin.stage1[1].bn1.training
    freezer.freeze_to(0)
    model.train()
    assert model.norm.training
    assert not twin.norm.training


def test_a_pickled_frozen_model_loads_as_a_plain_model():
    model, _, freezer = make()
    freezer.freeze_to(1)
    loaded = pickle.loads(pickle.dumps(model)).train()
    assert loaded.norm.training
    assert not loaded.stem.weight.requires_grad


def test_a_norm_without_parameters_and_spectral_norm_are_held_too():
    model = nn.Sequential(
        nn.utils.parametrizations.spectral_norm(nn.Conv2d(3, 4, 3)),
        nn.BatchNorm2d(4, affine=False),
        nn.Dropout(0.5),
        nn.Conv2d(4, 4, 3),
        nn.Flatten(),
        nn.Linear(64, 3),
    )
    freezer = Freezer(model, find_blocks(model, trace(model, images())).blocks, OPTIMIZERS["sgd"](model.parameters()))
    freezer.freeze_to(1)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    weight = model[0].weight.clone()
    model.train()(images())
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    assert torch.equal(model[0].weight, weight)
    assert model[2].training


def test_the_state_freezes_another_freezer_as_far_and_survives_weights_only_loading(tmp_path):
    _, _, freezer = make()
    freezer.freeze_to(2)
    torch.save(freezer.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    other_model, _, other = make()
    other.load_state_dict(state)
    assert other.n_frozen == 2
    assert not other_model.stem.weight.requires_grad
    other.load_state_dict({**state, "n_frozen": 1})
    assert other.n_frozen == 1
    assert other_model.stage1[1].conv1.weight.requires_grad


@pytest.mark.parametrize(
    "change",
    [{"n_frozen": 9}, {"n_frozen": -1}, {"n_frozen": "1"}, {"n_frozen": True}, {"blocks": ["a"]}, {"blocks": 4}],
)
def test_a_state_of_another_model_or_of_another_kind_is_refused(change):
    _, _, freezer = make()
    with pytest.raises(StateMismatch, match=next(iter(change)).removeprefix("n_")):
        freezer.load_state_dict({**freezer.state_dict(), **change})
    assert freezer.n_frozen == 0


@pytest.mark.parametrize("name", ["n_frozen", "blocks"])
def test_a_state_that_lacks_an_entry_is_refused(name):
    _, _, freezer = make()
    state = {key: value for key, value in freezer.state_dict().items() if key != name}
    with pytest.raises(StateMismatch, match=name):
        freezer.load_state_dict(state)


def test_a_compiled_model_is_compiled_anew_twice_for_each_frozen_front_and_not_for_each_epoch():
    torch._dynamo.reset()
    graphs = 0

    def count(module, inputs):
        nonlocal graphs
        graphs += 1
        return module.forward

    model, opt, _ = make()
    compiled = torch.compile(model, backend=count)
    freezer = Freezer(compiled, partition(compiled, images()).blocks, opt)
    seen = []
    for n_frozen in (0, 1, 1, 2, 2, 0, 2, 1):
        freezer.freeze_to(n_frozen)
        step(compiled, opt)
        compiled.eval()
        with torch.no_grad():
            compiled(images())
        seen.append(graphs)
    # At most one graph for training and one for evaluation at first, and for each front that was not there yet.
    assert all(count <= most for count, most in zip(seen, [2, 4, 4, 6, 6, 6, 6, 6], strict=True))
    assert seen[0] < seen[1] == seen[2] < seen[3] == seen[-1]
    torch._dynamo.reset()


def test_a_compiled_model_that_would_meet_the_recompile_limit_is_warned_about():
    model = nn.Linear(2, 2)
    assert recompile_warning(model, 100) is None
    compiled = torch.compile(model, backend="eager")
    with recompile_limit(8):
        assert recompile_warning(compiled, 3) is None
        warning = recompile_warning(compiled, 4)
    assert warning is not None
    assert f"{RECOMPILE_LIMIT}=8" in warning
