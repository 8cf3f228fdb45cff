"""A forward pass by kernels that hide no product, in this thread alone: PyTorch's switches are the whole process's.

The second and last file of what PyTorch does not promise. Tested with torch 2.6.0 and 2.14.1.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
import torch.nn.modules.transformer as transformer
from torch import Tensor
from torch._decomp import decomposition_table
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from torch.utils._pytree import tree_leaves

__all__ = ["PlainKernels", "attention_in_products", "takes_random_numbers", "uncompiled"]

_aten = torch.ops.aten
_RECURRENT = {
    torch.lstm: _aten.lstm,
    torch.gru: _aten.gru,
    torch.rnn_tanh: _aten.rnn_tanh,
    torch.rnn_relu: _aten.rnn_relu,
}
_LOOKS_INTO_MASKS = getattr(getattr(transformer, "_detect_is_causal_mask", None), "__code__", None)


class PlainKernels(TorchFunctionMode):
    """A context in which recurrent layers and attention are made of products, and values are not looked at.

    That a mode is there keeps ``nn.MultiheadAttention`` and ``nn.TransformerEncoder`` from their fused kernels. Fused
    attention itself is for ``attention_in_products``.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.__bool__ and sys._getframe(1).f_code is _LOOKS_INTO_MASKS:
            return False  # nn.TransformerEncoder asks whether its mask is causal: the products are the same
        if func is F.batch_norm:
            return _batch_norm(*args, **kwargs)
        if func is F.group_norm:
            return _group_norm(*args, **kwargs)
        if func in _RECURRENT:
            return _recurrent(_RECURRENT[func], *args, **kwargs)
        return func(*args, **kwargs)


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """``F.batch_norm`` that takes a single value a channel: the sample has one item, where a batch has more."""
    if training and input.numel() == input.shape[1]:
        twice = torch.cat([input, input])  # fake numbers have no unbiased variance of one
        return _batch_norm(twice, running_mean, running_var, weight, bias, training, momentum, eps)[:1]
    return torch.batch_norm(input, weight, bias, running_mean, running_var, training, momentum, eps, False)


def _group_norm(
    input: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """``F.group_norm`` that takes a single value a group."""
    return torch.group_norm(input, num_groups, weight, bias, eps, False)


def _recurrent(operator: Any, *args: Any) -> Any:
    """A recurrent layer in products; it takes a fused kernel only for an input without a gradient."""
    packed = isinstance(args[3], (tuple, list))  # data, batch sizes, states, parameters; else input, states, parameters
    decomposed = decomposition_table[operator.data if packed else operator.input]
    return decomposed(args[0].detach().requires_grad_(), *args[1:])


def attention_in_products(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[[], Any] | None:
    """What computes a fused attention in products, for a dispatch mode that is handed the fused one; None for others.

    Args:
        func: an operator with its overload.
        args, kwargs: of its call.
    """
    name = func.__name__
    if not name.startswith("_scaled_dot_product_") or "math" in name or "backward" in name:
        return None
    names = [argument.name for argument in func._schema.arguments]
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    query, key = given["query"], given["key"]
    mask, scale = given.get("attn_mask", given.get("attn_bias")), given.get("scale")
    settings = (mask, given.get("dropout_p", 0.0), given.get("is_causal", False), None)
    grouped = query.shape[-3] != key.shape[-3]
    return lambda: _aten._scaled_dot_product_attention_math.default(
        query, key, given["value"], *settings, scale=scale, enable_gqa=grouped
    )


def takes_random_numbers(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether an operator draws from one of the process's generators: in earnest, and not from one it is handed.

    Args:
        func: an operator with its overload, as a dispatch mode is handed it.
        args, kwargs: of its call.
    """
    if torch.Tag.nondeterministic_seeded not in getattr(func, "tags", ()) or kwargs.get("generator") is not None:
        return False
    defaults = {argument.name: argument.default_value for argument in func._schema.arguments}
    given = {**defaults, **dict(zip(defaults, args, strict=False)), **kwargs}
    if given.get("dropout_p") == 0:  # of fused attention
        return False
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    pretends = any(isinstance(mode, FakeTensorMode) for mode in _get_current_dispatch_mode_stack())
    on_meta = torch.device(kwargs.get("device") or "cpu").type == "meta"
    return not (pretends or on_meta or any(isinstance(tensor, FakeTensor) or tensor.is_meta for tensor in tensors))


_eager, _n_eager, _SWITCHING = contextlib.ExitStack(), 0, threading.Lock()


@contextlib.contextmanager
def uncompiled() -> Iterator[None]:
    """Run what ``torch.compile`` compiled as it was written, in this thread; before torch 2.14 in all of them."""
    dynamo = sys.modules.get("torch._dynamo.eval_frame")
    if dynamo is None:  # nothing is compiled
        yield
        return
    in_thread = getattr(dynamo, "_use_eager_on_nested_compile", None)
    with in_thread() if in_thread is not None else _uncompiled_everywhere():
        yield


@contextlib.contextmanager
def _uncompiled_everywhere() -> Iterator[None]:
    """The switch of the process: the first of several threads turns it, and the last one turns it back."""
    global _n_eager
    with _SWITCHING:
        if not _n_eager:
            _eager.enter_context(torch.compiler.set_stance("force_eager"))
        _n_eager += 1
    try:
        yield
    finally:
        with _SWITCHING:
            _n_eager -= 1
            if not _n_eager:
                _eager.close()
