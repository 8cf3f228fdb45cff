"""The plots of the report: which there are, which runs each is about, and how it is drawn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby
from typing import Any

from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from spfde.app.report.canvas import (
    LIGHT,
    WIDTH,
    Theme,
    add_axes,
    add_curves,
    add_legend,
    as_percent,
    label,
    name_runs,
    picture,
    style_of,
    whole_epochs,
)
from spfde.app.report.figures import share_of_dense
from spfde.app.report.folders import RecordedRun
from spfde.app.report.tables import PARTS_OF_DENSE

_HATCHES = ("", "//", "\\\\", "..")
_FEW_RUNS = 3
_MANY_BLOCKS = 24
LOG_FROM = 4.0
"""The largest cost over the smallest one, above which costs are drawn over a logarithm."""


@dataclass(frozen=True)
class Plot:
    """One plot: the end of its file's name, what it shows, for which runs, and what to say when there are none."""

    key: str
    title: str
    caption: str
    absent: str
    wants: Callable[[RecordedRun], bool]
    draw: Callable[[Any, Sequence[RecordedRun], Theme], None]

    def png(self, runs: Sequence[RecordedRun], theme: Theme = LIGHT) -> bytes | None:
        """The picture of those of ``runs`` that it is about; None if there are none.

        A run keeps its colour, dash and marker in every plot.
        """
        if not any(self.wants(run) for run in runs):
            return None
        return picture(lambda figure, theme: self.draw(figure, runs, theme), theme)


def _accuracy(figure: Any, runs: Sequence[RecordedRun], theme: Theme) -> None:
    axes = add_axes(figure, theme, x="epoch", y="accuracy (measured)")
    if len(runs) <= _FEW_RUNS:
        for index, run in enumerate(runs):
            epochs, accuracy = run.points("train_accuracy")
            axes.plot(epochs, accuracy, color=theme.runs[index], linewidth=0.8, alpha=0.6)
    shown = add_curves(axes, runs, theme, lambda run: run.points(_accuracy_of(run)))
    whole_epochs(axes)
    as_percent(axes.yaxis)
    name_runs(figure, runs, shown, theme, add=_if_validated)


def _accuracy_of(run: RecordedRun) -> str:
    return f"{run.evaluated_on}_accuracy"


def _if_validated(run: RecordedRun) -> str:
    return " (validation)" if run.evaluated_on == "val" else ""


def accuracy_over_flops(run: RecordedRun) -> tuple[list[float], list[float]]:
    """Training FLOPs up to and with each epoch, and the test or validation accuracy after it."""
    name = _accuracy_of(run)
    spent = accumulate(row.get("training_flops", 0.0) for row in run.epochs.values())
    points = [
        (total, row[name]) for total, row in zip(spent, run.epochs.values(), strict=True) if name in row and total > 0
    ]
    return [total for total, _ in points], [accuracy for _, accuracy in points]


def _flops(figure: Any, runs: Sequence[RecordedRun], theme: Theme) -> None:
    axes = add_axes(figure, theme, x="cumulative training FLOPs (modelled)", y="accuracy (measured)")
    shown = add_curves(axes, runs, theme, accuracy_over_flops)
    ends = [accuracy_over_flops(runs[index])[0][-1] for index in shown]
    if max(ends) > LOG_FROM * min(ends):
        axes.set_xscale("log")
        axes.set_xlabel("cumulative training FLOPs (modelled), logarithmic", color=theme.text)
    else:
        axes.set_xlim(left=0)
        axes.ticklabel_format(axis="x", style="sci", scilimits=(0, 0), useMathText=True)
        axes.xaxis.get_offset_text().set_color(theme.text)
    as_percent(axes.yaxis)
    name_runs(figure, runs, shown, theme, add=_if_validated)


def _cost(figure: Any, runs: Sequence[RecordedRun], theme: Theme) -> None:
    shown = [run for run in runs if _has_cost(run)]
    figure.set_size_inches(WIDTH, 1.7 + 0.42 * len(shown))
    axes = add_axes(figure, theme, x="share of the dense model's training FLOPs (modelled)", y="")
    for row, run in enumerate(shown):
        left = 0.0
        for (name, _), colour, hatch in zip(PARTS_OF_DENSE, theme.parts, _HATCHES, strict=True):
            share = max(0.0, share_of_dense(run, name) or 0.0)
            filled = colour if not hatch else theme.background
            bar = {"color": filled, "edgecolor": colour, "hatch": hatch, "linewidth": 1.0}
            axes.barh(row, share, left=left, height=0.62, **bar)
            if share >= 0.07:
                box = {"facecolor": filled, "edgecolor": "none", "pad": 1.5}
                ink = theme.background if not hatch else theme.text
                where = {"ha": "center", "va": "center", "fontsize": 8.5}
                axes.text(left + share / 2, row, f"{share:.0%}", color=ink, bbox=box, **where)
            left += share
    axes.set_yticks(range(len(shown)), [label(run.name, 22) for run in shown])
    axes.set_ylim(len(shown) - 0.5, -0.5)
    axes.grid(False, axis="y")
    as_percent(axes.xaxis)
    handles = [
        Patch(facecolor=colour if not hatch else theme.background, edgecolor=colour, hatch=hatch * 2)
        for colour, hatch in zip(theme.parts, _HATCHES, strict=True)
    ]
    add_legend(figure, theme, handles, [title for _, title in PARTS_OF_DENSE])


def _freezing(figure: Any, runs: Sequence[RecordedRun], theme: Theme) -> None:
    shown = [run for run in runs if run.freezes]
    heights = [max(1.1, 0.17 * min(len(run.block_names()), _MANY_BLOCKS)) for run in shown]
    figure.set_size_inches(WIDTH, 0.9 + sum(height + 0.75 for height in heights))
    grid = figure.add_gridspec(len(shown), 1, height_ratios=heights)
    for row, run in enumerate(shown):
        axes = add_axes(figure, theme, grid[row], x="epoch" if row == len(shown) - 1 else "", y="")
        _timeline(axes, run, theme)
    handles = [
        Patch(facecolor=theme.runs[0], edgecolor=theme.runs[0]),
        Patch(facecolor=theme.background, edgecolor=theme.runs[5], hatch="////"),
        Line2D([], [], color=theme.runs[1], linewidth=2.2),
    ]
    add_legend(figure, theme, handles, ["trained", "frozen", "counted: frozen above"])


def _timeline(axes: Any, run: RecordedRun, theme: Theme) -> None:
    """One bar a block, front block on top, hatched while it is frozen; over them the number that was counted."""
    names = run.block_names()
    hatched = {"color": theme.background, "edgecolor": theme.runs[5], "hatch": "////", "linewidth": 0.5}
    for block in range(len(names)):
        start = 0
        for is_frozen, within in groupby(count > block for count in run.frozen_blocks()):
            length = len(list(within))
            look = hatched if is_frozen else {"color": theme.runs[0]}
            axes.barh(block, length, left=start, height=0.72, **look)
            start += length
    epochs, counted = run.points("frozen_blocks")
    if epochs and run.planned_freezing():
        line = {"baseline": None, "color": theme.runs[1], "linewidth": 2.2}
        axes.stairs([count - 0.5 for count in counted], [*epochs, epochs[-1] + 1], **line)
    step = -(-len(names) // _MANY_BLOCKS)
    ticks = range(0, len(names), step)
    axes.set_yticks(ticks, [label(names[block], 20) for block in ticks], fontsize=8)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlim(0, run.planned_epochs)
    origin = "planned" if run.planned_freezing() else "as counted: the folder has no plan"
    axes.set_title(f"{label(run.name)} ({origin})", color=theme.text, fontsize=10, loc="left", pad=14)
    axes.grid(False, axis="y")
    whole_epochs(axes)


def _sieving(figure: Any, runs: Sequence[RecordedRun], theme: Theme) -> None:
    figure.set_size_inches(WIDTH, 5.4)
    swaps = add_axes(figure, theme, 2, 1, 1, x="", y="samples swapped")
    used = add_axes(figure, theme, 2, 1, 2, x="epoch", y="share of the samples")
    shown = [index for index, run in enumerate(runs) if run.sieves]
    for place, index in enumerate(shown):
        run, style = runs[index], style_of(index, theme, 1)
        shift = 0.12 * (place - (len(shown) - 1) / 2)  # side by side where runs swap in the same epochs
        moved = [(epoch + shift, value) for epoch, value in zip(*run.points("sieve_moved"), strict=True) if value]
        swaps.vlines([at for at, _ in moved], 0, [value for _, value in moved], color=style["color"], linewidth=1.6)
        marks = {**style, "linestyle": "none"}
        swaps.plot([at for at, _ in moved], [value for _, value in moved], **marks)
        epochs, share = _shares(run, "sieve_ever_used", "partial_samples", "removed_samples")
        used.plot(epochs, share, **style_of(index, theme, len(epochs)))
        epochs, share = _shares(run, "partial_samples", "partial_samples", "removed_samples")
        used.plot(epochs, share, color=style["color"], linewidth=0.9, alpha=0.7)
    end = max(runs[index].planned_epochs for index in shown)
    for axes in (swaps, used):
        axes.set_xlim(-0.5, max(end - 0.5, 0.5))
        whole_epochs(axes)
    swaps.set_ylim(bottom=0)
    used.set_ylim(top=1.03)
    as_percent(used.yaxis)
    name_runs(figure, runs, shown, theme)


def _shares(run: RecordedRun, name: str, *whole: str) -> tuple[list[int], list[float]]:
    """Of each epoch a figure's share in the sum of others."""
    sums = {epoch: sum(row.get(part, 0.0) for part in whole) for epoch, row in run.epochs.items()}
    found = {epoch: row[name] / sums[epoch] for epoch, row in run.epochs.items() if name in row and sums[epoch]}
    return list(found), list(found.values())


def _cost_of_an_epoch(figure: Any, runs: Sequence[RecordedRun], theme: Theme) -> None:
    above = "FLOPs vs dense (modelled)", lambda run: _shares(run, "training_flops", "dense_training_flops")
    below = "seconds (measured)", lambda run: run.points("seconds")
    _over_epochs(figure, runs, theme, above, below)


def _schedule(figure: Any, runs: Sequence[RecordedRun], theme: Theme) -> None:
    above = "density (counted)", lambda run: run.points("density")
    below = "learning rate (set)", lambda run: run.points("learning_rate")
    _over_epochs(figure, runs, theme, above, below)


def _over_epochs(
    figure: Any, runs: Sequence[RecordedRun], theme: Theme, *plots: tuple[str, Callable[[RecordedRun], Any]]
) -> None:
    """Two plots over epochs, one above the other; the upper one's figures are shares."""
    figure.set_size_inches(WIDTH, 5.4)
    shown: set[int] = set()
    for place, (title, points) in enumerate(plots, start=1):
        axes = add_axes(figure, theme, 2, 1, place, x="epoch" if place == 2 else "", y=title)
        shown |= set(add_curves(axes, runs, theme, points))
        axes.set_ylim(bottom=0)
        whole_epochs(axes)
        if place == 1:
            as_percent(axes.yaxis)
    name_runs(figure, runs, sorted(shown), theme)


def _has_cost(run: RecordedRun) -> bool:
    return share_of_dense(run, "training_flops") is not None


def _has_any(*names: str) -> Callable[[RecordedRun], bool]:
    return lambda run: any(run.last(name) is not None for name in names)


NO_EPOCH = "No run has finished an epoch yet."
PLOTS = (
    Plot(
        key="accuracy",
        title="Accuracy over epochs",
        caption="Measured on the test set, or on the validation set where a run has one. Thin, for up to three runs: "
        "on the training samples as trained on.",
        absent=NO_EPOCH,
        wants=_has_any("test_accuracy", "val_accuracy"),
        draw=_accuracy,
    ),
    Plot(
        key="flops",
        title="Accuracy over training FLOPs",
        caption="Accuracy on the test set, or on the validation set where a run has one, measured, against the "
        "training FLOPs spent so far, modelled.",
        absent=NO_EPOCH,
        wants=lambda run: bool(accuracy_over_flops(run)[0]),
        draw=_flops,
    ),
    Plot(
        key="cost",
        title="Where the training FLOPs went",
        caption="Modelled. All parts together are the dense model's training FLOPs for the same epochs on all samples, "
        "plus the gradients of inactive weights where a method needs them.",
        absent=NO_EPOCH,
        wants=_has_cost,
        draw=_cost,
    ),
    Plot(
        key="epochs",
        title="What an epoch costs",
        caption="Above, what the model of the cost says; below, what the clock says. A saving is real where both fall.",
        absent=NO_EPOCH,
        wants=_has_any("training_flops", "seconds"),
        draw=_cost_of_an_epoch,
    ),
    Plot(
        key="freezing",
        title="Freeze timeline",
        caption="Blocks in their order, the front on top, as planned; what was frozen (counted) is above the line.",
        absent="No run freezes a block.",
        wants=lambda run: run.freezes,
        draw=_freezing,
    ),
    Plot(
        key="sieving",
        title="Sieving turnover",
        caption="Counted. Above, samples swapped at each update, different runs side by side. Below, the share of all "
        "samples used so far, and (thin) the share in use.",
        absent="No run leaves samples out.",
        wants=lambda run: run.sieves,
        draw=_sieving,
    ),
    Plot(
        key="schedule",
        title="Density and learning rate",
        caption="Density of the masked tensors; learning rate of the first group, as set by the schedule.",
        absent=NO_EPOCH,
        wants=_has_any("density", "learning_rate"),
        draw=_schedule,
    ),
)
