"""The trainer behind ``spfde train``: an ordinary PyTorch loop with a session attached. It reads top to bottom."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spfde.app.data.images import Split
from spfde.app.declaring import names_of
from spfde.app.options import UpdateOptions
from spfde.app.runs import kept_checkpoints
from spfde.app.runs.best import best_epoch
from spfde.app.runs.folder import SUMMARY
from spfde.app.terminating import terminable
from spfde.app.train.events import Display
from spfde.app.train.loss import loss_of
from spfde.app.train.memory import memory_advice
from spfde.app.train.optimizing import rate_factor, share_of_step, take_step
from spfde.app.train.options import TrainOptions
from spfde.app.train.processes import joined
from spfde.app.train.profile import profiled
from spfde.app.train.setup import Loads, TrainingRun, opened
from spfde.app.train.stamp import versions
from spfde.app.train.tally import Pass, Tally
from spfde.core.errors import DataError, TrainingDiverged
from spfde.cost import SavedTensorBytes, reset_peak

Step = Callable[[Tensor, Tensor, Tensor | None, float, bool], tuple[Tensor, Tensor]]

PULSE = 20
"""Steps between two looks at the loss."""
Summary = dict[str, Any]
"""What ``summary.json`` holds."""
_TOLD = (*names_of(UpdateOptions), "weights", "label_smoothing", "ema", "reestimate_bn")
"""Options that it names."""


def train(
    options: TrainOptions,
    out: Path,
    display: Display | None = None,
    *,
    resume: bool = False,
    load: Loads | None = None,
) -> Summary:
    """Train a model, or go on with a run that was stopped.

    It needs torch, numpy and pydantic alone; safetensors, where it is installed, for the format of the weights.

    Args:
        options: what to train; for a resumed run, what its folder says.
        out: the run folder.
        display: shows progress; its live bar is gone when this returns, however it does. None shows nothing.
        resume: go on from the newest checkpoint in ``out``; from the start, where there is none yet.
        load: gives the data, called as ``load_data`` is, which it is where this is None.

    Returns:
        The summary, as written to ``summary.json``.

    Raises:
        SpfdeError: a mistake in the options (nothing is left behind), a damaged checkpoint, a loss that diverged, no
            memory left.
        KeyboardInterrupt: on Ctrl-C, and as ``Terminated`` on SIGTERM, which waits some seconds for the checkpoint of
            an epoch that is trained; the folder can be resumed.
    """
    with closing(train_in_steps(options, out, display, resume=resume, load=load)) as steps:
        while True:
            try:
                next(steps)
            except StopIteration as ended:
                summary: Summary = ended.value
                return summary


def train_in_steps(
    options: TrainOptions,
    out: Path,
    display: Display | None = None,
    *,
    resume: bool = False,
    load: Loads | None = None,
) -> Generator[None, None, Summary]:
    """What ``train`` does, with a pause once everything is in hand, and behind each batch in training and evaluation.

    Whoever does other things in a pause leaves the process as it was found, see ``turns``.

    Args:
        options, out, display, resume, load: as in ``train``.
    """
    with (
        joined() as processes,
        terminable() as ending,
        _plain_data_errors(),
        memory_advice(options, out),
        display if display is not None and processes.is_first else Display() as display,
        opened(options, out, processes, resume=resume, load=load) as run,
    ):
        display.started(run)
        yield
        to_profile, step = run.options.profile, stepping(run)
        for epoch in run.session.epochs():
            processes.seed_epoch(run.options.seed, epoch)
            reset_peak(run.machine.device)
            trained = yield from train_epoch(run, step, epoch, display, profile=to_profile)
            to_profile = None
            with ending.held():
                evaluated = yield from evaluate(run)
                if math.isnan(evaluated.loss):
                    # The epoch's last step broke the weights: they must not become the last good checkpoint.
                    _stop_if_diverged(run, evaluated.loss, epoch)
                run.session.end_epoch()
                row = _metrics(run, trained, evaluated)
                with processes.together("what is kept of an epoch"):
                    _keep(run, row)
                display.epoch_done(run, row)
        accuracies = yield from _accuracies(run)
        summary = processes.first(lambda: accuracies | _summary(run))
        with processes.together("the end of the run"):
            if run.data.validation is not None:
                run.trackers.log(accuracies, step=run.options.epochs - 1)
            run.folder.write_json(SUMMARY, summary)
            run.trackers.finish()
        display.finished(run, summary)
        return summary


def train_epoch(
    run: TrainingRun, step: Step, epoch: int, display: Display, *, profile: int | None = None
) -> Generator[None, None, Pass]:
    """One pass over the partial set; ``profile``: so many of its steps are profiled."""
    session, n_batches = run.session, len(run.session.loader)
    run.feed.begin_epoch(epoch)
    accumulate = run.options.accumulate
    _set_rates(run, epoch)
    run.model.train()
    tally, saved = Tally(run.machine.device, run.processes), SavedTensorBytes(run.model)
    with _profiling(run, profile, n_batches, display) as after_step:
        for number, handed in enumerate(run.waits.over(session.loader), start=1):
            x, y = run.batch(handed)
            with saved if number == 1 else nullcontext():
                logits, loss = step(x, y, _weights(run), *share_of_step(number, n_batches, accumulate))
            if number % accumulate == 0 or number == n_batches:
                run.evaluated.stepped()
            session.observe(logits, y)
            tally.add(loss * len(y), logits, y)
            is_last = number == n_batches
            if is_last or number % PULSE == 0:
                mean = tally.read().loss if is_last else tally.glance()
                if mean is not None:
                    _stop_if_diverged(run, mean, epoch)
                    display.batch_done(run, number, n_batches, mean)
            after_step()
            yield
    return tally.read(saved.bytes)


def train_step(
    run: TrainingRun, x: Tensor, y: Tensor, weights: Tensor | None, share: float = 1.0, is_last: bool = True
) -> tuple[Tensor, Tensor]:
    """One batch as ``TrainingRun.batch`` gives it; the logits, and the loss that it went down, detached.

    Where graphs of steps can be captured this is what is captured: nothing in it waits for the device.

    Args:
        run: of which the weights are stepped.
        x, y: the batch.
        weights: of the losses.
        share: what the batch's mean loss counts in its step.
        is_last: whether the step is taken now.
    """
    logits = run.logits(x)
    loss = loss_of(logits, y, weights, run.options.label_smoothing)
    run.scaler.scale(loss if share == 1 else share * loss).backward()  # type: ignore[no-untyped-call]
    if is_last:
        take_step(run.optimizer, run.scaler, run.options.clip_norm)
    return logits.detach(), loss.detach()


def _set_rates(run: TrainingRun, epoch: int) -> None:
    if run.session.recipe.learning_rate is None:
        for group in run.optimizer.param_groups:
            group["lr"] = run.options.rate * rate_factor(run.options, epoch)


def stepping(run: TrainingRun) -> Step:
    """``train_step`` for a run; as one graph for each stage, where its engine captures and no loss is scaled.

    A step of several batches is none: its first ones leave gradients behind, which a graph does not.
    """
    step = partial(train_step, run)
    if run.session.captures_steps and not run.scaler.is_enabled() and run.options.accumulate == 1:
        return run.session.capture(step, strict=False)
    return step


def _weights(run: TrainingRun) -> Tensor | None:
    """Of the losses of a batch, where sieving asks for them."""
    sieving = run.session.recipe.sieving
    rescales = run.session.recipe.sieves and sieving is not None and sieving.rescales
    return run.session.loss_weights() if rescales else None


def _profiling(
    run: TrainingRun, steps: int | None, n_batches: int, display: Display
) -> AbstractContextManager[Callable[[], object]]:
    """Gives what is to be called after each step."""
    if steps is None:
        return nullcontext(lambda: None)
    return profiled(steps, n_batches, run.machine.device, run.folder.path, partial(display.profiled, run))


@torch.no_grad()  # in the pauses gradients are on: it is lifted there
def evaluate(
    run: TrainingRun, split: Split | None = None, model: nn.Module | None = None
) -> Generator[None, None, Pass]:
    """One pass over a set, which the processes share.

    Args:
        split: by default what every epoch is evaluated on: the validation set, or the test set where there is none.
        model: by default the run's, as ``Evaluated`` has it.
    """
    model = run.evaluated.ready() if model is None else model
    model.eval()
    run.processes.level(model)
    tally = Tally(run.machine.device, run.processes)
    for x, y in run.evaluation_batches(split or run.data.evaluated_on):
        logits = run.logits(x, model)
        tally.add(F.cross_entropy(logits, y, reduction="sum"), logits, y)
        yield
    return tally.read()


def _stop_if_diverged(run: TrainingRun, loss: float, epoch: int) -> None:
    if math.isfinite(loss):
        return
    good = f"The last good checkpoint is {run.folder.checkpoints.latest}" if epoch else "There is no checkpoint yet"
    raise TrainingDiverged(
        f"the loss became {loss} in epoch {epoch}. {good}. Start a new run with a smaller --lr "
        f"(it was {run.options.rate:g})."
    )


def _metrics(run: TrainingRun, trained: Pass, evaluated: Pass) -> dict[str, Any]:
    """The epoch's line: the ledger's row, and how the model did."""
    session, split = run.session, run.data.evaluated_on
    row = asdict(session.cost.rows[-1])
    # In a step that is replayed autograd saves nothing anew: a stage's first step, which is not, has told.
    kept = trained.saved_tensor_bytes or (run.progress.rows[-1]["saved_tensor_bytes"] if run.progress.rows else 0)
    return {
        "epoch": row.pop("epoch"),
        "train_loss": trained.loss,
        "train_accuracy": trained.accuracy,
        f"{split}_loss": evaluated.loss if math.isfinite(evaluated.loss) else None,
        f"{split}_accuracy": evaluated.accuracy,
        "learning_rate": row.pop("lr"),
        "explored": session.explored,
        "total_blocks": len(session.blueprint.partition.blocks),
        "removed_samples": len(session.removed_set),
        **row,
        "saved_tensor_bytes": kept,
        "loader_wait_seconds": run.waits.seconds,
        "sieve_moved": session.sieve_turnover["moved"],
        "sieve_ever_used": session.sieve_turnover["ever_used"],
    }


def _keep(run: TrainingRun, row: dict[str, Any]) -> None:
    """Put the epoch on disk; from here on a kill loses nothing of it."""
    progress = run.progress
    progress.rows.append(row)
    run.folder.append_metrics(row)
    run.trackers.log(row, step=row["epoch"])
    done, every = run.session.epoch, run.options.keep_every
    if every is not None and (done % every == 0 or done == run.options.epochs):
        # Before ``latest``: a kill between the two only trains this epoch again, and writes the same once more.
        run.folder.checkpoints.keep(
            lambda folder: kept_checkpoints.write(folder, run.model, run.session.masks),
            epoch=done,
            about=run.options.identity(),
        )
    run.folder.checkpoints.save(
        run.save,
        epoch=done,
        best=best_epoch(progress.rows) == len(progress.rows) - 1,
        about=run.options.identity(),
    )


def _accuracies(run: TrainingRun) -> Generator[None, None, dict[str, Any]]:
    """Of the last and of the best epoch. Where epochs are validated, the test set is looked at here, and only here.

    Its figures are those of checkpoints, so that a run that was killed since its last epoch comes to the same.
    """
    rows = run.progress.rows
    if run.data.validation is None:
        found = [row["test_accuracy"] for row in rows]
        return {"test_accuracy": found[-1], "best_test_accuracy": found[best_epoch(rows) or 0]}
    best, last, checkpoints = best_epoch(rows) or 0, len(rows) - 1, run.folder.checkpoints
    tested = yield from evaluate(run, "test", run.at(checkpoints.latest))
    best_tested = tested if best == last else (yield from evaluate(run, "test", run.at(checkpoints.best)))
    return {
        "val_accuracy": rows[last]["val_accuracy"],
        "best_val_accuracy": rows[best]["val_accuracy"],
        "test_accuracy": tested.accuracy,
        "best_test_accuracy": best_tested.accuracy,
        "best_epoch": best,
    }


def _summary(run: TrainingRun) -> dict[str, Any]:
    session, totals, progress = run.session, run.session.cost.totals, run.progress
    together = run.options.batch_size * run.processes.size
    dense_steps = math.ceil(run.data.spec.train_samples / together) * run.options.epochs
    return {
        "epochs": session.epoch,
        "training_flops": totals.cost.training_flops,
        "dense_training_flops": totals.cost.dense_training_flops,
        "flops_ratio": totals.flops_ratio,
        "seconds": totals.seconds,
        "dense_step_seconds": progress.dense_step_seconds,
        "dense_seconds_extrapolated": progress.dense_step_seconds and progress.dense_step_seconds * dense_steps,
        "samples_seen": totals.samples,
        "peak_memory_bytes": totals.peak_memory_bytes or 0,
        "dense_weight_bytes": totals.dense_weight_bytes,
        "compressed_weight_bytes": totals.compressed_weight_bytes,
        "final_sparsity": 1.0 - session.density,
        "frozen_blocks": session.frozen_blocks,
        "total_blocks": len(session.blueprint.partition.blocks),
        "engine": session.engine,
        "processes": run.processes.size,
        "recipe": run.options.recipe_name,
        "training": {name: getattr(run.options, name) for name in _TOLD},
        "seed": run.options.seed,
        "versions": {name: version for name, version in versions().items() if name in ("spfde", "torch")},
    }


@contextmanager
def _plain_data_errors() -> Iterator[None]:
    """A loader's worker puts its whole traceback into the message of an error: take the message out again."""
    try:
        yield
    except DataError as error:
        _, from_worker, message = str(error).rpartition(f"{DataError.__module__}.{DataError.__qualname__}: ")
        if not from_worker:
            raise
        raise DataError(message.strip()) from None
