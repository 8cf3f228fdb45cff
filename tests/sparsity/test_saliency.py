import copy
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call

from spfde.core.errors import InvalidArgument
from spfde.sparsity.block import Block
from spfde.sparsity.masks import highest_overall
from spfde.sparsity.saliency import (
    choose_units,
    connection_sensitivity,
    gradient_flow,
    synaptic_flow,
    untouched,
)
from spfde.sparsity.structure import NM, Channels, Kernels, Patterns, Unstructured

Batch = tuple[Tensor, Tensor]


def _loss(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def _tiny(seed: int = 0) -> nn.Sequential:
    """Four inputs, three classes, smooth, in double precision."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def _batches(n: int = 2, size: int = 6) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(size, 4, dtype=torch.float64, generator=generator),
            torch.randint(3, (size,), generator=generator),
        )
        for _ in range(n)
    ]


def _weights(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.dim() > 1}


def _summed_loss(model: nn.Module, temperature: float = 1.0) -> Callable[[Tensor], Tensor]:
    """The loss over all batches as a function of all masked weights in one vector."""
    weights, batches = _weights(model), _batches()

    def value(flat: Tensor) -> Tensor:
        parts = dict(zip(weights, flat.split([w.numel() for w in weights.values()]), strict=True))
        state = {name: part.view(weights[name].shape) for name, part in parts.items()}
        return torch.stack(
            [F.cross_entropy(functional_call(model, state, x) / temperature, y) for x, y in batches]
        ).sum()

    return value


def _flat(tensors: dict[str, Any]) -> Tensor:
    return torch.cat([t.detach().flatten() for t in tensors.values()])


def test_connection_sensitivity_is_what_finite_differences_of_a_gate_say() -> None:
    model = _tiny()
    score = _flat(connection_sensitivity(model, _weights(model), _batches(), _loss))
    loss, at, step = _summed_loss(model), _flat(_weights(model)), 1e-5
    for index in range(len(at)):
        gate = torch.zeros_like(at)
        gate[index] = step * at[index]
        slope = (loss(at + gate) - loss(at - gate)) / (2 * step)
        assert score[index].item() == pytest.approx(abs(slope.item()), abs=1e-9, rel=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_gradient_flow_is_the_weight_times_a_dense_hessian_times_the_gradient(temperature: float) -> None:
    model = _tiny()
    score = _flat(gradient_flow(model, _weights(model), _batches(), _loss, temperature=temperature))
    loss, at = _summed_loss(model, temperature), _flat(_weights(model))
    hessian = torch.autograd.functional.hessian(loss, at)
    gradient = torch.autograd.functional.jacobian(loss, at)
    assert torch.allclose(score, at * (hessian @ gradient), rtol=1e-9, atol=1e-14)


def test_weights_of_high_gradient_flow_carry_the_gradients_norm() -> None:
    # Which sign is kept: without the lowest scores the gradient stays larger than without the highest.
    better = 0
    for seed in range(10):
        model = _tiny(seed)
        score = _flat(gradient_flow(model, _weights(model), _batches(), _loss, temperature=1.0))
        loss, at, order = _summed_loss(model), _flat(_weights(model)), score.argsort()
        norms = []
        for removed in (order[:4], order[-4:]):
            pruned = at.clone()
            pruned[removed] = 0.0
            norms.append(torch.autograd.functional.jacobian(loss, pruned).norm().item())
        better += norms[0] > norms[1]
    assert better == 10


def test_a_loss_that_is_linear_in_its_weights_has_no_gradient_flow() -> None:
    model = nn.Linear(4, 1, bias=False).double()
    score = gradient_flow(model, _weights(model), _batches(), lambda m, batch: m(batch[0]).sum(), temperature=1.0)
    assert not score["weight"].any()


def test_an_output_that_is_no_tensor_cannot_be_divided_by_a_temperature() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = _tiny()

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"logits": self.inner(x)}

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return F.cross_entropy(model(batch[0])["logits"], batch[1])

    model = Named()
    with pytest.raises(InvalidArgument, match=r"temperature=200\.0.*dict"):
        gradient_flow(model, _weights(model), _batches(), loss, temperature=200.0)
    assert not model._forward_hooks
    assert gradient_flow(model, _weights(model), _batches(), loss, temperature=1.0).keys() == _weights(model).keys()


@pytest.mark.parametrize("value", [1.5, torch.ones(3, requires_grad=True), torch.tensor(1.0)])
def test_a_loss_that_is_no_number_to_differentiate_is_refused(value: Any) -> None:
    model = _tiny()
    with pytest.raises(InvalidArgument, match="one number"):
        connection_sensitivity(model, _weights(model), _batches(), lambda *_: value)


def test_attention_has_a_gradient_flow() -> None:
    class Attending(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.out = nn.Linear(4, 12), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            query, key, value = self.qkv(x.view(2, 3, 4)).chunk(3, dim=-1)
            return self.out(F.scaled_dot_product_attention(query, key, value)).flatten(0, 1)

    model = Attending().double()
    score = gradient_flow(model, _weights(model), _batches(), _loss, temperature=1.0)
    assert all(s.isfinite().all() and s.any() for s in score.values())


def test_synaptic_flow_is_conserved_from_layer_to_layer() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(36, 7, bias=False), nn.ReLU(),
        nn.Linear(7, 2, bias=False),
    )  # fmt: skip
    score = synaptic_flow(model, _weights(model), torch.randn(1, 3, 5, 5))
    totals = [s.sum().item() for s in score.values()]
    assert len(totals) == 3
    assert totals == pytest.approx([totals[0]] * 3, rel=1e-12)


def test_synaptic_flow_of_two_layers_is_worked_out_by_hand() -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, -2.0], [-3.0, 4.0]]))
        model[2].weight.copy_(torch.tensor([[-5.0, 6.0]]))
    score = synaptic_flow(model, _weights(model), torch.full((1, 2), -9.0))
    assert score["0.weight"].tolist() == [[5.0, 10.0], [18.0, 24.0]]
    assert score["2.weight"].tolist() == [[15.0, 42.0]]
    masks = {"0.weight": torch.tensor([[True, True], [True, False]]), "2.weight": torch.tensor([[True, True]])}
    assert synaptic_flow(model, _weights(model), torch.ones(1, 2), masks=masks)["2.weight"].tolist() == [[15.0, 18.0]]


def test_synaptic_flow_of_a_deep_network_does_not_overflow() -> None:
    model = nn.Sequential(*[nn.Linear(64, 64, bias=False) for _ in range(80)])
    with torch.no_grad():
        for p in model.parameters():
            p.normal_()
    single = model.double()(torch.ones(1, 64, dtype=torch.float64)).abs().max()
    model.float()
    score = synaptic_flow(model, _weights(model), torch.ones(1, 64))
    assert single.item() > 0
    assert score["0.weight"].sum().item() > torch.finfo(torch.float32).max
    assert all(s.isfinite().all() for s in score.values())


def test_tied_weights_flow_together() -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    model[1].weight = model[0].weight
    nn.init.constant_(model[0].weight, 2.0)
    score = synaptic_flow(model, {"0.weight": model[0].weight}, torch.ones(1, 2))
    # R = sum over W W 1, each of the four weights in either place: 2 * (2 + 2) twice.
    assert score["0.weight"].tolist() == [[16.0, 16.0], [16.0, 16.0]]


def test_token_ids_become_ones_and_masks_stay() -> None:
    class Text(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.out = nn.Embedding(3, 2), nn.Linear(2, 1, bias=False)

        def forward(self, ids: Tensor, hidden: Tensor) -> Tensor:
            return self.out(self.embedding(ids).masked_fill(hidden.unsqueeze(-1), 0.0).sum(1))

    model = Text()
    with torch.no_grad():
        model.embedding.weight.copy_(torch.tensor([[9.0, 9.0], [1.0, -2.0], [9.0, 9.0]]))
        model.out.weight.copy_(torch.tensor([[3.0, 4.0]]))
    sample = {"ids": torch.tensor([[0, 2, 2]]), "hidden": torch.tensor([[False, False, True]])}
    assert synaptic_flow(model, {"out.weight": model.out.weight}, sample)["out.weight"].tolist() == [[6.0, 16.0]]


def test_a_model_that_insists_on_single_precision_is_refused_with_a_way_out() -> None:
    class Insists(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.float())

    model = Insists(2, 2)
    with pytest.raises(InvalidArgument, match=r"float64.*SNIP"):
        synaptic_flow(model, _weights(model), torch.ones(1, 2))


def test_the_best_of_all_layers_are_chosen_and_one_of_each_stays() -> None:
    scores = {"a": torch.tensor([5.0, 4.0, 3.0]), "b": torch.tensor([0.1, 0.2]), "c": torch.tensor([4.0, 9.0])}
    chosen = highest_overall(scores, 4)
    assert {name: mask.int().tolist() for name, mask in chosen.items()} == {"a": [1, 1, 0], "b": [0, 1], "c": [0, 1]}
    left = {"a": torch.tensor([0, 1, 1]).bool(), "b": torch.tensor([1, 0]).bool(), "c": torch.tensor([1, 1]).bool()}
    chosen = highest_overall(scores, 4, among=left)
    assert {name: mask.int().tolist() for name, mask in chosen.items()} == {"a": [0, 1, 0], "b": [1, 0], "c": [1, 1]}


def test_a_units_score_is_a_mean_so_that_size_is_no_advantage() -> None:
    # Channels of four weights and of one: the sum of the large ones is higher, their mean is lower.
    scores = {"large": torch.full((2, 4), 1.0), "small": torch.full((3, 1), 2.0)}
    masks = choose_units(scores, Channels(), 4)
    assert masks["large"].sum(1).tolist() == [4, 0]
    assert masks["small"].sum() == 3


def test_signed_scores_are_summed_with_their_signs() -> None:
    scores = {"w": torch.tensor([[5.0, 1.0], [-5.0, 1.0]])}
    assert choose_units(scores, Block(rows=2), 1)["w"].tolist() == [[False, True], [False, True]]


def test_groups_take_their_own_best_whatever_the_other_layers_have() -> None:
    scores = {"a": torch.tensor([[9.0, 8.0, 7.0, 6.0]]), "b": torch.tensor([[0.1, 0.3, 0.2, 0.0]])}
    masks = choose_units(scores, NM(), 4)
    assert masks["a"].int().tolist() == [[1, 1, 0, 0]]
    assert masks["b"].int().tolist() == [[0, 1, 1, 0]]


@given(
    structure=st.sampled_from([Unstructured(), Block(), Kernels(), Patterns(), Channels()]),
    share=st.floats(0.0, 1.0), sizes=st.lists(st.integers(1, 3), min_size=1, max_size=3), seed=st.integers(0, 99),
)  # fmt: skip
def test_the_number_chosen_is_exact_and_no_layer_is_left_empty(
    structure: Any, share: float, sizes: list[int], seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = {f"l{i}": torch.randn(4 * size, 2, 3, 3, generator=generator) for i, size in enumerate(sizes)}
    total = sum(structure.n_units(s.shape) for s in scores.values())
    n = len(scores) + int(share * (total - len(scores)))
    masks = choose_units(scores, structure, n)
    assert sum(int(structure.units_of(mask).sum()) for mask in masks.values()) == n
    assert sum(int(mask.sum()) for mask in masks.values()) == n * structure.unit_size((4, 2, 3, 3)) or isinstance(
        structure, Channels
    )
    assert all(mask.any() for mask in masks.values())
    fewer = choose_units(scores, structure, max(len(scores), n // 2), masks=masks)
    assert not any((fewer[name] & ~masks[name]).any() for name in masks)


class _Noisy(nn.Module):
    """BatchNorm, dropout, a buffer that is not saved, one that counts, and a tensor that is no float."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.dropout = nn.Dropout(0.5)
        self.fc = nn.Linear(4, 3)
        self.register_buffer("seen", torch.zeros((), dtype=torch.long), persistent=False)
        self.codes = nn.Parameter(torch.arange(3), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.seen = self.seen + 1  # a new tensor, not the old one in place
        return self.fc(self.dropout(F.relu(self.norm(self.conv(x))).mean((2, 3)))) + self.codes


def test_scoring_leaves_no_trace_of_itself() -> None:
    model = _Noisy()
    model.norm.eval()  # a mode that train(True) would change
    generator = torch.Generator().manual_seed(0)
    batches = [(torch.randn(4, 2, 6, 6, generator=generator), torch.tensor([0, 1, 2, 0])) for _ in range(2)]
    model.conv.weight.grad = torch.full_like(model.conv.weight, 0.25)
    seen, grad = model.seen, model.conv.weight.grad
    before, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002

    weights = {name: p for name, p in model.named_parameters() if p.dim() > 1}
    with untouched(model, training=True):
        assert model.norm.training
        connection_sensitivity(model, weights, batches, _loss)
        gradient_flow(model, weights, batches, _loss, temperature=200.0)
        random.random()
    with untouched(model, training=False):
        synaptic_flow(model, weights, batches[0][0])

    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert [m.training for m in model.modules()] == modes
    assert model.seen is seen
    assert seen == 0
    assert model.conv.weight.grad is grad
    assert (grad == 0.25).all()
    assert model.fc.weight.grad is None
    assert [p.requires_grad for p in model.parameters()] == [False, True, True, True, True, True, True]
    assert not model._forward_hooks
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert (np.random.get_state()[1] == states[2]).all()  # noqa: NPY002


def test_what_fails_midway_leaves_no_trace_either() -> None:
    model = _Noisy().eval()
    batch = (torch.randn(4, 2, 6, 6), torch.tensor([0, 1, 2, 0]))

    def fails_after_a_pass(model: nn.Module, batch: Batch) -> Tensor:
        model(batch[0])
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), untouched(model, training=True):
        connection_sensitivity(model, {"fc.weight": model.fc.weight}, [batch], fails_after_a_pass)
    assert not model.training
    assert model.seen == 0
    assert not model.norm.running_mean.any()


def test_scores_do_not_depend_on_the_global_generators() -> None:
    model = _Noisy()
    batches = [(torch.randn(4, 2, 6, 6), torch.tensor([0, 1, 2, 0]))]
    scores = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        with untouched(model, training=True):
            scores.append(connection_sensitivity(model, {"fc.weight": model.fc.weight}, batches, _loss)["fc.weight"])
    assert torch.equal(*scores)
