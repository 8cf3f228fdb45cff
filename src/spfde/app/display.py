"""Progress for a person: a live panel in a terminal, one plain line an epoch elsewhere."""

from __future__ import annotations

from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from spfde.app.setup import Run
from spfde.cost import format_bytes, format_flops, format_seconds

RECENT = 8
"""Epochs that the live panel shows."""


def frozen_bar(frozen: int, total: int) -> str:
    """The blocks from front to back, frozen ones filled: ``■■■□□ 3/5``."""
    return f"{'■' * frozen}{'□' * (total - frozen)} {frozen}/{total}" if total else "–"


class ConsoleDisplay:
    """Shows a run on a rich console.

    Args:
        console: where to; a live panel if it is a terminal, else a line an epoch.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._rows: list[dict[str, Any]] = []
        self._live: Live | None = None
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}"),
            TimeElapsedColumn(),
            console=console,
        )
        self._task = self._bar.add_task("epoch", total=None, loss="–")
        self._spent, self._dense = 0, 0

    def started(self, run: Run) -> None:
        spec, session = run.data.spec, run.session
        self._console.print(
            f"[bold]spfde[/] · {spec.name}: {spec.train_samples:,} + {spec.test_samples:,} images, "
            f"{run.options.model}, {run.options.epochs} epochs, recipe {run.options.recipe_name}, "
            f"engine {session.engine}, {run.accelerator.device}"
        )
        if run.resumed_from is not None:
            self._console.print(f"going on at epoch {session.epoch} from {run.resumed_from}")
        bill = run.plan
        self._console.print(
            f"plan: {format_flops(bill.training_flops)} of {format_flops(bill.dense_training_flops)} training FLOPs "
            f"({bill.flops_ratio:.1%}, modelled)"
            + (f"; freezing starts at epoch {bill.start_epoch}" if bill.start_epoch is not None else "")
        )
        totals = session.cost.totals
        self._spent, self._dense = totals.cost.training_flops, totals.cost.dense_training_flops
        if self._console.is_terminal:
            self._live = Live(self._panel(), console=self._console, refresh_per_second=4, transient=True)
            self._live.start()

    def batch_done(self, run: Run, done: int, total: int, loss: float) -> None:
        if self._live is not None:
            description = f"epoch {run.session.epoch + 1}/{run.options.epochs}"
            self._bar.update(self._task, description=description, completed=done, total=total, loss=f"{loss:.3f}")
            self._live.update(self._panel())

    def epoch_done(self, run: Run, row: dict[str, Any]) -> None:
        self._spent += row["training_flops"]
        self._dense += row["dense_training_flops"]
        row = row | {"of_dense": self._spent / self._dense if self._dense else 1.0}
        self._rows.append(row)
        if self._live is not None:
            self._live.update(self._panel())
        else:
            self._console.print(
                f"epoch {row['epoch'] + 1:>3}/{run.options.epochs}  test {row['test_accuracy']:.4f}  "
                f"train {row['train_accuracy']:.4f}  density {row['density']:.3f}  "
                f"frozen {frozen_bar(row['frozen_blocks'], row['total_blocks'])}  "
                f"partial set {row['partial_samples']:,}  "
                f"FLOPs {row['of_dense']:.1%} of dense (modelled)  {row['seconds']:.1f} s",
                soft_wrap=True,
            )

    def finished(self, run: Run, summary: dict[str, Any]) -> None:
        self.stop()
        if not self._rows and run.resumed_from is None:
            return
        self._console.print()
        self._console.print(Text(str(run.session.cost)))
        self._console.print(cost_table(summary, run.options.dense_timing_steps))

    def stop(self) -> None:
        """Leave the terminal as it was; call it however the run ends."""
        if self._live is not None:
            self._live.update(self._table())
            self._live.transient = False
            self._live.stop()
            self._live = None

    def _panel(self) -> RenderableType:
        return Group(self._table(), self._bar)

    def _table(self) -> Table:
        table = Table(box=None, pad_edge=False)
        for name in (
            "epoch",
            "test acc",
            "train acc",
            "density",
            "frozen blocks",
            "partial set",
            "FLOPs of dense",
            "s",
        ):
            table.add_column(name, justify="left" if name == "frozen blocks" else "right", no_wrap=True)
        for row in self._rows[-RECENT:]:
            table.add_row(
                str(row["epoch"] + 1),
                f"{row['test_accuracy']:.4f}",
                f"{row['train_accuracy']:.4f}",
                f"{row['density']:.3f}",
                frozen_bar(row["frozen_blocks"], row["total_blocks"]),
                f"{row['partial_samples']:,}",
                f"{row['of_dense']:.1%}",
                f"{row['seconds']:.1f}",
            )
        return table


def cost_table(summary: dict[str, Any], timing_steps: int) -> Table:
    """What came out, each figure with its kind: measured, modelled or extrapolated."""
    table = Table(title="Result", box=None, title_justify="left", show_header=False, pad_edge=False)
    table.add_row(
        "test accuracy", f"{summary['test_accuracy']:.4f}", f"best {summary['best_test_accuracy']:.4f}", "measured"
    )
    table.add_row(
        "training FLOPs",
        format_flops(summary["training_flops"]),
        f"dense {format_flops(summary['dense_training_flops'])}: {summary['flops_ratio']:.1%}",
        "modelled",
    )
    table.add_row("training time", format_seconds(summary["seconds"]), "", "measured")
    if summary["dense_seconds_extrapolated"]:
        dense = summary["dense_seconds_extrapolated"]
        table.add_row(
            "dense training time",
            format_seconds(dense),
            f"this run took {summary['seconds'] / dense:.2f}x",
            f"extrapolated from {timing_steps} timed dense steps",
        )
    table.add_row("peak memory", format_bytes(summary["peak_memory_bytes"]), "", "measured")
    if summary["engine"] == "masked" and summary["final_sparsity"] > 0:
        table.add_row(
            "weight sparsity",
            f"{summary['final_sparsity']:.1%}",
            "the masked engine computes densely: sparsity saves FLOPs on paper, freezing and sieving save seconds",
            "",
        )
    return table
