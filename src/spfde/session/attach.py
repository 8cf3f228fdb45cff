"""``attach``, and everything that can be wrong with what is attached to, found before anything is changed."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, IterableDataset

from spfde.core.errors import InvalidArgument, Problem, Problems, nearest
from spfde.core.optimizers import Optimizers
from spfde.core.say import counted, say, say_on_stderr
from spfde.core.torch_private import tree_map_only
from spfde.engines.base import Job
from spfde.engines.choose import AUTO, check_engine, choose_engine
from spfde.engines.prefix_cache import PrefixCache, find_cache_problems
from spfde.freezing.freezer import recompile_warning
from spfde.freezing.rates import check_rates
from spfde.model.sample import Sample, Untraceable, sample_from, sample_of, unwrap
from spfde.planning import Plan
from spfde.planning.blueprint import Blueprint, check_epochs, check_recipe, draw, sieving_warning
from spfde.planning.timeline import Timeline
from spfde.recipe.recipe import Recipe
from spfde.session.checks import are_optimizers, check_model, note_session
from spfde.session.distributed import World, check_shared_loader, deals_out
from spfde.session.initial_masks import first_masks
from spfde.session.part import Setting
from spfde.session.resuming import Kept, resume
from spfde.session.same_data import check_same_data
from spfde.session.sampling import samples_of_epoch
from spfde.session.session import Session
from spfde.sieving.balance import find_labels
from spfde.sieving.loader import check_loader, population_of
from spfde.sieving.methods import check_fraction
from spfde.sieving.stream import Batches, StreamLoader, check_stream, is_stream, stream_of
from spfde.sparsity import PruningAtInitialisation
from spfde.sparsity.saliency import ScoreLoss


def attach(
    model: nn.Module,
    optimizer: Optimizer | Sequence[Optimizer],
    loader: DataLoader[Any] | Batches,
    recipe: Recipe,
    *,
    epochs: int,
    samples_per_epoch: int | None = None,
    seed: int = 0,
    engine: str = "auto",
    compile: bool = False,
    cache: PrefixCache | None = None,
    plan: Plan | None = None,
    sample: Sample | None = None,
    labels: Tensor | Sequence[int] | None = None,
    loss: ScoreLoss | None = None,
    probe: Sample | None = None,
    sparse_allreduce: bool = True,
    state: Mapping[str, Any] | None = None,
) -> Session:
    """Attach a recipe to a training loop.

    The model and the optimizer stay the caller's own: hooks are added, nothing is wrapped. Everything that can be wrong
    is found here. To resume: attach, then load the states of the model, the optimizer and the session, in this order;
    or load the model first, and pass the session's state as ``state``.

    Args:
        model: the model, on the device where it will be trained.
        optimizer: the optimizer, or a list of several; together they must hold exactly the model's trainable
            parameters, each once.
        loader: the training loader over a map-style data set. ``session.loader`` replaces it in the loop. Where nothing
            is sieved it may be of any kind: over a stream, with a batch sampler of your own, an iterable of batches, a
            function that returns one for each epoch, or None (batches come from elsewhere).
        recipe: what to save, and how.
        epochs: length of the run.
        samples_per_epoch: samples that this process trains on in an epoch; needed where the loader does not tell, and
            no other number than the loader's where it does.
        seed: seed of masks, growth and sieving; the same seed gives the same choices on every device.
        engine: "masked" (dense arithmetic under a mask), "native" (sparse kernels on a CPU), "cudagraph" (captured
            passes on a GPU), "blocks" (kernels for blocks of weights on a GPU), another registered one, or "auto": the
            one that is expected to be the fastest, which a line on the standard error tells.
            ``session.engine`` is the choice, ``session.engine_reason`` why.
        compile: compile the model's blocks one by one with ``torch.compile``, each kind of block once for each mode and
            shape. Sums round in another order then.
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
        sparse_allreduce: with several processes in DistributedDataParallel: average the active entries of masked
            gradients alone, which come to the same; False: whole gradients.
        state: of a session, from ``state_dict``, to go on from. The weights stay as they are, so load them before. The
            optimizer's state comes after, where ``recipe.learning_rate`` has split its groups, else before or after.

    Raises:
        InvalidArgument: with every problem that was found, each with its remedy.
        StateMismatch: ``state`` is of another run, or a weight outside its masks is not zero.

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
    optimizers = Optimizers.of(optimizer)
    machine = {"compile": compile, "cache": cache}
    _check_together(model, optimizers, loader, recipe, epochs, machine, is_resumed=state is not None)
    world = World.current()
    batches, stream = _loader_of(loader, recipe, model, sample=sample, samples_per_epoch=samples_per_epoch)
    sieving = recipe.sieving if stream is None else None
    classes = find_labels(batches.dataset, labels) if sieving is not None and sieving.balanced else None
    sample_given = sample is not None
    refusal = None
    if sample is None:
        try:
            sample = sample_of(loader, model)
        except Untraceable as error:
            refusal = error  # not every recipe needs one
    if plan is None:
        blueprint = draw(model, sample, recipe, epochs, refusal=refusal)
    else:
        blueprint = _planned(plan, model, recipe, epochs)
    sample = () if sample is None else sample
    if recipe.learning_rate is not None:
        stops = blueprint.learning_stops
        Problems(check_rates(optimizers, recipe.learning_rate, stops, decayed=state is not None)).raise_if_any()
    for words in () if plan is not None else (blueprint.left_dense_warning, sieving_warning(recipe, epochs)):
        if words is not None:
            warnings.warn(words, stacklevel=2)
    warning = recompile_warning(model, len({count for count in blueprint.freeze_plan.frozen if count}))
    if warning is not None:
        warnings.warn(warning, stacklevel=2)
    population = population_of(batches) if stream is None else torch.arange(stream.samples)
    n_ids = int(population.max()) + 1
    timeline = Timeline(blueprint, recipe, len(population))
    job = Job(
        given=model,
        blueprint=blueprint,
        sample=sample,
        batch_size=(batches.batch_size or 1) if stream is None else stream.batch_size,
        density=blueprint.density(timeline[0]),
        n_samples=n_ids,
        cache=cache,
        compiles=compile,
        is_strict=engine != AUTO,
    )
    choice = choose_engine(engine, job, is_neutral=recipe.is_neutral, tell=say_on_stderr)
    masks = None if state is not None else first_masks(model, batches, blueprint, sample=sample, seed=seed, loss=loss)
    setting = Setting(
        model=unwrap(model),
        optimizer=optimizers,
        recipe=recipe,
        blueprint=blueprint,
        timeline=timeline,
        seed=seed,
        world=world,
        sparse_allreduce=sparse_allreduce,
    )
    kept = None if state is None else Kept(optimizers, blueprint.sparse_layers.values())
    session = Session(
        setting,
        batches if stream is None else stream,
        job=job,
        choice=choice,
        labels=classes,
        masks=masks,
        probe=_probe(model, batches, recipe, seed=seed, sample_given=sample_given, probe=probe),
    )
    if state is not None and kept is not None:
        resume(session, state, kept)
    if world.is_shared:
        _check_ranks_agree(session, world)
    note_session(session)
    if plan is None and blueprint.shortfall is not None:
        say_on_stderr(blueprint.shortfall)
    if engine == "auto" and blueprint.target:
        say(f"engine {choice.name}: {choice.reason}")
    return session


def _loader_of(
    loader: Any, recipe: Recipe, model: nn.Module, *, sample: Sample | None, samples_per_epoch: int | None
) -> tuple[DataLoader[Any], StreamLoader | None]:
    """The user's loader, and what the session iterates where its samples have no ids; None where they have."""
    count = samples_per_epoch
    if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 1):
        raise InvalidArgument(Problem("samples_per_epoch", count, "must be a whole number from 1 on", "Count them."))
    if recipe.sieves or not is_stream(loader):
        known = samples_of_epoch(loader)
        if count is not None and count not in (known, -(-known // World.current().size)):
            rule = f"is not what the loader gives in an epoch ({known})"
            remedy = "Leave it out; where batches come from elsewhere, pass loader=None or what gives them."
            raise InvalidArgument(Problem("samples_per_epoch", count, rule, remedy))
        return loader, None
    if sample is None and not hasattr(loader, "dataset"):
        sample = sample_of(loader, model)
    return loader, stream_of(loader, samples_per_epoch=samples_per_epoch, sample=sample)


def _planned(plan: Plan, model: nn.Module, recipe: Recipe, epochs: int) -> Blueprint:
    """The plan's blueprint, if it is one of this model, recipe and length."""
    blueprint, own = plan.blueprint, dict(unwrap(model).named_parameters())
    problems = Problems()
    if plan.recipe != recipe or blueprint.epochs != epochs:
        problems.add("plan", counted(blueprint.epochs, "epoch"), "is of another recipe or run length", "Leave it out.")
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
    if not are_optimizers(optimizer):
        rule = "must be a torch.optim.Optimizer, or a list of some"
        problems.add("optimizer", optimizer, rule, "Pass the model's optimizer.")
    if not isinstance(loader, DataLoader):
        sieves = not isinstance(recipe, Recipe) or recipe.sieves
        problems.found.extend(check_loader(loader) if sieves else check_stream(loader))
    with problems.collecting():
        check_recipe(recipe)
    with problems.collecting():
        check_epochs(epochs)
    if isinstance(seed, bool) or not isinstance(seed, int) or not -(2**63) <= seed < 2**63:
        problems.add("seed", seed, "must be a whole number of 64 bits", "Take a small one, such as 0.")
    with problems.collecting():
        check_engine(engine)
    problems.raise_if_any()


def check_options(recipe: object, options: Mapping[str, Any]) -> None:
    """For callbacks, which attach later: is the recipe one, and are these options of ``attach``?

    Raises:
        InvalidArgument: with every problem that was found.
    """
    known = [name for name in inspect.signature(attach).parameters if name not in _OF_TRAINERS]
    problems = Problems()
    with problems.collecting():
        check_recipe(recipe)
    for name, value in options.items():
        if name in _OF_TRAINERS:
            problems.add(name, value, "is the trainer's", "Leave it out.")
        elif name not in known:
            problems.add(name, value, "is no argument of spfde.attach", nearest(name, known))
    problems.raise_if_any()


_OF_TRAINERS = ("model", "optimizer", "loader", "recipe", "epochs", "state")
"""What callbacks take from the trainer."""


def _check_together(
    model: nn.Module,
    optimizers: Optimizers,
    loader: Any,
    recipe: Recipe,
    epochs: int,
    machine: Mapping[str, Any],
    *,
    is_resumed: bool,
) -> None:
    """Do the arguments fit each other? Nothing here is slow, or touches them."""
    problems = Problems()
    problems.found.extend(check_model(model, optimizers, recipe, machine))
    problems.found.extend(find_cache_problems(machine["cache"], recipe))
    if recipe.learning_rate is not None:
        problems.found.extend(check_rates(optimizers, recipe.learning_rate, decayed=is_resumed))
    with problems.collecting():
        recipe.interval(epochs)
    streams = not recipe.sieves and is_stream(loader)
    found = [*check_stream(loader), *_check_data(loader, recipe)] if streams else check_loader(loader)
    problems.found.extend(found)
    if not found and recipe.sieving is not None and not streams:
        problems.found.extend(_check_sieving(loader, recipe, epochs))
    if not problems.found and not streams:
        world = World.current()
        if deals_out(loader, world):
            problems.found.extend(check_same_data(loader, world, sieves=recipe.sieves))
        if not problems.found:
            problems.found.extend(check_shared_loader(loader, world, sieves=recipe.sieves))
    problems.raise_if_any()


def _check_data(loader: Any, recipe: Recipe) -> list[Problem]:
    """Does the recipe take samples by their index, where the loader's have none?"""
    kind, remedy = type(loader).__name__, "Pass a DataLoader over a map-style data set, with a batch_size."
    if isinstance(recipe.sparsity, PruningAtInitialisation) and recipe.sparsity.n_batches:
        return [Problem("loader", kind, f"gives {recipe.sparsity.name} no batches of random samples", remedy)]
    return []


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
    if not hasattr(getattr(loader, "dataset", None), "__getitem__") or isinstance(loader.dataset, IterableDataset):
        rule = "is needed, for this loader's samples cannot be drawn by index"
        raise InvalidArgument(Problem("probe", None, rule, f"Pass {technique.probe_samples} samples as probe=."))
    population = population_of(loader)
    if len(population) < technique.probe_samples:
        rule = f"must be at most the number of samples ({len(population)})"
        raise InvalidArgument(Problem("probe_samples", technique.probe_samples, rule, "Lower it."))
    order = torch.randperm(len(population), generator=torch.Generator().manual_seed(seed))
    indices = population[order[: technique.probe_samples]].tolist()
    drawn = sample_from(loader, model, indices, argument="probe")
    device = next(unwrap(model).parameters()).device
    moved: Sample = tree_map_only(torch.Tensor, lambda tensor: tensor.to(device), drawn)
    return moved


def _check_sieving(loader: DataLoader[Any], recipe: Recipe, epochs: int) -> list[Problem]:
    """Does the partial set fill a batch?"""
    assert recipe.sieving is not None
    assert loader.batch_size is not None
    return check_fraction(recipe.sieving, len(population_of(loader)), loader.batch_size, epochs)


def _check_ranks_agree(session: Session, world: World) -> None:
    """Equal settings and weights on all ranks, or the masks would drift apart."""
    weights = dict(session.blueprint.sparse_layers)
    for argument, item in (
        ("recipe", session.recipe.to_dict()),
        ("seed", session.seed),
        ("epochs", session.blueprint.epochs),
        ("model", weights),
    ):
        if world.disagrees(item, what=argument):
            session.detach()
            raise InvalidArgument(
                Problem(
                    argument,
                    f"that of rank {world.rank}",
                    f"must be the same on all {world.size} ranks",
                    "Pass the same values everywhere, and make the model under the same seed or from one checkpoint.",
                )
            )
