from __future__ import annotations

import pickle

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from spfde.app.train.models import MODELS, BasicBlock, EveryOtherPixel, build_model
from spfde.core.errors import InvalidArgument

OF_EARLIER_VERSIONS = {
    "resnet8": 4762.908400086701,
    "resnet20": 15448.950250729808,
    "resnet32": 72854.85495552963,
    "vgg19": 357477.54770805535,
}
"""Sums of the absolute initial weights of seed 0."""


def _build(name: str, *, image_size: int | tuple[int, int] = 32, channels: int = 3, classes: int = 10) -> nn.Module:
    return build_model(name, num_classes=classes, in_channels=channels, image_size=image_size, seed=0)


def _weighted(model: nn.Module) -> int:
    return sum(isinstance(module, nn.Conv2d | nn.Linear) for module in model.modules())


def test_resnet8_has_the_hand_counted_number_of_parameters() -> None:
    # stem 27*16; stage 1: 2*9*16*16; stage 2: 9*16*32 + 9*32*32 + 16*32; stage 3: 9*32*64 + 9*64*64 + 32*64
    convolutions = 432 + 4608 + (4608 + 9216 + 512) + (18432 + 36864 + 2048)
    norms = 2 * (3 * 16 + 3 * 32 + 3 * 64)  # weight and bias; stages 2 and 3 have one more on the shortcut
    head = 64 * 10 + 10
    assert sum(parameter.numel() for parameter in _build("resnet8").parameters()) == convolutions + norms + head


@pytest.mark.parametrize(("name", "layers", "shortcuts"), [("resnet8", 8, 2), ("resnet20", 20, 2), ("resnet32", 32, 2)])
def test_a_resnet_has_as_many_weighted_layers_as_its_name_says_beside_the_shortcuts(
    name: str, layers: int, shortcuts: int
) -> None:
    assert _weighted(_build(name)) == layers + shortcuts


def test_vgg19_has_sixteen_convolutions_each_with_batch_norm_and_one_linear_layer() -> None:
    model = _build("vgg19")
    kinds = [type(module) for module in model.modules()]
    assert (kinds.count(nn.Conv2d), kinds.count(nn.BatchNorm2d), kinds.count(nn.Linear)) == (16, 16, 1)


def test_resnet32_has_the_papers_doubled_widths_and_training_flops() -> None:
    with torch.device("meta"):
        model = build_model("resnet32", num_classes=100, in_channels=3, image_size=32)
        images = torch.zeros(1, 3, 32, 32)
    with FlopCounterMode(display=False) as counter:
        model(images)
    # Stage 1: stem and 10 convolutions at 32x32; stages 2 and 3: one that widens, 9 more, and a 1x1 shortcut.
    macs = 27 * 32 * 1024 + 10 * 9 * 32 * 32 * 1024
    macs += (9 * 32 * 64 + 9 * 9 * 64 * 64 + 32 * 64) * 256 + (9 * 64 * 128 + 9 * 9 * 128 * 128 + 64 * 128) * 64
    macs += 128 * 100
    assert counter.get_total_flops() == 2 * macs
    assert 3 * 2 * macs * 160 * 50_000 == pytest.approx(1.32e16, rel=0.01)


@pytest.mark.parametrize("name", list(MODELS))
@pytest.mark.parametrize(("channels", "size"), [(1, (28, 28)), (3, (32, 32)), (4, (17, 24))])
def test_every_model_gives_one_logit_a_class_whatever_the_images(
    name: str, channels: int, size: tuple[int, int]
) -> None:
    model = _build(name, channels=channels, image_size=size, classes=7).eval()
    assert model(torch.randn(2, channels, *size)).shape == (2, 7)


@pytest.mark.parametrize("name", list(MODELS))
def test_every_model_survives_pickling(name: str) -> None:
    model = _build(name).eval()
    images = torch.randn(1, 3, 32, 32)
    assert torch.equal(pickle.loads(pickle.dumps(model))(images), model(images))


@pytest.mark.parametrize(
    ("name", "width", "channels"),
    [
        ("resnet8", 1.0, (16, 16, 16, 32, 32, 32, 64, 64, 64)),
        ("resnet8", 0.5, (8, 8, 8, 16, 16, 16, 32, 32, 32)),
        ("resnet8", 0.28, (4, 4, 4, 9, 9, 9, 18, 18, 18)),  # 4.48, 8.96, 17.92
        ("resnet8", 0.03, (1, 1, 1, 1, 1, 1, 2, 2, 2)),  # 0.48, 0.96, 1.92
        ("vgg19", 0.01, (1, 1, 1, 1, 3, 3, 3, 3, *[5] * 8)),
    ],
)
def test_a_width_is_a_factor_on_the_channels_in_whole_ones(name: str, width: float, channels: tuple[int, ...]) -> None:
    model = build_model(name, num_classes=10, in_channels=3, image_size=32, width=width, seed=0)
    found = [module.out_channels for module in model.modules() if isinstance(module, nn.Conv2d)]
    assert sorted(found) == sorted(channels)
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def test_at_width_1_a_model_is_what_it_was_before_there_were_widths() -> None:
    for name, expected in OF_EARLIER_VERSIONS.items():
        weights = _build(name).parameters()
        assert sum(float(weight.detach().double().abs().sum()) for weight in weights) == pytest.approx(
            expected, rel=1e-9
        )


def test_with_few_channels_every_other_pixel_stands_in_for_a_stride() -> None:
    # PyTorch's own corrupts memory then, see LEAST_STRIDED_CHANNELS.
    strided, stand_in = BasicBlock(8, 4, stride=2), BasicBlock(7, 4, stride=2)
    assert isinstance(strided.downsample, nn.Sequential)
    assert isinstance(stand_in.downsample, nn.Sequential)
    assert strided.downsample[0].stride == (2, 2)
    assert [type(module) for module in stand_in.downsample] == [EveryOtherPixel, nn.Conv2d, nn.BatchNorm2d]
    x = torch.randn(2, 7, 5, 6)
    convolution = stand_in.downsample[1]
    expected = nn.functional.conv2d(x, convolution.weight, stride=2)
    assert torch.allclose(convolution(stand_in.downsample[0](x)), expected, atol=1e-6)


@pytest.mark.parametrize("width", [0.0, -1.0, 33.0, float("nan")])
def test_a_width_out_of_its_range_is_refused(width: float) -> None:
    with pytest.raises(InvalidArgument, match=r"width=.*is not above 0 and up to 32"):
        build_model("resnet8", num_classes=10, in_channels=3, image_size=32, width=width)


def test_a_model_of_timm_takes_no_width() -> None:
    with pytest.raises(InvalidArgument, match=r"width=0.5: is for built-in models, and timm:resnet18 has channels"):
        build_model("timm:resnet18", num_classes=10, in_channels=3, image_size=32, width=0.5)


def test_convolutions_have_no_bias_and_kaiming_fan_out_weights() -> None:
    for module in _build("resnet20").modules():
        if isinstance(module, nn.Conv2d):
            assert module.bias is None
            fan_out = module.out_channels * module.kernel_size[0] * module.kernel_size[1]
            if module.weight.numel() > 4000:
                assert module.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.05)


def test_a_seed_fixes_the_weights_and_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    first, second = _build("resnet8"), _build("resnet8")
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    other = build_model("resnet8", num_classes=10, in_channels=3, image_size=32, seed=1)
    assert not torch.equal(next(first.parameters()), next(other.parameters()))


def test_without_a_seed_the_global_generator_decides() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        first = build_model("resnet8", num_classes=10, in_channels=3, image_size=32)
        second = build_model("resnet8", num_classes=10, in_channels=3, image_size=32)
    assert not torch.equal(next(first.parameters()), next(second.parameters()))


def test_an_unknown_model_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(InvalidArgument, match=r"model='resnet23'.*Did you mean 'resnet(20|32)'"):
        _build("resnet23")


def test_vgg19_refuses_images_that_its_pooling_would_use_up() -> None:
    with pytest.raises(InvalidArgument, match=r"image_size=15.*at least 16"):
        _build("vgg19", image_size=15)


class TestTimm:
    @pytest.fixture(autouse=True)
    def _needs_timm(self) -> None:
        pytest.importorskip("timm")

    def test_a_convolutional_model_is_built_for_the_channels_and_classes(self) -> None:
        model = _build("timm:resnet10t", channels=1, classes=5).eval()
        assert model(torch.randn(1, 1, 32, 32)).shape == (1, 5)

    def test_a_model_that_depends_on_the_image_size_is_built_for_it(self) -> None:
        model = _build("timm:vit_tiny_patch16_224", image_size=(32, 48), classes=5).eval()
        assert model(torch.randn(1, 3, 32, 48)).shape == (1, 5)
        assert model.pos_embed.shape[1] == 1 + 2 * 3

    def test_an_unknown_name_is_refused_with_the_nearest_but_not_with_a_thousand_names(self) -> None:
        with pytest.raises(InvalidArgument, match=r"Did you mean 'timm:vit_tiny_patch16_224'") as caught:
            _build("timm:vit_tiny_patch16_225")
        assert len(str(caught.value)) < 300

    @pytest.mark.filterwarnings("ignore:Initializing zero-element")
    def test_a_model_that_cannot_take_such_images_is_refused_with_the_reason(self) -> None:
        with pytest.raises(InvalidArgument, match=r"model='timm:gmlp_s16_224'.*cannot be built for 3 x 8 x 8"):
            _build("timm:gmlp_s16_224", image_size=8)
