"""What this library uses of PyTorch that PyTorch does not promise, in one place: another version may change it.

Each name says what for, and why no public one does. Tested with torch 2.6.0 and 2.14.1.
"""

from __future__ import annotations

import contextlib
import sys
import types
from collections import OrderedDict
from collections.abc import Callable, Iterator
from operator import attrgetter
from typing import Any

import torch
import torch.nn.modules.module as modules
import torch.optim.optimizer as optimizers
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.modules.batchnorm import _NormBase as NormBase
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

__all__ = [
    "BUFFERS",
    "HOOKS",
    "MODULES",
    "PARAMETERS",
    "FakeTensorMode",  # tensors without numbers: a model is traced without being run
    "NormBase",  # the base of all norms that keep statistics; the public classes have no common one
    "TorchDispatchMode",  # sees every operator that runs
    "active_ddp",
    "add_each_",
    "after_backward",
    "backward_pass",
    "comm_hook_of",
    "compiled_inside",
    "copy_each_",
    "find_nonfinite_",
    "has_global_hooks",
    "hook_steps",
    "hooks_on_gradient",
    "hooks_to_copy",
    "install_comm_hook",
    "is_compiled",
    "is_compiled_whole",
    "is_recorded",
    "layers_of_wrapping",
    "least_two_four_shape",
    "multiplies_tiles",
    "multiply_each_",
    "norm_each",
    "overloads_of",
    "rebuild_reducer",
    "recompile_limit",
    "run_while_compiling",
    "step_hooks_of",
    "steps_can_be_hooked",
    "steps_running",
    "stop_allocating",
    "storage_id",
    "takes_tf32",
    "tree_flatten",
    "tree_leaves",  # the tensors in nested arguments and results
    "tree_map_only",
    "tree_unflatten",
    "version_of",
    "why_not_rebuilt",
]

# Where a module keeps what it holds. A guard reads them at every pass, and the public iterators take ten times as long.
PARAMETERS, BUFFERS, MODULES = "_parameters", "_buffers", "_modules"
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

_OPTIMIZERS = optimizers.Optimizer.profile_hook_step.__code__.co_filename  # where steps are wrapped to run hooks

# One call for many tensors, as the optimizers of PyTorch make it.
copy_each_, multiply_each_, add_each_ = torch._foreach_copy_, torch._foreach_mul_, torch._foreach_add_
norm_each = torch._foreach_norm

_distributed: Any = torch.distributed  # what is not among its documented names

# A number that grows with every write in place, by which PyTorch itself finds out about them.
version_of: Callable[[Tensor], int] = attrgetter("_version")  # no line of Python: a step asks for dozens

# The number of the backward pass that runs now, -1 outside: hooks on parameters are not told which one calls them.
backward_pass: Callable[[], int] = torch._C._current_graph_task_id


def compiled_inside(model: nn.Module) -> nn.Module | None:
    """The module that ``torch.compile`` wrapped; None for one that is not compiled. Its wrapper has no public name."""
    inside = getattr(model, "_orig_mod", None)
    return inside if isinstance(inside, nn.Module) else None


def layers_of_wrapping(model: nn.Module) -> Iterator[nn.Module]:
    """The model, what is in its wrapper, and so on: the outermost first."""
    inner: nn.Module | None = model
    while inner is not None:
        yield inner
        wraps = isinstance(inner, (nn.parallel.DistributedDataParallel, nn.DataParallel))
        inner = inner.get_submodule("module") if wraps else compiled_inside(inner)


def active_ddp() -> nn.parallel.DistributedDataParallel | None:
    """The DistributedDataParallel whose forward pass runs now. It leaves no public mark on the model that it wraps."""
    return getattr(nn.parallel.DistributedDataParallel, "_active_ddp_module", None)


def after_backward(callback: Callable[[], None]) -> None:
    """Have a function called at the end of the backward pass that runs now, before ``backward`` returns.

    On an accelerator it runs on the stream of the caller of ``backward``, which has waited for all gradients by then.
    It is not called where the pass fails. DistributedDataParallel ends its passes this way; no public hook does.
    """
    torch.autograd.Variable._execution_engine.queue_callback(callback)


def hooks_on_gradient(parameter: Tensor) -> OrderedDict[int, Callable[..., Any]]:
    """The hooks that are called when a gradient has arrived, in their order: there is no public list of them."""
    return parameter._post_accumulate_grad_hooks or OrderedDict()  # type: ignore[return-value]


def step_hooks_of(optimizer: optimizers.Optimizer) -> list[Callable[..., Any]]:
    """The hooks on an optimizer's steps: there is no public list of them."""
    return [*optimizer._optimizer_step_pre_hooks.values(), *optimizer._optimizer_step_post_hooks.values()]


def multiplies_tiles() -> bool:
    """Whether this processor multiplies tiles (AMX). Torch 2.6 has no public list of what a processor can do."""
    return torch.cpu._is_amx_tile_supported()


def takes_tf32() -> tuple[object, object]:
    """Whether CUDA's products and convolutions in fp32 are rounded to TF32, by the older or the newer switches.

    The older ones cannot be read once the newer ones have been set.
    """
    kinds = torch.backends.cuda.matmul, torch.backends.cudnn
    try:
        return kinds[0].allow_tf32, kinds[1].allow_tf32
    except RuntimeError:
        return tuple(getattr(kind, "fp32_precision", None) for kind in kinds)  # type: ignore[return-value]


def stop_allocating(device: torch.device, pool: Any) -> None:
    """Have no more memory taken from a graph's pool: up to PyTorch 2.12 a capture that fails does not see to it."""
    names = ("_cuda_endAllocateToPool", "_cuda_endAllocateCurrentStreamToPool")
    stop = next((getattr(torch._C, name) for name in names if hasattr(torch._C, name)), None)
    if stop is not None:
        with contextlib.suppress(RuntimeError):  # it was seen to
            stop(torch.cuda.current_device() if device.index is None else device.index, pool)


def find_nonfinite_(tensors: list[Tensor]) -> Tensor:
    """1 where any number in tensors of one type and device is infinite or NaN, else 0: float32 of shape (1,), there.

    One operation for all, as ``GradScaler`` has it; it multiplies them, in place, by one.
    """
    found, one = (torch.full((1,), value, device=tensors[0].device) for value in (0.0, 1.0))
    torch._amp_foreach_non_finite_check_and_unscale_(tensors, found, one)
    return found


def rebuild_reducer(wrapper: nn.parallel.DistributedDataParallel) -> frozenset[int]:
    """Have a DistributedDataParallel average the gradients of the parameters that require one now, and of no others.

    It fixes them when it is made, and waits for the gradients of them all: one that is frozen later would be waited for
    in vain. These are the steps of its own ``__init__`` and ``__setstate__`` (which unpickling takes), in their order,
    as torch 2.14.1 has them (not run with 2.6 yet). They exchange nothing between the ranks. Hooks of others are
    registered again.

    Returns:
        Identities of the parameters.
    """
    builtin = comm_hook_of(wrapper) if not wrapper._comm_hooks else ""
    wrapper._remove_autograd_hooks()  # type: ignore[no-untyped-call]  # of the reducer that goes
    parameters, are_sparse = wrapper._build_params_for_reducer()  # type: ignore[no-untyped-call]
    names = wrapper._build_debug_param_to_name_mapping(parameters)  # type: ignore[no-untyped-call]
    wrapper._ddp_init_helper(parameters, are_sparse, names, wrapper.static_graph)  # type: ignore[no-untyped-call]
    wrapper._has_rebuilt_buckets = False
    if wrapper.static_graph:
        wrapper._static_graph_delay_allreduce_enqueued = False
        wrapper.reducer._set_static_graph()
        wrapper.logger._set_static_graph()  # type: ignore[union-attr]
    for hook, state in wrapper._comm_hooks:
        wrapper.logger._set_comm_hook_name(hook.__qualname__)  # type: ignore[union-attr]
        _distributed._register_comm_hook(wrapper.reducer, state, hook)
    if builtin.startswith("BuiltinCommHookType."):
        kind = getattr(_distributed.BuiltinCommHookType, builtin.partition(".")[2])
        wrapper._register_builtin_comm_hook(kind)  # type: ignore[no-untyped-call]
    return frozenset(map(id, parameters))


def comm_hook_of(wrapper: nn.parallel.DistributedDataParallel) -> str:
    """The name of the communication hook on a DistributedDataParallel; empty without one. It has no public one."""
    return str(wrapper._get_ddp_logging_data().get("comm_hook", ""))  # type: ignore[no-untyped-call]


def install_comm_hook(
    wrapper: nn.parallel.DistributedDataParallel, hook: Callable[[Any, Any], Any], state: object
) -> None:
    """Register a communication hook on the reducer that a DistributedDataParallel has now, and on no other.

    ``register_comm_hook`` notes it on the wrapper, too, where copies and pickles would take it along.
    """
    wrapper.logger._set_comm_hook_name(hook.__qualname__)  # type: ignore[union-attr]
    _distributed._register_comm_hook(wrapper.reducer, state, hook)


def why_not_rebuilt(wrapper: nn.parallel.DistributedDataParallel) -> str | None:
    """What of a DistributedDataParallel ``rebuild_reducer`` would lose; None where it can be rebuilt."""
    if wrapper._use_python_reducer:
        return 'torch._dynamo.config.optimize_ddp = "python_reducer"'
    if getattr(wrapper, "mixed_precision", None) is not None:
        return "mixed_precision"
    if getattr(wrapper, "_delay_all_reduce_params", None):
        return "delay_all_reduce_named_params"
    by_bucket = [state for _, state in wrapper._comm_hooks if type(state).__name__ == "PowerSGDState"]
    return "the PowerSGD hook, which keeps what it knows by bucket" if by_bucket else None


def steps_running(optimizer: torch.optim.Optimizer) -> int:
    """How many ``step`` methods of an optimizer, its own and inherited ones, are on the stack, of those that run hooks.

    PyTorch patches ``step`` class by class, each when its first instance is made: what runs twice is not known before.
    """
    frame: types.FrameType | None = sys._getframe(1)
    found = 0
    while frame is not None:
        if frame.f_code.co_name == "wrapper" and frame.f_code.co_filename == _OPTIMIZERS:
            found += frame.f_locals.get("self") is optimizer
        frame = frame.f_back
    return found


def hook_steps(optimizer: torch.optim.Optimizer) -> None:
    """Have ``step`` run hooks from the next call on.

    PyTorch patches ``step`` in ``Optimizer.__init__``. A class that does not call it (timm's Lookahead, which wraps
    another optimizer) is patched by the first ``zero_grad`` alone, so that the first step would run no hook.
    """
    if not getattr(type(optimizer).step, "hooked", False):
        optimizer._patch_step_function()


def steps_can_be_hooked(optimizer: torch.optim.Optimizer) -> bool:
    """Whether ``hook_steps`` is in time.

    Schedulers put a ``step`` on the instance that calls the class's as it was then: patching the class comes too late.
    """
    return "step" not in vars(optimizer) or bool(getattr(type(optimizer).step, "hooked", False))


def is_compiled(model: nn.Module) -> bool:
    """Whether the model, or a part of it, is compiled by ``torch.compile``."""
    parts = model.modules()
    return any(compiled_inside(part) is not None or getattr(part, "_compiled_call_impl", None) for part in parts)


def is_compiled_whole(model: nn.Module) -> bool:
    """Whether calls of the model itself are compiled: by ``torch.compile(model)`` or ``model.compile()``."""
    return compiled_inside(model) is not None or getattr(model, "_compiled_call_impl", None) is not None


def is_recorded() -> bool:
    """Whether somebody records or transforms what runs now, and so must see PyTorch's own operators.

    ``torch.compile``, ``torch.export``, ``torch.jit.trace``, ``torch.func`` and dispatch modes do, such as fake tensors
    and counters of FLOPs.
    """
    return bool(
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
    )


def run_while_compiling(function: Callable[[], bool]) -> Callable[[], bool]:
    """Have Dynamo call a function while it compiles, and take its result as a constant.

    ``torch.compiler.assume_constant_result`` does the same, and loads the compiler for it.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def recompile_limit() -> tuple[str, int]:
    """The setting that says how often code is compiled anew, by the name that this torch gives it, and its value."""
    settings = torch._dynamo.config
    name = "recompile_limit" if hasattr(settings, "recompile_limit") else "cache_size_limit"  # as torch 2.6 calls it
    return f"torch._dynamo.config.{name}", int(getattr(settings, name))


def has_global_hooks() -> bool:
    """Whether there are hooks on every module, which a graph would not call. Only the tables themselves tell."""
    return any(getattr(modules, f"_global{table}") for table in HOOKS)


def storage_id(tensor: Tensor) -> int:
    """Equal for tensors that share memory, fake ones included, which have no address."""
    return int(tensor.untyped_storage()._cdata)


def overloads_of(operator: Any) -> Any:
    """The operator whatever the types of its arguments, as tables of operators are keyed."""
    return operator._overloadpacket


def hooks_to_copy(module: nn.Module, keep: Callable[[object], bool]) -> dict[int, OrderedDict[int, Any]]:
    """What ``copy.deepcopy`` is to take for a module's tables of hooks, by identity: the pre-hooks to keep."""
    tables = {
        id(hooks): OrderedDict[int, Any]()
        for name, hooks in vars(module).items()
        if name.startswith("_") and "_hooks" in name and isinstance(hooks, OrderedDict)
    }
    before = module._forward_pre_hooks
    tables[id(before)] = OrderedDict((key, hook) for key, hook in before.items() if keep(hook))
    return tables


def least_two_four_shape(dtype: torch.dtype) -> tuple[int, int] | None:
    """What rows and columns of a 2:4 sparse matrix must be multiples of; None where this version does not say."""
    tensors = torch.sparse
    forced = getattr(tensors.SparseSemiStructuredTensor, "_FORCE_CUTLASS", False)
    kernel = tensors.SparseSemiStructuredTensorCUTLASS if forced else tensors.SparseSemiStructuredTensorCUSPARSELT
    least = getattr(kernel, "_DTYPE_SHAPE_CONSTRAINTS", {}).get(dtype)
    return None if least is None else (least.sparse_min_rows, least.sparse_min_cols)


def local_tensor(tensor: Any) -> Tensor:
    """The local tensor of a DTensor, always the same object; ``to_local()`` gives a view where gradients are on."""
    found: Tensor = tensor._local_tensor
    return found


def class_under_fsdp(module: nn.Module) -> type[nn.Module] | None:
    """The class that a module had before ``fully_shard`` gave it another; None for one that was not sharded.

    The new class is ``FSDP…(FSDPModule, the one before)``. It is told by name: not every torch has the package.
    """
    classes = type(module).__mro__
    at = next((at for at, each in enumerate(classes) if each.__name__ == "FSDPModule"), None)
    return None if at is None else classes[at + 1]


def is_of_fsdp(attribute: str) -> bool:
    """Whether an attribute of a module is what ``fully_shard`` remembers there."""
    return attribute.startswith("__composable_api_state_key")
