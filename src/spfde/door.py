"""The door: everything that can be wrong with what a session is attached to, found before anything is changed."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from spfde.errors import InvalidArgument, Problem, nearest
from spfde.freezing import recompile_warning
from spfde.planning import Blueprint
from spfde.recipe import Recipe
from spfde.sieving import check_fraction, population_of

ENGINES = ("auto", "masked", "native")


def choose_engine(engine: str) -> str:
    """The engine that ``auto`` stands for, or ``engine`` itself.

    Raises:
        InvalidArgument: an unknown engine, or one that cannot work here.
    """
    if engine not in ENGINES:
        raise InvalidArgument(Problem("engine", engine, "is no engine", nearest(str(engine), ENGINES)))
    if engine == "native":
        raise InvalidArgument(
            Problem("engine", engine, "has no kernels in this version of spfde", 'Use engine="masked" or "auto".')
        )
    return "masked"


def check_optimizer(model: nn.Module, optimizer: Optimizer) -> list[Problem]:
    names = {id(p): name for name, p in model.named_parameters()}
    held = [p for group in optimizer.param_groups for p in group["params"]]
    foreign = [tuple(p.shape) for p in held if id(p) not in names]
    in_optimizer = {id(p) for p in held}
    missing = [names[id(p)] for p in model.parameters() if p.requires_grad and id(p) not in in_optimizer]
    problems = []
    if foreign:
        problems.append(
            Problem(
                "optimizer",
                f"{len(foreign)} parameters of shapes {foreign[:3]}",
                "holds parameters that are not the model's",
                "Make the optimizer from model.parameters(), after the model is complete.",
            )
        )
    if missing:
        problems.append(
            Problem(
                "optimizer",
                ", ".join(missing[:3]) + (" …" if len(missing) > 3 else ""),
                f"lacks {len(missing)} trainable parameters of the model",
                "Add them to the optimizer, or set requires_grad=False on them.",
            )
        )
    return problems


def check_sieving(loader: DataLoader[Any], recipe: Recipe, epochs: int) -> list[Problem]:
    """Does the partial set fill a batch? Warns where forgetting cannot be counted."""
    assert recipe.sieving is not None
    assert loader.batch_size is not None
    if recipe.sieves and epochs > 1 and recipe.interval(epochs) == 1:
        warnings.warn(
            "update_interval_epochs is 1, so that a sample is seen once an interval: no forgetting can be counted and "
            "the sieve chooses at random. Take an interval of 2 or more.",
            stacklevel=4,
        )
    return check_fraction(recipe.sieving, len(population_of(loader)), loader.batch_size)


def check_single_process() -> None:
    if (
        torch.distributed.is_available()
        and torch.distributed.is_initialized()
        and torch.distributed.get_world_size() > 1
    ):
        raise InvalidArgument(
            Problem(
                "recipe",
                f"{torch.distributed.get_world_size()} processes",
                "masks and sieved samples are not yet kept equal over several processes",
                "Train in one process, or with a neutral recipe.",
            )
        )


def warn_of_recompiles(model: nn.Module, blueprint: Blueprint) -> None:
    """Warn where freezing a compiled model would meet torch's limit of recompilations."""
    warning = recompile_warning(model, len({at for at in blueprint.freeze_plan.freeze_epochs if at is not None}))
    if warning is not None:
        warnings.warn(warning, stacklevel=3)
