"""The first masks of methods that choose them from a model and some data (pruning at initialisation)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from spfde.core.errors import InvalidArgument, Problem
from spfde.core.torch_private import tree_map_only
from spfde.model.sample import Sample, batch_of, without_traces
from spfde.planning.blueprint import Blueprint
from spfde.sieving.loader import population_of
from spfde.sparsity import PruningAtInitialisation
from spfde.sparsity.saliency import ScoreLoss


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
    structure, layers = method.structure, blueprint.sparse_layers
    units = sum(blueprint.target[name] // structure.unit_size(tuple(layer.shape)) for name, layer in layers.items())
    return method.select(
        model,
        layers,
        units=units,
        batches=batches,
        loss=loss or cross_entropy,
        sample=sample,
    )


def cross_entropy(model: nn.Module, batch: Any) -> Tensor:
    """Cross entropy of ``model(x)`` against ``y``, for a batch ``(x, y)``: the loss where the caller gives none.

    Raises:
        InvalidArgument: it does not fit, or would mean nothing: one output, or ``y`` with numbers of another kind.
    """
    x, y = batch
    logits = model(x)
    if not isinstance(logits, Tensor):
        raise _loss_is_needed(f"the model returns {type(logits).__name__} and not logits")
    if logits.dim() < 2 or logits.shape[1] == 1:
        raise _loss_is_needed("the model has one output a sample, and cross entropy compares several")
    try:
        value = F.cross_entropy(logits, y)
    except (RuntimeError, ValueError, IndexError) as error:
        raise _loss_is_needed(f"cross entropy does not fit logits {tuple(logits.shape)} and y ({error})") from None
    if y.is_floating_point() and not _are_probabilities(y):
        rule = "y holds neither labels nor class probabilities, which are not negative and sum to 1"
        raise _loss_is_needed(rule)
    return value


def _are_probabilities(y: Tensor) -> bool:
    """Whether each sample's values, over dimension 1, are a distribution, as far as 16 bits can tell."""
    total = y.sum(1)
    return bool((y >= 0).all()) and torch.allclose(total, torch.ones_like(total), rtol=0.0, atol=0.01)


def _loss_is_needed(reason: str) -> InvalidArgument:
    return InvalidArgument(
        Problem("loss", None, f"is needed, for {reason}", "Pass attach(loss=lambda model, batch: …).")
    )


def _batches(loader: DataLoader[Any], count: int, *, seed: int, device: torch.device) -> list[Any]:
    """``count`` batches of random samples; fewer where the data set has not so many."""
    assert loader.batch_size is not None, "attach lets no such loader in"
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
        raise _loss_is_needed(f"a batch of the loader is {type(batch).__name__}, and not a pair of inputs and labels")
