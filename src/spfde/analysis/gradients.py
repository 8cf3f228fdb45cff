"""Gradient norms by layer, and how they change from checkpoint to checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from spfde.core.errors import InvalidArgument, Problem, Problems
from spfde.model.sample import Sample, call_arguments, unwrap

Loss = Callable[[Tensor, Tensor], Tensor]
"""Mean loss of a batch, a scalar, from the model's output and the target."""


def gradient_norms(
    model: nn.Module,
    batches: Iterable[tuple[Sample, Tensor]],
    loss: Loss,
    *,
    parameters: Sequence[str],
    masks: Mapping[str, Tensor] | None = None,
) -> dict[str, float]:
    """Euclidean norm of the gradient of the mean loss over all samples, by parameter.

    The model computes in the mode that it is in. In evaluation mode BatchNorm statistics stay as they are and dropout
    is off, so that checkpoints are compared on one function of the same samples. No ``.grad`` is touched.

    Args:
        model: the model.
        batches: inputs and targets; the target's first dimension is the number of samples.
        loss: mean loss of a batch.
        parameters: qualified names.
        masks: by parameter name; the norm is that of the active weights alone, as training sees it. A parameter without
            a mask counts in full.

    Raises:
        InvalidArgument: a name is no parameter of the model, or there is no sample.

    Example:
        >>> loss = torch.nn.functional.cross_entropy
        >>> norms = spfde.analysis.gradient_norms(model, loader, loss, parameters=["0.weight"])
        >>> norms["0.weight"] > 0
        True
    """
    model = unwrap(model)
    known = dict(model.named_parameters())
    problems = Problems()
    for name in parameters:
        if name not in known:
            problems.add(
                "parameters", name, "is no parameter of the model", "Take names from model.named_parameters()."
            )
    problems.raise_if_any()
    chosen = {name: known[name] for name in parameters}
    asked = {name: p.requires_grad for name, p in chosen.items()}
    totals = {name: torch.zeros_like(p, requires_grad=False) for name, p in chosen.items()}
    seen = 0
    try:
        for p in chosen.values():
            p.requires_grad_(True)
        for inputs, target in batches:
            args, kwargs = call_arguments(inputs)
            with torch.enable_grad():
                mean = loss(model(*args, **kwargs), target)
            gradients = torch.autograd.grad(mean, list(chosen.values()), allow_unused=True)
            for total, gradient in zip(totals.values(), gradients, strict=True):
                if gradient is not None:
                    total.add_(gradient, alpha=len(target))
            seen += len(target)
    finally:
        for name, p in chosen.items():
            p.requires_grad_(asked[name])
    if not seen:
        rule, remedy = "must hold at least one sample", "Pass batches of inputs and targets."
        raise InvalidArgument(Problem("batches", 0, rule, remedy))
    return {name: _norm(total, (masks or {}).get(name)) / seen for name, total in totals.items()}


def successive_differences(values: Sequence[float]) -> list[float]:
    """Absolute differences between each value and the one before; one fewer than there are values.

    Of gradient norms, this is what a criterion for freezing by convergence would watch (Yuan et al. 2022, figure 3b).
    """
    return [abs(after - before) for before, after in pairwise(values)]


def _norm(gradient: Tensor, mask: Tensor | None) -> float:
    if mask is not None:
        gradient = gradient.masked_fill(~mask.to(gradient.device), 0.0)
    return float(torch.linalg.vector_norm(gradient))
