"""What a model computes, and in which order: one forward pass on fake tensors.

The trace runs a copy of the model whose parameters and buffers are fake: nothing is computed, no memory is taken, the
user's modules, BatchNorm statistics and generators stay as they were, and a ResNet-50 at 224 px costs well under a
second of bookkeeping. An operation is attributed to a parameter by storage, so that functional uses, slices (the packed
projection of ``nn.MultiheadAttention``) and tied weights are all found; so is a weight that is computed from parameters
and buffers alone before it is used (weight norm, weight standardisation, a cast, a pruning mask).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from spfde.core.errors import InvalidArgument, Problem
from spfde.core.generators import GeneratorsRestored
from spfde.core.plain_kernels import PlainKernels, uncompiled
from spfde.core.torch_private import (
    FakeTensorMode,
    storage_id,
    tree_leaves,
    tree_map_only,
)
from spfde.model.recorder import Recorder, TracedOp
from spfde.model.sample import Sample, Untraceable, call_arguments, unwrap
from spfde.model.twin import fake_copy

__all__ = [
    "Trace",
    "TracedOp",
    "Untraceable",
    "fake_copy",
    "like_the_model",
    "memory_shared_by",
    "trace",
    "traced_once",
    "weight_of",
]


Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Trace:
    """The forward pass of a model on one sample batch."""

    batch_size: int  # number of samples in the traced batch
    ops: tuple[TracedOp, ...]  # operations in order of execution
    uncounted: Mapping[str, int]  # modules that ran and cost no counted FLOPs, by type name, with how often they ran
    # For each module that ran, the position of the first operation that could be its own.
    first_run: Mapping[str, int]
    written: Mapping[str, str]  # buffers that the pass wrote to, with the module that was running then


def weight_of(op: TracedOp, parameters: Mapping[str, nn.Parameter]) -> str | None:
    """The parameter that is the weight of a product or convolution; None where it has none.

    Of several matrices that it reads, the last one is the weight: those before are an input or a bias that happens to
    be a parameter. Of those that its weight was computed from, the largest.
    """
    read = [name for name in op.parameters[: op.n_read] if parameters[name].dim() >= 2]
    if read:
        return read[-1]
    computed = [name for name in op.parameters[op.n_read :] if parameters[name].dim() >= 2]
    return max(computed, key=lambda name: parameters[name].numel(), default=None)


_KNOWN: ContextVar[dict[tuple[int, torch.Size], Trace] | None] = ContextVar("known traces", default=None)


@contextmanager
def traced_once() -> Iterator[None]:
    """While this is open a model is traced once for each shape of a sample that is a tensor: for many plans of one.

    Models must live on, and stay as they are, meanwhile.

    Example:
        >>> with traced_once():
        ...     trace(model, torch.zeros(1, 4)) is trace(model, torch.zeros(1, 4))
        True
    """
    before = _KNOWN.set({})
    try:
        yield
    finally:
        _KNOWN.reset(before)


def trace(model: nn.Module, sample: Sample, *, training: bool = False, calls: bool = False) -> Trace:
    """Trace ``model`` on ``sample`` without running it for real.

    Args:
        model: the model; only its structure is read.
        sample: what the model is called with: a tensor, a tuple of positional or a mapping of keyword arguments.
            The first dimension of the first tensor is the batch.
        training: run it in training mode; by default in evaluation mode.
        calls: ``sample`` is the positional and the keyword arguments of a call.

    Raises:
        Untraceable: the model cannot be called with this sample, or its forward pass needs real values.
        InvalidArgument: it holds lazy parameters that have no shape yet.
    """
    model, known = unwrap(model), _KNOWN.get()
    if known is None or training or calls or not isinstance(sample, Tensor):
        return _traced(model, sample, training=training, calls=calls)
    key = id(model), sample.shape
    if key not in known:
        known[key] = _traced(model, sample, training=False, calls=False)
    return known[key]


def _traced(model: nn.Module, sample: Sample, *, training: bool, calls: bool) -> Trace:
    lazy = [name for name, p in model.named_parameters() if is_lazy(p)]
    if lazy:
        rule, remedy = "is a lazy parameter without a shape yet", "Run the model once on a batch first."
        raise InvalidArgument(Problem("model", lazy[0], rule, remedy))
    args, kwargs = cast(Arguments, sample) if calls else call_arguments(sample)
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    if not tensors or tensors[0].dim() == 0 or len(tensors[0]) == 0:
        rule, remedy = (
            "must hold a tensor with a batch dimension, and one sample at least",
            "Pass sample=, a small batch.",
        )
        raise Untraceable(Problem("sample", sample, rule, remedy))
    generators = GeneratorsRestored(watches=False)
    try:
        found = _run(model, args, kwargs, generators, training=training)
    except Untraceable:
        if not generators.is_unclear:
            raise
    else:
        if not generators.is_unclear:
            return found
    return _run(model, args, kwargs, GeneratorsRestored(again=generators), training=training)


def _run(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    generators: GeneratorsRestored,
    *,
    training: bool,
) -> Trace:
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    names = {id(p): name for name, p in model.named_parameters(remove_duplicate=True)}
    with FakeTensorMode(allow_non_fake_inputs=True) as fake, PlainKernels():
        twin, stand_ins = fake_copy(model, fake)
        owners = {storage_id(stand_ins[key]): name for key, name in names.items()}
        args, kwargs = tree_map_only(Tensor, like_the_model(model, fake), (args, kwargs))
        buffers = {storage_id(buffer): name for name, buffer in twin.named_buffers()}
        learning = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
        given = [storage_id(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        recorder = Recorder(owners, buffers, learning, given, batch_size=int(tensors[0].shape[0]))
        try:
            # Parts of the model may be compiled on their own.
            with recorder.watching(twin), torch.no_grad(), generators, uncompiled(), recorder:
                twin.train(training)(*args, **kwargs)
        except Exception as error:
            shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors)
            rule = f"the model's forward pass cannot be traced with it ({type(error).__name__}: {error})"
            remedy = (
                "Pass sample= with the inputs that the model is called with; a forward pass that branches on "
                "values of its inputs cannot be traced."
            )
            raise Untraceable(Problem("sample", f"tensors of shape {shapes}", rule, remedy)) from error
    return Trace(
        batch_size=int(tensors[0].shape[0]),
        ops=tuple(recorder.ops),
        uncounted=dict(sorted(recorder.uncounted().items())),
        first_run=recorder.first_run,
        written=recorder.written,
    )


def memory_shared_by(parameters: Mapping[str, nn.Parameter]) -> list[tuple[str, str]]:
    """Pairs of parameters that lie in the same memory, in whole or in part, although they are not one.

    Views of one flat buffer that lie side by side share their storage and no memory.
    """
    spans: dict[int, list[tuple[int, int, str]]] = {}
    for name, p in parameters.items():
        if p.numel() and p.layout == torch.strided and not p.is_meta and type(p) is nn.Parameter:
            first = int(p.storage_offset()) * p.element_size()
            reach = sum((int(size) - 1) * int(stride) for size, stride in zip(p.shape, p.stride(), strict=True)) + 1
            spans.setdefault(storage_id(p), []).append((first, first + reach * p.element_size(), name))
    pairs = []
    for of_storage in spans.values():
        reaching, holder = 0, ""
        for first, end, name in sorted(of_storage):
            if holder and first < reaching:
                pairs.append((holder, name))
            if end > reaching:
                reaching, holder = end, name
    return pairs


def like_the_model(model: nn.Module, fake: FakeTensorMode) -> Callable[[Tensor], Tensor]:
    """Makes an input fake, on the model's device; floating point inputs take the model's dtype when it has just one."""
    parameters = list(model.parameters())
    device = parameters[0].device if parameters else torch.device("cpu")
    dtypes = {p.dtype for p in parameters if p.is_floating_point()}

    def convert(tensor: Tensor) -> Tensor:
        dtype = next(iter(dtypes)) if len(dtypes) == 1 and tensor.is_floating_point() else tensor.dtype
        if tensor.is_meta:
            with fake:
                return torch.empty_strided(tensor.shape, tensor.stride(), device=device, dtype=dtype)
        return fake.from_tensor(tensor.detach()).to(device=device, dtype=dtype)

    return convert
