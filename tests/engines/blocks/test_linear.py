"""Layers of a model that compute with their active blocks, and when they do not."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Mapping

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from helpers.blocks import DEVICE, drawn, mask_of, needs_triton, relative_error
from spfde.engines.base import Parts
from spfde.engines.blocks.modules import linears_of

pytestmark = needs_triton

BLOCK = (32, 32)


class Masked:
    """Two linear layers with blocks, and what a session would tell of them."""

    def __init__(self, model: nn.Module | None = None, *, most: float = 1.0) -> None:
        from spfde.engines.blocks.linear import BlockLinears

        torch.manual_seed(0)
        made = nn.Sequential(nn.Linear(64, 96), nn.ReLU(inplace=True), nn.Linear(96, 64)) if model is None else model
        self.model = made.to(DEVICE)
        self.masks: dict[str, Tensor] = {}
        self.dense: frozenset[str] = frozenset()
        names = [name for name, p in self.model.named_parameters() if p.dim() == 2]
        for seed, name in enumerate(names):
            self.mutate(name, seed=seed)
        self.reference = copy.deepcopy(self.model)
        self.parts = Parts(masks=lambda: self.masks, dense_gradients=lambda: self.dense)
        self.blocks = BlockLinears(self.model, dict.fromkeys(names, BLOCK), self.parts, most=most)

    def mutate(self, name: str, *, seed: int, active: int | None = None) -> None:
        """Other blocks exist, as a mutation has it: the weight is written into, and the mask is another tensor."""
        weight = self.model.get_parameter(name)
        rows, columns = weight.shape[0] // 32, weight.shape[1] // 32
        order = torch.randperm(rows * columns, generator=torch.Generator().manual_seed(seed))
        units = torch.zeros(rows * columns, dtype=torch.bool)
        units[order[: rows * columns // 2 if active is None else active]] = True
        self.masks[name] = mask_of(units.view(rows, columns), BLOCK).to(DEVICE)
        with torch.no_grad():
            weight.copy_(drawn(*weight.shape, seed=seed) * self.masks[name])

    def check_step(self) -> None:
        """A step is that of PyTorch with the same weights."""
        self.reference.load_state_dict(self.model.state_dict())
        x = drawn(20, 64, seed=9)
        for model in (self.model, self.reference):
            model.zero_grad()
            model(x).square().sum().backward()
        assert relative_error(self.model(x), self.reference(x).detach()) < 1e-6
        for name, parameter in self.model.named_parameters():
            expected = self.reference.get_parameter(name).grad
            assert expected is not None
            if name in self.masks and name not in self.dense and self.blocks.layers[name].computes:
                expected = expected * self.masks[name]
            assert parameter.grad is not None
            assert relative_error(parameter.grad, expected) < 1e-6, name


@pytest.fixture
def masked() -> Masked:
    return Masked()


def test_a_step_is_that_of_pytorch_by_the_kernels(masked: Masked, started: list[str]) -> None:
    masked.check_step()
    assert started.count("weight_gradient") == 2


def test_a_mutation_is_followed_in_the_next_pass(masked: Masked) -> None:
    masked.check_step()
    for seed in (11, 12):
        for name in masked.masks:
            masked.mutate(name, seed=seed, active=2)
        masked.check_step()


def test_a_mutation_of_a_layer_that_the_last_pass_did_not_reach_is_followed(masked: Masked) -> None:
    masked.check_step()
    masked.model[0](drawn(5, 64, seed=1))
    masked.mutate("2.weight", seed=13)
    x = drawn(5, 96, seed=2)
    assert relative_error(masked.model[2](x), F.linear(x, masked.model[2].weight, masked.model[2].bias)) < 1e-6


def test_a_wish_for_dense_gradients_is_followed_though_no_weight_has_changed(masked: Masked) -> None:
    masked.check_step()
    masked.dense = frozenset(["2.weight"])
    masked.check_step()
    outside = masked.model[2].weight.grad.masked_select(~masked.masks["2.weight"])
    assert outside.count_nonzero() > len(outside) / 2
    masked.dense = frozenset()
    masked.check_step()


def test_a_wish_that_comes_before_the_first_pass_is_followed(masked: Masked) -> None:
    masked.dense = frozenset(masked.masks)
    masked.check_step()


def test_a_graph_depends_on_the_number_of_blocks_and_not_on_where_they_are() -> None:
    masked = Masked(nn.Sequential(nn.Linear(32, 288)))
    before = masked.blocks.key
    lists = masked.blocks.layers["0.weight"].lists
    address, columns = lists["rows"].data_ptr(), lists["rows"].tolist()
    masked.mutate("0.weight", seed=21)
    masked.blocks.refresh()
    assert masked.blocks.key == before
    assert lists["rows"].tolist() != columns
    assert lists["rows"].data_ptr() == address
    masked.mutate("0.weight", seed=22, active=9)
    masked.blocks.refresh()
    grown = masked.blocks.key
    assert grown != before
    masked.dense = frozenset(["0.weight"])
    masked.blocks.refresh()
    assert masked.blocks.key != grown


def test_evaluation_is_pytorch_with_whatever_weights_there_are(masked: Masked, started: list[str]) -> None:
    masked.model.eval()
    for parameter in masked.model.parameters():
        parameter.data.copy_(drawn(*parameter.shape, seed=5))  # an average, swapped in: not zero outside of the masks
    x = drawn(5, 64, seed=1)
    expected = masked.reference
    expected.load_state_dict(masked.model.state_dict())
    assert torch.equal(masked.model(x), expected(x))
    assert not started


def test_a_layer_with_many_blocks_is_left_to_pytorch_until_it_has_few(started: list[str]) -> None:
    masked = Masked(most=0.4)
    masked.check_step()
    assert not started
    masked.mutate("0.weight", seed=3, active=2)
    before = masked.blocks.key
    masked.check_step()
    assert "weight_gradient" in started
    assert masked.blocks.key != before


def test_detach_leaves_the_layers_as_they_were(masked: Masked, started: list[str]) -> None:
    names = set(vars(masked.reference[0]))
    assert set(vars(masked.model[0])) != names
    masked.blocks.detach()
    masked.blocks.detach()
    assert set(vars(masked.model[0])) == names
    masked.model(drawn(5, 64, seed=1))
    assert not started


def test_what_somebody_put_around_a_layers_forward_since_stays(masked: Masked, started: list[str]) -> None:
    layer, inner = masked.model[0], masked.model[0].forward
    layer.forward = lambda x: inner(x) + 1
    masked.blocks.detach()
    x = drawn(5, 64, seed=1)
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias) + 1)
    assert not started


def test_bypassed_layers_compute_as_their_class_says(masked: Masked, started: list[str]) -> None:
    x = drawn(5, 64, seed=1)
    with masked.blocks.bypass():
        masked.model(x)
        assert not started
    masked.model(x)
    assert started


def test_copies_and_pickles_of_the_model_compute_in_pytorch(masked: Masked, started: list[str]) -> None:
    file = io.BytesIO()
    torch.save(masked.model, file)
    file.seek(0)
    for twin in (copy.deepcopy(masked.model), torch.load(file, weights_only=False)):
        x = drawn(5, 64, seed=1)
        assert torch.equal(twin(x), masked.reference(x))
    assert not started


def test_weights_that_torch_func_puts_in_are_computed_with(masked: Masked, started: list[str]) -> None:
    x = drawn(5, 64, seed=1)
    other = {name: drawn(*p.shape, seed=7) for name, p in masked.model.named_parameters()}
    found = torch.func.functional_call(masked.model, other, (x,))
    assert torch.equal(found, torch.func.functional_call(masked.reference, other, (x,)))
    assert not started


def test_a_parameter_of_the_same_memory_may_stand_in_and_gets_the_gradient(masked: Masked, started: list[str]) -> None:
    leaves = {name: nn.Parameter(p.detach()) for name, p in masked.model.named_parameters()}
    torch.func.functional_call(masked.model, leaves, (drawn(5, 64, seed=1),)).sum().backward()
    assert started.count("weight_gradient") == 2
    assert all(leaf.grad is not None for leaf in leaves.values())
    assert masked.model[0].weight.grad is None


def test_a_counter_of_flops_sees_pytorchs_own_operators(masked: Masked) -> None:
    x = drawn(5, 64, seed=1)
    totals = []
    for model in (masked.model, masked.reference):
        with FlopCounterMode(display=False) as counter:
            model(x)
        totals.append(counter.get_total_flops())
    assert totals[0] == totals[1] > 0


def test_compiled_code_leaves_the_layers_to_the_kernels(masked: Masked, started: list[str]) -> None:
    compiled = torch.compile(masked.model, backend="eager")
    x = drawn(5, 64, seed=1)
    for seed in (1, 2):
        found = compiled(x)
        assert relative_error(found, masked.model(x)) < 1e-6
        masked.mutate("0.weight", seed=seed)
    found = compiled(x)
    assert relative_error(found, F.linear(F.relu(F.linear(x, *layer(masked, 0))), *layer(masked, 2))) < 1e-6
    assert started
    torch.compiler.reset()


def layer(masked: Masked, index: int) -> tuple[Tensor, Tensor]:
    return masked.model[index].weight, masked.model[index].bias


def test_checkpointed_layers_are_right(masked: Masked) -> None:
    x = drawn(20, 64, seed=1).requires_grad_()
    checkpoint(masked.model, x, use_reentrant=False).square().sum().backward()
    assert x.grad is not None
    (expected,) = torch.autograd.grad(masked.reference(x).square().sum(), x)
    assert relative_error(x.grad, expected) < 1e-6


def test_an_empty_batch_is_pytorchs_to_compute(masked: Masked, started: list[str]) -> None:
    assert masked.model(drawn(0, 64, seed=1)).shape == (0, 64)
    assert not started


@pytest.mark.parametrize("x", [torch.zeros(5, 64, dtype=torch.float64), torch.zeros(5, 32)])
def test_inputs_of_another_type_or_size_are_pytorchs_to_refuse(masked: Masked, x: Tensor) -> None:
    with pytest.raises(RuntimeError) as expected:
        masked.reference(x.to(DEVICE))
    with pytest.raises(RuntimeError) as refused:
        masked.model(x.to(DEVICE))
    assert str(refused.value) == str(expected.value)


def test_a_weight_in_two_layers_is_computed_in_both(started: list[str]) -> None:
    twice = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    twice[1].weight = twice[0].weight
    masked = Masked(twice)
    masked.check_step()
    assert started.count("weight_gradient") == 2


def test_frozen_layers_compute_and_have_no_gradient(masked: Masked) -> None:
    masked.model[0].requires_grad_(False)
    x = drawn(20, 64, seed=1)
    found = masked.model(x)
    found.sum().backward()
    assert relative_error(found, masked.reference(x)) < 1e-6
    assert masked.model[0].weight.grad is None
    assert masked.model[2].weight.grad is not None


class OwnForward(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.plain, self.own = nn.Linear(32, 32), OwnForward(32, 32)
        self.attention = nn.MultiheadAttention(32, 1)
        self.conv = nn.Conv2d(32, 32, 1)
        self.put = nn.Linear(32, 32)
        self.put.forward = lambda x: x  # type: ignore[method-assign]


def test_only_layers_whose_own_forward_computes_them_are_taken() -> None:
    model = Odd()
    weights: Mapping[str, object] = {name: None for name, p in model.named_parameters() if p.dim() >= 2}
    assert linears_of(model, {**weights, "gone.weight": None}) == {"plain.weight": [model.plain]}


def test_no_warning_is_given() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        Masked().check_step()
