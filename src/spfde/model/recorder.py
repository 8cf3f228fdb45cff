"""What a forward pass does, operation by operation: where weights are read, what they were computed from, what learns.

Everything is told by storage: a view of a parameter is that parameter. Of what is computed from parameters and buffers
alone it is known from which, and whether zeros of a parameter are zeros there too: a weight times a scale keeps them,
a weight minus its mean does not.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import inf
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import flop_registry

from spfde.core.plain_kernels import attention_in_products
from spfde.core.torch_private import TorchDispatchMode, overloads_of, storage_id, tree_leaves


@dataclass(frozen=True)
class TracedOp:
    """One operation that reads a parameter or costs counted FLOPs."""

    position: int  # place in the order of execution
    module: str  # qualified name of the innermost module that was running ('' is the model itself)
    # Qualified names of the parameters that the operation reads, views included. For an operation with counted FLOPs
    # also those that its weight was computed from.
    parameters: tuple[str, ...]
    flops: int  # forward FLOPs for the whole sample batch; one multiply-add is two
    output_numel: int  # elements of the output for the whole sample batch
    name: str  # the operation's name in ATen
    n_read: int = 0  # the first so many of the parameters are read themselves, the others computed with before
    dense: frozenset[str] = frozenset()  # those whose zeros are lost on the way here
    inputs_first: frozenset[str] = frozenset()  # matrices read as (in, out), or in a layout that is not known
    # Where the operation's inputs depend on parameters that learn: the position at which the last of those is first
    # read. None where nothing before it learns, so that its inputs need no gradient.
    learns_from: int | None = None


# Zeros of the first argument are zeros of the result, wherever they are.
_KEEP_ZEROS = frozenset(
    {"_to_copy", "_unsafe_view", "_weight_norm_interface", "abs", "alias", "asinh", "atan", "ceil", "clone"}
    | {"contiguous", "detach", "div", "elu", "erf", "expm1", "expand", "fake_quantize_per_channel_affine"}
    | {"fake_quantize_per_tensor_affine", "flip", "floor", "gelu", "leaky_relu", "neg", "permute"}
    | {"relu", "repeat", "reshape", "roll", "round", "sgn", "sign", "silu", "sin", "sinh", "sqrt", "square", "t"}
    | {"tan", "tanh", "transpose", "true_divide", "trunc", "view"}
)
_NORMS = frozenset({"native_batch_norm", "cudnn_batch_norm", "miopen_batch_norm"})


class Recorder(TorchDispatchMode):
    """Notes each operation with its module, its parameters and its FLOPs.

    Args:
        owners: the parameter's name by storage.
        buffers: the buffer's name by storage.
        learning: names of the parameters that learn.
        inputs: storages of what the model is called with.
    """

    def __init__(
        self, owners: Mapping[int, str], buffers: Mapping[int, str], learning: frozenset[str], inputs: Iterable[int]
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.ops: list[TracedOp] = []
        self.first_run: dict[str, int] = {}
        self.written: dict[str, str] = {}  # buffers that were written to, with the module that was running
        self._owners, self._buffers, self._learning = owners, buffers, learning
        # Storages that do not depend on the input, with the parameters that they were computed from.
        self._computed: dict[int, tuple[str, ...]] = dict.fromkeys(buffers, ())
        self._from_input = set(inputs)
        self._zeros: dict[int, frozenset[str]] = {key: frozenset({name}) for key, name in owners.items()}
        self._kept: list[Tensor] = []  # keeps all alive, so that no later storage takes their address
        self._learnt: dict[int, int] = {}  # storages that depend on what learns: where its last part is first read
        self._first_read: dict[str, int] = {}
        self._stack: list[str] = [""]
        self._types: dict[str, str] = {}
        self._calls: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        packet = overloads_of(func)
        if packet not in flop_registry and func is not torch.ops.prim.device.default:
            # Composite operations (matmul, linear) arrive whole under no_grad; their parts are what is counted.
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        products = attention_in_products(func, args, kwargs)
        if products is not None:
            with self:
                products()
        out = func(*args, **kwargs)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        inputs = [storage_id(tensor) for tensor in tensors]
        outputs = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        count = None if products is not None else flop_registry.get(packet)
        flops = int(count(*args, **kwargs, out_val=out)) if count is not None else 0
        direct = tuple(dict.fromkeys(self._owners[key] for key in inputs if key in self._owners))
        origins = [name for key in inputs for name in self._computed.get(key, ())]
        # A view of a parameter is no use of it yet: whoever reads the view is.
        is_view = any(storage_id(tensor) in self._owners for tensor in outputs)
        learnt = max((self._learnt[key] for key in inputs if key in self._learnt), default=None)
        if outputs and (flops or (direct and not is_view)):
            parameters = tuple(dict.fromkeys((*direct, *origins))) if flops else direct
            self._add(str(packet), parameters, len(direct), flops, outputs, tensors)
        self._note_writes(func, args, kwargs)
        # A view of what was computed is as it was.
        is_view = is_view or (not func._schema.is_mutable and any(storage_id(t) in inputs for t in outputs))
        if not is_view:
            at = [self._first_read.get(name, -1) for name in direct if name in self._learning]
            self._note_learning(outputs, max((*at, -1 if learnt is None else learnt), default=-1))
            known = self._from_input.isdisjoint(inputs)
            zeros = self._zeros_kept(str(packet), args, kwargs) if known else frozenset()
            # The factors of a product are weights of their own.
            made_of = () if flops else tuple(dict.fromkeys((*direct, *origins)))
            self._note(outputs, made_of if known else None, zeros)
        return out

    def _add(
        self, name: str, parameters: tuple[str, ...], n_read: int, flops: int, outputs: list[Tensor], of: list[Tensor]
    ) -> None:
        for parameter in parameters:
            self._first_read.setdefault(parameter, len(self.ops))
        computed = [tensor for tensor in of if storage_id(tensor) in self._computed]
        lost = {
            parameter
            for tensor in computed
            for parameter in self._computed[storage_id(tensor)]
            if parameter not in self._zeros.get(storage_id(tensor), ())
        }
        from_input = [
            storage_id(tensor)
            for tensor in of
            if storage_id(tensor) not in self._owners and not self._computed.get(storage_id(tensor))
        ]
        op = TracedOp(
            len(self.ops),
            self._stack[-1],
            parameters,
            flops,
            outputs[0].numel(),
            name,
            n_read,
            dense=frozenset(lost) if flops else frozenset(),
            inputs_first=self._inputs_first(name, of) if flops else frozenset(),
            learns_from=max((self._learnt[key] for key in from_input if key in self._learnt), default=None),
        )
        self.ops.append(op)

    def _inputs_first(self, name: str, operands: list[Tensor]) -> frozenset[str]:
        """Parameters that a product reads with the inputs in front. Convolutions read (out, in, ...)."""
        if "convolution" in name:
            return frozenset()
        of_parameters = [(self._owners[storage_id(t)], t) for t in operands if storage_id(t) in self._owners]
        # nn.Linear hands over its weight transposed: the inputs are in front there, and the strides run upwards.
        return frozenset(owner for owner, t in of_parameters if t.dim() >= 2 and (t.dim() > 2 or t.stride(0) != 1))

    def _zeros_kept(self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> frozenset[str]:
        """Parameters whose zeros are zeros of the result, of an operation on what does not depend on the input."""
        bare = name.rpartition(".")[2]
        bare = bare if bare.startswith("_") and not bare.endswith("_") else bare.removesuffix("_")

        def zeros(value: object) -> frozenset[str]:
            return self._zeros.get(storage_id(value), frozenset()) if isinstance(value, Tensor) else frozenset()

        if bare in _KEEP_ZEROS:
            return zeros(args[0])
        if bare == "mul":
            return zeros(args[0]) | zeros(args[1])
        if bare in ("add", "sub"):
            return zeros(args[0]) & zeros(args[1])
        if bare == "copy":
            return zeros(args[1])
        if bare in ("cat", "stack"):
            return frozenset[str]().union(*map(zeros, args[0]))
        if bare in ("clamp", "clamp_min", "clamp_max", "hardtanh"):
            low, high = _limits(bare, args, kwargs)
            return zeros(args[0]) if low <= 0 <= high else frozenset()
        if bare == "pow" and isinstance(args[1], (int, float)) and args[1] > 0:
            return zeros(args[0])
        if bare == "masked_fill" and not isinstance(args[2], Tensor) and args[2] == 0:
            return zeros(args[0])
        return frozenset()

    def _note(self, outputs: list[Tensor], origins: tuple[str, ...] | None, zeros: frozenset[str]) -> None:
        """Remember from which parameters these were computed; None when the model's input had a part in it."""
        for tensor in outputs:
            key = storage_id(tensor)
            self._kept.append(tensor)
            if origins is not None:
                self._computed[key] = tuple(dict.fromkeys(self._computed.get(key, ()) + origins))
                self._zeros[key] = zeros
                self._from_input.discard(key)
            else:
                self._from_input.add(key)
                self._computed.pop(key, None)
                self._zeros.pop(key, None)

    def _note_learning(self, outputs: list[Tensor], latest: int) -> None:
        for tensor in outputs:
            if latest >= 0:
                self._learnt[storage_id(tensor)] = latest
            else:
                self._learnt.pop(storage_id(tensor), None)

    def _note_writes(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Which buffers an operation writes to: as its schema says, or, of a norm, its statistics in training."""
        schema = func._schema
        written = [
            value
            for argument, value in [*zip(schema.arguments, args, strict=False)]
            if argument.alias_info is not None and argument.alias_info.is_write
        ]
        written += [
            kwargs[argument.name]
            for argument in schema.arguments
            if argument.name in kwargs and argument.alias_info is not None and argument.alias_info.is_write
        ]
        if schema.name.rpartition("::")[2] in _NORMS and len(args) > 5 and args[5]:
            written += args[3:5]
        for leaf in tree_leaves(written):
            if isinstance(leaf, Tensor) and storage_id(leaf) in self._buffers:
                self.written[self._buffers[storage_id(leaf)]] = self._stack[-1]

    @contextlib.contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """While it runs, know which module does."""
        handles = []
        for name, module in model.named_modules():
            self._types[name] = type(module).__name__
            own = [f"{name}.{key}" if name else key for key, _ in module.named_buffers(recurse=False)]

            def enter(_: nn.Module, __: Any, name: str = name) -> None:
                self._calls[name] += 1
                self.first_run.setdefault(name, len(self.ops))
                self._stack.append(name)

            def leave(module: nn.Module, _: Any, __: Any, own: list[str] = own) -> None:
                # A buffer may be another tensor afterwards, instead of one that is written to.
                for buffer in own:
                    value = module._buffers.get(buffer.rpartition(".")[2])
                    if value is not None and self._buffers.get(storage_id(value)) != buffer:
                        self.written.setdefault(buffer, self._stack[-1])
                self._stack.pop()

            handles.append(module.register_forward_pre_hook(enter))
            handles.append(module.register_forward_hook(leave, always_call=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def uncounted(self) -> Counter[str]:
        """Types of the modules that ran without a counted operation in them or below them."""
        counted = set()
        for op in self.ops:
            if op.flops:
                parts = op.module.split(".")
                counted |= {".".join(parts[:depth]) for depth in range(len(parts) + 1)}
        parents = {name.rpartition(".")[0] for name in self._types if name}
        found: Counter[str] = Counter()
        for name, calls in self._calls.items():
            if name not in counted and name not in parents:
                found[self._types[name]] += calls
        return found


def _limits(clamp: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[float, float]:
    """Between which values an operation of this name clamps; where a tensor tells, they are not known."""
    names = {"clamp_min": ["min"], "clamp_max": ["max"], "hardtanh": ["min_val", "max_val"]}.get(clamp, ["min", "max"])
    given = dict(zip(names, args[1:], strict=False)) | dict(kwargs)
    if any(isinstance(value, Tensor) for value in given.values()):
        return inf, -inf
    unset = (-1.0, 1.0) if clamp == "hardtanh" else (-inf, inf)
    low, high = (next((given.get(name) for name in names if key in name), None) for key in ("min", "max"))
    return (unset[0] if low is None else low), (unset[1] if high is None else high)
