"""One node of a traced model, as the kernels know it."""

from __future__ import annotations

import operator
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import fx, nn

Kind = Literal["conv", "linear", "norm", "act", "add", "max_pool", "avg_pool", "global_pool"]


@dataclass(frozen=True)
class Node:
    """One operation that the kernels know.

    Attributes:
        kind: which.
        name: of its value, unique in the graph.
        inputs: names of the values that it reads.
        module: qualified name of its module in the model; None for a function.
        options: the rest: ``act``; ``kernel``, ``stride``, ``padding``, ``count_include_pad``; ``keepdim``.
    """

    kind: Kind
    name: str
    inputs: tuple[str, ...]
    module: str | None
    options: Mapping[str, Any]


_ACT_MODULES: dict[type[nn.Module], str] = {nn.ReLU: "relu", nn.ReLU6: "relu6", nn.SiLU: "silu", nn.GELU: "gelu"}
_ACT_FUNCTIONS: dict[Any, str] = {
    F.relu: "relu", torch.relu: "relu", torch.relu_: "relu", F.relu_: "relu", F.relu6: "relu6", F.silu: "silu",
    F.gelu: "gelu", "relu": "relu", "relu_": "relu",
}  # fmt: skip
_ADDS = (operator.add, operator.iadd, torch.add, "add", "add_")
_IN_PLACE = (operator.iadd, torch.relu_, F.relu_, "add_", "relu_")


def read(node: fx.Node, model: nn.Module, reasons: Mapping[str, str], sparse: Collection[str]) -> Node | None:
    """The operation as the kernels know it, or None.

    Args:
        node: of the trace.
        model: the model that was traced.
        reasons: modules that stay in PyTorch, whatever they are.
        sparse: names of the masked parameters; a linear layer is taken only if its weight is one.
    """
    if node.op == "call_module":
        return _read_module(node, model, reasons, sparse)
    if node.op not in ("call_function", "call_method"):
        return None
    if node.target in _ADDS:
        return _read_add(node)
    if node.target in _ACT_FUNCTIONS:
        return _read_act(node)
    return _read_pool_function(node)


def _read_module(node: fx.Node, model: nn.Module, reasons: Mapping[str, str], sparse: Collection[str]) -> Node | None:
    name = str(node.target)
    module = model.get_submodule(name)
    if name in reasons or len(node.args) != 1 or node.kwargs or not isinstance(node.args[0], fx.Node):
        return None
    source, kind = (node.args[0].name,), type(module)
    if isinstance(module, nn.Conv2d) and kind is nn.Conv2d and _takes_conv(module):
        return Node("conv", node.name, source, name, {})
    if kind is nn.Linear and f"{name}.weight" in sparse:
        return Node("linear", node.name, source, name, {})
    if kind is nn.BatchNorm2d:
        return Node("norm", node.name, source, name, {})
    if kind in _ACT_MODULES and getattr(module, "approximate", "none") == "none":
        if getattr(module, "inplace", False) and _is_read_later(node):
            return None
        return Node("act", node.name, source, name, {"act": _ACT_MODULES[kind]})
    if isinstance(module, nn.AdaptiveAvgPool2d) and module.output_size in (1, (1, 1)):
        return Node("global_pool", node.name, source, name, {"keepdim": True})
    if (
        isinstance(module, nn.MaxPool2d)
        and module.dilation in (1, (1, 1))
        and not module.ceil_mode
        and not module.return_indices
    ):
        return Node("max_pool", node.name, source, name, _window(module.kernel_size, module.stride, module.padding))
    if isinstance(module, nn.AvgPool2d) and not module.ceil_mode and module.divisor_override is None:
        window = _window(module.kernel_size, module.stride, module.padding)
        return Node("avg_pool", node.name, source, name, {**window, "count_include_pad": module.count_include_pad})
    return None


def _takes_conv(conv: nn.Conv2d) -> bool:
    is_real = conv.weight.dtype in (torch.float32, torch.float64)
    if conv.padding_mode != "zeros" or conv.stride[0] != conv.stride[1] or not is_real:
        return False
    if conv.padding == "same":
        return all((k - 1) * d % 2 == 0 for k, d in zip(conv.kernel_size, conv.dilation, strict=True))
    return True


def _read_add(node: fx.Node) -> Node | None:
    if (
        len(node.args) != 2
        or not all(isinstance(arg, fx.Node) for arg in node.args)
        or node.kwargs.get("alpha", 1) != 1
    ):
        return None
    if set(node.kwargs) - {"alpha"} or (node.target in _IN_PLACE and _is_read_later(node)):
        return None
    return Node("add", node.name, tuple(arg.name for arg in node.args if isinstance(arg, fx.Node)), None, {})


def _read_act(node: fx.Node) -> Node | None:
    options = dict(node.kwargs)
    in_place = (
        bool(options.pop("inplace", False))
        or node.target in _IN_PLACE
        or (len(node.args) == 2 and node.args[1] is True)
    )
    if options.pop("approximate", "none") != "none" or options:
        return None
    if not isinstance(node.args[0], fx.Node) or len(node.args) > 2 or (in_place and _is_read_later(node)):
        return None
    return Node("act", node.name, (node.args[0].name,), None, {"act": _ACT_FUNCTIONS[node.target]})


def _read_pool_function(node: fx.Node) -> Node | None:
    args, options = node.args, dict(node.kwargs)
    if not args or not isinstance(args[0], fx.Node):
        return None
    source = (args[0].name,)
    if node.target is F.adaptive_avg_pool2d and not options and args[1:] in (((1, 1),), (1,)):
        return Node("global_pool", node.name, source, None, {"keepdim": True})
    if node.target in ("mean", torch.mean):
        dim: Any = args[1] if len(args) > 1 else options.pop("dim", None)
        keepdim = args[2] if len(args) > 2 else options.pop("keepdim", False)
        if not options and isinstance(dim, (tuple, list)) and tuple(dim) in ((2, 3), (-2, -1), (3, 2), (-1, -2)):
            return Node("global_pool", node.name, source, None, {"keepdim": bool(keepdim)})
        return None
    if node.target in (F.max_pool2d, F.avg_pool2d, torch.max_pool2d):
        return _read_window_function(node, source)
    return None


def _read_window_function(node: fx.Node, source: tuple[str, ...]) -> Node | None:
    is_max = node.target is not F.avg_pool2d
    names = ("kernel_size", "stride", "padding", "dilation" if is_max else "ceil_mode", "ceil_mode" if is_max else "_")
    options = dict(zip(names, node.args[1:], strict=False)) | dict(node.kwargs)
    include = options.pop("count_include_pad", True)
    if options.pop("ceil_mode", False) or options.pop("dilation", 1) not in (1, (1, 1), [1, 1]):
        return None
    if options.pop("return_indices", False) or options.pop("divisor_override", None) is not None or "_" in options:
        return None
    window = _window(options.pop("kernel_size"), options.pop("stride", None), options.pop("padding", 0))
    if options or any(isinstance(value, fx.Node) for pair in window.values() for value in pair):
        return None
    return Node(
        "max_pool" if is_max else "avg_pool", node.name, source, None, {**window, "count_include_pad": bool(include)}
    )


def _window(kernel: Any, stride: Any, padding: Any) -> dict[str, tuple[Any, Any]]:
    return {"kernel": _pair(kernel), "stride": _pair(stride or kernel), "padding": _pair(padding)}


def _pair(value: Any) -> tuple[Any, Any]:
    if isinstance(value, (tuple, list)):
        return (value[0], value[0]) if len(value) == 1 else (value[0], value[1])
    return value, value


def _is_read_later(node: fx.Node) -> bool:
    """Would someone else see what this node does to its input in place?"""
    source = node.args[0]
    return isinstance(source, fx.Node) and any(user is not node and node < user for user in source.users)
