import pytest
import torch
from torch import nn

from spfde.core.errors import InvalidArgument
from spfde.sparsity import StaticSparse
from spfde.sparsity.layers import select_layers


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 4)
        self.body = nn.ModuleDict(
            {"conv": nn.Conv2d(3, 8, 3), "up": nn.ConvTranspose2d(8, 8, 2), "norm": nn.BatchNorm2d(8)}
        )
        self.line = nn.Conv1d(8, 8, 3)
        self.volume = nn.Conv3d(1, 2, 3)
        self.attention = nn.MultiheadAttention(8, 2)
        self.cross = nn.MultiheadAttention(8, 2, kdim=4, vdim=6)
        self.words = nn.Embedding(10, 8)
        self.scale = nn.Parameter(torch.ones(3, 3))


ORDER = [
    "body.conv.weight",
    "body.up.weight",
    "body.norm.weight",
    "words.weight",
    "scale",
    "line.weight",
    "attention.in_proj_weight",
    "attention.in_proj_bias",
    "attention.out_proj.weight",
    "cross.q_proj_weight",
    "cross.k_proj_weight",
    "cross.v_proj_weight",
    "cross.out_proj.weight",
    "head.weight",
    "head.bias",
]


def _select(model: nn.Module | None = None, **fields: object) -> list[str]:
    method = StaticSparse(**{"sparsity": 0.9, **fields})
    model = model or Net()
    order = ORDER if isinstance(model, Net) else [name for name, _ in model.named_parameters()]
    return list(select_layers(model, method, order=order, head=["head.weight", "head.bias"]))


def test_weights_that_run_are_selected_in_order_without_first_head_norms_biases_and_embeddings() -> None:
    assert _select() == [
        "body.up.weight",
        "line.weight",
        "attention.in_proj_weight",
        "attention.out_proj.weight",
        "cross.q_proj_weight",
        "cross.k_proj_weight",
        "cross.v_proj_weight",
        "cross.out_proj.weight",
    ]


def test_first_and_head_can_be_masked_on_request() -> None:
    assert _select(dense_first=False)[0] == "body.conv.weight"
    assert _select(dense_head=False)[-1] == "head.weight"


def test_patterns_restrict_the_selection() -> None:
    assert _select(include=("attention.*", "line.*")) == [
        "line.weight",
        "attention.in_proj_weight",
        "attention.out_proj.weight",
    ]
    assert _select(include=("attention.*",), exclude=("*.out_proj.*",)) == ["attention.in_proj_weight"]


def test_patterns_that_match_nothing_are_named_together_with_the_nearest() -> None:
    with pytest.raises(InvalidArgument) as caught:
        _select(include=("lin.weight",), exclude=("*.downsample.*",), overrides={"wrods.weight": 0.5})
    assert [(p.argument, p.value) for p in caught.value.problems] == [
        ("include", "lin.weight"),
        ("exclude", "*.downsample.*"),
        ("overrides", "wrods.weight"),
    ]
    assert "Did you mean 'line.weight'?" in str(caught.value)


def test_an_override_of_a_layer_that_stays_dense_is_refused() -> None:
    with pytest.raises(InvalidArgument, match=r"overrides.*dense_first"):
        _select(overrides={"body.conv.weight": 0.5})


def test_a_model_without_prunable_layers_is_refused() -> None:
    model = nn.Sequential(nn.Embedding(4, 4), nn.LayerNorm(4))
    with pytest.raises(InvalidArgument, match=r"model.*prunable"):
        _select(model)


def test_a_selection_that_leaves_nothing_is_refused() -> None:
    with pytest.raises(InvalidArgument, match=r" 1 prunable"):
        _select(nn.Sequential(nn.Linear(4, 4)))


def test_sparsity_zero_selects_nothing_and_needs_nothing() -> None:
    assert _select(sparsity=0.0) == []
    assert _select(nn.Sequential(nn.LayerNorm(4)), sparsity=0.0) == []


def test_an_override_makes_a_dense_method_sparse() -> None:
    assert "line.weight" in _select(sparsity=0.0, overrides={"line.*": 0.5})


def test_a_weight_shared_with_an_embedding_is_never_masked() -> None:
    model = nn.ModuleDict(
        {"first": nn.Linear(4, 4), "words": nn.Embedding(9, 4), "mid": nn.Linear(4, 4), "out": nn.Linear(4, 9)}
    )
    model["out"].weight = model["words"].weight
    method = StaticSparse(sparsity=0.5)
    order = ["first.weight", "words.weight", "out.weight", "mid.weight"]
    assert list(select_layers(model, method, order=order, head=[])) == ["mid.weight"]


def test_weights_that_do_not_learn_are_left_alone() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight.requires_grad_(False)
    assert _select(model) == ["2.weight"]


class Separable(nn.Sequential):
    """Convolutions that are depthwise (two of them), grouped, and plain."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 8, 3),
            nn.Conv2d(8, 8, 3, groups=8),
            nn.Conv2d(8, 8, 3, groups=4),
            nn.ConvTranspose2d(8, 16, 2, groups=8),
            nn.Conv2d(16, 8, 1),
            nn.Conv1d(8, 1, 1),
            nn.Conv1d(1, 4, 1),
        )


def test_depthwise_convolutions_stay_dense_and_other_groups_are_masked() -> None:
    assert _select(Separable()) == ["2.weight", "4.weight", "5.weight", "6.weight"]


def test_depthwise_convolutions_are_masked_where_include_names_them() -> None:
    assert _select(Separable(), include=("1.*", "4.*")) == ["1.weight", "4.weight"]
    assert _select(Separable(), include=("*",), exclude=("3.*", "5.*", "6.*")) == ["1.weight", "2.weight", "4.weight"]


def test_an_override_of_a_depthwise_convolution_says_how_to_mask_it() -> None:
    with pytest.raises(InvalidArgument, match=r"overrides.*depthwise.*include"):
        _select(Separable(), overrides={"1.weight": 0.5})


def test_a_parametrised_weight_is_left_alone() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), nn.Linear(4, 4))
    assert _select(model) == ["2.weight"]
