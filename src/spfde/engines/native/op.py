"""A region as one function of autograd's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spfde.core.errors import UsageError
from spfde.engines.native.program import Program


class RegionFunction(torch.autograd.Function):
    """Outputs of a region, from its inputs and its parameters."""

    @staticmethod
    def forward(ctx: Any, program: Program, *tensors: Tensor) -> tuple[Tensor, ...]:
        n_outputs = len(program.plan.region.outputs)
        made = program.forward(tensors[: len(program.plan.region.inputs)])
        ctx.program, ctx.n_tensors = program, len(tensors)
        ctx.set_materialize_grads(False)
        # Parameters are saved so that a change in place before the backward pass is an error, as everywhere in PyTorch.
        ctx.save_for_backward(*tensors, *made[n_outputs:])
        return tuple(made[:n_outputs])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # read once: what checkpointing saves can be unpacked but once
        tensors, saved = saved[: ctx.n_tensors], saved[ctx.n_tensors :]
        return None, *_RegionBackward.apply(ctx.program, saved, *gradients, *tensors)


class _RegionBackward(torch.autograd.Function):
    """Gradients of a region's inputs and parameters, from those of its outputs; with the former it takes the latter."""

    @staticmethod
    def forward(ctx: Any, program: Program, saved: tuple[Tensor, ...], *flowing: Tensor | None) -> Any:
        return tuple(program.backward(flowing[: len(program.plan.region.outputs)], saved))

    @staticmethod
    def backward(ctx: Any, *_: Any) -> None:
        raise UsageError(
            "The native engine has no second derivatives (create_graph=True, gradient penalties, Hessians). "
            'Attach with engine="masked".'
        )
