"""What every plot of the report shares: colours for a light and a dark page, axes, curves, legends.

Matplotlib's objects alone are used, and no global state. Runs differ by colour, dash and marker, and hatches back up
the colours of areas: no plot is read by colour alone.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, PercentFormatter

from spfde.app.report.folders import RecordedRun

WIDTH, HEIGHT, DPI = 6.4, 3.8, 160
"""Inches, and dots per inch: 1024 pixels wide, with text that can still be read on a phone."""

_DASHES = ("-", "--", "-.", (0, (1, 1)))
_MARKERS = ("o", "s", "^", "D", "v", "P")
_FEW_EPOCHS = 40


@dataclass(frozen=True)
class Theme:
    """Colours of a page. Those of runs and of parts of the cost have a contrast of at least 3:1 with the background."""

    background: str
    text: str
    grid: str
    runs: tuple[str, ...]
    parts: tuple[str, ...]


LIGHT = Theme(
    background="#ffffff",
    text="#1d2330",
    grid="#d5d9e0",
    runs=("#0072b2", "#c44e00", "#00835f", "#a03a78", "#7a6400", "#444b55"),
    parts=("#2b3648", "#0072b2", "#c44e00", "#00835f"),
)
DARK = Theme(
    background="#1a1d24",
    text="#e6e9ef",
    grid="#3a404c",
    runs=("#6cb8f5", "#ff9d5c", "#3ecf9e", "#e58ac0", "#d9c24a", "#b8c0cc"),
    parts=("#dfe4ee", "#6cb8f5", "#ff9d5c", "#3ecf9e"),
)


def picture(draw: Callable[[Any, Theme], None], theme: Theme) -> bytes:
    """The PNG of a figure that ``draw`` fills; the same bytes for the same input."""
    figure = Figure(figsize=(WIDTH, HEIGHT), dpi=DPI, facecolor=theme.background, layout="constrained")
    file = io.BytesIO()
    with warnings.catch_warnings():
        # A folder's name may use letters that the font does not have: boxes in a legend are no reason to fail.
        warnings.filterwarnings("ignore", message=".*[Gg]lyph.*missing.*")
        draw(figure, theme)
        figure.savefig(file, format="png", facecolor=theme.background, metadata={"Software": None})
    return file.getvalue()


def label(name: str, limit: int = 32) -> str:
    """A run's name as Matplotlib takes it: text, no mathematics, not hidden from legends, and not too long."""
    name = name.encode(errors="replace").decode()
    short = name if len(name) <= limit else f"…{name[1 - limit :]}"
    return (f" {short}" if short.startswith("_") else short).replace("$", r"\$")


def add_axes(figure: Any, theme: Theme, *position: Any, x: str, y: str) -> Any:
    axes = figure.add_subplot(*(position or (1, 1, 1)))
    axes.set_facecolor(theme.background)
    axes.set_xlabel(x, color=theme.text)
    axes.set_ylabel(y, color=theme.text)
    axes.tick_params(colors=theme.text, which="both")
    axes.grid(True, color=theme.grid, linewidth=0.6)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(theme.text)
    return axes


def style_of(index: int, theme: Theme, n_points: int) -> dict[str, Any]:
    return {
        "color": theme.runs[index % len(theme.runs)],
        "linestyle": _DASHES[index % len(_DASHES)],
        "marker": _MARKERS[index % len(_MARKERS)],
        "markevery": 1 if n_points <= _FEW_EPOCHS else n_points // 12,
        "markersize": 4.5,
        "linewidth": 1.7,
    }


def mark_of(index: int) -> tuple[int, int]:
    """A colour and a marker, by their places; the first 36 indices have one pair each."""
    return index % len(LIGHT.runs), (index + index // len(LIGHT.runs)) % len(_MARKERS)


def style_of_mark(index: int, theme: Theme) -> dict[str, Any]:
    """A point of its own, without a line."""
    colour, marker = mark_of(index)
    return {"color": theme.runs[colour], "marker": _MARKERS[marker], "markersize": 5.5, "linestyle": "none"}


def add_legend(figure: Any, theme: Theme, handles: Sequence[Any], names: Sequence[str]) -> None:
    columns = 1 if any(len(name) > 20 for name in names) else min(3, len(names))
    figure.legend(handles, names, loc="outside lower center", ncols=columns, frameon=False, labelcolor=theme.text)


def name_runs(
    figure: Any,
    runs: Sequence[RecordedRun],
    shown: Sequence[int],
    theme: Theme,
    *,
    add: Callable[[RecordedRun], str] = lambda run: "",
) -> None:
    """Name the runs that are shown in a legend; ``add`` says what stands behind a name."""
    handles = [Line2D([], [], **style_of(index, theme, 1)) for index in shown]
    add_legend(figure, theme, handles, [label(runs[index].name) + add(runs[index]) for index in shown])


def add_curves(
    axes: Any, runs: Sequence[RecordedRun], theme: Theme, points: Callable[[RecordedRun], tuple[Any, Any]]
) -> list[int]:
    """Draw one curve a run; the indices of the runs that had any points."""
    shown = []
    for index, run in enumerate(runs):
        x, y = points(run)
        if x:
            axes.plot(x, y, **style_of(index, theme, len(x)))
            shown.append(index)
    return shown


def whole_epochs(axes: Any) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def as_percent(axis: Any) -> None:
    axis.set_major_formatter(PercentFormatter(1.0, symbol=" %", decimals=None))
