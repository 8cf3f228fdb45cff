"""The engine for blocks of weights, as ``attach`` and the session know it: when it can work, and how fast it is.

It takes linear layers alone. A convolution with single weights has no tile that tensor cores could take, and its zeros
are multiplied in less time than they are avoided in: on a GPU it stays dense under its mask.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import nn

from spfde.core.registry import register
from spfde.engines.base import Job, Parts, StandInEngine
from spfde.engines.blocks.lists import MOST_DENSITY, UNIT
from spfde.engines.blocks.modules import linears_of
from spfde.sparsity.block import Block

if TYPE_CHECKING:
    from spfde.engines.blocks.linear import BlockLinears

# Modelled, for an H200 (benchmarks/block_linear.py measures). Dense products in bf16, FLOPs a second; and time of a
# layer's step over the dense one, as a line in its density (slope, at zero): its blocks read their inputs from the
# second-level cache, which takes three times as long as dense arithmetic would.
_DENSE_RATE, _LINE = 6e14, (3.5, 0.15)
# What Python needs to start a layer's kernels, forward and backward, in seconds: PyTorch, and Triton.
_START_DENSE, _START_BLOCKS = 6e-5, 1.5e-4
_LEAST_CAPABILITY = (8, 0)  # bf16 and asynchronous copies
_INTERPRETED = 1e4  # times as long, in Triton's interpreter


@register("engine")
class BlocksEngine(StandInEngine["BlockLinears"]):
    """Kernels for linear layers that compute with the active blocks alone, forward and backward, on CUDA."""

    name: ClassVar[str] = "blocks"
    summary: ClassVar[str] = "kernels for linear layers with blocks of 32x32 weights and more, on CUDA"
    needs_masks: ClassVar[bool] = True

    @classmethod
    def supports(cls, job: Job) -> str | None:
        method = job.blueprint.method
        structure = None if method is None else method.structure
        if (
            not isinstance(structure, Block)
            or structure.along == "kernel"
            or structure.rows % UNIT
            or structure.columns % UNIT
        ):
            return f"it takes blocks whose sides are multiples of {UNIT}, and the structure is {structure!r}"
        if isinstance(job.given, nn.DataParallel):
            return "copies of the model on other devices have no kernels; use DistributedDataParallel"
        if job.is_compiled:
            return "the model is compiled by torch.compile"
        names = taken(job)
        if not names:
            first = next(iter(job.blueprint.target))
            return f"no sparse weight is that of an nn.Linear whose own forward computes it (the first is {first})"
        return next(filter(None, (_refused(name, job.model.get_parameter(name)) for name in names)), None)

    @classmethod
    def expected_speed(cls, job: Job) -> float:
        return _INTERPRETED if _is_interpreted() else modelled_speed(job, _START_DENSE, _START_BLOCKS)

    @classmethod
    def prepare(cls, job: Job, tell: Callable[[str], None] | None = None) -> str | None:
        from spfde.engines.blocks.check import check

        blocks = taken(job)
        devices = dict.fromkeys(job.model.get_parameter(name).device for name in blocks)
        if tell is not None:
            tell("compiling the kernels for blocks of weights")
        return next(filter(None, (check(block, device) for device in devices for block in set(blocks.values()))), None)

    def attach(self, job: Job, parts: Parts) -> None:
        self._attached = put_on_linears(job, parts)

    def before_replay(self) -> Hashable:
        self.computes.refresh()
        return self.computes.key

    def describe(self) -> list[str]:
        return describe(self.computes)


def put_on_linears(job: Job, parts: Parts) -> BlockLinears:
    """Have the kernels compute the job's linear layers."""
    from spfde.engines.blocks.linear import BlockLinears

    return BlockLinears(job.model, taken(job), parts)


def describe(linears: BlockLinears) -> list[str]:
    """What the kernels compute, and how much of it, a line each."""
    lines = ["replaced: the forward of linear layers, whose active blocks alone are computed with in training:"]
    for layer in linears.layers.values():
        high, wide = layer.lists.sides
        how = "" if layer.computes else ", left to PyTorch: too many for the kernels to be faster"
        lines.append(f"  {layer.name}: {layer.lists.active:,} active blocks of {high}x{wide}{how}")
    return lines


def modelled_speed(job: Job, start_dense: float = 0.0, start_blocks: float = 0.0) -> float:
    """Time of a step with the kernels over that without.

    Args:
        job: see ``BlocksEngine.supports``.
        start_dense, start_blocks: seconds to start a layer's kernels, PyTorch's and these; 0 in a CUDA graph.
    """
    blocks, (slope, fixed) = taken(job), _LINE
    ours = dense = 0.0
    for layer, density in zip(job.blueprint.cost.layers, job.density, strict=True):
        products = 3 * layer.forward_flops * job.batch_size / _DENSE_RATE
        by_pytorch = max(products, start_dense)
        by_blocks = max(products * (slope * density + fixed), start_blocks)
        dense += by_pytorch
        ours += by_blocks if layer.name in blocks and density <= MOST_DENSITY else by_pytorch
    return ours / dense if dense else 1.0


def taken(job: Job) -> dict[str, tuple[int, int]]:
    """The weights that the kernels take, with the (rows, columns) of their blocks."""
    method, model = job.blueprint.method, job.model
    assert method is not None
    assert isinstance(method.structure, Block)
    block = method.structure.rows, method.structure.columns
    sparse = {
        name: block for name, count in job.blueprint.target.items() if count < job.blueprint.sparse_layers[name].numel()
    }
    return dict.fromkeys(linears_of(model, sparse), block)


def _refused(name: str, weight: nn.Parameter) -> str | None:
    """Why the kernels do not take a weight, by what it is and where."""
    if weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"{name} is {weight.dtype}, and the kernels take float32, bfloat16 and float16"
    kind = weight.device.type
    if kind != "cuda" and not (kind == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"):
        return f"{name} is on {weight.device}, and the kernels are for CUDA"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (PyTorch for CUDA brings it along on Linux)"
    if kind == "cpu" and not _is_interpreted():
        return "TRITON_INTERPRET was set after Triton was imported"
    if kind == "cuda" and torch.version.hip is not None:
        return "the kernels have not been tried on ROCm"
    if kind == "cuda" and torch.cuda.get_device_capability(weight.device) < _LEAST_CAPABILITY:
        return f"{weight.device} has no tensor cores for bfloat16 (compute capability 8.0 or later)"
    return None


def _is_interpreted() -> bool:
    """Whether the kernels run in Triton's interpreter."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        return False
    from spfde.engines.blocks.kernels import INTERPRETED

    return INTERPRETED
