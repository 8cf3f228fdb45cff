"""Fuzz the native engine's kernels under AddressSanitizer.

Usage: python scripts/fuzz_native.py [--rounds 200] [--seed 0] [--half]

Random models of one to four layers, with random shapes, strides, paddings, dilations, groups, masks (none, some, all,
whole rows empty), batches and poolings go forward and back twice, then some of the batch forward without gradients, and
must agree with PyTorch: in double precision, or with ``--half`` in bf16 under autocast, where the bound is what
rounding makes of PyTorch's own result. Any invalid access ends the process with the sanitizer's report. Needs g++ or
clang++ with its AddressSanitizer.
"""

from __future__ import annotations

import argparse
import copy
import os
import random
import subprocess
import sys

import torch
from torch import Tensor, nn

from spfde.engines.native import build, region_plan
from spfde.engines.native.kernels import Kernels
from spfde.engines.native.model import NativeModel

_CHILD = "SPFDE_FUZZ_CHILD"
_TOLERANCE = 1e-9
_ROUNDING = 0.05  # in bf16, of what is expected


def main(argv: list[str] | None = None) -> int:
    """Start over with the sanitizer's runtime loaded first, then fuzz."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--half", action="store_true")
    options = parser.parse_args(argv)
    if _CHILD not in os.environ:
        compiler = os.environ.get("CXX", "g++")
        environment = {
            **os.environ,
            _CHILD: "1",
            # The sanitizer looks for the functions that throw when it is loaded: PyTorch throws.
            "LD_PRELOAD": " ".join(_runtime(compiler, name) for name in ("libasan.so", "libstdc++.so.6")),
            "ASAN_OPTIONS": "detect_leaks=0",
            "SPFDE_CXXFLAGS": f"{os.environ.get('SPFDE_CXXFLAGS', '')} {_quickly_compiled(compiler)}",
        }
        command = [sys.executable, __file__, "--rounds", str(options.rounds), "--seed", str(options.seed)]
        command += ["--half"] * options.half
        return subprocess.run(command, env=environment, check=False).returncode
    os.environ.pop("LD_PRELOAD", None)  # it is loaded; the compiler would be thrice as slow with it
    dtype = torch.float32 if options.half else torch.float64
    kernels = Kernels(build.load(real="float" if options.half else "double", sanitize=True), dtype)
    chosen = random.Random(options.seed)
    torch.manual_seed(options.seed)
    for number in range(options.rounds):
        tell = fuzz(kernels, chosen)
        if tell is not None:
            print(f"round {number}: {tell}", file=sys.stderr)
            return 1
    print(f"{options.rounds} rounds, no fault")
    return 0


def fuzz(kernels: Kernels, chosen: random.Random) -> str | None:
    """One model; what is wrong with it, or None."""
    region_plan.AT_ONCE_BYTES = chosen.choice([0, 3 << 20])
    tokens = chosen.random() < 0.25
    model, x = _tokens(chosen) if tokens else _images(chosen)
    half = kernels.dtype == torch.float32
    model, x = model.to(kernels.dtype).train(chosen.random() < 0.7), x.to(kernels.dtype)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 0.1  # a channel without active weights is constant: rounding must not grow in it,
            if module.affine:
                module.bias.data.normal_()  # nor choose a side of the activation's corner
    masks = {name: _mask(p, chosen) for name, p in model.named_parameters() if p.dim() in (2, 4)}
    for name, parameter in model.named_parameters():
        if name in masks:
            parameter.data.mul_(masks[name])
        parameter.requires_grad_(chosen.random() < 0.9)
    frozen = chosen.choice([0, 0, 0, chosen.randint(1, len(model))])
    for layer in model[:frozen]:
        layer.requires_grad_(False).eval()
    reference, rounded = copy.deepcopy(model).double(), copy.deepcopy(model)
    engine = NativeModel(
        model, kernels, masks=lambda: masks, dense_gradients=frozenset, for_inference=chosen.random() < 0.5
    )
    try:
        for _ in range(2):
            ours, expected, theirs = (
                _step(one, x, to_input=not frozen, half=half and one is not reference)
                for one in (model, reference, rounded)
            )
            for name, value in expected.items():
                mask = masks.get(name, torch.tensor(1))
                away, usual = (float(((found[name] - value) * mask).norm()) for found in (ours, theirs))
                if float((ours[name] * (mask == 0)).norm()) > 0:
                    return f"{name} is not masked in {model} on {tuple(x.shape)}"
                if away > _TOLERANCE * (1 + float(value.norm())) + half * (4 * usual + _ROUNDING * float(value.norm())):
                    return f"{name} differs by {away:.2g}, usual {usual:.2g}, in {model} on {tuple(x.shape)}"
        some = x[: chosen.randint(1, len(x))]
        with torch.no_grad():
            expected_now = reference.eval()(some.double())
            away, usual = (
                float((_forward(one.eval(), some, half=half) - expected_now).norm()) for one in (model, rounded)
            )
        if away > _TOLERANCE * (1 + float(some.norm())) + half * (4 * usual + _ROUNDING * float(expected_now.norm())):
            return f"without gradients the output differs by {away:.2g} in {model} on {tuple(some.shape)}"
    finally:
        engine.detach()
    return None


def _forward(model: nn.Module, x: Tensor, *, half: bool) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        out: Tensor = model(x)
    return out


def _step(model: nn.Module, x: Tensor, *, to_input: bool, half: bool) -> dict[str, Tensor]:
    x = x.clone().to(next(model.parameters()).dtype).requires_grad_(to_input)
    model.zero_grad()
    out = _forward(model, x, half=half)
    if not out.requires_grad:
        return {"output": out}
    (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)).sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"output": out.detach(), **({} if x.grad is None else {"input": x.grad}), **gradients}


def _mask(parameter: Tensor, chosen: random.Random) -> Tensor:
    mask = torch.rand(parameter.shape) < chosen.choice([0.0, 0.01, 0.1, 0.5, 1.0])
    if chosen.random() < 0.3:
        mask[chosen.randrange(len(mask))] = False
    if chosen.random() < 0.3:
        mask[:, chosen.randrange(mask.shape[1])] = False
    return mask


def _tokens(chosen: random.Random) -> tuple[nn.Sequential, Tensor]:
    sizes = [chosen.randint(1, 40) for _ in range(3)]
    model = nn.Sequential(
        nn.Linear(sizes[0], sizes[1], bias=chosen.random() < 0.5),
        chosen.choice([nn.ReLU, nn.GELU, nn.SiLU, nn.ReLU6])(),
        nn.Linear(sizes[1], sizes[2]),
    )
    leading = [chosen.randint(1, 9) for _ in range(chosen.randint(1, 3))]
    return model, torch.randn(*leading, sizes[0], dtype=torch.float64)


class _Residual(nn.Module):
    def __init__(self, channels: int, kernel: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, kernel, padding=kernel // 2, bias=False)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.norm(self.conv(x)) + x)


def _images(chosen: random.Random) -> tuple[nn.Sequential, Tensor]:
    """Layers are added as long as the image has room for them."""
    channels, height, width = chosen.randint(1, 20), *(chosen.choice([8, 16, chosen.randint(3, 19)]) for _ in range(2))
    shape = (chosen.randint(2, 40), channels, height, width)
    layers: list[nn.Module] = []
    for _ in range(chosen.randint(1, 4)):
        layer = _layer(channels, chosen)
        try:
            with torch.no_grad():
                out = nn.Sequential(*layers, layer).eval()(torch.zeros(shape))
        except RuntimeError:  # the kernel is larger than the image
            continue
        if min(out.shape) < 1 or out.shape[2] * out.shape[3] * shape[0] < 2:
            continue
        layers.append(layer)
        channels = out.shape[1]
    if not any(isinstance(layer, (nn.Conv2d, _Residual)) for layer in layers):
        layers.insert(0, nn.Conv2d(shape[1], shape[1], 1))
    return nn.Sequential(*layers), torch.randn(shape, dtype=torch.float64)


def _layer(channels: int, chosen: random.Random) -> nn.Module:
    kind = chosen.choice(["conv", "conv", "conv", "norm", "act", "pool", "residual"])
    if kind == "conv":
        groups = chosen.choice([g for g in (1, 1, 2, channels) if channels % g == 0])
        return nn.Conv2d(
            channels,
            groups * chosen.randint(1, 12),
            (chosen.randint(1, 5), chosen.randint(1, 5)),
            chosen.choice([1, 1, 2, 3]),
            (chosen.randint(0, 3), chosen.randint(0, 3)),
            (chosen.randint(1, 2), chosen.randint(1, 2)),
            groups,
            bias=chosen.random() < 0.5,
        )
    if kind == "norm":
        return nn.BatchNorm2d(channels, affine=chosen.random() < 0.8)
    if kind == "act":
        return chosen.choice([nn.ReLU, nn.ReLU6, nn.SiLU, nn.GELU])()
    if kind == "residual":
        return _Residual(channels, chosen.choice([1, 3, 5]))
    size = chosen.randint(1, 3)
    padding = chosen.randint(0, size // 2)
    if chosen.random() < 0.5:
        return nn.MaxPool2d(size, chosen.randint(1, 3), padding)
    return nn.AvgPool2d(size, chosen.randint(1, 3), padding, count_include_pad=chosen.random() < 0.5)


def _quickly_compiled(compiler: str) -> str:
    """Switches by which accesses are checked by calls, not in line: half of the code, and the same is found."""
    said = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    return "" if "clang" in said else "--param asan-instrumentation-with-call-threshold=0 -fno-var-tracking"


def _runtime(compiler: str, name: str) -> str:
    done = subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True)
    return done.stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
