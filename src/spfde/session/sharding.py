"""Models that ``fully_shard`` (FSDP2) has sharded: what works on them, in one place, and what their ranks agree on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from spfde.core.checksum import checksum, checksums
from spfde.core.errors import Problem, UsageError
from spfde.core.sharding import first_row, is_dtensor, is_sharded, reshard, sum_over_ranks
from spfde.recipe.recipe import Recipe
from spfde.session.distributed import World
from spfde.session.part import Setting
from spfde.sparsity.structure import Unstructured
from spfde.sparsity.weight import MaskedWeight


def check_sharding(model: nn.Module, recipe: Recipe, machine: Mapping[str, object]) -> list[Problem]:
    """What of a sharded model, or of what is asked for, does not work; empty for a model that is whole.

    Args:
        model: without wrappers.
        recipe: as attached.
        machine: ``compile`` and ``cache`` of ``attach``; which engines work, ``choose_engine`` knows.
    """
    wrapper = next((type(m).__name__ for m in model.modules() if type(m).__name__ == "FullyShardedDataParallel"), None)
    if wrapper is not None:
        rule = "flattens the parameters, and masks have no weights to find"
        return [Problem("model", wrapper, rule, "Shard it with torch.distributed.fsdp.fully_shard (FSDP2).")]
    if not is_sharded(model):
        spread = [name for name, p in model.named_parameters() if is_dtensor(p)]
        rule = "is a DTensor, and the model was not sharded by fully_shard"
        remedy = "Use torch.distributed.fsdp.fully_shard alone, or train it in DistributedDataParallel(model)."
        return [Problem("model", spread[0], rule, remedy)] if spread else []
    reshard(model)
    return [*_check_parameters(model), *check_recipe(recipe), *_check_machine(machine)]


def _check_parameters(model: nn.Module) -> list[Problem]:
    """Does each rank of all have rows of each parameter that learns?"""
    for name, parameter in model.named_parameters():
        if is_dtensor(parameter):
            problem = _layout_problem(name, parameter)
            if problem is not None:
                return [problem]
        elif parameter.requires_grad:
            rule = "learns and is not sharded, so that nobody averages its gradient over the ranks"
            remedy = "Call fully_shard(model) on the whole model at last, without ignored_params, or freeze it."
            return [Problem("model", name, rule, remedy)]
    return []


def _layout_problem(name: str, parameter: Any) -> Problem | None:
    mesh, placements, ranks = parameter.device_mesh, parameter.placements, World.current().size
    kinds = [(type(each).__name__, getattr(each, "dim", None)) for each in placements]
    if kinds != [("Shard", 0)] or mesh.size() != ranks:
        rule = f"is laid out as {tuple(placements)} over {mesh.size()} of {ranks} ranks, and must be rows over all"
        remedy = "Pass fully_shard a mesh of one dimension over all ranks, and no shard_placement_fn."
        return Problem("model", name, rule, remedy)
    if parameter.device.type != mesh.device_type:
        rule = f"lies on {parameter.device.type}, and the ranks exchange on {mesh.device_type}"
        return Problem("model", name, rule, "Leave out CPUOffloadPolicy.")
    return None


def check_recipe(recipe: Recipe) -> list[Problem]:
    """Do its masks follow from one layer at a time, and its freezing from the plan?"""
    problems, method = [], recipe.sparsity if recipe.is_sparse else None
    if method is not None and not _is_by_layer(type(method)):
        rule = "needs more than a layer's weight and gradient at the times of the plan, and the model is sharded (FSDP)"
        remedy = "Use static, set, rigl, mest or another DropGrow, or train it in DistributedDataParallel(model)."
        problems.append(Problem("sparsity", method.name, rule, remedy))
    if method is not None and not isinstance(method.structure, Unstructured):
        rule = "is not supported where the model is sharded (FSDP)"
        remedy = "Use structure=Unstructured(), or train it in DistributedDataParallel(model)."
        problems.append(Problem("structure", method.structure, rule, remedy))
    if recipe.freezes and recipe.freezing is not None and recipe.freezing.adapts:
        rule = "compares masks or outputs of whole models, and the model is sharded (FSDP)"
        remedy = 'Use criterion="schedule", or train it in DistributedDataParallel(model).'
        problems.append(Problem("criterion", recipe.freezing.criterion, rule, remedy))
    return problems


def _is_by_layer(kind: type) -> bool:
    """Whether the class that says how masks change, or one made of it, says ``by_layer``."""
    for each in kind.__mro__:
        if "by_layer" in vars(each):
            return bool(vars(each)["by_layer"])
        if "strategy" in vars(each):
            return False
    return False


def _check_machine(machine: Mapping[str, object]) -> list[Problem]:
    """Is it left to PyTorch to compute the model?"""
    usual: dict[str, object] = {"compile": False, "cache": None}
    rule = "is not supported where the model is sharded (FSDP), which PyTorch alone computes"
    return [
        Problem(name, machine[name], rule, "Leave it out, or train it in DistributedDataParallel(model).")
        for name, value in usual.items()
        if machine[name] is not value
    ]


def whole_checksums(layers: Mapping[str, MaskedWeight]) -> dict[str, int]:
    """A number for the content of each weight as a whole. With a sharded model every rank has to call it."""
    some = next(iter(layers.values()), None)
    if some is None or not is_dtensor(some.parameter):
        return checksums({name: layer.parameter for name, layer in layers.items()})
    own = [checksum(x.parameter, first_row(x.parameter) * (x.numel // x.parameter.shape[0])) for x in layers.values()]
    # Modulo 2^64, as each of them is.
    found: list[int] = sum_over_ranks(torch.stack(own), some.parameter).tolist()
    return dict(zip(layers, found, strict=True))


def agreed_on(
    setting: Setting, layers: Mapping[str, MaskedWeight], parameters: Mapping[str, Tensor]
) -> tuple[dict[str, int], dict[str, int]]:
    """What must be the same on all ranks of masks and of parameters, as numbers by name.

    Of a sharded model that is how many weights each layer has, and the generator that draws them.
    """
    whole = {name: p for name, p in parameters.items() if not p.is_meta and not is_dtensor(p)}
    if not setting.is_sharded:
        return checksums({name: layer.mask for name, layer in layers.items()}), checksums(whole)
    counts = {name: layer.active for name, layer in layers.items()}
    drawn_by = checksums({"the generator that draws all of them": setting.generator.get_state()})
    return {**counts, **(drawn_by if layers else {})}, checksums(whole)


def check_counts(layers: Mapping[str, MaskedWeight], of_ranks: list[dict[str, int]]) -> None:
    """Raise ``UsageError`` where the parts of a layer's mask do not add up to its number of active weights.

    Args:
        layers: the masked weights.
        of_ranks: what ``own_counts`` gave on each rank.
    """
    for name, layer in layers.items():
        found = sum(counts[name] for counts in of_ranks if name in counts)
        if is_dtensor(layer.parameter) and found != layer.active:
            raise UsageError(
                f"the ranks' parts of the mask of {name} have {found} active weights, and the layer {layer.active}: "
                "masks were changed by hand on some ranks. Change none, or load the session's state on every rank."
            )


def own_counts(layers: Mapping[str, MaskedWeight]) -> dict[str, int]:
    """Active weights in this rank's part of each sharded layer's mask."""
    return {name: int(x.mask.sum()) for name, x in layers.items() if is_dtensor(x.parameter)}
