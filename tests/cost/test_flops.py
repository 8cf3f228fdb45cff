from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from spfde.cost.flops import ModelCost, model_cost
from spfde.model.trace import trace


def cost_of(model: nn.Module, *shape: int) -> ModelCost:
    sample = torch.zeros(shape)
    return model_cost(trace(model, sample), model)


def small_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 4, 3, stride=2, padding=1),
        nn.Flatten(),
        nn.Linear(4 * 3 * 3, 10),
    )


class SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attention(x, x, x)[0]


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.body = nn.Linear(6, 6)
        self.head = nn.Linear(6, 11)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(self.body(self.embedding(tokens))))


def test_a_small_convolutional_net_costs_what_it_costs_by_hand() -> None:
    cost = cost_of(small_net(), 2, 3, 6, 6)
    # 2 x (output positions) x (output channels) x (inputs of one output)
    by_hand = {"0.weight": 2 * 36 * 8 * 27, "3.weight": 2 * 9 * 4 * 72, "5.weight": 2 * 36 * 10}
    assert {layer.name: layer.forward_flops for layer in cost.layers} == by_hand
    assert [layer.numel for layer in cost.layers] == [216, 288, 360]
    assert [layer.activations for layer in cost.layers] == [8 * 36, 4 * 9, 10]
    assert cost.forward_flops == sum(by_hand.values())
    assert cost.n_parameters == 216 + 16 + 288 + 4 + 360 + 10


def test_modules_that_are_not_counted_are_listed() -> None:
    assert cost_of(small_net(), 2, 3, 6, 6).uncounted == {"BatchNorm2d": 1, "Flatten": 1, "ReLU": 1}


def test_groups_divide_the_cost_of_a_convolution() -> None:
    (layer,) = cost_of(nn.Conv2d(4, 8, 3, stride=2, padding=1, groups=2), 2, 4, 6, 6).layers
    assert layer.forward_flops == 2 * 9 * 8 * (2 * 9)
    assert layer.numel == 8 * 2 * 9


def test_a_transposed_convolution_counts_the_uses_of_its_input() -> None:
    (layer,) = cost_of(nn.ConvTranspose2d(4, 8, 3, stride=2), 2, 4, 6, 6).layers
    assert layer.forward_flops == 2 * 36 * 4 * (8 * 9)


def test_attention_counts_projections_and_both_products() -> None:
    tokens, width, heads = 5, 8, 2
    cost = cost_of(SelfAttention(), 3, tokens, width)
    assert [(layer.name, layer.forward_flops, layer.weighted) for layer in cost.layers] == [
        ("attention.in_proj_weight", 2 * tokens * width * 3 * width, True),
        ("attention:bmm", 2 * heads * tokens * tokens * (width // heads), False),
        ("attention:bmm#2", 2 * heads * tokens * tokens * (width // heads), False),
        ("attention.out_proj.weight", 2 * tokens * width * width, True),
    ]
    assert [layer.activations for layer in cost.layers] == [5 * 24, 2 * 25, 5 * 8, 5 * 8]


def test_a_weight_used_twice_is_one_layer_with_both_costs() -> None:
    model = Tied()
    cost = model_cost(trace(model, torch.zeros(2, 4, dtype=torch.long)), model)
    layers = {layer.name: layer for layer in cost.layers}
    assert list(layers) == ["body.weight", "embedding.weight"]
    assert layers["body.weight"].forward_flops == 2 * (2 * 4 * 6 * 6)
    assert layers["body.weight"].activations == 2 * (4 * 6)
    assert layers["embedding.weight"].module == "head"
    assert layers["embedding.weight"].forward_flops == 2 * 4 * 6 * 11
    assert cost.n_parameters == 11 * 6 + (36 + 6) + 11


def test_a_parameter_that_is_the_input_of_a_product_is_not_its_weight() -> None:
    class Query(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query = nn.Parameter(torch.randn(5, 6))
            self.project = nn.Linear(6, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.project(self.query).T

    cost = cost_of(Query(), 3, 4)
    assert [layer.name for layer in cost.layers] == ["project.weight", ":mm"]
    # The projection does not depend on the batch: 240 FLOPs once, spread over three samples.
    assert [layer.forward_flops for layer in cost.layers] == [80, 2 * 4 * 5]


def test_densities_follow_the_weights_and_products_stay_dense() -> None:
    cost = cost_of(SelfAttention(), 1, 5, 8)
    assert cost.densities({"attention.in_proj_weight": 0.25, "unused.weight": 0.5}) == (0.25, 1.0, 1.0, 1.0)


@pytest.mark.parametrize("model_and_shape", [(small_net, (2, 3, 6, 6)), (SelfAttention, (3, 5, 8))])
@pytest.mark.parametrize("input_needs_gradient", [True, False])
def test_three_forward_passes_equal_what_autograd_executes_but_for_the_first_input_gradient(
    model_and_shape: tuple[type[nn.Module], tuple[int, ...]], input_needs_gradient: bool
) -> None:
    build, shape = model_and_shape
    model = build()
    cost = cost_of(model, *shape)
    with FlopCounterMode(display=False) as counter:
        model(torch.randn(shape, requires_grad=input_needs_gradient)).square().mean().backward()
    skipped = 0 if input_needs_gradient else cost.layers[0].forward_flops
    assert counter.get_total_flops() == shape[0] * (3 * cost.forward_flops - skipped)


def test_resnet50_at_224_pixels_costs_what_the_literature_says() -> None:
    class Bottleneck(nn.Module):
        def __init__(self, inputs: int, width: int, stride: int) -> None:
            super().__init__()
            self.reduce = nn.Conv2d(inputs, width, 1, bias=False)
            self.conv = nn.Conv2d(width, width, 3, stride, 1, bias=False)
            self.expand = nn.Conv2d(width, 4 * width, 1, bias=False)
            plain = stride == 1 and inputs == 4 * width
            self.shortcut = nn.Identity() if plain else nn.Conv2d(inputs, 4 * width, 1, stride, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.relu(self.expand(F.relu(self.conv(F.relu(self.reduce(x))))) + self.shortcut(x))

    blocks = [
        (width, stride if i == 0 else 1)
        for width, n, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2))
        for i in range(n)
    ]
    inputs = [64, *(4 * width for width, _ in blocks)]
    with torch.device("meta"):
        model = nn.Sequential(
            nn.Conv2d(3, 64, 7, 2, 3, bias=False),
            nn.MaxPool2d(3, 2, 1),
            *itertools.starmap(Bottleneck, ((i, w, s) for i, (w, s) in zip(inputs, blocks, strict=False))),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(2048, 1000),
        )
    cost = cost_of(model, 1, 3, 224, 224)
    assert cost.forward_flops == 2 * 4_089_184_256
    assert len(cost.layers) == 54
