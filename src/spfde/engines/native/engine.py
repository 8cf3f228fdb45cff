"""The native engine, as ``attach`` and the session know it: when it can work, how fast it is, and how it is put on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from spfde.core.errors import InvalidArgument
from spfde.core.registry import register
from spfde.engines.base import Job, Parts, StandInEngine
from spfde.engines.kept_outputs import CachedPrefix
from spfde.engines.native import build
from spfde.engines.native.attention import casts_to_bf16
from spfde.engines.native.graph import Capture, capture
from spfde.engines.native.layout import TOKEN_COLUMNS, likely_lanes
from spfde.engines.native.model import NativeModel
from spfde.engines.trace import check_forward

# Time of a layer's training step against PyTorch's dense one in the same precision, as a line in its density (slope, at
# zero). benchmarks/native.py measures steps against it. A linear layer pays for two changes of layout. Where the
# processor multiplies bf16, PyTorch gains more from it than what is sparse.
_LINES = {
    "fp32": {"conv": (1.0, 0.12), "linear": (1.3, 0.45)},
    "bf16": {"conv": (1.4, 0.135), "linear": (1.6, 0.6)},
}
# How the time grows with the share of lanes that a small batch leaves empty: less than in proportion, for PyTorch takes
# longer for an image of a small batch too.
_EMPTY_LANES = 0.75


@register("engine")
class NativeEngine(StandInEngine[NativeModel]):
    """Kernels that compute with the active weights alone, forward and backward, on CPUs."""

    name: ClassVar[str] = "native"
    summary: ClassVar[str] = "kernels that compute with the active weights alone, on CPUs"
    needs_masks: ClassVar[bool] = True

    @classmethod
    def supports(cls, job: Job) -> str | None:
        if job.is_compiled:
            return "the model is compiled by torch.compile"
        if job.compiles:
            return "its kernels take the place of blocks that are to be compiled (compile=True)"
        target = job.blueprint.target
        for name, parameter in job.model.named_parameters():
            if parameter.device.type != "cpu":
                return f"{name} is on {parameter.device}, and the kernels are for CPUs"
            if name in target and parameter.dtype != torch.float32:
                return f"{name} is {parameter.dtype}, and the kernels take float32"
        if (reason := build.available()) is not None:
            return reason
        try:
            taken, left = _layers(job), _captured(job).left
        except InvalidArgument as error:
            return "; ".join(problem.rule for problem in error.problems)
        if taken.keys() & set(target):
            return None
        first = next(iter(target))
        why = next((text for text in left if text.startswith(first.rpartition(".")[0] + " ")), first)
        return f"it takes no sparse layer of this model ({why})"

    @classmethod
    def expected_speed(cls, job: Job) -> float:
        # In which precision the model will run is known only where it is attached under autocast.
        return cls._expected_speed(job, "bf16" if casts_to_bf16() else "fp32")

    @classmethod
    def expectation(cls, job: Job) -> str:
        single, half = (1 / cls._expected_speed(job, precision) for precision in _LINES)
        return f"about {single:.1f}x faster than masked in fp32, {half:.1f}x under autocast to bf16"

    @classmethod
    def _expected_speed(cls, job: Job, precision: str) -> float:
        taken, blueprint = _layers(job), job.blueprint
        ours = dense = 0.0
        for layer, density in zip(blueprint.cost.layers, job.density, strict=True):
            dense += layer.forward_flops
            if layer.name not in taken:
                ours += layer.forward_flops
                continue
            kind = taken[layer.name]
            slope, fixed = _LINES[precision][kind]
            # A pixel of as many images as there are lanes is one vector, so that a small batch leaves lanes empty. Of a
            # linear layer each token is a sample, and a vector holds a few columns of them.
            rows = job.batch_size if kind == "conv" else job.batch_size * layer.forward_flops // (2 * layer.numel)
            unit = likely_lanes() * (1 if kind == "conv" else TOKEN_COLUMNS)
            ours += layer.forward_flops * (slope * density + fixed) * (-(-rows // unit) * unit / rows) ** _EMPTY_LANES
        return ours / dense

    @classmethod
    def prepare(cls, job: Job, tell: Callable[[str], None] | None = None) -> str | None:
        try:
            build.load(on_build=tell)
        except build.KernelsUnavailable as error:
            return error.reason
        return None

    @classmethod
    def supports_cache(cls, job: Job) -> str | None:
        blueprint, model = job.blueprint, job.model
        freezes = zip(blueprint.partition.blocks, blueprint.freeze_plan.freeze_epochs, strict=True)
        frozen = {name for block, at in freezes if at is not None for name in block.modules}
        if all(module.training for module in model.modules()):
            draws = _captured(job).draws
        else:
            draws = capture(model, job.sample, blueprint.target, training=True).draws
        owner = next((owner for owner in draws.values() if owner in frozen), None)
        if owner is None:
            return None
        kind = type(model.get_submodule(owner)).__name__
        return f"a frozen block must make the same of a sample each time, and {owner} ({kind}) draws random numbers"

    def attach(self, job: Job, parts: Parts) -> None:
        self._attached = NativeModel(
            job.model,
            masks=parts.masks,
            dense_gradients=parts.dense_gradients,
            masked_already=parts.masked_already,
            frozen=parts.frozen,
            cached=None if job.cache is None else CachedPrefix(job.n_samples, job.cache),
            sample=job.sample,
            captured=job.found.pop(self.name, None),
        )

    def describe(self) -> list[str]:
        regions, left = self.computes.taken, self.computes.left
        return [
            f"replaced: the model's forward; {sum(len(region.ops) for region in regions)} operations in "
            f"{len(regions)} native regions, in PyTorch: {', '.join(left) or 'nothing'}"
        ]

    def clears(self, tensors: Sequence[Tensor], masks: Sequence[Tensor]) -> Callable[[], None] | None:
        found = self.computes.kernels.outside(tensors, masks)
        return None if found is None else found.clear

    def on_batch(self) -> None:
        self.computes.announce(None)

    def prefix_variants(self) -> int:
        return self.computes.prefix_variants()

    def announce(self, samples: Tensor, variant: int) -> None:
        self.computes.announce(samples, variant)


def _captured(job: Job) -> Capture:
    """The job's model, cut; traced once for as long as it is as it is.

    Raises:
        InvalidArgument: it cannot be traced.
    """
    known: Capture | None = job.found.get(NativeEngine.name)
    if known is None or not known.is_current:
        check_forward(job.model)
        # With a cache a region must lie before what is frozen or behind it; at first nothing is frozen.
        frozen = None if job.cache is None else frozenset[str]()
        known = job.found[NativeEngine.name] = capture(job.model, job.sample, job.blueprint.target, frozen)
    return known


def _layers(job: Job) -> dict[str, str]:
    """The weights that the kernels take, with the kind of each one's layer."""
    ops = [op for region in _captured(job).regions for op in region.ops]
    return {f"{op.module}.weight": op.kind for op in ops if op.kind in _LINES["fp32"]}
