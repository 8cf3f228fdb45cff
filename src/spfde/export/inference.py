"""A file's weights in a model that is ready to be called, in PyTorch or by kernels that leave out the zeros."""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, TypeVar, overload

import torch
from torch import Tensor, nn

from spfde.core.errors import InvalidArgument, Problem, Problems, UsageError, nearest
from spfde.core.torch_private import is_compiled_whole
from spfde.engines.native import build
from spfde.engines.native.model import NativeModel
from spfde.engines.stand_in import put_on, stands_in
from spfde.engines.trace import check_forward
from spfde.export import files

Precision = Literal["fp32", "bf16"]
Model = TypeVar("Model", bound=nn.Module)

_ENGINES, _PRECISIONS = ("masked", "native"), ("fp32", "bf16")
# A linear layer of which more is left is multiplied faster by PyTorch, which changes no layout for it.
_MOST_OF_LINEAR = 0.4


@overload
def load(path: str | os.PathLike[str]) -> dict[str, Tensor]: ...


@overload
def load(
    path: str | os.PathLike[str],
    *,
    model: Model,
    engine: Literal["masked", "native"] | None = None,
    precision: Precision | None = None,
) -> Model: ...


def load(
    path: str | os.PathLike[str],
    *,
    model: nn.Module | None = None,
    engine: Literal["masked", "native"] | None = None,
    precision: Precision | None = None,
) -> dict[str, Tensor] | nn.Module:
    """The tensors in a file that ``save_dense`` or ``save_compressed`` wrote; with ``model``, the model with them.

    The tensors are in memory: the file may go or change.

    Args:
        path: the file.
        model: takes the weights, and is put into evaluation mode. Its names and shapes must be those of the file.
        engine: "native" lets the model compute with the weights that are not zero alone, for batches of any size and
            without gradients, its norms folded. A copy of it computes in PyTorch. Weights and statistics are read at
            the first call, and again once PyTorch counts that they were written to (``copy_``, ``load_state_dict``,
            another tensor as ``.data``; not what is written into ``.data`` or by NumPy). "masked" or None: PyTorch
            computes.
        precision: of the native engine: "bf16", "fp32", or None for fp32 outside of
            ``torch.autocast("cpu", torch.bfloat16)`` and bf16 inside.

    Returns:
        Tensors by name, or ``model``.

    Raises:
        InvalidArgument: the file's tensors are not the model's, or the engine cannot compute it here. The model is as
            it was.
        UsageError: safetensors is not installed. Later: the loaded model is called in training mode.
        WeightsFileError: the file is missing, damaged, no safetensors file, or of a newer layout.

    Example:
        >>> spfde.export.save_dense(model.state_dict(), "weights.safetensors")
        >>> spfde.export.load("weights.safetensors")["5.bias"].shape
        torch.Size([3])
        >>> spfde.export.load("weights.safetensors", model=model)(torch.zeros(1, 4)).shape
        torch.Size([1, 3])
    """
    _check_choices(model, engine, precision)
    if model is not None and engine == "native":
        _check_computable(model)
    tensors = files.read(path)
    if model is None:
        return tensors
    _check_fits(model, tensors, path)
    if engine == "native":
        _check_sparse(active_weights(model, tensors))
    model.load_state_dict(tensors)
    return compute_natively(model, precision) if engine == "native" else model.eval()


def compute_natively(model: Model, precision: Precision | None = None) -> Model:
    """Let a model compute by the weights that it has and that are not zero; see :func:`load`.

    Raises:
        InvalidArgument: the engine cannot compute it here, or it has too few zeros.
    """
    _check_computable(model)
    masks = active_weights(model, dict(model.named_parameters()))
    _check_sparse(masks)
    put_on(model.eval(), SparseInference(model, masks, precision))
    return model


def active_weights(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Which weights of convolutions and linear layers are not zero, by name, where it pays to leave the others out.

    Args:
        model: whose layers they are.
        tensors: by the model's names.
    """
    found = {}
    for name, module in model.named_modules():
        weight = tensors.get(f"{name}.weight" if name else "weight")
        if weight is None or not isinstance(module, nn.Conv2d | nn.Linear):
            continue
        mask = weight != 0
        share = int(mask.count_nonzero()) / max(1, mask.numel())
        if share <= _MOST_OF_LINEAR or (share < 1 and isinstance(module, nn.Conv2d)):
            found[f"{name}.weight" if name else "weight"] = mask
    return found


class SparseInference:
    """Computes a model by the native engine, one call at a time, without gradients.

    Args:
        model: in evaluation mode.
        masks: see ``active_weights``.
        precision: None: as autocast says.
    """

    name = "native"

    def __init__(self, model: nn.Module, masks: Mapping[str, Tensor], precision: Precision | None) -> None:
        self.model, self._masks, self._precision = model, masks, precision
        self._native = NativeModel(model, masks=lambda: self._masks, dense_gradients=frozenset, for_inference=True)
        self._lock = threading.Lock()  # the engine's buffers are those of one pass
        self._has_told = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.model.training:
            raise UsageError(
                "the model was loaded for inference, and is in training mode. Call model.eval(), or load the file with "
                'engine="masked" to train it.'
            )
        with self._lock, torch.no_grad(), self._autocast():
            found = self._native(*args, **kwargs)
            if not self._has_told:
                self._has_told = True
                self._tell_left()
        return found

    def _autocast(self) -> AbstractContextManager[Any]:
        if self._precision is None:
            return nullcontext()
        return torch.autocast("cpu", torch.bfloat16, enabled=self._precision == "bf16")

    def _tell_left(self) -> None:
        """Warn of sparse layers that PyTorch computes, their zeros included."""
        taken = {f"{op.module}.weight" for region in self._native.taken for op in region.ops if op.module}
        if left := [name for name in self._masks if name not in taken]:
            why = "; ".join(self._native.left)
            warnings.warn(
                f"The native engine leaves {len(left)} of {len(self._masks)} sparse layers to PyTorch, zeros included: "
                f"{', '.join(left)}. What it does not take: {why}.",
                stacklevel=2,
            )


def _check_choices(model: nn.Module | None, engine: str | None, precision: str | None) -> None:
    problems = Problems()
    if engine is not None and engine not in _ENGINES:
        problems.add("engine", engine, "is no engine for inference", nearest(str(engine), _ENGINES))
    elif engine is not None and model is None:
        problems.add("engine", engine, "computes a model, and none was passed", "Pass model=.")
    if precision is not None and precision not in _PRECISIONS:
        problems.add("precision", precision, "is neither fp32 nor bf16", nearest(str(precision), _PRECISIONS))
    elif precision is not None and engine != "native":
        remedy = 'Pass engine="native", or call the model under torch.autocast.'
        problems.add("precision", precision, "is a setting of the native engine", remedy)
    problems.raise_if_any()


def _check_computable(model: nn.Module) -> None:
    """Raise ``InvalidArgument`` where the engine cannot be put on a model here."""
    reason, remedy = build.available(), 'Load it with engine="masked": PyTorch computes it.'
    if stands_in(model):
        reason, remedy = "an engine computes the model already", "Detach the session, or pass another model."
    elif is_compiled_whole(model):
        reason = "the model is compiled by torch.compile"
    elif reason is None:
        check_forward(model)
        for name, parameter in model.named_parameters():
            if parameter.device.type != "cpu" or parameter.dtype != torch.float32:
                kind = f"{parameter.dtype} on {parameter.device}"
                reason, remedy = f"{name} is {kind}", "Pass a model of float32 on the CPU."
                break
        else:
            try:
                build.load()
            except build.KernelsUnavailable as error:
                reason = error.reason
    if reason is not None:
        raise InvalidArgument(Problem("engine", "native", f"cannot work here: {reason}", remedy))


def _check_sparse(masks: Mapping[str, Tensor]) -> None:
    if not masks:
        rule = "cannot work here: no convolution has zeros, and no linear layer enough of them"
        raise InvalidArgument(Problem("engine", "native", rule, 'Load it with engine="masked": PyTorch computes it.'))


def _check_fits(model: nn.Module, tensors: Mapping[str, Tensor], path: object) -> None:
    """Raise ``InvalidArgument`` where the file's tensors are not those of the model, by name and shape."""
    wanted = {name: value.shape for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    remedy, problems = "Pass the model that was exported, built with the same arguments.", Problems()
    if missing := sorted(set(wanted) - set(tensors)):
        problems.add("model", _some(missing), f"are not in {path}", remedy)
    if unknown := sorted(set(tensors) - set(wanted)):
        problems.add("model", type(model).__name__, f"has no {_some(unknown)}, which {path} holds", remedy)
    for name in wanted:
        if name in tensors and tensors[name].shape != wanted[name]:
            rule = f"is {tuple(tensors[name].shape)} in {path}, and {tuple(wanted[name])} in the model"
            problems.add("model", name, rule, remedy)
    problems.raise_if_any()


def _some(names: list[str]) -> str:
    return ", ".join(names[:2]) + (f" and {len(names) - 2} more" if len(names) > 2 else "")
