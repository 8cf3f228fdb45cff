"""Which engine computes: dense arithmetic under a mask, or kernels that compute with the active weights alone."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from spfde.core.errors import InvalidArgument, Problem, nearest
from spfde.model.sample import Sample, unwrap

if TYPE_CHECKING:
    from spfde.planning import Blueprint

ENGINES = ("auto", "masked", "native")
# Time of a layer's training step against PyTorch's dense one, as a line in its density (slope, at zero), and how much
# faster than masked the whole model must come out for "auto" to leave PyTorch's well-trodden way. benchmarks/native.py
# measures steps against it. A linear layer pays for two changes of layout.
_LINES = {"conv": (1.0, 0.12), "linear": (1.3, 0.45)}
WORTH_IT = 0.9
# How the time grows with the share of lanes that a small batch leaves empty: less than in proportion, for PyTorch takes
# longer for an image of a small batch too.
_EMPTY_LANES = 0.75


@dataclass(frozen=True)
class Choice:
    """An engine, why it was taken, in a few words, and what was asked for."""

    name: str
    reason: str
    asked: str = "masked"


def check_engine(engine: str) -> None:
    """Raise ``InvalidArgument`` for anything that is no engine's name."""
    if engine not in ENGINES:
        raise InvalidArgument(Problem("engine", engine, "is no engine", nearest(str(engine), ENGINES)))


def choose_engine(
    engine: str,
    model: nn.Module,
    blueprint: Blueprint,
    *,
    sample: Sample,
    batch_size: int,
    is_neutral: bool,
    on_build: Callable[[str], None] | None = None,
) -> Choice:
    """The engine that computes ``model``. The same model and machine give the same choice.

    Args:
        engine: "auto", "masked" or "native".
        model: as attached, wrappers included.
        blueprint: what the recipe means for it.
        sample: what the model is called with.
        batch_size: samples of a training batch.
        is_neutral: the recipe changes nothing; then the engine is always masked.
        on_build: called with one line before the kernels are compiled.

    Raises:
        InvalidArgument: an unknown engine, or "native" where it cannot work, with the reason.
    """
    check_engine(engine)
    if engine == "masked":
        return Choice("masked", "as asked", engine)
    if is_neutral or not blueprint.target:
        return Choice("masked", "nothing is sparse", engine)
    reason = _refusal(model, blueprint)
    estimate = 1.0
    if reason is None:
        estimate, left = estimate_time(unwrap(model), blueprint, sample, batch_size)
        if left:
            reason = f"it takes no sparse layer of this model ({left})"
        elif engine == "auto" and estimate > WORTH_IT:
            return Choice("masked", f"native kernels would take about {estimate:.2f}x of its time here", engine)
    if reason is None:
        from spfde.engines.native import build

        try:
            build.load(on_build=on_build)
        except build.KernelsUnavailable as error:
            reason = error.reason
    if reason is None:
        why = "as asked" if engine == "native" else f"about {1 / estimate:.1f}x faster than masked"
        return Choice("native", why, engine)
    if engine == "native":
        raise InvalidArgument(
            Problem("engine", engine, f"cannot work here: {reason}", 'Use engine="masked" or "auto".')
        )
    return Choice("masked", f"native kernels cannot work here: {reason}", engine)


def say_on_stderr(line: str) -> None:
    """Tell the user what takes a while."""
    print(f"spfde: {line}", file=sys.stderr, flush=True)


def say_choice(engine: str, reason: str) -> None:
    """Tell which engine was chosen and why; silent where the logger "spfde" is set to WARNING or above."""
    if logging.getLogger("spfde").level <= logging.INFO:
        say_on_stderr(f"engine {engine}: {reason}")


def _refusal(model: nn.Module, blueprint: Blueprint) -> str | None:
    """Why the kernels cannot compute this model, as far as its parameters tell."""
    if isinstance(model, torch._dynamo.OptimizedModule):
        return "the model is compiled by torch.compile"
    for name, parameter in unwrap(model).named_parameters():
        if parameter.device.type != "cpu":
            return f"{name} is on {parameter.device}, and the kernels are for CPUs"
        if name in blueprint.target and parameter.dtype != torch.float32:
            return f"{name} is {parameter.dtype}, and the kernels take float32"
    from spfde.engines.native import build

    return build.available()


def estimate_time(model: nn.Module, blueprint: Blueprint, sample: Sample, batch_size: int) -> tuple[float, str]:
    """Modelled time of a training step against the masked engine's, and why no sparse layer is taken; '' where one is.

    Args:
        model, blueprint, sample: see ``choose_engine``.
        batch_size: a pixel of ``lanes`` images is one vector, so that a small batch leaves lanes empty.
    """
    from spfde.engines.native.graph import capture
    from spfde.engines.native.layout import TOKEN_COLUMNS, likely_lanes
    from spfde.engines.native.trace import check_forward

    try:
        check_forward(model)
        captured = capture(model, sample, blueprint.target)
    except InvalidArgument as error:
        return 1.0, str(error)
    nodes = [node for region in captured.regions for node in region.nodes]
    taken = {f"{node.module}.weight": node.kind for node in nodes if node.kind in _LINES}
    if not taken.keys() & set(blueprint.target):
        first = next(iter(blueprint.target))
        return 1.0, next((text for text in captured.left if text.startswith(first.rpartition(".")[0] + " ")), first)
    ours, all_of_it = 0.0, 0.0
    for layer, density in zip(blueprint.cost.layers, blueprint.density(blueprint.first_row), strict=True):
        all_of_it += layer.forward_flops
        if layer.name not in taken:
            ours += layer.forward_flops
            continue
        kind = taken[layer.name]
        slope, fixed = _LINES[kind]
        # Of a linear layer each token is a sample, and a vector holds a few columns of them.
        rows = batch_size if kind == "conv" else batch_size * layer.forward_flops // (2 * layer.numel)
        unit = likely_lanes() * (1 if kind == "conv" else TOKEN_COLUMNS)
        ours += layer.forward_flops * (slope * density + fixed) * (-(-rows // unit) * unit / rows) ** _EMPTY_LANES
    return ours / all_of_it, ""
