"""The models of the command line: CIFAR ResNets, VGG-19, and any of timm's by name."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from spfde.app.data.images import DataSpec
from spfde.core.errors import InvalidArgument, Problem, nearest
from spfde.core.numbers import MOST_WIDTH, round_half_up

TIMM_PREFIX = "timm:"
# In channels_last, PyTorch 2.14 corrupts memory on the CPU in the backward pass of a 1x1 convolution with stride 2 and
# fewer input channels than this.
LEAST_STRIDED_CHANNELS = 8


class EveryOtherPixel(nn.Module):
    """Before a 1x1 convolution it stands in for the convolution's stride: the same outputs, and as many FLOPs.

    ``(N, C, H, W)`` to ``(N, C, ceil(H / stride), ceil(W / stride))``.
    """

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :, :: self.stride, :: self.stride]


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with batch norm and a shortcut; a 1x1 convolution with batch norm where the shape changes.

    ``(N, in_channels, H, W)`` to ``(N, out_channels, ceil(H / stride), ceil(W / stride))``.
    """

    def __init__(self, in_channels: int, out_channels: int, *, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.downsample = _shortcut(in_channels, out_channels, stride)
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu1(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        result: Tensor = self.relu2(out + self.downsample(x))
        return result


class CifarResNet(nn.Module):
    """The CIFAR ResNet of He et al. (2016), section 4.2: a 3x3 stem and three stages of ``n`` basic blocks.

    The weighted layers are 6n + 2 without the shortcuts. Departure: shortcuts that change the shape are 1x1
    convolutions with batch norm (the original's option B; its CIFAR experiments pad with zeros). ``widths`` are the
    channels of the stages; the stem has the first.
    """

    def __init__(self, n: int, widths: tuple[int, int, int], *, num_classes: int, in_channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, widths[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.relu = nn.ReLU()
        self.layer1 = _stage(n, widths[0], widths[0], stride=1)
        self.layer2 = _stage(n, widths[0], widths[1], stride=2)
        self.layer3 = _stage(n, widths[1], widths[2], stride=2)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(widths[2], num_classes)
        _kaiming(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.fc(self.flatten(self.pool(x)))
        return logits


def cifar_vgg(
    stages: tuple[tuple[int, int], ...], *, num_classes: int, in_channels: int, width: float = 1.0
) -> nn.Sequential:
    """VGG with batch norm for small images: convolutions, global average, one linear layer.

    Departure from Simonyan and Zisserman (2015): no hidden linear layers, as is usual on CIFAR, and no fifth
    max-pooling, which the global average replaces (so that 28-pixel images pass too). ``stages`` are the channels and
    the number of 3x3 convolutions of each; between them are 2x2 max-poolings. ``width`` is a factor on the channels.
    """
    layers: list[nn.Module] = []
    channels = in_channels
    for position, (of_stage, convolutions) in enumerate(stages):
        if position > 0:
            layers.append(nn.MaxPool2d(2))
        own = scaled(of_stage, width)
        for _ in range(convolutions):
            layers += [nn.Conv2d(channels, own, 3, padding=1, bias=False), nn.BatchNorm2d(own), nn.ReLU()]
            channels = own
    model = nn.Sequential()
    model.add_module("features", nn.Sequential(*layers))
    model.add_module("pool", nn.AdaptiveAvgPool2d(1))
    model.add_module("flatten", nn.Flatten())
    model.add_module("classifier", nn.Linear(channels, num_classes))
    _kaiming(model)
    return model


def cifar_resnet(
    n: int, widths: tuple[int, int, int], *, num_classes: int, in_channels: int, width: float = 1.0
) -> CifarResNet:
    """``CifarResNet`` with so many times the channels."""
    first, second, third = (scaled(channels, width) for channels in widths)
    return CifarResNet(n, (first, second, third), num_classes=num_classes, in_channels=in_channels)


def scaled(channels: int, width: float) -> int:
    """So many times the channels, in whole ones: the nearest number, and one at least."""
    return max(1, round_half_up(channels * width))


def _shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
    if stride == 1 or in_channels >= LEAST_STRIDED_CHANNELS:
        convolution = nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False)
        return nn.Sequential(convolution, nn.BatchNorm2d(out_channels))
    convolution = nn.Conv2d(in_channels, out_channels, 1, bias=False)
    return nn.Sequential(EveryOtherPixel(stride), convolution, nn.BatchNorm2d(out_channels))


def _stage(n: int, in_channels: int, out_channels: int, *, stride: int) -> nn.Sequential:
    first = BasicBlock(in_channels, out_channels, stride=stride)
    return nn.Sequential(first, *(BasicBlock(out_channels, out_channels) for _ in range(n - 1)))


def _kaiming(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


MODELS: dict[str, Callable[..., nn.Module]] = {
    "resnet8": partial(cifar_resnet, 1, (16, 32, 64)),
    "resnet20": partial(cifar_resnet, 3, (16, 32, 64)),
    "resnet32": partial(cifar_resnet, 5, (32, 64, 128)),  # the paper's doubled widths
    "vgg19": partial(cifar_vgg, ((64, 2), (128, 2), (256, 4), (512, 4), (512, 4))),
}
"""The built-in models by name, called with num_classes= and in_channels=, and with width= where it is not 1."""
SMALLEST = {"vgg19": 16}
"""Least height and width of an image, where a model cannot take any."""


def build_model(
    name: str,
    *,
    num_classes: int,
    in_channels: int,
    image_size: int | tuple[int, int],
    width: float = 1.0,
    seed: int | None = None,
) -> nn.Module:
    """Build a freshly initialised model.

    Args:
        name: a key of ``MODELS``, or ``timm:NAME``.
        num_classes: number of outputs.
        in_channels: channels of the images.
        image_size: height and width of the images, or one number for both.
        width: factor on the channels of a built-in model, which are rounded to whole ones.
        seed: with a seed the initial weights depend on it alone and the global generator is left as it was;
            without, they are drawn from the global generator, as PyTorch's layers do.

    Raises:
        InvalidArgument: the name is unknown, timm is missing, the model does not take such images, or a width is given
            for a model of timm.

    Example:
        >>> from spfde.app.train.models import build_model
        >>> build_model("resnet8", num_classes=10, in_channels=3, image_size=32, width=0.5).fc
        Linear(in_features=32, out_features=10, bias=True)
    """
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    check_model(name, width)
    if not 0 < width <= MOST_WIDTH:
        remedy = "Expected: factor on the channels of a built-in model."
        raise InvalidArgument(Problem("width", width, f"is not above 0 and up to {MOST_WIDTH:g}", remedy))
    if min(size) < SMALLEST.get(name, 1):
        rule = f"is too small for {name}, which needs at least {SMALLEST.get(name, 1)} pixels each way"
        raise InvalidArgument(Problem("image_size", image_size, rule, "Choose a ResNet or larger images."))
    build = MODELS.get(name) or partial(_build_timm, name, size)
    with torch.random.fork_rng(devices=[], enabled=seed is not None):
        if seed is not None:
            torch.default_generator.manual_seed(seed)
        return build(num_classes=num_classes, in_channels=in_channels, **({} if width == 1 else {"width": width}))


def build_for(name: str, spec: DataSpec, *, width: float, seed: int | None = None) -> nn.Module:
    """The model of that name for such data, see ``build_model``."""
    return build_model(
        name,
        num_classes=spec.num_classes,
        in_channels=spec.channels,
        image_size=spec.image_size,
        width=width,
        seed=seed,
    )


def check_model(name: str, width: float = 1.0) -> None:
    """Raise ``InvalidArgument`` for a name that is no model's, or a width that it cannot have.

    Names of timm's models are looked up when they are built.
    """
    if width != 1 and name.startswith(TIMM_PREFIX):
        rule = f"is for built-in models, and {name} has channels of its own, of which nothing is known here"
        raise InvalidArgument(
            Problem("width", width, rule, "Leave it out, and choose a wider or narrower one of timm.")
        )
    if name not in MODELS and not name.startswith(TIMM_PREFIX):
        known = [*MODELS, f"{TIMM_PREFIX}NAME"]
        raise InvalidArgument(Problem("model", name, "is no known model", nearest(name, known)))


def pretrained_timm(name: str, image_size: tuple[int, int], *, in_channels: int) -> dict[str, Tensor]:
    """The pretrained state of timm's model of that name, with its own classes; downloaded where it is not here yet.

    The global generator is left as it was.

    Raises:
        InvalidArgument: there is no such model, it has no such weights, or they cannot be downloaded.
    """
    _check_timm(name)
    with torch.random.fork_rng(devices=[]):
        try:
            return _create_timm(name, image_size, pretrained=True, in_chans=in_channels).state_dict()
        except Exception as error:  # of timm, of the hub, and of the network
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            rule = f"{name} cannot be had with such weights: {reason}"
            remedy = "They are downloaded once: see that the network is there, or give a file of weights."
            raise InvalidArgument(Problem("weights", "pretrained", rule, remedy)) from error


def _build_timm(name: str, size: tuple[int, int], *, num_classes: int, in_channels: int) -> nn.Module:
    _check_timm(name)
    try:
        return _create_timm(name, size, pretrained=False, num_classes=num_classes, in_chans=in_channels)
    except Exception as error:
        rule = f"cannot be built for {in_channels} x {size[0]} x {size[1]} images: {error}"
        remedy = "Choose another model of timm or another image size."
        raise InvalidArgument(Problem("model", name, rule, remedy)) from error


def _check_timm(name: str) -> None:
    """Raise ``InvalidArgument`` where timm or its model of that name is not there."""
    try:
        import timm  # seconds to import, and an extra
    except ImportError as error:
        remedy = "Install it: pip install 'spfde[vision]'."
        raise InvalidArgument(Problem("model", name, "needs the package timm", remedy)) from error
    wanted = name.removeprefix(TIMM_PREFIX)
    if not timm.is_model(wanted):
        # timm knows more than a thousand models: the nearest one is useful, the whole list is not.
        near = difflib.get_close_matches(wanted.lower(), timm.list_models(), n=1, cutoff=0.5)
        hint = f"Did you mean '{TIMM_PREFIX}{near[0]}'? " if near else ""
        remedy = f"{hint}See timm.list_models() for all names."
        raise InvalidArgument(Problem("model", name, "is no model of timm", remedy))


def _create_timm(name: str, size: tuple[int, int], **settings: Any) -> nn.Module:
    import timm

    create = partial(timm.create_model, name.removeprefix(TIMM_PREFIX), **settings)
    model: nn.Module
    try:
        model = create(img_size=size)
    except TypeError as error:
        # Models whose weights do not depend on the size (most convolutional ones) have no such argument.
        if "img_size" not in str(error):
            raise
        model = create()
    return model
