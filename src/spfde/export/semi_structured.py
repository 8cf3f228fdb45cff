"""2:4 sparse layers as PyTorch's semi-structured tensors, which some GPUs multiply up to twice as fast."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from spfde.core.errors import InvalidArgument, Problem, Problems, UsageError
from spfde.core.torch_private import least_two_four_shape

_DTYPES = (torch.float16, torch.bfloat16, torch.int8)
_LEAST_CAPABILITY = (8, 0)


def is_two_four(mask: Tensor) -> bool:
    """Whether of a linear layer's mask, [out, in], at most two of each four consecutive inputs exist."""
    if mask.dim() != 2 or mask.numel() == 0 or mask.shape[1] % 4:
        return False
    return bool((mask.reshape(len(mask), -1, 4).sum(2) <= 2).all())


def to_semi_structured(model: nn.Module, masks: Mapping[str, Tensor]) -> nn.Module:
    """A copy of the model for inference whose 2:4 sparse linear layers compute with sparse tensor cores.

    Other N:M masks are taken where they happen to be 2:4 as well; a 4:8 mask in general is not, and no hardware knows
    it. Convolutions stay dense: PyTorch has no semi-structured kernels for them.

    Args:
        model: on a GPU of compute capability 8.0 (Ampere) or later, in float16, bfloat16 or int8.
        masks: by parameter name (``session.masks``).

    Raises:
        InvalidArgument: no linear layer has a 2:4 mask, a weight outside its mask is not zero, or a type or shape does
            not fit.
        UsageError: the hardware has no sparse tensor cores.

    Example:
        >>> two_four = spfde.SET(sparsity=0.5, structure=spfde.NM(n=2, m=4))
        >>> session = spfde.attach(model, optimizer, loader, spfde.Recipe(sparsity=two_four), epochs=2)
        >>> if torch.cuda.is_available():
        ...     sparse = spfde.export.to_semi_structured(model.cuda().half(), session.masks)
    """
    layers = [
        f"{name}.weight" if name else "weight" for name, module in model.named_modules() if type(module) is nn.Linear
    ]
    chosen = [name for name in layers if name in masks and is_two_four(masks[name])]
    if not chosen:
        rule = f"none of its {len(masks)} masks is 2:4 along the input dimension of a linear layer"
        raise InvalidArgument(Problem("masks", sorted(masks), rule, "Train with a 2:4 structure."))
    weights = {name: model.get_parameter(name) for name in chosen}
    problems = Problems()
    for name, weight in weights.items():
        if weight.dtype not in _DTYPES:
            rule, remedy = "sparse tensor cores take float16, bfloat16 or int8", "Convert the model: model.half()."
            problems.add(name, str(weight.dtype), rule, remedy)
        elif problem := _misfit(name, weight):
            problems.found.append(problem)
        if bool(weight.detach().masked_fill(masks[name].to(weight.device), 0).any()):
            problems.add(name, "weights outside the mask", "must be zero", "Pass the masks that the model has.")
    _check_hardware({weight.device for weight in weights.values()})
    problems.raise_if_any()
    sparse = copy.deepcopy(model).eval()
    for name, weight in weights.items():
        compressed = torch.sparse.to_sparse_semi_structured(weight.detach())
        owner = sparse.get_submodule(name.rpartition(".")[0])
        owner.weight = nn.Parameter(compressed, requires_grad=False)
    return sparse


def _misfit(name: str, weight: Tensor) -> Problem | None:
    """What of a weight's shape PyTorch's kernel refuses; None where nothing, or where this version does not say."""
    least = least_two_four_shape(weight.dtype)
    if least is None:
        return None
    (out, inputs), (rows, columns) = weight.shape, least
    if out % rows == 0 and inputs % columns == 0:
        return None
    rule = f"PyTorch's kernel takes multiples of {rows} outputs and {columns} inputs of {weight.dtype}"
    fits = f"nn.Linear({math.ceil(inputs / columns) * columns}, {math.ceil(out / rows) * rows})"
    remedy = f"Leave it out of the masks, so that it stays dense, or train {fits} in its place."
    return Problem(name, (out, inputs), rule, remedy)


def _check_hardware(devices: set[torch.device]) -> None:
    for device in devices:
        found = None
        if device.type != "cuda":
            found = f"the model is on {device}"
        elif (capability := torch.cuda.get_device_capability(device)) < _LEAST_CAPABILITY:
            found = f"{torch.cuda.get_device_name(device)} has compute capability {'.'.join(map(str, capability))}"
        if found is not None:
            raise UsageError(
                "semi-structured (2:4) tensors need an NVIDIA GPU of compute capability 8.0 (Ampere) or later, and "
                f"{found}. Move the model to such a GPU, or export it with save_compressed, which works everywhere."
            )
