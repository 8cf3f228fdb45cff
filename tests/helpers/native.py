"""Helpers for the tests of the native engine: kernels of both number types, and a model beside its masked twin."""

from __future__ import annotations

import copy
import functools
import os
from collections.abc import Mapping, Sequence

import pytest
import torch
from torch import Tensor, nn

from spfde.engines.native import build
from spfde.engines.native.kernels import Kernels
from spfde.engines.native.model import NativeModel

needs_kernels = pytest.mark.skipif(build.available() is not None, reason=f"no kernels: {build.available()}")
NATIVE = pytest.param("native", marks=needs_kernels)
both_engines = pytest.mark.parametrize("engine", ["masked", NATIVE])


@functools.cache
def kernels(dtype: torch.dtype = torch.float64) -> Kernels:
    """The kernels built for ``dtype``."""
    return variant_kernels("this processor", dtype)


# Builds of the kernels for what other processors lack, by what they have; each needs this processor to have it too.
VARIANTS = {
    "this processor": "",
    "bf16 without products of pairs": "-mno-avx512bf16",
    "AVX2": "-march=haswell",
}


def variants(*, long: Sequence[str] = ("bf16 without products of pairs", "AVX2")) -> pytest.MarkDecorator:
    """Parametrize a test over the builds that this machine can run; most are for long runs, for they are compiled."""
    capability = torch.backends.cpu.get_cpu_capability()
    runs = [name for name in VARIANTS if name == "this processor" or (name == "AVX2" and "AVX" in capability)
            or "AVX512" in capability]  # fmt: skip
    marked = [pytest.param(name, marks=pytest.mark.long if name in long else ()) for name in runs]
    return pytest.mark.parametrize("variant", marked)


@functools.cache
def variant_kernels(variant: str, dtype: torch.dtype = torch.float32) -> Kernels:
    """The kernels of a build. That of double is for tests alone: it is optimised less, which takes half of the time."""
    is_double = dtype == torch.float64
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(
            "SPFDE_CXXFLAGS", f"{os.environ.get('SPFDE_CXXFLAGS', '')} {VARIANTS[variant]} {'-O1' * is_double}"
        )
        return Kernels(build.load(real="double" if is_double else "float"), dtype)


def random_masks(model: nn.Module, density: float, seed: int = 0) -> dict[str, Tensor]:
    """Masks for all convolutions and linear layers of the model, whose weights are zeroed outside."""
    generator = torch.Generator().manual_seed(seed)
    masks = {}
    for name, parameter in model.named_parameters():
        if parameter.dim() in (2, 4):
            masks[name] = torch.rand(parameter.shape, generator=generator) < density
            parameter.data.mul_(masks[name])
    return masks


def relative_error(found: Tensor, expected: Tensor) -> float:
    """L2 distance over L2 norm."""
    distance = (found.detach().double() - expected.detach().double()).norm()
    return float(distance / expected.detach().double().norm().clamp_min(1e-30))


def twin(
    model: nn.Module,
    masks: Mapping[str, Tensor],
    dtype: torch.dtype = torch.float64,
    *,
    for_inference: bool = False,
) -> tuple[nn.Module, NativeModel]:
    """A copy of ``model`` that computes as before, and the engine that was put on ``model``."""
    reference = copy.deepcopy(model)
    engine = NativeModel(
        model, kernels(dtype), masks=lambda: masks, dense_gradients=lambda: frozenset(), for_inference=for_inference
    )
    return reference, engine


def step(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Output, gradients and buffers after one pass forward and back with a fixed random gradient of the output."""
    x = x.clone().requires_grad_()
    model.zero_grad()
    out = model(x)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    (out * weights.to(out.dtype)).sum().backward()
    found = {"output": out.detach()}
    if x.grad is not None:
        found["input's gradient"] = x.grad
    found.update({f"{name}.grad": p.grad for name, p in model.named_parameters() if p.grad is not None})
    found.update({name: buffer.detach().clone() for name, buffer in model.named_buffers()})
    return found


def assert_same_step(
    model: nn.Module, reference: nn.Module, masks: Mapping[str, Tensor], x: Tensor, *, tolerance: float = 1e-10
) -> None:
    """Both give the same output, gradients (of active weights) and statistics."""
    ours, expected = step(model, x), step(reference, x)
    assert ours.keys() == expected.keys()
    largest = max(float(value.double().norm()) for value in expected.values())
    for name, value in expected.items():
        mask = masks.get(name.removesuffix(".grad"))
        if mask is not None:
            value = value * mask
            assert not bool((ours[name] * ~mask).any()), f"{name} has a gradient where there is no weight"
        # A gradient that cancels out to nothing has no digits of its own.
        if float(value.double().norm()) < 1e-9 * largest:
            assert float(ours[name].double().norm()) < max(1e-9, tolerance) * largest, name
        else:
            assert relative_error(ours[name], value) < tolerance, name
