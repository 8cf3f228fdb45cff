"""The trainer behind ``spfde train``: an ordinary PyTorch loop with a session attached. It reads top to bottom."""

from __future__ import annotations

import math
import signal
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from spfde.app.runs import kept_checkpoints
from spfde.app.runs.best import best_epoch
from spfde.app.runs.folder import SUMMARY
from spfde.app.train.display import ConsoleDisplay
from spfde.app.train.options import TrainOptions
from spfde.app.train.setup import TrainingRun, opened, versions
from spfde.core.errors import DataError, TrainingDiverged
from spfde.cost import SavedTensorBytes, reset_peak
from spfde.freezing.rates import learning_rate_factor

PULSE = 20
"""Steps between two looks at the loss: each look waits for the device."""


@dataclass(frozen=True)
class Pass:
    """What one pass gave: mean loss, accuracy in [0, 1], and the bytes that autograd saved in its first step."""

    loss: float
    accuracy: float
    saved_tensor_bytes: int | None = None


def train(options: TrainOptions, out: Path, display: ConsoleDisplay, *, resume: bool = False) -> dict[str, Any]:
    """Train a model, or go on with a run that was stopped.

    Args:
        options: what to train; for a resumed run, what its folder says.
        out: the run folder.
        display: shows progress; its live bar is gone when this returns, however it does.
        resume: go on from the newest checkpoint in ``out``; from the start, where there is none yet.

    Returns:
        The summary, as written to ``summary.json``.

    Raises:
        SpfdeError: a mistake in the options (nothing is left behind), a damaged checkpoint, a loss that diverged.
        KeyboardInterrupt: on Ctrl-C or SIGTERM; the folder can be resumed.
    """
    with _sigterm_interrupts(), _plain_data_errors(), display, opened(options, out, resume=resume) as run:
        display.started(run)
        for epoch in run.session.epochs():
            reset_peak(run.accelerator.device)
            trained = train_epoch(run, epoch, display)
            tested = evaluate(run)
            if math.isnan(tested.loss):
                # The epoch's last step broke the weights: they must not become the last good checkpoint.
                _stop_if_diverged(run, tested.loss, epoch)
            run.session.end_epoch()
            row = _metrics(run, trained, tested)
            _keep(run, row)
            display.epoch_done(run, row)
        summary = _summary(run)
        run.folder.write_json(SUMMARY, summary)
        run.accelerator.end_training()
        display.finished(run, summary)
        return summary


def train_epoch(run: TrainingRun, epoch: int, display: ConsoleDisplay) -> Pass:
    """One pass over the partial set."""
    session, optimizer, device = run.session, run.optimizer, run.accelerator.device
    if session.recipe.learning_rate is None:
        for group in optimizer.param_groups:
            group["lr"] = run.options.lr * learning_rate_factor(epoch, stop=run.options.epochs, warmup=0)
    weighted = session.recipe.sieves and session.recipe.sieving is not None and session.recipe.sieving.rescales
    run.model.train()
    loss_sum = torch.zeros((), dtype=torch.float64 if device.type != "mps" else torch.float32, device=device)
    n_correct = torch.zeros((), dtype=torch.int64, device=device)
    seen, n_batches = 0, len(session.loader)
    saved = SavedTensorBytes(run.model)
    for number, (images, labels) in enumerate(session.loader, start=1):
        x, y = run.batch(images, labels, augmented=True)
        with saved if number == 1 else nullcontext():
            logits = run.model(x)
            if weighted:
                loss = (session.loss_weights() * F.cross_entropy(logits, y, reduction="none")).mean()
            else:
                loss = F.cross_entropy(logits, y)
        run.accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        session.observe(logits, y)

        loss_sum += loss.detach() * len(y)
        n_correct += (logits.detach().argmax(1) == y).sum()
        seen += len(y)
        if number % PULSE == 0 or number == n_batches:
            mean = float(loss_sum) / seen
            _stop_if_diverged(run, mean, epoch)
            display.batch_done(run, number, n_batches, mean)
    return Pass(float(loss_sum) / seen, int(n_correct) / seen, saved.bytes)


@torch.no_grad()
def evaluate(run: TrainingRun) -> Pass:
    """One pass over the test set."""
    run.model.eval()
    loss_sum, n_correct, seen = 0.0, 0, 0
    for images, labels in run.test_loader:
        x, y = run.batch(images, labels, augmented=False)
        logits = run.model(x)
        loss_sum += float(F.cross_entropy(logits.float(), y, reduction="sum"))
        n_correct += int((logits.argmax(1) == y).sum())
        seen += len(y)
    return Pass(loss_sum / seen, n_correct / seen)


def _stop_if_diverged(run: TrainingRun, loss: float, epoch: int) -> None:
    if math.isfinite(loss):
        return
    checkpoints = run.folder.checkpoints
    good = f"The last good checkpoint is {checkpoints.latest}" if checkpoints.exist else "There is no checkpoint yet"
    raise TrainingDiverged(
        f"the loss became {loss} in epoch {epoch}. {good}. Start a new run with a smaller --lr "
        f"(it was {run.options.lr:g})."
    )


def _metrics(run: TrainingRun, trained: Pass, tested: Pass) -> dict[str, Any]:
    """The epoch's line: the ledger's row, and how the model did."""
    session = run.session
    row = asdict(session.cost.rows[-1])
    return {
        "epoch": row.pop("epoch"),
        "train_loss": trained.loss,
        "train_accuracy": trained.accuracy,
        "test_loss": tested.loss if math.isfinite(tested.loss) else None,
        "test_accuracy": tested.accuracy,
        "learning_rate": row.pop("lr"),
        "explored": session.explored,
        "total_blocks": len(session.blueprint.partition.blocks),
        "removed_samples": len(session.removed_set),
        **row,
        "saved_tensor_bytes": trained.saved_tensor_bytes,
        "sieve_moved": session.sieve_turnover["moved"],
        "sieve_ever_used": session.sieve_turnover["ever_used"],
    }


def _keep(run: TrainingRun, row: dict[str, Any]) -> None:
    """Put the epoch on disk; from here on a kill loses nothing of it."""
    progress = run.progress
    progress.rows.append(row)
    run.folder.append_metrics(row)
    run.accelerator.log(
        {name: value for name, value in row.items() if isinstance(value, (int, float))}, step=row["epoch"]
    )
    done, every = run.session.epoch, run.options.keep_every
    if every is not None and (done % every == 0 or done == run.options.epochs):
        # Before ``latest``: a kill between the two only trains this epoch again, and writes the same once more.
        run.folder.checkpoints.keep(
            lambda folder: kept_checkpoints.write(folder, run.accelerator.unwrap_model(run.model), run.session.masks),
            epoch=done,
            about=run.options.identity(),
        )
    run.folder.checkpoints.save(
        lambda folder: run.accelerator.save_state(str(folder)),
        epoch=done,
        best=best_epoch(progress.rows) == len(progress.rows) - 1,
        about=run.options.identity(),
    )


def _summary(run: TrainingRun) -> dict[str, Any]:
    session, totals, progress = run.session, run.session.cost.totals, run.progress
    dense_steps = math.ceil(run.data.spec.train_samples / run.options.batch_size) * run.options.epochs
    return {
        "test_accuracy": progress.rows[-1]["test_accuracy"],
        "best_test_accuracy": max(row["test_accuracy"] for row in progress.rows),
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
        "recipe": run.options.recipe_name,
        "seed": run.options.seed,
        "versions": {name: version for name, version in versions().items() if name in ("spfde", "torch")},
    }


@contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    """A SIGTERM ends the run as Ctrl-C does: at once, with the folder fit to be resumed."""
    try:
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    except ValueError:  # not in the main thread: signals are somebody else's
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


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
