"""What a forward pass does, operation by operation: where weights are read, what they were computed from, what learns.

Everything is told by storage: a view of a parameter is that parameter. Of what is computed from parameters and buffers
alone it is known from which, and whether zeros of a parameter are zeros there too (``zeros.py``).
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from spfde.core.plain_kernels import attention_in_products
from spfde.core.torch_private import TorchDispatchMode, overloads_of, storage_id, tree_leaves
from spfde.model.zeros import Zeros


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
    # Where nothing that it reads is a weight: those that one of its operands was computed from together with the
    # model's input, once for each sample at most.
    from_input: frozenset[str] = frozenset()
    # Where the operation's inputs depend on parameters that learn: the position at which the last of those is first
    # read. None where nothing before it learns, so that its inputs need no gradient.
    learns_from: int | None = None


_WEIGHT_AT = {"convolution": 1, "addmm": 2, "aten.mm": 1}
"""Which operand of a product is its weight; of others both may be."""
_NORMS = frozenset({"native_batch_norm", "cudnn_batch_norm", "miopen_batch_norm"})


class Recorder(TorchDispatchMode):
    """Notes each operation with its module, its parameters and its FLOPs.

    Args:
        owners: the parameter's name by storage.
        buffers: the buffer's name by storage.
        learning: the parameters that learn, by name, with their sizes.
        inputs: storages of what the model is called with.
        batch_size: how many samples that is.
    """

    def __init__(
        self,
        owners: Mapping[int, str],
        buffers: Mapping[int, str],
        learning: Mapping[str, int],
        inputs: Iterable[int],
        batch_size: int,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        from torch.utils.flop_counter import flop_registry  # a model is traced long after the import of this package

        self._flops_of = flop_registry  # by operation; it imports Triton where that is installed, a third of our time
        self.ops: list[TracedOp] = []
        self.first_run: dict[str, int] = {}
        self.written: dict[str, str] = {}  # buffers that were written to, with the module that was running
        self._owners, self._buffers, self._learning = owners, buffers, learning
        # Storages that do not depend on the input, with the parameters that they were computed from.
        self._computed: dict[int, tuple[str, ...]] = dict.fromkeys(buffers, ())
        # Those that do, with the parameters that were computed with on the way, since the last product.
        self._from_input: dict[int, frozenset[str]] = dict.fromkeys(inputs, frozenset())
        self._batch_size = batch_size
        self._zeros = Zeros(owners)
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
        if packet not in self._flops_of and func is not torch.ops.prim.device.default:
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
        count = None if products is not None else self._flops_of.get(packet)
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
            self._zeros.note(str(packet), args, kwargs, outputs)
            # The factors of a product are weights of their own.
            made_of = () if flops else (*direct, *origins)
            met = [self._from_input[key] for key in inputs if key in self._from_input]
            self._note(outputs, made_of, None if not met else frozenset().union(*met) if not flops else frozenset())
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
            if parameter not in self._zeros.of(tensor)
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
            from_input=self._weights_from_input(name, of) if flops else frozenset(),
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

    def _weights_from_input(self, name: str, operands: list[Tensor]) -> frozenset[str]:
        """Parameters that were computed with, together with the input, to make a weight of a product.

        At a weight's place all that were; elsewhere those that still have their zeros: an activation is scaled by
        parameters, too, but by fewer than it has elements.
        """
        at = next((place for of, place in _WEIGHT_AT.items() if of in name), None)
        found = set()
        for place, tensor in enumerate(operands):
            met = self._from_input.get(storage_id(tensor), frozenset())
            names = met if place == at else met & self._zeros.of(tensor).keys()
            found |= {own for own in names if tensor.numel() <= self._batch_size * self._learning.get(own, 0)}
        return frozenset(found)

    def _note(self, outputs: list[Tensor], origins: tuple[str, ...], met: frozenset[str] | None) -> None:
        """Remember from which parameters these were computed.

        Args:
            origins: those that the operation reads, or that what it reads was computed from.
            met: those that the model's input has met before; None where it has no part in this.
        """
        for tensor in outputs:
            key = storage_id(tensor)
            self._kept.append(tensor)
            if met is None:
                self._computed[key] = tuple(dict.fromkeys(self._computed.get(key, ()) + origins))
                self._from_input.pop(key, None)
            else:
                self._from_input[key] = met.union(origins)
                self._computed.pop(key, None)

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
