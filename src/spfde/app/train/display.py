"""Progress for a person: a line an epoch, under it a live bar in a terminal, and the bill at the end.

Everything fits into 80 columns, and into a file.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from spfde.app.data.images import Split
from spfde.app.runs.best import accuracy_in, chosen_by
from spfde.app.train.events import Display
from spfde.app.train.feed import cores
from spfde.app.train.profile import Profile
from spfde.app.train.setup import TrainingRun
from spfde.core.say import counted
from spfde.cost import format_flops, format_seconds

WIDTH = 80
CELLS = 10
"""Longest bar of blocks; deeper models share a cell between blocks."""
HEADER_EVERY = 20
"""Epochs between two headings."""

BRAKE = 0.2
"""Share of an epoch's training that is waited for data from which on it is told."""

_LEGEND = "accuracy · samples: partial set · FLOPs: of dense so far, modelled"


def frozen_bar(frozen: int, total: int) -> str:
    """The blocks from front to back, frozen ones filled: ``■■■□□ 3/5``."""
    if not total:
        return "–"
    cells = min(total, CELLS)
    # Rounded down, but a frozen block is always seen, and so is one that still learns.
    filled = max(frozen * cells // total, min(frozen, 1))
    return f"{'■' * filled}{'□' * (cells - filled)} {frozen}/{total}"


def header(split: Split) -> str:
    """The heading of the epochs' lines; ``split``: what they are evaluated on."""
    return (
        f"{'epoch':>7}  {split:>6}  {'train':>6}  {'density':>7}  {'frozen blocks':<16}  {'samples':>9}  "
        f"{'FLOPs':>6}  {'time':>7}"
    )


def epoch_line(row: Mapping[str, Any], *, epochs: int, of_dense: float) -> str:
    """One epoch's line under the heading; ``of_dense`` are the run's training FLOPs so far against dense."""
    return (
        f"{row['epoch'] + 1:>3}/{epochs:<3}  {accuracy_in(row):6.4f}  {row['train_accuracy']:6.4f}  "
        f"{row['density']:7.3f}  {frozen_bar(row['frozen_blocks'], row['total_blocks']):<16}  "
        f"{row['partial_samples']:>9,}  {of_dense:6.1%}  {_seconds(row['seconds']):>7}"
    )


def _seconds(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 1000 else f"{seconds:.0f} s"


class ConsoleDisplay(Display):
    """Shows a run on a rich console; with a live bar if that is a terminal."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._shown = 0
        self._bar: Progress | None = None

    def __exit__(self, *_: object) -> None:
        self._stop_bar()  # leave the terminal as it was

    def started(self, run: TrainingRun) -> None:
        spec, session, options, bill = run.data.spec, run.session, run.options, run.plan
        model = options.model if options.width == 1 else f"{options.model}, width {options.width:g}"
        held_out = "" if run.data.validation is None else f" + {len(run.data.validation):,} held out"  # type: ignore[arg-type]
        images = f"{spec.train_samples:,}{held_out} + {spec.test_samples:,} images"
        self._print(
            f"spfde · {short_name(spec.name)}: {images} · {model} · "
            f"recipe {short_name(options.recipe_name)} · {counted(options.epochs, 'epoch')} · "
            f"engine {session.engine} · {run.machine.device}{_together(run)}"
        )
        for line in run.choices:
            self._print(line)
        if session.recipe.is_sparse:
            self._print(f"engine {session.engine}: {session.engine_reason}")
        freezing = (
            f"; freezing starts after {counted(bill.start_epoch, 'epoch')}" if bill.start_epoch is not None else ""
        )
        self._print(
            f"plan (modelled): {format_flops(bill.training_flops)} of {format_flops(bill.dense_training_flops)} "
            f"training FLOPs, {bill.flops_ratio:.1%}{freezing}"
        )
        if run.resumed_from is not None:
            self._print(f"going on after {session.epoch} of {counted(options.epochs, 'epoch')} from {run.resumed_from}")
        elif run.is_resumed:
            self._print("no epoch had been finished: starting over")
        self._print(f"{run.data.evaluated_on}, train: {_LEGEND}")
        if self._console.is_terminal and not self._console.quiet:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("loss {task.fields[loss]}{task.fields[waited]}"),
                TimeElapsedColumn(),
                console=self._console,
                transient=True,
            )
            self._bar.add_task("epoch", total=len(session.loader), loss="–", waited="")
            self._bar.start()

    def batch_done(self, run: TrainingRun, done: int, total: int, loss: float) -> None:
        if self._bar is not None:
            shown: dict[str, Any] = {
                "description": f"epoch {run.session.epoch + 1}/{run.options.epochs}",
                "loss": f"{loss:.3f}",
                "waited": f" · {run.waits.share:.0%} waited for data" if _is_held_up(run) else "",
            }
            self._bar.update(self._bar.task_ids[0], completed=done, total=total, **shown)

    def profiled(self, run: TrainingRun, found: Profile) -> None:
        for line in profile_lines(found, on_gpu=run.machine.device.type == "cuda"):
            self._print(line)

    def epoch_done(self, run: TrainingRun, row: dict[str, Any]) -> None:
        if self._shown % HEADER_EVERY == 0:
            self._line(header(run.data.evaluated_on))
        self._shown += 1
        self._line(epoch_line(row, epochs=run.options.epochs, of_dense=run.session.cost.totals.flops_ratio))
        if _is_held_up(run):
            self._print(waited_line(run.waits.share, workers=run.feed.loader.num_workers, cores=cores()))

    def finished(self, run: TrainingRun, summary: dict[str, Any]) -> None:
        self._stop_bar()
        for line in ("", *results(summary), "", *str(run.session.cost).splitlines()):
            self._print(line)
        dense = summary["dense_seconds_extrapolated"]
        if dense and not run.session.recipe.is_neutral:
            self._print(
                f"A dense run would take {format_seconds(dense)}, extrapolated from {run.options.dense_timing_steps} "
                f"steps that were timed before training; this one took {summary['seconds'] / dense:.1%} of that."
            )
        if summary["engine"] == "masked" and summary["final_sparsity"] > 0:
            self._print(
                "The masked engine computes densely: sparsity saves modelled FLOPs, freezing and sieving save time."
            )

    def _stop_bar(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _print(self, text: str) -> None:
        for line in textwrap.wrap(
            text, WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
        ) or [""]:
            self._line(line)

    def _line(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)


def _is_held_up(run: TrainingRun) -> bool:
    """Whether images are decoded or augmented more slowly than the model trains on them."""
    return run.feed.loading_is_work and run.waits.share > BRAKE


def waited_line(share: float, *, workers: int, cores: int) -> str:
    """What is said of an epoch that the loader has held up.

    Args:
        share: of its training that was waited, in [0, 1].
        workers: that the loader has.
        cores: that there are.
    """
    remedy = f"more --workers (now {workers}, on {cores} cores)" if workers < cores else "a smaller --image-size"
    return f"  waited {share:.0%} of the time for data: {remedy}, more cores or smaller files help (docs/data.md)"


def _together(run: TrainingRun) -> str:
    """How many samples a step has, where several processes take it."""
    size, batch = run.processes.size, run.options.batch_size
    return f" · {size} processes, {counted(batch, 'sample')} each: {batch * size:,} a step" if size > 1 else ""


def profile_lines(found: Profile, *, on_gpu: bool) -> list[str]:
    """How busy the GPU was; without one, what the time was spent on."""
    about = f"profile of {found.steps} {'step' if found.steps == 1 else 'steps'} (measured), trace in {found.trace}"
    if found.gpu_seconds is not None and found.gpu_busy is not None:
        each = 1e3 * found.gpu_seconds / found.steps
        return [f"{about}: the GPU was busy {found.gpu_busy:.1%} of the time, {each:.2f} ms a step"]
    if on_gpu:
        return [f"{about}: the profiler saw nothing of the GPU"]
    lines = [f"{about}: there is no GPU; the dearest operations on the CPU, by the time in them alone:"]
    for name, calls, seconds, share in found.dearest:
        short = name if len(name) <= 44 else f"{name[:43]}…"
        lines.append(f"{short:<44} {1e3 * seconds:>9,.1f} ms {share:>6.1%} {calls:>7,} calls")
    return lines


def short_name(source: str) -> str:
    """A data set's or recipe's name; of a path, its last part."""
    return Path(source).name or source


def results(summary: Mapping[str, Any]) -> list[str]:
    """What came out by ``summary.json``, each figure with its kind."""
    choice, lines = chosen_by(summary), []
    for which, name in (("test", "test_accuracy"), ("validation", "val_accuracy")):
        if name in summary:
            chosen = ", chosen by it," if which == choice else ""
            best = f"in the best epoch{chosen} {summary[f'best_{name}']:.4f}"
            lines.append(f"{which} accuracy {summary[name]:.4f}, {best} (measured)")
    if summary["final_sparsity"] > 0:
        lines.append(f"sparsity of masked layers {summary['final_sparsity']:.1%} (counted)")
    if summary["total_blocks"]:
        lines.append(f"frozen blocks {summary['frozen_blocks']} of {summary['total_blocks']} (counted)")
    return lines
