"""The operations that the kernels know, read from the nodes of a traced model."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import fx, nn

Kind = Literal["conv", "linear", "norm", "act", "add", "max_pool", "avg_pool", "global_pool"]


@dataclass(frozen=True)
class Op:
    """One operation that the kernels know.

    Attributes:
        kind: which.
        name: of its value, unique in the graph.
        inputs: names of the values that it reads.
        module: qualified name of its module in the model; None for a function.
        options: the rest: ``act``; ``kernel``, ``stride``, ``padding``, ``count_include_pad``; ``size`` of the output
            for which an adaptive pool's kernel was chosen; ``keepdim``.
    """

    kind: Kind
    name: str
    inputs: tuple[str, ...]
    module: str | None
    options: Mapping[str, Any]


_ACTIVATIONS: dict[Any, str] = {
    nn.ReLU: "relu", nn.ReLU6: "relu6", nn.SiLU: "silu", nn.GELU: "gelu",
    F.relu: "relu", F.relu_: "relu", torch.relu: "relu", torch.relu_: "relu", "relu": "relu", "relu_": "relu",
    F.relu6: "relu6", F.silu: "silu", F.gelu: "gelu",
}  # fmt: skip
_ADDS = (operator.add, operator.iadd, torch.add, "add", "add_")
_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
# Pools as functions, by the module that does the same. They differ in the order of what the kernels do not do.
_POOLS: dict[Any, type[nn.Module]] = {
    F.max_pool2d: nn.MaxPool2d,
    torch.max_pool2d: nn.MaxPool2d,
    F.avg_pool2d: nn.AvgPool2d,
    F.adaptive_avg_pool2d: nn.AdaptiveAvgPool2d,
    F.adaptive_max_pool2d: nn.AdaptiveMaxPool2d,
}

Shape = tuple[int, ...] | None


def read(
    node: fx.Node,
    model: nn.Module,
    reasons: Mapping[str, str],
    sparse: Collection[str],
    shape_of: Callable[[fx.Node], Shape],
) -> Op | str | None:
    """The operation as the kernels know it; or why they do not, None where there is nothing to say about that.

    Args:
        node: of the trace, in which nobody reads what was written in place.
        model: the model that was traced.
        reasons: modules that stay in PyTorch, whatever they are.
        sparse: names of the masked parameters; a linear layer is taken only if its weight is one.
        shape_of: shape of a node's value on the sample; None where that is no floating-point tensor.
    """
    if node.op == "call_module":
        if str(node.target) in reasons:
            return reasons[str(node.target)]
        return _read_module(node, model, sparse, shape_of)
    if node.op not in ("call_function", "call_method"):
        return None
    if node.target in _ADDS:
        return _read_add(node)
    if node.target in _ACTIVATIONS:
        return _read_activation(node)
    if node.target in ("mean", torch.mean):
        return _read_mean(node)
    return _read_pool_function(node, shape_of) if node.target in _POOLS else None


def _read_module(
    node: fx.Node, model: nn.Module, sparse: Collection[str], shape_of: Callable[[fx.Node], Shape]
) -> Op | str | None:
    name = str(node.target)
    module = model.get_submodule(name)
    kind = type(module)
    if len(node.args) != 1 or node.kwargs or not isinstance(node.args[0], fx.Node):
        return None
    source = node.args[0]
    if kind is nn.Conv2d:
        assert isinstance(module, nn.Conv2d)
        return _conv_reason(module) or Op("conv", node.name, (source.name,), name, {})
    if kind is nn.Linear:
        is_sparse = f"{name}.weight" in sparse
        return Op("linear", node.name, (source.name,), name, {}) if is_sparse else "its weight is not sparse"
    if kind is nn.BatchNorm2d:
        return Op("norm", node.name, (source.name,), name, {})
    if kind in _ACTIVATIONS:
        if getattr(module, "approximate", "none") != "none":
            return "approximate"
        return Op("act", node.name, (source.name,), name, {"act": _ACTIVATIONS[kind]})
    if kind in _POOLS.values():
        return _read_pool(node, module, name, shape_of(source))
    return "drops at random" if kind in _DROPOUTS else None


def _conv_reason(conv: nn.Conv2d) -> str | None:
    if conv.weight.dtype not in (torch.float32, torch.float64):
        return f"its weight is {conv.weight.dtype}"
    if conv.padding_mode != "zeros":
        return f"padding_mode={conv.padding_mode!r}"
    if conv.stride[0] != conv.stride[1]:
        return f"stride={conv.stride} differs between rows and columns"
    return None


def _read_pool(node: fx.Node, module: Any, name: str | None, shape: Shape) -> Op | str:
    assert isinstance(node.args[0], fx.Node)
    source = (node.args[0].name,)
    if isinstance(module, (nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)):
        if getattr(module, "return_indices", False):
            return "return_indices"
        is_max = isinstance(module, nn.AdaptiveMaxPool2d)
        return _adaptive(node, source, name, is_max=is_max, size=module.output_size, shape=shape)
    if module.ceil_mode:
        return "ceil_mode"
    window = _window(module.kernel_size, module.stride, module.padding)
    if isinstance(module, nn.MaxPool2d):
        if _pair(module.dilation) != (1, 1) or module.return_indices:
            return "dilation or return_indices"
        return Op("max_pool", node.name, source, name, window)
    if module.divisor_override is not None:
        return "divisor_override"
    return Op("avg_pool", node.name, source, name, {**window, "count_include_pad": module.count_include_pad})


def _adaptive(
    node: fx.Node, source: tuple[str, ...], name: str | None, *, is_max: bool, size: Any, shape: Shape
) -> Op | str:
    """Adaptive pooling; where the size divides the image's, all windows are alike."""
    if _pair(size) == (1, 1) and not is_max:
        return Op("global_pool", node.name, source, name, {"keepdim": True})
    if shape is None or len(shape) != 4:
        return f"reads {shape}"
    sizes = [n if wanted is None else wanted for n, wanted in zip(shape[2:], _pair(size), strict=True)]
    if not all(isinstance(wanted, int) and n % wanted == 0 for n, wanted in zip(shape[2:], sizes, strict=True)):
        return f"its windows differ: {shape[2:]} to {tuple(sizes)}"
    kernel = tuple(n // wanted for n, wanted in zip(shape[2:], sizes, strict=True))
    options = {"kernel": kernel, "stride": kernel, "padding": (0, 0), "size": tuple(sizes)}
    return Op("max_pool" if is_max else "avg_pool", node.name, source, name, options)


def _read_add(node: fx.Node) -> Op | None:
    if (
        len(node.args) != 2
        or not all(isinstance(arg, fx.Node) for arg in node.args)
        or node.kwargs.get("alpha", 1) != 1
        or set(node.kwargs) - {"alpha"}
    ):
        return None
    return Op("add", node.name, tuple(arg.name for arg in node.args if isinstance(arg, fx.Node)), None, {})


def _read_activation(node: fx.Node) -> Op | str | None:
    options = dict(node.kwargs)
    options.pop("inplace", None)
    if options.pop("approximate", "none") != "none":
        return "approximate"
    if options or not node.args or not isinstance(node.args[0], fx.Node) or len(node.args) > 2:
        return None
    return Op("act", node.name, (node.args[0].name,), None, {"act": _ACTIVATIONS[node.target]})


def _read_mean(node: fx.Node) -> Op | None:
    """A mean over the pixels of each image is a global pool."""
    args, options = node.args, dict(node.kwargs)
    if not args or not isinstance(args[0], fx.Node):
        return None
    dim: Any = args[1] if len(args) > 1 else options.pop("dim", None)
    keepdim = args[2] if len(args) > 2 else options.pop("keepdim", False)
    if options or not isinstance(dim, (tuple, list)) or tuple(dim) not in ((2, 3), (-2, -1), (3, 2), (-1, -2)):
        return None
    return Op("global_pool", node.name, (args[0].name,), None, {"keepdim": bool(keepdim)})


def _read_pool_function(node: fx.Node, shape_of: Callable[[fx.Node], Shape]) -> Op | str | None:
    source, *settings = node.args or (None,)
    if not isinstance(source, fx.Node) or node.all_input_nodes != [source]:
        return None
    return _read_pool(node, _POOLS[node.target](*settings, **node.kwargs), None, shape_of(source))


def _window(kernel: Any, stride: Any, padding: Any) -> dict[str, tuple[Any, Any]]:
    return {"kernel": _pair(kernel), "stride": _pair(stride or kernel), "padding": _pair(padding)}


def _pair(value: Any) -> tuple[Any, Any]:
    if isinstance(value, (tuple, list)):
        return (value[0], value[0]) if len(value) == 1 else (value[0], value[1])
    return value, value
