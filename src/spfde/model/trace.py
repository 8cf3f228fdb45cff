"""What a model computes, and in which order: one forward pass on fake tensors.

The trace runs a copy of the model whose parameters and buffers are fake: nothing is computed, no memory is taken, the
user's modules, BatchNorm statistics and generators stay as they were, and a ResNet-50 at 224 px costs well under a
second of bookkeeping. An operation is attributed to a parameter by storage, so that functional uses, slices (the packed
projection of ``nn.MultiheadAttention``) and tied weights are all found; so is a weight that is computed from parameters
and buffers alone before it is used (weight norm, weight standardisation, a cast, a pruning mask).
"""

from __future__ import annotations

import contextlib
import copy
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.prune import BasePruningMethod
from torch.utils.flop_counter import flop_registry

from spfde.core.errors import InvalidArgument, Problem
from spfde.core.torch_private import (
    FakeTensorMode,
    TorchDispatchMode,
    hooks_to_copy,
    overloads_of,
    plain_kernels,
    storage_id,
    tree_leaves,
    tree_map_only,
)
from spfde.model.sample import Sample, call_arguments, global_generators_restored, unwrap


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


@dataclass(frozen=True)
class Trace:
    """The forward pass of a model on one sample batch."""

    batch_size: int  # number of samples in the traced batch
    ops: tuple[TracedOp, ...]  # operations in order of execution
    uncounted: Mapping[str, int]  # modules that ran and cost no counted FLOPs, by type name, with how often they ran
    # For each module that ran, the position of the first operation that could be its own.
    first_run: Mapping[str, int]


def trace(model: nn.Module, sample: Sample) -> Trace:
    """Trace ``model`` on ``sample`` without running it for real.

    Args:
        model: the model; only its structure is read.
        sample: what the model is called with: a tensor, a tuple of positional or a mapping of keyword arguments.
            The first dimension of the first tensor is the batch.

    Raises:
        InvalidArgument: the model cannot be called with this sample, its forward pass needs real values, or it holds
            lazy parameters that have no shape yet.
    """
    model = unwrap(model)
    lazy = [name for name, p in model.named_parameters() if is_lazy(p)]
    if lazy:
        rule, remedy = "is a lazy parameter without a shape yet", "Run the model once on a batch first."
        raise InvalidArgument(Problem("model", lazy[0], rule, remedy))
    args, kwargs = call_arguments(sample)
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    if not tensors or tensors[0].dim() == 0:
        rule, remedy = "must hold a tensor with a batch dimension", "Pass the inputs of one small batch."
        raise InvalidArgument(Problem("sample", sample, rule, remedy))
    names = {id(p): name for name, p in model.named_parameters(remove_duplicate=True)}
    with FakeTensorMode(allow_non_fake_inputs=True) as fake, plain_kernels():
        twin, stand_ins = fake_copy(model, fake)
        owners = {storage_id(stand_ins[key]): name for key, name in names.items()}
        args, kwargs = tree_map_only(Tensor, like_the_model(model, fake), (args, kwargs))
        recorder = _Recorder(owners, {storage_id(buffer) for buffer in twin.buffers()})
        eager = torch.compiler.set_stance("force_eager")  # parts of the model may be compiled on their own
        try:
            with recorder.watching(twin), torch.no_grad(), global_generators_restored(), eager, recorder:
                twin.train(False)(*args, **kwargs)
        except Exception as error:
            shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors)
            rule = f"the model's forward pass cannot be traced with it ({type(error).__name__}: {error})"
            remedy = (
                "Pass sample= with the inputs that the model is called with; a forward pass that branches on "
                "values of its inputs cannot be traced."
            )
            raise InvalidArgument(Problem("sample", f"tensors of shape {shapes}", rule, remedy)) from error
    return Trace(
        batch_size=int(tensors[0].shape[0]),
        ops=tuple(recorder.ops),
        uncounted=dict(sorted(recorder.uncounted().items())),
        first_run=recorder.first_run,
    )


class _Recorder(TorchDispatchMode):
    """Notes each operation with its module, its parameters and its FLOPs."""

    def __init__(self, owners: Mapping[int, str], buffers: set[int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.ops: list[TracedOp] = []
        self.first_run: dict[str, int] = {}
        self._owners = owners
        # Storages that do not depend on the input, with the parameters that they were computed from.
        self._computed: dict[int, tuple[str, ...]] = dict.fromkeys(buffers, ())
        self._kept: list[Tensor] = []  # keeps those alive, so that no later storage takes their address
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
        out = func(*args, **kwargs)
        inputs = [storage_id(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        outputs = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        count = flop_registry.get(packet)
        flops = int(count(*args, **kwargs, out_val=out)) if count is not None else 0
        direct = [self._owners[key] for key in inputs if key in self._owners]
        origins = [name for key in inputs for name in self._computed.get(key, ())]
        parameters = tuple(dict.fromkeys(direct + origins if flops else direct))
        # A view of a parameter is no use of it yet: whoever reads the view is.
        is_view = any(storage_id(t) in self._owners for t in outputs)
        if outputs and (flops or (parameters and not is_view)):
            op = TracedOp(len(self.ops), self._stack[-1], parameters, flops, outputs[0].numel(), str(packet))
            self.ops.append(op)
        if not is_view:
            known = not flops and all(key in self._owners or key in self._computed for key in inputs)
            self._note(outputs, tuple(dict.fromkeys(direct + origins)) if known else None)
        return out

    def _note(self, outputs: list[Tensor], origins: tuple[str, ...] | None) -> None:
        """Remember from which parameters these were computed; None when the model's input had a part in it."""
        for tensor in outputs:
            key = storage_id(tensor)
            if origins is not None:
                self._computed[key] = tuple(dict.fromkeys(self._computed.get(key, ()) + origins))
                self._kept.append(tensor)
            else:
                self._computed.pop(key, None)

    @contextlib.contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        handles = []
        for name, module in model.named_modules():
            self._types[name] = type(module).__name__

            def enter(_: nn.Module, __: Any, name: str = name) -> None:
                self._calls[name] += 1
                self.first_run.setdefault(name, len(self.ops))
                self._stack.append(name)

            def leave(_: nn.Module, __: Any, ___: Any) -> None:
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


def fake_copy(model: nn.Module, fake: FakeTensorMode) -> tuple[nn.Module, dict[int, Tensor]]:
    """A copy of the model on fake tensors, and the fake tensor of each parameter by the id of the real one."""
    stand_ins: dict[int, Tensor] = {}
    for p in model.parameters():
        stand_ins[id(p)] = nn.Parameter(fake.from_tensor(p.detach()), requires_grad=p.requires_grad)
    for buffer in model.buffers():
        stand_ins[id(buffer)] = fake.from_tensor(buffer.detach())
    memo: dict[int, Any] = {**stand_ins}
    for module in model.modules():
        # The user's own hooks may record, count or hold anything: the copy has none of them. Those of torch's weight
        # norm, spectral norm and pruning compute the weight, so they stay.
        memo.update(hooks_to_copy(module, _computes_a_weight))
        for value in tree_leaves(vars(module)):
            if isinstance(value, Tensor) and id(value) not in memo:
                memo[id(value)] = fake.from_tensor(value.detach())
            elif isinstance(value, torch.Generator):
                memo[id(value)] = value.clone_state()
    return copy.deepcopy(model, memo), stand_ins


def _computes_a_weight(hook: object) -> bool:
    return isinstance(hook, BasePruningMethod) or type(hook).__module__.startswith("torch.nn.utils")


def like_the_model(model: nn.Module, fake: FakeTensorMode) -> Callable[[Tensor], Tensor]:
    """Makes an input fake, on the model's device; floating point inputs take the model's dtype when it has just one."""
    parameters = list(model.parameters())
    device = parameters[0].device if parameters else torch.device("cpu")
    dtypes = {p.dtype for p in parameters if p.is_floating_point()}

    def convert(tensor: Tensor) -> Tensor:
        dtype = next(iter(dtypes)) if len(dtypes) == 1 and tensor.is_floating_point() else tensor.dtype
        return fake.from_tensor(tensor.detach()).to(device=device, dtype=dtype)

    return convert
