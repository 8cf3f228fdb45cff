"""``attach``, and everything that can be wrong with what is attached to, found before anything is changed."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from spfde.core.errors import InvalidArgument, Problem, Problems
from spfde.core.say import say, say_on_stderr
from spfde.core.torch_private import tree_map_only
from spfde.engines.base import Job
from spfde.engines.choose import check_engine, choose_engine
from spfde.engines.prefix_cache import PrefixCache, find_cache_problems
from spfde.freezing.freezer import recompile_warning
from spfde.freezing.rates import check_rates
from spfde.model.sample import Sample, sample_from, unwrap
from spfde.planning import Plan
from spfde.planning.blueprint import Blueprint, check_epochs, check_recipe, draw
from spfde.planning.timeline import Timeline
from spfde.recipe.recipe import Recipe
from spfde.session.distributed import World, check_shared_loader
from spfde.session.initial_masks import first_masks
from spfde.session.part import Setting
from spfde.session.session import Session
from spfde.sieving import DataSieving
from spfde.sieving.balance import find_labels
from spfde.sieving.loader import check_loader, population_of
from spfde.sieving.methods import check_fraction
from spfde.sparsity.saliency import ScoreLoss


def attach(
    model: nn.Module,
    optimizer: Optimizer,
    loader: DataLoader[Any],
    recipe: Recipe,
    *,
    epochs: int,
    seed: int = 0,
    engine: str = "auto",
    cache: PrefixCache | None = None,
    plan: Plan | None = None,
    sample: Sample | None = None,
    labels: Tensor | Sequence[int] | None = None,
    loss: ScoreLoss | None = None,
    probe: Sample | None = None,
) -> Session:
    """Attach a recipe to a training loop.

    The model and the optimizer stay the caller's own: hooks are added, nothing is wrapped. Everything that can be wrong
    is found here. To resume: attach, then load the states of the model, the optimizer and the session, in this order.

    Args:
        model: the model, on the device where it will be trained.
        optimizer: the optimizer; it must hold exactly the model's trainable parameters.
        loader: the training loader over a map-style data set. ``session.loader`` replaces it in the loop.
        recipe: what to save, and how.
        epochs: length of the run.
        seed: seed of masks, growth and sieving; the same seed gives the same choices on every device.
        engine: "masked" (dense arithmetic under a mask), "native" (sparse kernels on a CPU), another registered one, or
            "auto": the one that is expected to be the fastest, which a line on the standard error tells.
            ``session.engine`` is the choice, ``session.engine_reason`` why.
        cache: what to keep of frozen blocks' outputs; None: nothing. It is no part of the session's state.
        plan: what ``spfde.plan`` gave for this model, recipe and length, so that the model is not traced again.
        sample: what the model is called with (a tensor, a tuple of positional or a mapping of keyword arguments); by
            default taken from the data set's first item.
        labels: the class of each sample of the data set, for sieving with ``balanced=True``; by default the data set's
            ``targets`` or ``labels``, and where it has none, those that are observed.
        loss: for methods that prune at initialisation (SNIP, GraSP): the mean loss of a batch, called with the
            model and a batch of the loader. By default batches are ``(x, y)``, and the loss is cross entropy of
            ``model(x)`` against ``y``.
        probe: for freezing with ``criterion="representation"``: what the model is called with to compare its outputs,
            ``probe_samples`` samples; by default random ones of the data set.

    Raises:
        InvalidArgument: with every problem that was found, each with its remedy.

    Example:
        >>> session = spfde.attach(model, optimizer, loader, spfde.presets.mest, epochs=2)
        >>> for epoch in session.epochs():
        ...     for x, y in session.loader:
        ...         logits = model(x)
        ...         torch.nn.functional.cross_entropy(logits, y).backward()
        ...         optimizer.step()
        ...         optimizer.zero_grad()
        ...         session.observe(logits, y)
        >>> round(session.density, 1)
        0.1
    """
    _check_kinds(model, optimizer, loader, recipe, epochs=epochs, seed=seed, engine=engine)
    _check_together(model, optimizer, loader, recipe, epochs, cache)
    world = World.current()
    classes = find_labels(loader.dataset, labels) if recipe.sieving is not None and recipe.sieving.balanced else None
    sample_given = sample is not None
    sample = sample_from(loader, model) if sample is None else sample
    blueprint = draw(model, sample, recipe, epochs) if plan is None else _planned(plan, model, recipe, epochs)
    if recipe.learning_rate is not None:
        Problems(check_rates(optimizer, recipe.learning_rate, blueprint.learning_stops)).raise_if_any()
    warning = recompile_warning(model, len({count for count in blueprint.freeze_plan.frozen if count}))
    if warning is not None:
        warnings.warn(warning, stacklevel=2)
    population = population_of(loader)
    n_ids = int(population.max()) + 1
    timeline = Timeline(blueprint, recipe, len(population))
    job = Job(
        given=model,
        blueprint=blueprint,
        sample=sample,
        batch_size=loader.batch_size or 1,
        density=blueprint.density(timeline[0]),
        n_samples=n_ids,
        cache=cache,
    )
    choice = choose_engine(engine, job, is_neutral=recipe.is_neutral, tell=say_on_stderr)
    masks = first_masks(model, loader, blueprint, sample=sample, seed=seed, loss=loss)
    setting = Setting(
        model=unwrap(model),
        optimizer=optimizer,
        recipe=recipe,
        blueprint=blueprint,
        timeline=timeline,
        seed=seed,
        world=world,
    )
    session = Session(
        setting,
        loader,
        job=job,
        choice=choice,
        labels=classes,
        masks=masks,
        probe=_probe(model, loader, recipe, seed=seed, sample_given=sample_given, probe=probe),
    )
    if world.is_shared and not recipe.is_neutral:
        _check_ranks_agree(session, world)
    _SESSIONS[id(unwrap(model))] = _SESSIONS[id(optimizer)] = session
    if plan is None and blueprint.shortfall is not None:
        say_on_stderr(blueprint.shortfall)
    if engine == "auto" and blueprint.target:
        say(f"engine {choice.name}: {choice.reason}")
    return session


def _planned(plan: Plan, model: nn.Module, recipe: Recipe, epochs: int) -> Blueprint:
    """The plan's blueprint, if it is one of this model, recipe and length."""
    blueprint, own = plan.blueprint, dict(unwrap(model).named_parameters())
    problems = Problems()
    if plan.recipe != recipe or blueprint.epochs != epochs:
        problems.add("plan", f"{blueprint.epochs} epochs", "is of another recipe or run length", "Leave it out.")
    if any(own.get(name) is not weight for name, weight in blueprint.sparse_layers.items()):
        problems.add("plan", type(model).__name__, "is of another model", "Plan for this very model, or leave it out.")
    problems.raise_if_any()
    return blueprint


def _check_kinds(
    model: object, optimizer: object, loader: object, recipe: object, *, epochs: object, seed: object, engine: str
) -> None:
    """Is each argument something of its kind? Without that nothing else can be asked."""
    problems = Problems()
    if not isinstance(model, nn.Module):
        problems.add("model", model, "must be a torch.nn.Module", "Pass the model that is trained.")
    if not isinstance(optimizer, Optimizer):
        problems.add("optimizer", optimizer, "must be a torch.optim.Optimizer", "Pass the model's optimizer.")
    if not isinstance(loader, DataLoader):
        problems.found.extend(check_loader(loader))
    with problems.collecting():
        check_recipe(recipe)
    with problems.collecting():
        check_epochs(epochs)
    if isinstance(seed, bool) or not isinstance(seed, int) or not -(2**63) <= seed < 2**63:
        problems.add("seed", seed, "must be a whole number of 64 bits", "Take a small one, such as 0.")
    with problems.collecting():
        check_engine(engine)
    problems.raise_if_any()


def _check_together(
    model: nn.Module,
    optimizer: Optimizer,
    loader: DataLoader[Any],
    recipe: Recipe,
    epochs: int,
    cache: PrefixCache | None,
) -> None:
    """Do the arguments fit each other? Nothing here is slow, or touches them."""
    problems = Problems()
    problems.found.extend(_check_optimizer(unwrap(model), optimizer))
    problems.found.extend(_check_hooks(optimizer, recipe))
    problems.found.extend(_check_unattached(unwrap(model), optimizer))
    problems.found.extend(find_cache_problems(cache, recipe))
    if recipe.learning_rate is not None:
        problems.found.extend(check_rates(optimizer, recipe.learning_rate))
    interval = None
    with problems.collecting():
        interval = recipe.interval(epochs)
    found = check_loader(loader)
    problems.found.extend(found)
    if not found and recipe.sieving is not None:
        problems.found.extend(_check_sieving(loader, recipe, epochs, interval))
    if not problems.found and not recipe.is_neutral:
        problems.found.extend(check_shared_loader(loader, World.current(), sieves=recipe.sieves))
    problems.raise_if_any()


def _probe(
    model: nn.Module, loader: DataLoader[Any], recipe: Recipe, *, seed: int, sample_given: bool, probe: Sample | None
) -> Sample | None:
    """The samples that the representation criterion looks at, on the model's device; None where there is none."""
    technique = recipe.freezing
    if technique is None or technique.criterion != "representation" or not recipe.freezes or probe is not None:
        return probe
    if sample_given:
        rule = "is needed where sample is given, for the data set's items are not the model's inputs then"
        raise InvalidArgument(Problem("probe", None, rule, f"Pass {technique.probe_samples} samples as probe=."))
    population = population_of(loader)
    if len(population) < technique.probe_samples:
        rule = f"must be at most the number of samples ({len(population)})"
        raise InvalidArgument(Problem("probe_samples", technique.probe_samples, rule, "Lower it."))
    order = torch.randperm(len(population), generator=torch.Generator().manual_seed(seed))
    drawn = sample_from(loader, model, population[order[: technique.probe_samples]].tolist())
    device = next(unwrap(model).parameters()).device
    moved: Sample = tree_map_only(torch.Tensor, lambda tensor: tensor.to(device), drawn)
    return moved


_SESSIONS: weakref.WeakValueDictionary[int, Session] = weakref.WeakValueDictionary()
"""Attached sessions by the identity of their model and of their optimizer."""


def _check_unattached(model: nn.Module, optimizer: Optimizer) -> list[Problem]:
    """Two sessions on one model would undo each other's masks."""
    for name, target in (("model", model), ("optimizer", optimizer)):
        session = _SESSIONS.get(id(target))
        if session is not None and session.holds(target):
            return [
                Problem(name, type(target).__name__, "has a session already", "Call detach() on that session first.")
            ]
    return []


def _check_hooks(optimizer: Optimizer, recipe: Recipe) -> list[Problem]:
    """Can the optimizer's steps be hooked, and does freezing keep a parameter from moving?"""
    name = type(optimizer).__name__
    try:
        optimizer.register_step_pre_hook(lambda *_: None).remove()
    except AttributeError:
        return [
            Problem("optimizer", name, "has no step hooks", "Attach to the optimizer inside it, or before wrapping it.")
        ]
    if recipe.sparsity is not None and recipe.sparsity.refuses_closures and isinstance(optimizer, torch.optim.LBFGS):
        rule = f"runs the model within its step, and {recipe.sparsity.name} exchanges the weights for that long"
        remedy = "Take an optimizer that steps without a closure, such as SGD or AdamW."
        return [Problem("optimizer", name, rule, remedy)]
    if recipe.freezes and isinstance(optimizer, torch.optim.LBFGS):
        remedy = "Take an optimizer that skips parameters without a gradient, such as SGD or AdamW."
        return [Problem("optimizer", name, "moves parameters that have no gradient, and so frozen ones", remedy)]
    return []


def _check_optimizer(model: nn.Module, optimizer: Optimizer) -> list[Problem]:
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


def _check_sieving(loader: DataLoader[Any], recipe: Recipe, epochs: int, interval: int | None) -> list[Problem]:
    """Does the partial set fill a batch? Warns where the criterion can say nothing of a sample."""
    assert recipe.sieving is not None
    assert loader.batch_size is not None
    needed = recipe.sieving.make_criterion().presentations_needed
    circular = recipe.sieves and isinstance(recipe.sieving, DataSieving)
    if circular and epochs > 1 and interval is not None and interval < needed:
        warnings.warn(
            f"update_interval_epochs is {interval}, and {recipe.sieving.criterion} can say nothing of a sample that is "
            f"seen less than {needed} times an interval: the sieve chooses at random. Take an interval of {needed} or "
            "more.",
            stacklevel=4,
        )
    return check_fraction(recipe.sieving, len(population_of(loader)), loader.batch_size)


def _check_ranks_agree(session: Session, world: World) -> None:
    """Equal settings and weights on all ranks, or the masks would drift apart."""
    weights = dict(session.blueprint.sparse_layers)
    for argument, item in (
        ("recipe", session.recipe.to_dict()),
        ("seed", session.seed),
        ("epochs", session.blueprint.epochs),
        ("model", weights),
    ):
        if world.disagrees(item):
            session.detach()
            raise InvalidArgument(
                Problem(
                    argument,
                    f"that of rank {world.rank}",
                    f"must be the same on all {world.size} ranks",
                    "Pass the same values everywhere, and make the model under the same seed or from one checkpoint.",
                )
            )
