"""Which weights are masked, what is said of the others, and what layers that the user froze cost."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import spfde
from spfde.core.errors import InvalidArgument


class Bare(nn.Module):
    """A matrix of the model's own, between two layers."""

    def __init__(self, product: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.w, self.head = nn.Linear(8, 16), nn.Parameter(torch.randn(16, 16)), nn.Linear(16, 4)
        self.product = product

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.product(F.relu(self.first(x)), self.w)))


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase], **options: Any) -> None:
        super().__init__()
        self.memory = kind(8, 16, batch_first=True, **options)
        self.middle, self.head = nn.LazyLinear(16), nn.Linear(16, 4)
        self(torch.zeros(1, 3, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.middle(self.memory(x)[0][:, -1]))


def plan(model: nn.Module, sample: Tensor, *, freezing: Any = None, **fields: Any) -> spfde.planning.Plan:
    sparsity = spfde.SET(**{"sparsity": 0.5, **fields}) if fields else None
    return spfde.plan(model, sample, spfde.Recipe(sparsity=sparsity, freezing=freezing), 4, 10)


X = torch.zeros(1, 8)
MASK = torch.ones(16, 16).tril()  # neither a parameter nor a buffer


@pytest.mark.parametrize(
    "product",
    [
        lambda x, w: F.linear(x, w),
        lambda x, w: x @ w,
        lambda x, w: torch.einsum("bi,oi->bo", x, w),
        lambda x, w: (w @ x.t()).t(),
        lambda x, w: F.linear(x, w * 2.0),
        lambda x, w: F.linear(x, (w * 8).round() / 8),
        lambda x, w: F.linear(x, w / w.norm()),
        lambda x, w: F.linear(x, w.clamp(-1, 1)),
        lambda x, w: F.linear(x, w.clamp(min=0)),
        lambda x, w: F.linear(x, F.hardtanh(w)),
        lambda x, w: F.linear(x, w * MASK),
        lambda x, w: torch.cat([F.linear(x, w[:8]), F.linear(x, w[8:])], 1),
        lambda x, w: F.linear(x, w.flip(-1)),
        lambda x, w: F.linear(x, w + ((w * 8).round() / 8 - w).detach()),
        lambda x, w: F.linear(x, w + (w.view(-1, 8) * 2).round().view(16, 16)),
        lambda x, w: F.linear(x, w + (w.mT * 2).mT),
        lambda x, w: F.linear(x, w - w.roll(3, 0).roll(-3, 0)),
        lambda x, w: F.linear(x, w + w.flip(0, 1).roll((16, 1), (0, 1)).roll(-1, 1).flip((1, 0))),
        lambda x, w: F.linear(x, w + torch.cat([w[:8] * 2, w[8:]])),
        lambda x, w: F.linear(x, w * w.flip(-1) + w),
    ],
    ids=str.split(
        "linear matmul einsum left scaled quantised divided clamped positive hardtanh masked slices flipped "
        "straight-through grouped transposed rolled mirrored halves product"
    ),
)
def test_a_bare_matrix_is_masked_where_it_is_named_and_billed_by_its_product(product: Any) -> None:
    bill = plan(Bare(product), X, include=("w",))
    assert list(bill.blueprint.sparse_layers) == ["w"]
    dense = 2 * (8 * 16 + 16 * 16 + 16 * 4)
    assert bill.flops_ratio == pytest.approx((dense - 16 * 16) / dense)


@pytest.mark.parametrize(
    "computed",
    [
        lambda w: w - w.mean(),
        lambda w: w.softmax(-1),
        lambda w: w + 1,
        lambda w: F.layer_norm(w, (16,)),
        lambda w: w.clamp(0.1, 1),
        lambda w: w.clamp(max=-0.1),
        lambda w: F.hardtanh(w, 0.1, 1.0),
        lambda w: torch.where(w.abs() > 0.1, w, 0.5),
        lambda w: w.clamp(torch.tensor(0.1)),
        lambda w: w + MASK,
        lambda w: (w + w.flip(-1)) / 2,
        lambda w: (w + w.mT) / 2,
        lambda w: w - w.mT.contiguous(),
        lambda w: w + w.roll(1),
        lambda w: w + w.roll(1, 0),
        lambda w: w + w.view(2, 8, 16).permute(1, 0, 2).reshape(16, 16),
        lambda w: w + w[0],
        lambda w: w + w[:8].repeat(2, 1),
        lambda w: w + torch.cat([w[8:], w[:8]]),
        lambda w: w + torch.stack([w[:, 0], *w.unbind(1)[:-1]], 1),
        lambda w: w.clone().add_(w.rot90()),
    ],
    ids=str.split(
        "centred softmax shifted normalised above below hardtanh filled tensor constant mirrored symmetric "
        "antisymmetric rolled rolled-rows interleaved row repeated swapped shifted-columns turned"
    ),
)
def test_a_weight_whose_zeros_are_lost_before_its_product_cannot_be_named(computed: Any) -> None:
    with pytest.raises(InvalidArgument) as caught:
        plan(Bare(lambda x, w: F.linear(x, computed(w))), X, include=("w",))
    (problem,) = caught.value.problems
    assert problem.argument == "include"
    assert "zeros" in problem.rule


def test_a_weight_whose_zeros_are_lost_stays_dense_by_default_with_a_warning_and_in_the_bill() -> None:
    class Standardised(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight - self.weight.mean(1, keepdim=True), self.bias)

    model = nn.Sequential(nn.Linear(8, 16), Standardised(16, 16), nn.Linear(16, 16), nn.Linear(16, 4))
    with pytest.warns(UserWarning, match=r"1\.weight"):
        bill = plan(model, X, sparsity=0.5)
    assert list(bill.blueprint.sparse_layers) == ["2.weight"]
    assert [weight.name for weight in bill.blueprint.left_dense] == ["1.weight"]
    assert "1.weight" in str(bill)
    dense = 2 * (8 * 16 + 2 * 16 * 16 + 16 * 4)
    assert bill.flops_ratio == pytest.approx((dense - 16 * 16) / dense)


def test_a_weight_that_a_product_of_others_is_added_to_stays_dense_and_is_listed() -> None:
    class Adapted(nn.Linear):
        def __init__(self) -> None:
            super().__init__(16, 16)
            self.down, self.up = nn.Parameter(torch.randn(2, 16)), nn.Parameter(torch.zeros(16, 2))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight + self.up @ self.down, self.bias)

    model = nn.Sequential(nn.Linear(8, 16), Adapted(), nn.Linear(16, 16), nn.Linear(16, 4))
    with pytest.warns(UserWarning, match=r"1\.weight"):
        bill = plan(model, X, sparsity=0.5)
    assert list(bill.blueprint.sparse_layers) == ["2.weight"]
    assert "1.weight" in [weight.name for weight in bill.blueprint.left_dense]
    # The factors are weights of their own.
    named = plan(model, X, include=("1.down",), dense_first=False)
    assert list(named.blueprint.sparse_layers) == ["1.down"]


class Modulated(nn.Conv2d):
    """A convolution whose weight is scaled for each sample, as in StyleGAN 2."""

    def __init__(self, *, demodulates: bool = False) -> None:
        super().__init__(16, 16, 3, padding=1)
        self.style, self.demodulates = nn.Linear(16, 16), demodulates

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, *size = x.shape
        weight = self.weight[None] * (1 + self.style(x.mean((2, 3))).view(batch, 1, channels, 1, 1))
        if self.demodulates:
            weight = weight * (weight.square().sum((2, 3, 4), keepdim=True) + 1e-8).rsqrt()
        y = F.conv2d(x.reshape(1, -1, *size), weight.reshape(-1, *self.weight.shape[1:]), padding=1, groups=batch)
        return y.view(batch, channels, *size)


class Dynamic(nn.Linear):
    """A layer whose weight depends on its input, in one way or another."""

    def __init__(self, kind: str) -> None:
        super().__init__(16, 16)
        self.gate, self.kind = nn.Linear(16, 16), kind

    def forward(self, x: Tensor) -> Tensor:
        gate = self.gate(x)
        if self.kind == "gated":
            return F.linear(x, self.weight * gate.mean(0).sigmoid(), self.bias)
        if self.kind == "shifted":
            return F.linear(x, self.weight + gate.mean(0)[:, None] * x.mean(0), self.bias)
        if self.kind == "left":
            return ((self.weight * gate.mean(0)) @ x.t()).t()
        return torch.einsum("bi,boi->bo", x, self.weight * gate[:, None])


def _around(layer: nn.Module) -> nn.Sequential:
    """A layer between others that are masked."""
    if isinstance(layer, nn.Conv2d):
        ends = nn.Conv2d(1, 16, 3), nn.Conv2d(16, 16, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4)
    else:
        ends = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 4)
    return nn.Sequential(ends[0], layer, *ends[1:])


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(
    "make",
    [
        Modulated,
        lambda: Modulated(demodulates=True),
        lambda: Dynamic("gated"),
        lambda: Dynamic("shifted"),
        lambda: Dynamic("left"),
        lambda: Dynamic("each sample"),
    ],
    ids=["modulated", "demodulated", "gated", "shifted", "left", "each sample"],
)
def test_a_weight_that_is_computed_from_the_input_stays_dense_and_is_listed_with_the_reason(
    make: Callable[[], nn.Module], batch: int
) -> None:
    model = _around(make())
    sample = torch.zeros(batch, *((1, 8, 8) if isinstance(model[1], nn.Conv2d) else (8,)))
    with pytest.warns(UserWarning, match=r"1\.weight"):
        bill = plan(model, sample, sparsity=0.5)
    assert [weight.name for weight in bill.blueprint.left_dense] == ["1.weight"]
    assert "input" in bill.blueprint.left_dense[0].reason
    assert "1.weight" not in bill.blueprint.sparse_layers
    assert len(bill.blueprint.sparse_layers) == 2
    with pytest.raises(InvalidArgument) as caught:
        plan(model, sample, include=("1.weight",))
    (problem,) = caught.value.problems
    assert (problem.argument, "input" in problem.rule) == ("include", True)
    assert not plan(model, sample, sparsity=0.5, exclude=("1.weight",)).blueprint.left_dense


def test_a_model_all_whose_weights_are_computed_from_the_input_is_told_so() -> None:
    model = _around(Modulated())
    for index in (0, 2):
        model[index].requires_grad_(False)
    model[1].style.requires_grad_(False)
    with pytest.raises(InvalidArgument, match=r"1\.weight.*input"):
        plan(model, torch.zeros(1, 1, 8, 8), sparsity=0.5)


class Attention(nn.Module):
    """Attention with all the parameters that are added to or multiplied with activations."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.qkv, self.head = nn.Linear(8, 16), nn.Linear(16, 48), nn.Linear(16, 4)
        self.position, self.bias = nn.Parameter(torch.randn(1, 5, 16)), nn.Parameter(torch.randn(2, 5, 5))
        self.scale, self.temperature = nn.Parameter(torch.ones(2, 1, 8)), nn.Parameter(torch.ones(2, 1, 1))
        self.gamma = nn.Parameter(torch.ones(1, 1, 16))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x) + self.position
        q, k, v = self.qkv(x).view(-1, 5, 3, 2, 8).permute(2, 0, 3, 1, 4)
        scores = (q * self.scale) @ k.mT * self.temperature + self.bias
        y = (scores.softmax(-1) @ v).transpose(1, 2).reshape(-1, 5, 16)
        return self.head((x + y * self.gamma).mean(1))


@pytest.mark.parametrize("batch", [1, 3])
def test_parameters_that_activations_are_shifted_or_scaled_by_are_no_weights_of_products(batch: int) -> None:
    bill = plan(Attention(), torch.zeros(batch, 5, 8), sparsity=0.5)
    assert not bill.blueprint.left_dense
    assert not bill.blueprint.cost.from_input


@pytest.mark.parametrize(
    ("kind", "options", "matrices"),
    [
        (nn.LSTM, {"num_layers": 2}, 4),
        (nn.LSTM, {"bidirectional": True}, 4),
        (nn.LSTM, {"proj_size": 4}, 3),
        (nn.GRU, {}, 2),
        (nn.RNN, {}, 2),
    ],
)
def test_matrices_of_recurrent_layers_are_masked_where_they_are_named(kind: Any, options: Any, matrices: int) -> None:
    model = Recurrent(kind, **options)
    bill = plan(model, torch.zeros(1, 5, 8), include=("memory.*",), dense_first=False)
    assert set(bill.blueprint.sparse_layers) == {n for n, p in model.named_parameters() if "memory.weight" in n}
    assert len(bill.blueprint.sparse_layers) == matrices
    assert bill.flops_ratio < 0.8


def test_recurrent_matrices_that_are_not_named_are_said_to_stay_dense() -> None:
    with pytest.warns(UserWarning, match="LSTM"):
        bill = plan(Recurrent(nn.LSTM), torch.zeros(1, 5, 8), sparsity=0.5, dense_first=False)
    assert list(bill.blueprint.sparse_layers) == ["middle.weight"]


def test_what_is_used_with_the_inputs_in_front_takes_no_structure() -> None:
    with pytest.raises(InvalidArgument) as caught:
        plan(Bare(lambda x, w: x @ w), X, include=("w",), structure=spfde.Channels())
    assert caught.value.problems[0].argument == "structure"
    assert "w" in plan(Bare(F.linear), X, include=("w",), structure=spfde.Channels()).blueprint.sparse_layers


def _mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.Linear(16, 4))


def test_views_side_by_side_in_one_buffer_are_parameters_like_any_others() -> None:
    model, place = _mlp(), 0
    flat = torch.cat([p.detach().flatten() for p in model.parameters()])
    for p in model.parameters():
        p.data = flat[place : place + p.numel()].view_as(p)
        place += p.numel()
    assert list(plan(model, X, sparsity=0.5).blueprint.sparse_layers) == ["2.weight", "4.weight"]


def test_two_parameters_in_the_same_memory_are_refused_with_both_names() -> None:
    model = _mlp()
    model[4].weight.data = model[2].weight.data
    with pytest.raises(InvalidArgument) as caught:
        plan(model, X, sparsity=0.5)
    assert {"2.weight", "4.weight"} <= {caught.value.problems[0].value, *str(caught.value).split("'")}


F0, F1, F2, F3 = 2 * 8 * 16, 2 * 16 * 16, 2 * 16 * 16, 2 * 16 * 4


@pytest.mark.parametrize(
    ("frozen", "flops"),
    [
        ((), 3 * (F0 + F1 + F2 + F3)),
        ((0, 2), F0 + F1 + 3 * (F2 + F3)),
        ((2,), 3 * F0 + 2 * F1 + 3 * (F2 + F3)),
        ((5,), 3 * (F0 + F1 + F2) + 2 * F3),
        ((0, 2, 4, 5), F0 + F1 + F2 + F3),
    ],
    ids=["none", "front", "middle", "head", "all"],
)
def test_a_layer_that_the_user_froze_has_no_gradient_of_its_weight(frozen: tuple[int, ...], flops: int) -> None:
    model = _mlp()
    for index in frozen:
        model[index].requires_grad_(False)
    bill = plan(model, X)
    assert bill.training_flops == bill.dense_training_flops == 4 * 10 * flops


def test_freezing_saves_only_what_is_spent() -> None:
    model = _mlp()
    for index in (2, 4):
        model[index].requires_grad_(False)
    freezing = spfde.ProgressiveFreezing(flops_reduction=0, start_epoch=2, fraction=1.0)
    bill = plan(model, X, freezing=freezing)
    # Once the first block is frozen, nothing before the head needs a gradient.
    assert bill.epoch_costs[1].saved_by_freezing == 0
    assert bill.epoch_costs[2].saved_by_freezing == 10 * (2 * F0 + F1 + F2)
    assert bill.epoch_costs[2].training_flops == 10 * (F0 + F1 + F2 + 3 * F3)


class Branching(nn.Module):
    """Reads a value of its input."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.head = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.head(self.middle(x) if float(x.sum()) > 0 else x)


def test_a_model_that_cannot_be_traced_is_planned_where_weights_are_named_and_its_flops_are_said_to_be_unknown() -> (
    None
):
    bill = plan(Branching(), X, include=("middle.weight",))
    assert dict(bill.blueprint.target) == {"middle.weight": 128}
    assert bill.training_flops == 0
    assert bill.to_dict()["uncounted"] == {"Branching": 1}
    assert "FLOPs" in str(bill).splitlines()[-1]


@pytest.mark.parametrize("fields", [{"sparsity": 0.5}, {"freezing": spfde.ProgressiveFreezing()}])
def test_a_model_that_cannot_be_traced_is_refused_where_the_recipe_needs_it(fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgument) as caught:
        plan(Branching(), X, **fields)
    (problem,) = caught.value.problems
    assert problem.argument == "sample"
    assert ("include" if "sparsity" in fields else "freezing") in problem.remedy


def test_freezing_a_model_with_a_tied_head_is_refused_with_advice_that_can_be_followed() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.layer = nn.Embedding(7, 4), nn.Linear(4, 4)

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return self.layer(self.embedding(tokens)) @ self.embedding.weight.T

    recipe = spfde.Recipe(freezing=spfde.ProgressiveFreezing(flops_reduction=0.1))
    with pytest.raises(spfde.InvalidArgument) as caught:
        spfde.plan(Tied(), torch.zeros(2, 3, dtype=torch.long), recipe, 8, 8)
    (problem,) = caught.value.problems
    assert "embedding.weight" in problem.rule
    assert "tie_word_embeddings" in problem.remedy
    assert "blocks" not in problem.remedy
