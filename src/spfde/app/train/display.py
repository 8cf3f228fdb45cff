"""Progress for a person: a line an epoch, under it a live bar in a terminal, and a cost table at the end.

Everything fits into 80 columns, and into a file.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from spfde.app.train.setup import Run
from spfde.cost import format_bytes, format_flops, format_seconds

WIDTH = 80
CELLS = 10
"""Longest bar of blocks; deeper models share a cell between blocks."""
HEADER_EVERY = 20
"""Epochs between two headings."""

_HEADER = (
    f"{'epoch':>7}  {'test':>6}  {'train':>6}  {'density':>7}  {'frozen blocks':<16}  {'samples':>9}  "
    f"{'FLOPs':>6}  {'time':>7}"
)
_LEGEND = "test, train: accuracy · samples: partial set · FLOPs: of dense so far, modelled"


def frozen_bar(frozen: int, total: int) -> str:
    """The blocks from front to back, frozen ones filled: ``■■■□□ 3/5``."""
    if not total:
        return "–"
    cells = min(total, CELLS)
    # Rounded down, but a frozen block is always seen, and so is one that still learns.
    filled = max(frozen * cells // total, min(frozen, 1))
    return f"{'■' * filled}{'□' * (cells - filled)} {frozen}/{total}"


def epoch_line(row: Mapping[str, Any], *, epochs: int, of_dense: float) -> str:
    """One epoch's line under the heading.

    Args:
        row: a line of ``metrics.jsonl``.
        epochs: length of the run.
        of_dense: training FLOPs of the run so far against dense.
    """
    return (
        f"{row['epoch'] + 1:>3}/{epochs:<3}  {row['test_accuracy']:6.4f}  {row['train_accuracy']:6.4f}  "
        f"{row['density']:7.3f}  {frozen_bar(row['frozen_blocks'], row['total_blocks']):<16}  "
        f"{row['partial_samples']:>9,}  {of_dense:6.1%}  {_seconds(row['seconds']):>7}"
    )


def _seconds(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 1000 else f"{seconds:.0f} s"


class ConsoleDisplay:
    """Shows a run on a rich console.

    Args:
        console: where to; with a live bar if it is a terminal.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._shown = 0
        self._bar: Progress | None = None
        self._spent, self._dense = 0, 0

    def started(self, run: Run) -> None:
        spec, session, options, bill = run.data.spec, run.session, run.options, run.plan
        images = f"{spec.train_samples:,} + {spec.test_samples:,} images"
        self._print(
            f"spfde · {short_name(spec.name)}: {images} · {options.model} · "
            f"recipe {short_name(options.recipe_name)} · {options.epochs} epochs · engine {session.engine} · "
            f"{run.accelerator.device}"
        )
        if session.recipe.is_sparse:
            self._print(f"engine {session.engine}: {session.engine_reason}")
        freezing = f"; freezing starts after {bill.start_epoch} epochs" if bill.start_epoch is not None else ""
        self._print(
            f"plan (modelled): {format_flops(bill.training_flops)} of {format_flops(bill.dense_training_flops)} "
            f"training FLOPs, {bill.flops_ratio:.1%}{freezing}"
        )
        if run.resumed_from is not None:
            self._print(f"going on after {session.epoch} of {options.epochs} epochs from {run.resumed_from}")
        elif run.is_resumed:
            self._print("no epoch had been finished: starting over")
        totals = session.cost.totals
        self._spent, self._dense = totals.cost.training_flops, totals.cost.dense_training_flops
        self._print(_LEGEND)
        if self._console.is_terminal and not self._console.quiet:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("loss {task.fields[loss]}"),
                TimeElapsedColumn(),
                console=self._console,
                transient=True,
            )
            self._bar.add_task("epoch", total=len(session.loader), loss="–")
            self._bar.start()

    def batch_done(self, run: Run, done: int, total: int, loss: float) -> None:
        if self._bar is not None:
            description = f"epoch {run.session.epoch + 1}/{run.options.epochs}"
            self._bar.update(
                self._bar.task_ids[0], description=description, completed=done, total=total, loss=f"{loss:.3f}"
            )

    def epoch_done(self, run: Run, row: dict[str, Any]) -> None:
        self._spent += row["training_flops"]
        self._dense += row["dense_training_flops"]
        if self._shown % HEADER_EVERY == 0:
            self._line(_HEADER)
        self._shown += 1
        self._line(
            epoch_line(row, epochs=run.options.epochs, of_dense=self._spent / self._dense if self._dense else 1.0)
        )

    def finished(self, run: Run, summary: dict[str, Any]) -> None:
        self.stop()
        totals = run.session.cost.totals.cost
        savings = {
            "saved by sparsity": -totals.saved_by_sparsity,
            "saved by freezing": -totals.saved_by_freezing,
            "saved by sieving": -totals.saved_by_sieving,
            "added by dense gradients": totals.dense_gradient_flops,
            "added by scores and probes": totals.overhead_flops,
        }
        self._line("")
        self._line(
            cost_table(
                summary,
                savings=savings,
                memory=run.plan.to_dict()["memory"]["actual"],
                uncounted=run.session.blueprint.cost.uncounted,
                timing_steps=run.options.dense_timing_steps,
            )
        )

    def stop(self) -> None:
        """Leave the terminal as it was; call it however the run ends."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _print(self, text: str) -> None:
        for line in textwrap.wrap(text, WIDTH, subsequent_indent="  ", break_long_words=False):
            self._line(line)

    def _line(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)


def short_name(source: str) -> str:
    """A data set's or recipe's name; of a path, its last part."""
    return Path(source).name or source


def cost_table(
    summary: Mapping[str, Any],
    *,
    savings: Mapping[str, int],
    memory: Mapping[str, float],
    uncounted: Mapping[str, int],
    timing_steps: int,
) -> str:
    """What came out and what it cost against dense, each figure with its kind; at most 80 columns.

    Args:
        summary: as in ``summary.json``.
        savings: signed FLOPs by source; zeros are left out.
        memory: modelled bytes of a step: dense, average, minimum.
        uncounted: modules without FLOPs, by type.
        timing_steps: dense steps that were timed.
    """
    dense_flops, dense_time = summary["dense_training_flops"], summary["dense_seconds_extrapolated"]
    rows = [
        ("test accuracy", f"{summary['test_accuracy']:.4f}", "", "", "measured"),
        ("  best epoch's", f"{summary['best_test_accuracy']:.4f}", "", "", "measured"),
        (
            "training FLOPs",
            format_flops(summary["training_flops"]),
            format_flops(dense_flops),
            f"{summary['flops_ratio']:.1%}",
            "modelled",
        ),
    ]
    rows += [
        (f"  {name}", format_flops(flops), "", f"{flops / dense_flops:+.1%}", "modelled")
        for name, flops in savings.items()
        if flops
    ]
    rows.append(
        (
            "training time",
            format_seconds(summary["seconds"]),
            f"{format_seconds(dense_time)} *" if dense_time else "",
            f"{summary['seconds'] / dense_time:.1%}" if dense_time else "",
            "measured",
        )
    )
    rows += [
        (
            f"memory of a step, {name}",
            format_bytes(memory[key]),
            format_bytes(memory["dense"]),
            f"{memory[key] / memory['dense']:.1%}",
            "modelled",
        )
        for name, key in (("average", "average"), ("least", "minimum"))
    ]
    rows.append(("peak memory, process", format_bytes(summary["peak_memory_bytes"]), "", "", "measured"))
    if summary["final_sparsity"] > 0:
        rows.append(("sparsity of masked layers", f"{summary['final_sparsity']:.1%}", "", "", "counted"))
    if summary["total_blocks"]:
        rows.append(("frozen blocks", f"{summary['frozen_blocks']} of {summary['total_blocks']}", "", "", "counted"))
    head = ("", "this run", "dense run", "of dense", "")
    lines = [_table_row(head), "─" * WIDTH, *map(_table_row, rows), "─" * WIDTH]
    notes = []
    if dense_time:
        notes.append(f"* extrapolated: {timing_steps} dense steps, timed before training, times the dense run's steps.")
    if summary["engine"] == "masked" and summary["final_sparsity"] > 0:
        notes.append(
            "The masked engine computes densely: sparsity saves modelled FLOPs only; freezing and sieving save time."
        )
    if uncounted:
        listed = ", ".join(f"{name} x{count}" for name, count in sorted(uncounted.items()))
        notes.append(f"The model of FLOPs leaves out {listed}.")
    for note in notes:
        lines += textwrap.wrap(note, WIDTH, subsequent_indent="  ")
    return "\n".join(lines)


def _table_row(cells: tuple[str, str, str, str, str]) -> str:
    name, here, dense, share, kind = cells
    return f"{name:<27}{here:>13}  {dense:>14}  {share:>8}  {kind}".rstrip()
