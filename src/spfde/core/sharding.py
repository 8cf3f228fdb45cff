"""Models that ``torch.distributed.fsdp.fully_shard`` (FSDP2) has sharded: each rank holds rows of every parameter.

Nothing here imports ``torch.distributed``, which not every build of PyTorch has.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from spfde.core.torch_private import class_under_fsdp, local_tensor


def is_dtensor(tensor: object) -> bool:
    """Whether it is spread over ranks, as the parameters of a sharded model are."""
    return type(tensor).__name__ == "DTensor"


def own_part(tensor: Tensor) -> Tensor:
    """What lies in this process: of a DTensor its local tensor, else all of it."""
    return local_tensor(tensor) if is_dtensor(tensor) else tensor


def is_sharded(model: nn.Module) -> bool:
    """Whether ``fully_shard`` was called on the model, or on modules in it."""
    return any(class_under_fsdp(module) is not None for module in model.modules())


def reshard(model: nn.Module) -> None:
    """Have a sharded model's modules hold their sharded parameters.

    Between a forward pass and its backward pass they may hold whole ones, and so they do after a forward pass alone.
    """
    for module in model.modules():
        if class_under_fsdp(module) is not None:
            reshard_one: Any = module
            reshard_one.reshard()


def first_row(parameter: Any) -> int:
    """Where the rows begin that this rank holds of a parameter sharded along dimension 0.

    Of n rows each of k ranks holds ``ceil(n / k)``, as ``torch.chunk`` deals them out: the last ones fewer, or none.
    """
    rows, ranks = parameter.shape[0], parameter.device_mesh.size()
    return int(min(rows, parameter.device_mesh.get_local_rank() * -(-rows // ranks)))


def sum_over_ranks(numbers: Tensor, parameter: Any) -> Tensor:
    """The sum of an integer tensor over the ranks that share a parameter, which all call it; the tensor is written."""
    torch.distributed.all_reduce(numbers, group=parameter.device_mesh.get_group())
    return numbers
