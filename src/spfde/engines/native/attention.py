"""Attention under autocast to bf16: what stays in PyTorch, and in which precision it is fast."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from spfde.core.torch_private import multiplies_tiles

# In PyTorch, training steps of short sequences take up to five times as long in bf16 as in fp32, casts included, where
# the processor has no instructions for tiles; from about 250 tokens on bf16 is as fast. See benchmarks/attention.py.
_SHORT = 200


def casts_to_bf16() -> bool:
    """Would a forward pass be in bf16 here?"""
    return torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16


def attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *args: Any, **kwargs: Any
) -> Tensor:
    """``torch.nn.functional.scaled_dot_product_attention``, in fp32 where autocast would train it slowly in bf16.

    Departs from autocast: products and softmax of short sequences are in fp32. The result has autocast's type.

    Args:
        query, key, value: [..., tokens, features].
        attn_mask, args, kwargs: as PyTorch takes them.
    """
    if not _is_slow_in_bf16(query, key, value):
        return F.scaled_dot_product_attention(query, key, value, attn_mask, *args, **kwargs)
    if attn_mask is not None and attn_mask.is_floating_point():
        attn_mask = attn_mask.float()
    with torch.autocast("cpu", enabled=False):
        found = F.scaled_dot_product_attention(query.float(), key.float(), value.float(), attn_mask, *args, **kwargs)
    return found.bfloat16()


# What the engine calls in place of PyTorch's functions.
IN_PLACE_OF: Mapping[Any, Callable[..., Tensor]] = {F.scaled_dot_product_attention: attention}


def _is_slow_in_bf16(query: Tensor, key: Tensor, value: Tensor) -> bool:
    return (
        casts_to_bf16()
        and torch.is_grad_enabled()
        and (query.requires_grad or key.requires_grad or value.requires_grad)
        and query.device.type == "cpu"
        and query.dtype != torch.float64  # which autocast leaves alone
        and key.shape[-2] <= _SHORT
        and not _multiplies_bf16_fast()
    )


def _multiplies_bf16_fast() -> bool:
    """Also of processors that have not been measured."""
    return multiplies_tiles() or torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512")
