"""Getting a run ready: options in, everything in hand out. All mistakes are found here, before any work is done."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer

import spfde
from spfde.app.data.datasets import load_data
from spfde.app.data.images import ImageData, Split, draw
from spfde.app.data.validation import hold_out, trained_on
from spfde.app.machine_errors import is_lost_process
from spfde.app.runs.checkpoints import described
from spfde.app.runs.folder import CONFIG, RECIPE, RunFolder
from spfde.app.runs.rows import check_rows
from spfde.app.train.augment import BatchAugment, normalise
from spfde.app.train.building import built
from spfde.app.train.checks import check_named
from spfde.app.train.dense_step import time_dense_step
from spfde.app.train.evaluated import Drawn, Evaluated, check_norms
from spfde.app.train.evaluated import told as told_of_evaluated
from spfde.app.train.feed import Feed, make_feed
from spfde.app.train.loss import loss_of
from spfde.app.train.machine import Machine, choose, compiling, pick_device
from spfde.app.train.mixing import Mixing, mixing_of
from spfde.app.train.optimizing import make_optimizer
from spfde.app.train.optimizing import told as told_of_updates
from spfde.app.train.options import TrainOptions, check_full_batch
from spfde.app.train.processes import Processes, check_together, open_folder
from spfde.app.train.saving import Remembers, load_state, load_weights, save_state, seed_all, weights_note
from spfde.app.train.stamp import hardware, versions
from spfde.app.train.starting import start_from
from spfde.app.train.tracking import Trackers
from spfde.app.train.waits import Waits
from spfde.core.errors import DataError, RunFolderError, StateMismatch, TrainingDiverged
from spfde.core.state import check_entries
from spfde.engines.prefix_cache import PrefixCache
from spfde.planning import Plan, plan
from spfde.recipe.recipe import Recipe
from spfde.session.distributed import OtherRankFailed
from spfde.session.session import Session
from spfde.sieving.balance import find_labels

Loads = Callable[..., ImageData]
"""Gives a data set, called as ``load_data`` is."""


@dataclass
class Progress:
    """What the loop itself remembers from epoch to epoch; ``rows`` are the lines of ``metrics.jsonl``."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    dense_step_seconds: float | None = None

    def state_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        check_entries(state, "the run's progress", {"rows": list, "dense_step_seconds": (float, type(None))})
        check_rows(state["rows"])
        self.rows, self.dense_step_seconds = state["rows"], state["dense_step_seconds"]


@dataclass
class TrainingRun:
    """Everything that a run has in hand.

    Attributes:
        options: with nothing left to choose.
        asked: the options as they were asked for.
        choices: what was chosen, in lines for the user.
        processes: those that train it together.
        normalised: gives images on the device as the model takes them, but for the memory format.
        mixing: mixes images of a batch in training; None for no mixing.
        wrapped: what the model is called by in training: itself, or with others what averages its gradients.
        evaluated: gives the model to evaluate, where that is another one.
        waits: how long the newest epoch's training has waited for its batches, in this process.
    """

    options: TrainOptions
    asked: TrainOptions
    choices: list[str]
    folder: RunFolder
    processes: Processes
    machine: Machine
    data: ImageData
    normalised: Callable[[Tensor], Tensor]
    mixing: Mixing | None
    model: nn.Module
    wrapped: nn.Module
    evaluated: Evaluated
    optimizer: Optimizer
    scaler: GradScaler
    session: Session
    plan: Plan
    augment: BatchAugment
    feed: Feed
    trackers: Trackers
    progress: Progress
    waits: Waits = field(default_factory=Waits)
    is_resumed: bool = False
    resumed_from: Path | None = None

    def batch(self, handed: Any) -> tuple[Tensor, Tensor]:
        """A batch of ``session.loader`` as the model takes it, and its labels, on the device.

        Labels are classes ``(N,)``, or class probabilities ``(N, classes)`` where images are mixed.
        """
        images, labels = self.feed.batch(handed, self.session)
        x = self.normalised(images)
        if self.mixing is not None:
            x, labels = self.mixing(x, labels, self.session.augmentation_seeds())
        return _as_input(x), labels

    def evaluation_batches(self, split: Split) -> Iterator[tuple[Tensor, Tensor]]:
        """This process's share of a set to evaluate on as the model takes it, and its labels, on the device."""
        batches = self.feed.evaluation_batches(split)
        return ((_as_input(self.normalised(images)), labels) for images, labels in batches)

    def logits(self, x: Tensor, model: nn.Module | None = None) -> Tensor:
        """The outputs in the run's precision, as float32; of its model, or of another one like it."""
        # The wrapper waits for the other processes, which in evaluation may have another number of batches.
        called = model if model is not None else (self.wrapped if self.model.training else self.model)
        with self.machine.autocast():
            logits: Tensor = called(x)
        return logits.float()

    def at(self, checkpoint: Path) -> nn.Module:
        """A model with a checkpoint's weights as they were evaluated, beside the run's own, which is not touched."""
        model = built(self.options, self.data.spec, self.machine.device, seed=0)
        with self.processes.copied(checkpoint) as copy:
            load_weights(copy, model)
        return model

    def save(self, folder: Path) -> None:
        """Write what the run goes on from."""
        save_state(folder, self.model, self.optimizer, self.scaler, self._others, self.machine.device)
        self.evaluated.save(folder)

    def load(self, folder: Path) -> None:
        """Go on from what ``save`` wrote."""
        load_state(folder, self.model, self.optimizer, self.scaler, self._others, self.machine.device)
        self.evaluated.load(folder)

    @property
    def _others(self) -> dict[str, Remembers]:
        return {"session": self.session, "augment": self.augment, "progress": self.progress}


def _as_input(images: Tensor) -> Tensor:
    return images.contiguous(memory_format=torch.channels_last)


@contextmanager
def opened(
    options: TrainOptions, out: Path, processes: Processes, *, resume: bool, load: Loads | None = None
) -> Iterator[TrainingRun]:
    """The run in its locked folder; a new folder of which nothing came is removed again."""
    folder = open_folder(processes, out, resume=resume)
    is_ready = False
    with ExitStack() as afterwards:
        afterwards.callback(folder.close)
        try:
            options, checkpoint = processes.first(partial(_looked_up, options, folder, resume=resume))
            own = options if processes.is_first else options.untold()
            run = _prepare(own, folder, processes, afterwards, load, is_new=checkpoint is None)
            run.is_resumed = resume
            if not resume:
                folder.write_json(CONFIG, _described(run))  # first of all: it is what a resumed run needs
            folder.write_text(RECIPE, options.load_recipe().to_toml())
            if checkpoint is not None:
                _load(run, checkpoint)
            folder.write_metrics(run.progress.rows)
            run.trackers.start(run.options.model_dump(mode="json"))
            if run.session.epoch == 0 and options.dense_timing_steps:
                run.progress.dense_step_seconds, told = time_dense_step(
                    run.options, run.data.spec, run.machine, run.processes
                )
                run.choices += told
            is_ready = True
            yield run
        except BaseException as error:
            if not resume and _came_to_nothing(folder, error, is_ready=is_ready):
                folder.discard()
            raise


def _looked_up(options: TrainOptions, folder: RunFolder, *, resume: bool) -> tuple[TrainOptions, Path | None]:
    """The options, with what a resumed run has chosen before, and the checkpoint that it goes on from."""
    if resume:
        before = TrainOptions.from_config(folder.read_json(CONFIG), folder.path / CONFIG)
        options = options.as_chosen(before)
    checkpoint = folder.checkpoints.newest()
    if checkpoint is not None:
        options.check_identity(described(checkpoint), checkpoint)
    return options, checkpoint


def _came_to_nothing(folder: RunFolder, error: BaseException, *, is_ready: bool) -> bool:
    """Is a new run's folder of no use: no epoch in it, and the same would happen again?"""
    if folder.checkpoints.exist:
        return False
    if not is_ready:
        # Interrupted, it can be resumed, once it says what was asked for.
        return isinstance(error, Exception) or not (folder.path / CONFIG).is_file()
    return isinstance(error, (TrainingDiverged, DataError))


def _prepare(
    asked: TrainOptions,
    folder: RunFolder,
    processes: Processes,
    afterwards: ExitStack,
    load: Loads | None,
    *,
    is_new: bool,
) -> TrainingRun:
    """Everything in hand. What is quick to check comes before the data are read, and perhaps downloaded."""
    spec = trained_on(check_named(asked.model_dump()), asked.validation_share, asked.batch_size)
    check_together(asked, processes)
    device = pick_device(asked.device, processes.local_rank if processes.is_shared else None)
    seed_all(asked.seed)
    recipe = asked.load_recipe()
    model = built(asked, spec, device)
    check_norms(model, asked)
    begun = start_from(model, asked, spec, processes.first) if asked.weights is not None and is_new else None
    sample = torch.zeros(2, *spec.sample_shape, device=device)
    bill = plan(model, sample, recipe, asked.epochs, spec.train_samples, batch_size=asked.batch_size)
    check_full_batch(recipe, samples=spec.train_samples, batch_size=asked.batch_size, epochs=asked.epochs)
    options, chosen = choose(asked, device, bill, processes.size)
    machine = Machine(device, options.precision)
    afterwards.enter_context(machine.in_use())
    whole = processes.in_turn(  # one of a host downloads what is not there
        partial(
            load or load_data,
            options.data,
            root=Path(options.data_root),
            image_size=options.image_size,
            crop_share=options.crop_share,
        )
    )
    data = hold_out(whole, options.validation_share, options.seed)
    augment = _augment(options, data)
    feed = make_feed(data, device, augment, options, processes)
    normalised = partial(normalise, mean=data.mean.to(device), std=data.std.to(device))
    optimizer = make_optimizer(model.parameters(), options)

    def score_loss(net: nn.Module, handed: Any) -> Tensor:
        images, labels = feed.plain(handed)
        return loss_of(net(normalised(images)), labels, label_smoothing=options.label_smoothing)

    probe = _probe(options, recipe, data)
    # "auto" chooses for the precision that it is attached under; accelerators have one engine for all of them.
    with machine.autocast() if device.type == "cpu" else nullcontext():
        session = spfde.attach(
            model,
            optimizer,
            feed.loader,
            recipe,
            sample=sample,
            labels=find_labels(data.train),
            loss=score_loss,
            probe=None if probe is None else normalised(probe.to(device)),
            plan=bill,
            **_settings(options),
        )
    afterwards.callback(feed.end_workers, session.loader)
    told = (chosen, begun, told_of_updates(options), told_of_evaluated(options), feed.where, weights_note())
    trackers = Trackers(options.track, folder.path)
    afterwards.callback(trackers.close)
    return TrainingRun(
        options=options,
        asked=asked,
        choices=[line for line in told if line is not None],
        folder=folder,
        processes=processes,
        machine=machine,
        data=data,
        normalised=normalised,
        mixing=mixing_of(options, data.spec.num_classes),
        model=model,
        wrapped=processes.wrapped(model, device),
        evaluated=_evaluated(model, options, session, data, normalised, machine),
        optimizer=optimizer,
        scaler=machine.scaler(),
        session=session,
        plan=bill,
        augment=augment,
        feed=feed,
        trackers=trackers,
        progress=Progress(),
    )


def _evaluated(
    model: nn.Module,
    options: TrainOptions,
    session: Session,
    data: ImageData,
    normalised: Callable[[Tensor], Tensor],
    machine: Machine,
) -> Evaluated:
    drawn = Drawn(data, options.reestimate_bn, options)

    def samples() -> Iterator[Tensor]:
        for images in drawn:
            yield normalised(images.to(machine.device)).contiguous(memory_format=torch.channels_last)

    def forward(twin: nn.Module, x: Tensor) -> object:
        with machine.autocast():
            return twin(x)

    return Evaluated(
        model,
        options,
        lambda: session.masks,
        make_twin=lambda: built(options, data.spec, machine.device, seed=0),
        samples=samples,
        forward=forward,
    )


def _augment(options: TrainOptions, data: ImageData) -> BatchAugment:
    mode = data.default_augmentation if options.augment == "auto" else options.augment
    return BatchAugment(mode, torch.Generator().manual_seed(options.seed + 1), padding=data.padding)


def _settings(options: TrainOptions) -> dict[str, Any]:
    """Those arguments of ``attach`` that options alone decide."""
    settings = {"epochs": options.epochs, "seed": options.seed, "engine": options.engine, "cache": _cache(options)}
    return settings | compiling(options)


def _cache(options: TrainOptions) -> PrefixCache | None:
    if not options.cache_variants:
        return None
    return PrefixCache(
        options.cache_variants,
        precision=options.cache_precision,
        limit_gib=options.cache_limit,
        folder=options.cache_folder,
    )


def _probe(options: TrainOptions, recipe: Recipe, data: ImageData) -> Tensor | None:
    """What freezing by representation looks at: random images of the training set."""
    if recipe.freezing is None or recipe.freezing.criterion != "representation":
        return None
    images, _ = draw(data.train, recipe.freezing.probe_samples, torch.Generator().manual_seed(options.seed))
    return images


def _described(run: TrainingRun) -> dict[str, Any]:
    """Everything that is needed to run again."""
    options, bill = run.options, run.plan
    command, asked = (each.model_dump(mode="json", exclude={"profile"}) for each in (options, run.asked))
    return {
        "command": command,
        "asked": {name: value for name, value in asked.items() if value != command[name]},
        "data": {**run.data.facts(), "class_names": run.data.class_names, "augment": run.augment.mode},
        "model": options.model,
        "recipe": options.load_recipe().to_dict(),
        "engine": run.session.engine,
        "plan": bill.to_dict(),
        "timeline": bill.timeline.to_dict(),
        "versions": versions(),
        "hardware": hardware(run.machine.device),
    }


def _load(run: TrainingRun, checkpoint: Path) -> None:
    try:
        with run.processes.copied(checkpoint) as copy:
            run.load(copy)
    except (RunFolderError, OtherRankFailed):
        raise
    except StateMismatch as error:
        raise StateMismatch(f"checkpoint {checkpoint}: {error}") from error
    except Exception as error:
        if is_lost_process(error):
            raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        versions_then = run.folder.read_json(CONFIG).get("versions")
        raise RunFolderError(
            f"checkpoint {checkpoint}: cannot be loaded ({reason}). It was written with {versions_then}, and these are "
            f"{versions()}. Resume with the versions that wrote it, or start a new run."
        ) from error
    run.resumed_from = checkpoint
