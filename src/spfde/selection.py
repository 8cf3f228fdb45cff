"""The first masks of methods that choose them from a model and some data (pruning at initialisation)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from torch.utils.data import DataLoader

from spfde.errors import InvalidArgument, Problem
from spfde.planning import Blueprint
from spfde.sieving import population_of
from spfde.sparsity import PruningAtInitialisation, ScoreLoss
from spfde.tracing import Sample, batch_of, unwrap, without_traces


def first_masks(
    model: nn.Module,
    loader: DataLoader[Any],
    blueprint: Blueprint,
    *,
    sample: Sample,
    seed: int,
    loss: ScoreLoss | None,
) -> dict[str, Tensor] | None:
    """The masks that the blueprint's method chooses; None where it chooses none from data.

    The batches hold random samples of the loader's data set, by ``seed``, put together by its ``collate_fn``. The
    loader is not iterated, no generator moves, and the model stays as it is.

    Raises:
        InvalidArgument: the loss cannot be computed, or gives no scores.
    """
    method = blueprint.method
    if not isinstance(method, PruningAtInitialisation):
        return None
    device = next(iter(blueprint.sparse_layers.values())).device
    batches = _batches(loader, method.n_batches, seed=seed, device=device)
    if loss is None and batches:
        _check_pair(batches[0])
    structure = method.structure
    units = sum(count // structure.unit_size(_shape(blueprint, name)) for name, count in blueprint.target.items())
    return method.select(
        unwrap(model),
        blueprint.sparse_layers,
        units=units,
        structure=structure,
        batches=batches,
        loss=loss or cross_entropy,
        sample=sample,
    )


def cross_entropy(model: nn.Module, batch: Any) -> Tensor:
    """Cross entropy of ``model(x)`` against ``y``, for a batch ``(x, y)``: the loss where the caller gives none."""
    x, y = batch
    logits = model(x)
    if not isinstance(logits, Tensor):
        rule = f"is needed, for the model returns {type(logits).__name__} and not logits"
        raise InvalidArgument(Problem("loss", None, rule, "Pass attach(loss=lambda model, batch: …)."))
    try:
        return F.cross_entropy(logits, y)
    except (RuntimeError, ValueError, IndexError) as error:
        rule = f"is needed, for cross entropy does not fit logits {tuple(logits.shape)} and y ({error})"
        raise InvalidArgument(Problem("loss", None, rule, "Pass attach(loss=lambda model, batch: …).")) from None


def _batches(loader: DataLoader[Any], count: int, *, seed: int, device: torch.device) -> list[Any]:
    """``count`` batches of random samples; fewer where the data set has not so many."""
    assert loader.batch_size is not None, "the door lets no such loader in"
    if not count:
        return []
    population = population_of(loader)
    order = torch.randperm(len(population), generator=torch.Generator().manual_seed(seed))
    chosen = torch.split(population[order][: count * loader.batch_size], loader.batch_size)
    # Together, so that random augmentation differs from batch to batch.
    with without_traces(loader.dataset):
        batches = [batch_of(loader, indices.tolist()) for indices in chosen]
    return [tree_map_only(Tensor, lambda tensor: tensor.to(device), batch) for batch in batches]


def _check_pair(batch: Any) -> None:
    if not (isinstance(batch, (tuple, list)) and len(batch) == 2 and all(isinstance(part, Tensor) for part in batch)):
        rule = f"is needed: a batch of the loader is {type(batch).__name__}, and not a pair of inputs and labels"
        raise InvalidArgument(Problem("loss", None, rule, "Pass attach(loss=lambda model, batch: …)."))


def _shape(blueprint: Blueprint, name: str) -> tuple[int, ...]:
    return tuple(blueprint.sparse_layers[name].shape)
