"""Blocks in order of execution, and that any prefix of them can be frozen."""

from __future__ import annotations

from functools import partial

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

from helpers.models import Residual, SmallResNet, TextModel, UNet, Unit, Wrapped, images, mlp, partition
from spfde.core.errors import InvalidArgument
from spfde.model.blocks import Partition
from spfde.model.trace import trace


def names(found: Partition) -> list[str]:
    return [block.name for block in found.blocks]


def on_meta(build) -> nn.Module:
    """Real models without their memory. (Not timm's: before 1.0.21 it reads numbers while it builds.)"""
    with torch.device("meta"):
        return build()


def small_vit() -> nn.Module:
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=8, patch_size=4, embed_dim=12, depth=3, num_heads=3, num_classes=3
    )


def test_blocks_come_in_order_of_execution_though_they_were_defined_in_another():
    found = partition(SmallResNet(), images())
    assert names(found) == ["stage1.0", "stage1.1", "stage2.0", "stage2.1"]
    assert found.head.name == "head"
    assert [block.n_layers for block in found.blocks] == [3, 2, 3, 2]
    assert found.reason is None


def test_the_stem_and_its_norm_join_the_first_block():
    first = partition(SmallResNet(), images()).blocks[0]
    assert first.parameters[:3] == ("stem.weight", "norm.weight", "norm.bias")
    assert {"stem", "norm", "stage1.0.bn2"} <= set(first.modules)


def test_the_down_sampling_branch_belongs_to_its_block():
    third = partition(SmallResNet(), images()).blocks[2]
    assert "stage2.0.shortcut.0.weight" in third.parameters
    assert "stage2.0.shortcut.1" in third.modules


def test_blocks_and_head_tile_the_trace_and_share_no_parameter():
    for model, sample in [
        (SmallResNet(), images()),
        (UNet(), images()),
        (mlp(), images(size=2)),
        (Wrapped(), torch.zeros(2, 4)),
    ]:
        traced = trace(model, sample)
        found = partition(model, sample)
        parts = [*found.blocks, found.head]
        assert [part.start for part in parts] == [0, *(part.stop for part in parts[:-1])]
        assert parts[-1].stop == len(traced.ops)
        parameters = [name for part in parts for name in part.parameters]
        assert sorted(parameters) == sorted(name for name, _ in model.named_parameters())
        for part in parts:
            read = {name for op in traced.ops[part.start : part.stop] for name in op.parameters}
            assert read == set(part.parameters)


@pytest.mark.parametrize(
    ("build", "size", "n_blocks", "first", "last", "head"),
    [
        (partial(on_meta, torchvision.models.resnet18), 64, 8, "layer1.0", "layer4.1", "fc"),
        (partial(on_meta, torchvision.models.resnet50), 64, 16, "layer1.0", "layer4.2", "fc"),
        (partial(on_meta, torchvision.models.vgg19_bn), 64, 18, "features.0", "classifier.3", "classifier.6"),
        (partial(on_meta, torchvision.models.mobilenet_v2), 64, 17, "features.1", "features.17", "classifier.1"),
        (partial(on_meta, torchvision.models.mobilenet_v3_small), 64, 11, "features.1", "features.11", "classifier.3"),
        (partial(on_meta, torchvision.models.convnext_tiny), 64, 18, "features.1.0", "features.7.2", "classifier.2"),
        (lambda: timm.create_model("vit_tiny_patch16_224"), 224, 12, "blocks.0", "blocks.11", "head"),
        (lambda: timm.create_model("convnext_atto"), 64, 12, "stages.0.blocks.0", "stages.3.blocks.1", "head.fc"),
    ],
    ids=["resnet18", "resnet50", "vgg19_bn", "mobilenet_v2", "mobilenet_v3", "convnext", "timm-vit", "timm-convnext"],
)
def test_the_blocks_of_known_models_are_those_of_their_papers(build, size, n_blocks, first, last, head):
    found = partition(build(), torch.zeros(2, 3, size, size))
    assert len(found.blocks) == n_blocks
    assert (found.blocks[0].name, found.blocks[-1].name) == (first, last)
    assert f"{head}.weight" in found.head.parameters


def test_the_down_sampling_norm_and_convolution_of_convnext_join_the_next_block():
    found = partition(on_meta(torchvision.models.convnext_tiny), torch.zeros(2, 3, 64, 64))
    fourth = found.blocks[3]
    assert fourth.name == "features.3.0"
    assert {"features.2.0.weight", "features.2.1.weight"} <= set(fourth.parameters)
    assert fourth.n_layers == 4


def test_the_norm_behind_a_convolution_of_a_plain_chain_belongs_to_that_convolution():
    found = partition(on_meta(torchvision.models.vgg11_bn), torch.zeros(2, 3, 64, 64))
    assert found.blocks[1].parameters == (
        "features.4.weight",
        "features.4.bias",
        "features.5.weight",
        "features.5.bias",
    )


def test_position_and_class_embeddings_of_a_vision_transformer_join_the_stem():
    found = partition(small_vit(), images())
    assert {"cls_token", "pos_embed", "patch_embed.proj.weight"} <= set(found.blocks[0].parameters)


def test_a_norm_without_parameters_is_found_in_its_block():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4, affine=False),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3),
        nn.Flatten(),
        nn.Linear(64, 2),
    )
    found = partition(model, images())
    assert "1" in found.blocks[0].modules
    assert "1" not in found.blocks[1].modules


def test_a_unet_has_its_blocks_in_order_and_the_lifting_layers_join_the_next_block():
    found = partition(UNet(), images())
    assert names(found) == ["down1", "down2", "bottom", "up2", "up1"]
    assert "lift2.weight" in found.blocks[3].parameters
    assert found.head.parameters == ("out.weight", "out.bias")


def test_a_plain_mlp_has_a_block_for_each_layer_but_the_last():
    found = partition(mlp(), images(size=2))
    assert names(found) == ["1", "4"]
    assert found.blocks[0].parameters == ("1.weight", "1.bias", "2.weight", "2.bias")
    assert found.head.name == "6"


def test_a_trunk_in_one_submodule_is_opened():
    found = partition(Wrapped(), torch.zeros(2, 4))
    assert names(found) == ["backbone.first", "backbone.second", "backbone.third"]
    assert found.head.name == "classifier"


def test_attention_is_not_taken_apart():
    model = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 8, batch_first=True), nn.Linear(8, 2))
    found = partition(model, torch.zeros(2, 5, 8))
    assert found.blocks[0].parameters[:4] == (
        "0.self_attn.in_proj_weight",
        "0.self_attn.in_proj_bias",
        "0.self_attn.out_proj.weight",
        "0.self_attn.out_proj.bias",
    )


def test_an_untied_text_model_has_its_encoder_layers_for_blocks():
    found = partition(TextModel(tied=False), torch.zeros(2, 5, dtype=torch.long))
    assert names(found) == ["encoder.layers.0", "encoder.layers.1", "encoder.layers.2"]
    assert {"tokens.weight", "positions"} <= set(found.blocks[0].parameters)


def test_a_head_tied_to_the_embedding_leaves_no_block_and_the_reason_names_the_parameter():
    found = partition(TextModel(tied=True), torch.zeros(2, 5, dtype=torch.long))
    assert found.blocks == ()
    assert found.reason is not None
    assert "'tokens.weight'" in found.reason


def test_layers_that_share_a_weight_become_one_block():
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.d, self.e = (nn.Linear(4, 4) for _ in range(5))

        def forward(self, x: Tensor) -> Tensor:
            return self.e(self.d(self.b(self.c(self.b(self.a(x))))))

    found = partition(Shared(), torch.zeros(2, 4))
    assert names(found) == ["a", "b + c", "d"]


def test_a_model_of_one_layer_has_no_block_and_says_so():
    found = partition(nn.Linear(3, 2), torch.zeros(2, 3))
    assert found.blocks == ()
    assert found.reason == "it has a single layer, which is the head"


def test_unused_parameters_are_in_no_block():
    model = SmallResNet()
    model.extra = nn.Linear(2, 2)
    found = partition(model, images())
    assert not any("extra" in name for part in [*found.blocks, found.head] for name in part.parameters)


def test_named_blocks_are_taken_and_the_rest_is_the_head():
    found = partition(SmallResNet(), images(), ("stage1", "stage2.0"))
    assert names(found) == ["stage1", "stage2.0"]
    assert [block.n_layers for block in found.blocks] == [5, 3]
    assert "stem.weight" in found.blocks[0].parameters
    assert "stage2.1.conv1.weight" in found.head.parameters


class Numbered(nn.Module):
    """Six convolutions, told apart by the ends of their names alone, a norm between two of them, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.ModuleDict({f"{key}{n}": nn.Conv2d(3, 3, 1) for key in "ba" for n in range(3)})
        self.between, self.head = nn.BatchNorm2d(3), nn.Conv2d(3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        for key in ("a0", "a1", "a2", "b0", "b1", "b2"):
            x = self.layer[key](x)
            x = self.between(x) if key == "a1" else x
        return self.head(x)


def test_a_name_that_no_module_has_is_a_prefix_of_those_that_are_frozen_at_once():
    found = partition(Numbered(), images(), ("layer.a", "layer.b0"))
    assert names(found) == ["layer.a", "layer.b0"]
    assert [block.n_layers for block in found.blocks] == [3, 1]
    assert {"layer.a0.weight", "between.weight", "layer.a2.weight"} <= set(found.blocks[0].parameters)
    assert {"layer.a1", "between"} <= set(found.blocks[0].modules)
    assert found.head.parameters[0] == "layer.b1.weight"
    assert found.blocks[1].start == found.blocks[0].stop


def test_prefixes_whose_modules_run_interleaved_are_refused():
    model = nn.Sequential()
    for name in ("a0", "b0", "a1", "b1", "head"):
        model.add_module(name, nn.Conv2d(3, 3, 1))
    with pytest.raises(InvalidArgument, match="interleaved"):
        partition(model, images(), ("a", "b"))


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ((), "at least one"),
        (("stage1.", "stage"), r"'stage1\.': lies inside the block 'stage'"),
        (("stage9",), "Did you mean 'stage"),
        (("stage2", "stage1"), r"order of execution.*\('stage1', 'stage2'\)"),
        (("stage1", "stage1.0"), "lies inside the block 'stage1'"),
        (("stage1", "stage1"), "twice"),
        (("stage1", "head"), "no layer for the head"),
    ],
)
def test_named_blocks_that_cannot_be_are_refused_with_the_remedy(blocks, message):
    with pytest.raises(InvalidArgument, match=message):
        partition(SmallResNet(), images(), blocks)


def test_named_blocks_that_run_interleaved_are_refused():
    class Crossed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.out = Unit(3, 3), Unit(3, 3), nn.Conv2d(3, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.a(self.b(self.a(x))))

    with pytest.raises(InvalidArgument, match="interleaved"):
        partition(Crossed(), images(), ("a", "b"))


class Tied(nn.Module):
    """A language model in small: the output is read from the embedding."""

    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        self.embedding, self.layers = nn.Embedding(7, 4), nn.Sequential(Unit(4, 4), Unit(4, 4))
        self.head = nn.Linear(4, 7, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens).mT[..., None]
        return self.head(self.layers(x)[..., 0].mT)


TOKENS = torch.zeros(2, 5, dtype=torch.long)


def test_of_a_tied_head_the_remedy_is_no_names_of_blocks():
    assert "tie_word_embeddings" in str(partition(Tied(), TOKENS).remedy)
    assert "embedding.weight" in str(partition(Tied(), TOKENS).reason)
    assert names(partition(Tied(tied=False), TOKENS)) == ["layers.0", "layers.1"]


@pytest.mark.parametrize("blocks", [("layers.0",), ("layers.0", "layers.1"), ("layers",)])
def test_blocks_between_a_tied_embedding_and_its_head_are_refused_with_the_parameter(blocks):
    with pytest.raises(InvalidArgument) as caught:
        partition(Tied(), TOKENS, blocks)
    (problem,) = caught.value.problems
    assert "'embedding.weight'" in problem.rule
    assert "tie_word_embeddings" in problem.remedy
    assert "blocks" not in problem.remedy
    partition(Tied(tied=False), TOKENS, blocks)


def without_batch_norm(model: nn.Module) -> nn.Module:
    """Evaluation mode: a frozen and a trained BatchNorm compute the same."""
    return model.eval()


@pytest.mark.parametrize(
    ("model", "sample"),
    [
        (SmallResNet, images()),
        (UNet, images()),
        (mlp, images(size=2)),
        (Wrapped, torch.randn(3, 4)),
        (lambda: TextModel(tied=False), torch.arange(10).reshape(2, 5)),
        (small_vit, images()),
        (lambda: nn.Sequential(Residual(3, 4), Residual(4, 4), nn.Flatten(), nn.Linear(256, 2)), images()),
    ],
    ids=["resnet", "unet", "mlp", "wrapped", "text", "vit", "two-blocks"],
)
def test_freezing_any_prefix_cuts_the_backward_pass_and_leaves_the_other_gradients_equal(model, sample):
    torch.manual_seed(0)
    net = without_batch_norm(model())
    found = partition(net, sample)
    parameters = dict(net.named_parameters())
    _, whole, full_bytes = backward(net, sample)
    assert all(whole[name] is not None for name in parameters)
    frozen: set[str] = set()
    before = full_bytes
    for block in found.blocks:
        frozen |= set(block.parameters)
        for name in block.parameters:
            parameters[name].requires_grad_(False)
        leaves, grads, saved = backward(net, sample)
        assert leaves == {name for name in parameters if name not in frozen}
        assert all(grads[name] is None for name in frozen)
        for name in leaves:
            torch.testing.assert_close(grads[name], whole[name])
        assert saved < before
        before = saved


def backward(net: nn.Module, sample: Tensor) -> tuple[set[str], dict[str, Tensor | None], int]:
    """Parameters that the gradient functions reach, all gradients, and bytes of activations that are saved."""
    storages: dict[int, int] = {}
    held = {p.untyped_storage().data_ptr() for p in net.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in held:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = net(sample).square().mean()
    names_by_id = {id(p): name for name, p in net.named_parameters()}
    leaves, stack, seen = set(), [loss.grad_fn], set()
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            leaves.add(names_by_id[id(node.variable)])
        stack.extend(parent for parent, _ in node.next_functions)
    net.zero_grad()
    loss.backward()
    return leaves, {name: p.grad for name, p in net.named_parameters()}, sum(storages.values())
