"""Weights that a run starts from: those of a file, or timm's pretrained ones."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spfde.app.data.images import DataSpec
from spfde.app.train.models import TIMM_PREFIX, pretrained_timm
from spfde.app.train.options import TrainOptions
from spfde.app.train.saving import read_weights
from spfde.core.errors import InvalidArgument, Problem, Problems, SpfdeError

PRETRAINED = "pretrained"
_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")
_REMEDY = "Give weights of this model and width; a head of another number of classes may differ."


def start_from(
    model: nn.Module, options: TrainOptions, spec: DataSpec, first: Callable[[Callable[[], Any]], Any]
) -> str:
    """Give a model the weights that were asked for; a line that says where they are from, and what is left fresh.

    Args:
        model: with fresh weights.
        options: of the run, with ``weights``.
        spec: of the data.
        first: calls a function in the first of several processes, and gives all of them its result.

    Raises:
        InvalidArgument: there are none, they cannot be read, or are of another model.
    """
    assert options.weights is not None
    _check(options.weights, options.model)
    state = first(partial(_state, options.weights, options.model, spec))
    fresh = take_over(model, state, n_classes=spec.num_classes, given=options.weights)
    where = (
        f"{options.model.removeprefix(TIMM_PREFIX)}, pretrained" if options.weights == PRETRAINED else options.weights
    )
    left = f"; fresh, as they were for other classes: {', '.join(fresh)}" if fresh else ""
    return f"weights: from {where}{left}"


def take_over(model: nn.Module, state: Mapping[str, Tensor], *, n_classes: int, given: str) -> list[str]:
    """Load a state into a model, but for a head of another number of classes; the names of what is left as it is.

    Args:
        model: that takes it.
        state: by the names of the model's own state.
        n_classes: of the model.
        given: what the state is from, for errors.

    Raises:
        InvalidArgument: something is missing, foreign, of another shape or not finite; nothing has changed.
    """
    own = model.state_dict()
    fresh = [name for name in _head(model, n_classes) if name in state and _is_other_head(state[name], own[name])]
    problems = Problems()
    shaped = [
        f"{name} {tuple(state[name].shape)} instead of {tuple(value.shape)}"
        for name, value in own.items()
        if name in state and name not in fresh and state[name].shape != value.shape
    ]
    broken = [name for name in own if name in state and not bool(torch.isfinite(state[name]).all())]
    for rule, found in (
        ("lacks", [name for name in own if name not in state]),
        ("has what the model has not:", [name for name in state if name not in own]),
        ("has", shaped),
        ("holds numbers that are not finite in", broken),
    ):
        if found:
            more = f" and {len(found) - 3} more" if len(found) > 3 else ""
            problems.add("weights", given, f"{rule} {', '.join(found[:3])}{more}", _REMEDY)
    problems.raise_if_any()
    model.load_state_dict({name: value for name, value in state.items() if name not in fresh}, strict=False)
    return fresh


def _head(model: nn.Module, n_classes: int) -> list[str]:
    """Names of what gives an output a class."""
    heads = [name for name, module in model.named_modules() if getattr(module, "out_features", None) == n_classes]
    return [
        f"{name}.{leaf}" for name in heads for leaf in ("weight", "bias") if hasattr(model.get_submodule(name), leaf)
    ]


def _is_other_head(theirs: Tensor, own: Tensor) -> bool:
    return theirs.shape != own.shape and theirs.shape[1:] == own.shape[1:] and theirs.dim() == own.dim()


def _check(weights: str, model: str) -> None:
    """Raise ``InvalidArgument`` for what cannot be weights of such a model, before anything is read or downloaded."""
    if weights == PRETRAINED:
        if not model.startswith(TIMM_PREFIX):
            rule, remedy = f"there are none of {model}", "Give a file of weights, or a model of timm (timm:NAME)."
            raise InvalidArgument(Problem("weights", weights, rule, remedy))
        return
    if not os.path.isfile(weights):
        raise InvalidArgument(Problem("weights", weights, "is no file", f"Give a file, or {PRETRAINED}."))
    if Path(weights).suffix not in _SUFFIXES:
        raise InvalidArgument(Problem("weights", weights, f"must end in {', '.join(_SUFFIXES)}", "Rename it."))


def _state(weights: str, model: str, spec: DataSpec) -> dict[str, Tensor]:
    if weights == PRETRAINED:
        return pretrained_timm(model, spec.image_size, in_channels=spec.channels)
    try:
        state = read_weights(Path(weights))
    except SpfdeError as error:
        raise InvalidArgument(Problem("weights", weights, str(error), "Give another file.")) from error
    is_state = isinstance(state, Mapping) and all(isinstance(name, str) for name in state)
    if not is_state or not all(isinstance(value, Tensor) for value in state.values()):
        rule = "holds no state_dict: names with a tensor each"
        raise InvalidArgument(Problem("weights", weights, rule, "Save model.state_dict() alone."))
    return dict(state)
