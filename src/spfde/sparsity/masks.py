"""Masks: boolean tensors, True where the weight exists. How they are made, inferred, packed and applied.

Flat indices are row-major whatever the memory format, so that a mask depends on the shape and the seed alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from spfde.core.errors import InvalidArgument, Problem

# Integer types to reinterpret floats as: their product with a mask is exact, and faster than that of two types.
_BITS_OF = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def infer_mask(weight: Tensor, n_active: int | None = None, generator: torch.Generator | None = None) -> Tensor:
    """The mask of a weight that is already sparse: its non-zeros.

    Args:
        weight: a tensor with zeros where it is inactive.
        n_active: number of active weights wanted. Active weights that happen to be zero (just grown ones) cannot be
            told from inactive ones, so the missing ones are drawn at random. None: the non-zeros alone.
        generator: needed with ``n_active``.

    Raises:
        InvalidArgument: there are more non-zeros than ``n_active``.
    """
    mask = weight.detach() != 0
    found = int(mask.sum())
    if n_active is None or found == n_active:
        return mask
    if found > n_active:
        remedy = "Load a checkpoint of this sparsity, or lower the recipe's sparsity."
        raise InvalidArgument(Problem("n_active", n_active, f"the weight has {found} non-zeros, which is more", remedy))
    assert generator is not None, "filling a mask up needs a generator"
    return grow_random(mask, n_active, generator)


def grow_random(mask: Tensor, n_final: int, generator: torch.Generator) -> Tensor:
    """Activate inactive weights uniformly at random until ``n_final`` are active.

    Source: Mocanu et al. (SET, arXiv 1707.04780); Yuan et al. (MEST, arXiv 2110.14032).
    """
    flat = mask.flatten().clone()
    candidates = (~flat).nonzero().squeeze(1)
    n_new = n_final - (len(flat) - len(candidates))
    assert 0 <= n_new <= len(candidates), f"cannot grow {n_new} of {len(candidates)}"
    drawn = torch.randperm(len(candidates), generator=generator)[:n_new]
    flat[candidates[drawn.to(candidates.device)]] = True
    return flat.view(mask.shape)


def highest(score: Tensor, n: int, *, among: Tensor | None = None) -> Tensor:
    """A mask of the ``n`` highest scores; of equal ones the lower flat index wins, and NaN ranks lowest.

    Args:
        score: any shape, any real type.
        n: number of entries to choose, at most the number of candidates.
        among: boolean mask of the candidates; None: all entries.
    """
    flat = score.detach().flatten()
    candidates = None if among is None else among.flatten().nonzero().squeeze(1)
    values = flat if candidates is None else flat[candidates]
    values = torch.nan_to_num(values, nan=-math.inf, posinf=math.inf, neginf=-math.inf)
    assert 0 <= n <= len(values), f"cannot choose {n} of {len(values)}"
    if n == 0:
        return torch.zeros_like(score, dtype=torch.bool, memory_format=torch.contiguous_format)
    threshold = _nth_highest(values, n)
    chosen = values > threshold
    ties = (values == threshold).nonzero().squeeze(1)
    chosen[ties[: n - int(chosen.sum())]] = True
    if candidates is None:
        return chosen.view(score.shape)
    mask = torch.zeros(flat.shape, dtype=torch.bool, device=flat.device)
    mask[candidates[chosen]] = True
    return mask.view(score.shape)


def highest_overall(
    scores: Mapping[str, Tensor], n: int, *, among: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Masks of the ``n`` highest of all layers' scores together, with the best of each layer always among them."""
    device = next(iter(scores.values())).device
    every = torch.cat([score.to(device).flatten() for score in scores.values()])
    free = torch.ones_like(every, dtype=torch.bool)
    if among is not None:
        free = torch.cat([among[name].to(device).flatten() for name in scores])
    sizes = [score.numel() for score in scores.values()]
    parts = zip(torch.split(every, sizes), torch.split(free, sizes), strict=True)
    kept = torch.cat([highest(score, 1, among=candidates) for score, candidates in parts])
    chosen = torch.split(kept | highest(every, n - len(sizes), among=free & ~kept), sizes)
    return {name: c.view(score.shape).to(score.device) for (name, score), c in zip(scores.items(), chosen, strict=True)}


def largest_half(weight: Tensor, mask: Tensor) -> Tensor:
    """The larger half of the active weights by magnitude, rounded up, as a mask on the CPU."""
    weight, mask = weight.detach().cpu(), mask.cpu()
    return highest(weight.abs(), -(-int(mask.sum()) // 2), among=mask)


def _nth_highest(values: Tensor, n: int) -> Tensor:
    if values.device.type != "cpu":
        return torch.topk(values, n, sorted=False).values.min()
    # Several times as fast as topk on a CPU, which sorts more than is asked for. NumPy has no bfloat16.
    array = (values.float() if values.dtype == torch.bfloat16 else values).numpy()
    place = len(array) - n
    return torch.as_tensor(np.partition(array, place)[place]).to(values.dtype)


def apply_(tensor: Tensor, mask: Tensor) -> None:
    """Set ``tensor`` to +0 in place where the mask is False and leave every bit of the others.

    Unlike a product of numbers this also clears NaN and infinity, and makes no negative zeros.

    Example:
        >>> from spfde.sparsity.masks import apply_
        >>> weight = torch.tensor([1.0, -2.0, float("nan")])
        >>> apply_(weight, torch.tensor([True, False, False]))
        >>> weight
        tensor([1., 0., 0.])
    """
    bits(tensor).mul_(mask)


def bits(tensor: Tensor) -> Tensor:
    """The same memory as integers, whose product with a mask is exact; complex numbers as they are."""
    whole = tensor.detach() if tensor.requires_grad else tensor
    return whole if tensor.is_complex() else whole.view(_BITS_OF[tensor.element_size()])


def factors(tensor: Tensor, mask: Tensor) -> Tensor:
    """A mask as what ``bits(tensor)`` is multiplied with: zeros and ones of its type, laid out like it.

    Several tensors are multiplied by one kernel only where both factors are of one type and layout.
    """
    return torch.empty_like(bits(tensor), requires_grad=False).copy_(mask)


def pack(mask: Tensor) -> Tensor:
    """A mask as a one-dimensional uint8 tensor on the CPU, eight weights per byte, lowest bit first."""
    flat = mask.detach().flatten().to("cpu")
    return torch.from_numpy(np.packbits(flat.numpy(), bitorder="little"))


def unpack(packed: Tensor, shape: Sequence[int]) -> Tensor:
    """The boolean mask of ``shape`` that :func:`pack` packed, on the CPU.

    Raises:
        InvalidArgument: the number of bytes does not fit the shape.
    """
    numel = math.prod(shape)
    if packed.dtype != torch.uint8 or packed.shape != (math.ceil(numel / 8),):
        found = f"{packed.dtype} of shape {tuple(packed.shape)}"
        rule = f"a mask of shape {tuple(shape)} takes {math.ceil(numel / 8)} bytes in one dimension"
        raise InvalidArgument(Problem("packed", found, rule, "Use the state of the same model."))
    bits = np.unpackbits(packed.cpu().numpy(), count=numel, bitorder="little")
    return torch.from_numpy(bits).bool().view(*shape)
