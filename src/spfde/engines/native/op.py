"""A region as one operator of PyTorch's: autograd, fake tensors and the dispatcher see nothing unusual."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from spfde.core.errors import UsageError
from spfde.engines.native.program import Program

_PROGRAMS: weakref.WeakValueDictionary[int, Program] = weakref.WeakValueDictionary()
_HANDLES = itertools.count(1)


def register(program: Program) -> int:
    """A number by which the operators find the program for as long as it lives."""
    handle = next(_HANDLES)
    _PROGRAMS[handle] = program
    return handle


@torch.library.custom_op(
    "spfde::region", mutates_args=(), schema="(Tensor[] inputs, Tensor[] parameters, int program) -> Tensor[]"
)
def region(inputs: Sequence[Tensor], parameters: Sequence[Tensor], program: int) -> list[Tensor]:
    """Outputs of the region, the table of its norms [5, channels], and what the backward pass reads."""
    return _PROGRAMS[program].forward(inputs)


@region.register_fake
def _(inputs: Sequence[Tensor], parameters: Sequence[Tensor], program: int) -> list[Tensor]:
    made = _PROGRAMS[program]
    shapes, n_choices = made.plan.output_shapes, len(made.plan.pools_with_choice)
    kinds = [made.kernels.dtype] * (len(shapes) - n_choices) + [torch.int32] * n_choices
    return [inputs[0].new_empty(shape, dtype=kind) for shape, kind in zip(shapes, kinds, strict=True)]


@torch.library.custom_op(
    "spfde::region_backward",
    mutates_args=(),
    schema="(Tensor?[] gradients, Tensor[] saved, Tensor[] inputs, Tensor[] parameters, int program) -> Tensor[]",
)
def region_backward(
    gradients: Sequence[Tensor | None],
    saved: Sequence[Tensor],
    inputs: Sequence[Tensor],
    parameters: Sequence[Tensor],
    program: int,
) -> list[Tensor]:
    """Gradients of the inputs and parameters that need one, in that order."""
    made = _PROGRAMS[program]
    found = made.backward(gradients, saved)
    targets = [*inputs, *parameters]
    return [
        torch.zeros_like(target) if gradient is None else gradient
        for target, gradient, wanted in zip(targets, found, made.plan.wanted, strict=True)
        if wanted
    ]


@region_backward.register_fake
def _(
    gradients: Sequence[Tensor | None],
    saved: Sequence[Tensor],
    inputs: Sequence[Tensor],
    parameters: Sequence[Tensor],
    program: int,
) -> list[Tensor]:
    targets = [*inputs, *parameters]
    return [torch.empty_like(t) for t, wanted in zip(targets, _PROGRAMS[program].plan.wanted, strict=True) if wanted]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    tensors, parameters, handle = inputs
    ctx.handle, ctx.program = handle, _PROGRAMS[handle]
    ctx.n_outputs = len(ctx.program.plan.region.outputs)
    ctx.n_inputs, ctx.n_parameters = len(tensors), len(parameters)
    ctx.set_materialize_grads(False)
    # Parameters are saved so that a change in place before the backward pass is an error, as everywhere in PyTorch.
    ctx.save_for_backward(*tensors, *parameters, *output[ctx.n_outputs :])


def _backward(ctx: Any, gradients: Sequence[Tensor | None]) -> tuple[Any, Any, None]:
    tensors = ctx.saved_tensors
    n, m = ctx.n_inputs, ctx.n_inputs + ctx.n_parameters
    flowing = list(gradients[: ctx.n_outputs])
    found = iter(region_backward(flowing, list(tensors[m:]), list(tensors[:n]), list(tensors[n:m]), ctx.handle))
    wanted = ctx.program.plan.wanted
    each = [next(found) if is_wanted else None for is_wanted in wanted]
    return each[:n], each[n:], None


def _no_second_backward(ctx: Any, *_: Any) -> None:
    raise UsageError(
        "The native engine has no second derivatives (create_graph=True, gradient penalties, Hessians). "
        'Attach with engine="masked".'
    )


region.register_autograd(_backward, setup_context=_setup_context)
region_backward.register_autograd(_no_second_backward)
