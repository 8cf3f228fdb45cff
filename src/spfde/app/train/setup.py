"""Getting a run ready: options in, everything in hand out. All mistakes are found here, before any work is done."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import accelerate
import numpy
import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState
from accelerate.utils import set_seed
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.utils.data import DataLoader, RandomSampler

import spfde
from spfde.app.data.datasets import load_data
from spfde.app.data.images import ImageData, collate, draw
from spfde.app.runs.checkpoints import described
from spfde.app.runs.folder import CONFIG, RECIPE, RunFolder
from spfde.app.train.augment import BatchAugment, normalise
from spfde.app.train.checks import check_named
from spfde.app.train.models import build_for
from spfde.app.train.options import TrainOptions, check_full_batch
from spfde.core.errors import DataError, InvalidArgument, Problem, RunFolderError, StateMismatch, TrainingDiverged
from spfde.core.state import check_entries
from spfde.engines.prefix_cache import PrefixCache
from spfde.planning import Plan, plan
from spfde.recipe.recipe import Recipe
from spfde.session.session import Session

EVALUATION_BATCH = 256


@dataclass
class Progress:
    """What the loop itself remembers from epoch to epoch; ``rows`` are the lines of ``metrics.jsonl``."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    dense_step_seconds: float | None = None

    def state_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        check_entries(state, "the run's progress", {"rows": list, "dense_step_seconds": (float, type(None))})
        self.rows, self.dense_step_seconds = state["rows"], state["dense_step_seconds"]


@dataclass
class TrainingRun:
    """Everything that a run has in hand."""

    options: TrainOptions
    folder: RunFolder
    accelerator: accelerate.Accelerator
    data: ImageData
    model: nn.Module
    optimizer: Optimizer
    session: Session
    plan: Plan
    augment: BatchAugment
    test_loader: DataLoader[Any]
    progress: Progress
    is_resumed: bool = False
    resumed_from: Path | None = None

    def batch(self, images: Tensor, labels: Tensor, *, augmented: bool) -> tuple[Tensor, Tensor]:
        """A loader's batch on the device: augmented, normalised to float, channels last."""
        device = self.accelerator.device
        images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        if augmented and self.session.caches_prefix:
            images = self.augment.replay(images, self.session.augmentation_seeds())
        elif augmented:
            images = self.augment(images)
        x = normalise(images, self.data.mean, self.data.std)
        return x.contiguous(memory_format=torch.channels_last), labels


@contextmanager
def opened(options: TrainOptions, out: Path, *, resume: bool) -> Iterator[TrainingRun]:
    """The run in its locked folder; a new folder of which nothing came is removed again."""
    folder = RunFolder.reopen(out) if resume else RunFolder.create(out)
    is_ready = False
    try:
        checkpoint = folder.checkpoints.newest()
        if checkpoint is not None:
            options.check_identity(described(checkpoint), checkpoint)
        run = _prepare(options, folder)
        run.is_resumed = resume
        if not resume:
            folder.write_json(CONFIG, _described(run))  # first of all: it is what a resumed run needs
        folder.write_text(RECIPE, options.load_recipe().to_toml())
        if checkpoint is not None:
            _load(run, checkpoint)
        folder.write_metrics(run.progress.rows)
        _start_trackers(run)
        if run.session.epoch == 0 and options.dense_timing_steps:
            run.progress.dense_step_seconds = time_dense_step(run)
        is_ready = True
        yield run
    except BaseException as error:
        if not resume and _came_to_nothing(folder, error, is_ready=is_ready):
            folder.discard()
        raise
    finally:
        folder.close()
        # Accelerate keeps its state for the whole process, and would refuse a second run with other settings.
        AcceleratorState._reset_state(reset_partial_state=True)


def _came_to_nothing(folder: RunFolder, error: BaseException, *, is_ready: bool) -> bool:
    """Is a new run's folder of no use: no epoch in it, and the same would happen again?"""
    if folder.checkpoints.exist:
        return False
    if not is_ready:
        # Interrupted, it can be resumed, once it says what was asked for.
        return isinstance(error, Exception) or not (folder.path / CONFIG).is_file()
    return isinstance(error, (TrainingDiverged, DataError))


def _prepare(options: TrainOptions, folder: RunFolder) -> TrainingRun:
    """Everything in hand. What is quick to check comes before the data are read, and perhaps downloaded."""
    spec = check_named(options.model_dump())
    accelerator = _accelerator(options, folder.path)
    if accelerator.num_processes > 1:
        rule = "the command trains in one process: its run folder has one writer"
        remedy = "Start one process, or attach a session to a DistributedDataParallel loop of your own."
        raise InvalidArgument(Problem("torchrun", accelerator.num_processes, rule, remedy))
    set_seed(options.seed)
    recipe = options.load_recipe()
    model = build_for(options.model, spec).to(accelerator.device).to(memory_format=torch.channels_last)
    sample = torch.zeros(2, *spec.sample_shape, device=accelerator.device)
    bill = plan(model, sample, recipe, options.epochs, spec.train_samples, batch_size=options.batch_size)
    check_full_batch(recipe, samples=spec.train_samples, batch_size=options.batch_size)
    data = load_data(options.data, root=Path(options.data_root), image_size=options.image_size)
    loader, test_loader = _loaders(options, data, pin_memory=accelerator.device.type == "cuda")
    optimizer = SGD(model.parameters(), lr=options.lr, momentum=options.momentum, weight_decay=options.weight_decay)
    session = spfde.attach(
        model,
        optimizer,
        loader,
        recipe,
        epochs=options.epochs,
        seed=options.seed,
        engine=options.engine,
        sample=sample,
        loss=lambda net, batch: F.cross_entropy(net(normalise(batch[0], data.mean, data.std)), batch[1]),
        probe=_probe(options, recipe, data, device=accelerator.device),
        cache=_cache(options),
        plan=bill,
    )
    augment = BatchAugment(
        data.default_augmentation if options.augment == "auto" else options.augment,
        torch.Generator().manual_seed(options.seed + 1),
        padding=data.padding,
    )
    prepared_model, prepared_optimizer = accelerator.prepare(model, optimizer)
    progress = Progress()
    accelerator.register_for_checkpointing(session, augment, progress)
    return TrainingRun(
        options=options,
        folder=folder,
        accelerator=accelerator,
        data=data,
        model=prepared_model,
        optimizer=prepared_optimizer,
        session=session,
        plan=bill,
        augment=augment,
        test_loader=test_loader,
        progress=progress,
    )


def _cache(options: TrainOptions) -> PrefixCache | None:
    if not options.cache_variants:
        return None
    return PrefixCache(
        options.cache_variants,
        precision=options.cache_precision,
        limit_gib=options.cache_limit,
        folder=options.cache_folder,
    )


def _probe(options: TrainOptions, recipe: Recipe, data: ImageData, *, device: torch.device) -> Tensor | None:
    """What freezing by representation looks at: random images of the training set, as the model takes them."""
    if recipe.freezing is None or recipe.freezing.criterion != "representation":
        return None
    images, _ = draw(data.train, recipe.freezing.probe_samples, torch.Generator().manual_seed(options.seed))
    return normalise(images.to(device), data.mean, data.std)


def _loaders(options: TrainOptions, data: ImageData, *, pin_memory: bool) -> tuple[DataLoader[Any], DataLoader[Any]]:
    """Batches of the training set, shuffled, and of the test set.

    The order has a generator of its own: a loader draws from its generator whenever it starts workers, so that with one
    for both the order would depend on their number, and on when a run was resumed.
    """
    workers = workers_for(data, options.workers)
    shared: dict[str, Any] = {"collate_fn": collate, "num_workers": workers, "persistent_workers": workers > 0}
    order = torch.Generator().manual_seed(options.seed)
    train: DataLoader[Any] = DataLoader(
        data.train,
        batch_size=options.batch_size,
        sampler=RandomSampler(data.train, generator=order),  # type: ignore[arg-type]  # it has a length
        generator=torch.Generator().manual_seed(options.seed),
        pin_memory=pin_memory,
        **shared,
    )
    return train, DataLoader(data.test, batch_size=EVALUATION_BATCH, **shared)


def workers_for(data: ImageData, asked: int | None) -> int:
    """Loader processes: as many as were asked for, or one a core (up to eight) where images have to be decoded."""
    if asked is not None:
        return asked
    return 0 if data.in_memory else min(8, os.cpu_count() or 1)


def _accelerator(options: TrainOptions, out: Path) -> accelerate.Accelerator:
    device = options.device
    if device.startswith("cuda:"):
        torch.cuda.set_device(device)
    precision = "no" if options.precision == "fp32" else options.precision
    return accelerate.Accelerator(
        cpu=device == "cpu", mixed_precision=precision, log_with=list(options.track) or None, project_dir=str(out)
    )


def _start_trackers(run: TrainingRun) -> None:
    if run.options.track:
        options = run.options.model_dump(mode="json")
        flat = {name: value for name, value in options.items() if isinstance(value, (str, int, float, bool))}
        # Whatever can, writes into the run folder; a resumed run adds to what is there.
        places = {"wandb": {"dir": str(run.folder.path), "resume": "allow"}}
        run.accelerator.init_trackers("spfde", config=flat, init_kwargs=places)


def _described(run: TrainingRun) -> dict[str, Any]:
    """Everything that is needed to run again."""
    options, bill = run.options, run.plan
    return {
        "command": options.model_dump(mode="json"),
        "data": {**run.data.facts(), "augment": run.augment.mode},
        "model": options.model,
        "recipe": options.recipe,
        "engine": run.session.engine,
        "plan": bill.to_dict(),
        "timeline": bill.timeline.to_dict(),
        "versions": versions(),
        "hardware": hardware(run.accelerator.device),
    }


def _load(run: TrainingRun, checkpoint: Path) -> None:
    try:
        run.accelerator.load_state(str(checkpoint))
    except StateMismatch as error:
        raise StateMismatch(f"checkpoint {checkpoint}: {error}") from error
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        versions_then = run.folder.read_json(CONFIG).get("versions")
        raise RunFolderError(
            f"checkpoint {checkpoint}: cannot be loaded ({reason}). It was written with {versions_then}, and these are "
            f"{versions()}. Resume with the versions that wrote it, or start a new run."
        ) from error
    run.resumed_from = checkpoint


def time_dense_step(run: TrainingRun) -> float:
    """Median seconds of a dense training step, unfrozen, timed on a model of its own before training.

    It is the measured part of "what the dense run would have taken": this time, times the dense run's steps. The
    global generators are put back, so that the run does not depend on it.
    """
    device, options, spec = run.accelerator.device, run.options, run.data.spec
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        twin = build_for(options.model, spec).to(device).to(memory_format=torch.channels_last).train()
        shape = (min(options.batch_size, spec.train_samples), *spec.sample_shape)
        x = torch.randn(shape, device=device).contiguous(memory_format=torch.channels_last)
        y = torch.zeros(len(x), dtype=torch.int64, device=device)
        optimizer = SGD(twin.parameters(), lr=1e-6, momentum=options.momentum)
        seconds = []
        for _ in range(2 + options.dense_timing_steps):
            start = time.perf_counter()
            with run.accelerator.autocast():
                loss = F.cross_entropy(twin(x), y)
            torch.autograd.backward([loss])
            optimizer.step()
            optimizer.zero_grad()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[2:])


def versions() -> dict[str, str]:
    """Versions that a figure depends on."""
    return {
        "spfde": spfde.__version__,
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "accelerate": accelerate.__version__,
        "python": platform.python_version(),
    }


def hardware(device: torch.device) -> dict[str, Any]:
    """The machine that a figure was taken on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()
    return {"device": str(device), "name": name, "threads": torch.get_num_threads(), "cores": os.cpu_count()}


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
