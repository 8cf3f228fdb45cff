"""Linear layers on tokens: the same kernels, as convolutions of single pixels."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from helpers.native import assert_same_step, needs_kernels, random_masks, twin
from spfde.app.train.models import build_model
from spfde.engines.native.graph import capture

pytestmark = needs_kernels


def check(model: nn.Module, x: Tensor, *, density: float = 0.3, n_steps: int = 2) -> None:
    model = model.double()
    masks = random_masks(model, density)
    reference, engine = twin(model, masks)
    for _ in range(n_steps):
        assert_same_step(model, reference, masks, x.double())
    engine.detach()


class Block(nn.Module):
    """A transformer's feed-forward half, with what lies around it."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.act, self.drop = nn.GELU(), nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.drop(self.act(self.up(self.norm(x)))))


def test_a_hand_worked_linear_layer_comes_out() -> None:
    layer = nn.Linear(2, 2).double()
    layer.weight.data.copy_(torch.tensor([[2.0, 0.0], [0.0, -1.0]]))
    layer.bias.data.copy_(torch.tensor([1.0, 0.0]))
    model = nn.Sequential(layer)
    twin(model, {"0.weight": layer.weight != 0})
    x = torch.tensor([[1.0, 5.0], [3.0, 7.0], [0.0, 1.0]], dtype=torch.float64, requires_grad=True)
    out = model(x)
    assert out.tolist() == [[3.0, -5.0], [7.0, -7.0], [1.0, -1.0]]
    out.sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [[2.0, -1.0]] * 3
    assert layer.weight.grad is not None
    assert layer.weight.grad.tolist() == [[4.0, 0.0], [0.0, 13.0]]
    assert layer.bias.grad is not None
    assert layer.bias.grad.tolist() == [3.0, 3.0]


@settings(max_examples=25, deadline=None)
@given(
    leading=st.lists(st.integers(1, 12), min_size=1, max_size=3),
    sizes=st.tuples(st.integers(1, 20), st.integers(1, 20), st.integers(1, 20)),
    density=st.sampled_from([0.0, 0.05, 0.5, 1.0]),
    act=st.sampled_from([nn.ReLU, nn.GELU, nn.SiLU, nn.ReLU6]),
    bias=st.booleans(),
)
def test_any_chain_of_linear_layers_equals_pytorchs(
    leading: list[int], sizes: tuple[int, int, int], density: float, act: type[nn.Module], bias: bool
) -> None:
    model = nn.Sequential(
        nn.Linear(sizes[0], sizes[1], bias=bias), act(), nn.Dropout(0.0), nn.Linear(sizes[1], sizes[2], bias=bias)
    )
    check(model, torch.randn(*leading, sizes[0]), density=density, n_steps=1)


def test_a_feed_forward_block_is_one_region_and_the_norm_stays_in_pytorch() -> None:
    model = Block()
    captured = capture(model, torch.randn(3, 23, 6), {"up.weight", "down.weight"})
    assert [[node.kind for node in region.ops] for region in captured.regions] == [["linear", "act", "linear"]]
    assert captured.left == ("norm (LayerNorm)", "add")
    check(model, torch.randn(3, 23, 6))


def test_a_linear_layer_that_is_not_sparse_stays_in_pytorch() -> None:
    captured = capture(Block(), torch.randn(3, 23, 6), {"up.weight"})
    assert [[node.kind for node in region.ops] for region in captured.regions] == [["linear", "act"]]
    assert "down (Linear; its weight is not sparse)" in captured.left


def test_tokens_that_are_not_contiguous_are_read_as_they_are() -> None:
    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(5, 7), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x).transpose(1, 2))

    check(Turned(), torch.randn(2, 4, 5))


def test_images_become_tokens_and_the_two_do_not_share_a_region() -> None:
    class Patches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 6, 2, 2), nn.Linear(6, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(torch.relu(self.conv(x)).flatten(2).transpose(1, 2))

    model = Patches()
    regions = capture(model, torch.randn(1, 3, 8, 8), {"fc.weight"}).regions
    assert [region.is_tokens for region in regions] == [False, True]
    check(model, torch.randn(3, 3, 8, 8))


def test_a_vision_transformer_of_timm_trains_as_in_pytorch() -> None:
    model = build_model("timm:vit_tiny_patch16_224", num_classes=4, in_channels=3, image_size=(32, 32), seed=0)
    sparse = {name for name, p in model.named_parameters() if p.dim() == 2 and "blocks.0." in name}
    regions = capture(model, torch.zeros(1, 3, 32, 32), sparse).regions
    assert sum(node.kind == "linear" for region in regions for node in region.ops) == 4
    model = model.double()
    masks = {name: mask for name, mask in random_masks(model, 0.2).items() if name in sparse}
    reference, engine = twin(model, masks)
    assert_same_step(model, reference, masks, torch.randn(2, 3, 32, 32).double())
    engine.detach()
