"""The plots of a comparison: a point for each candidate, its accuracy over what it costs, and the Pareto front."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.lines import Line2D

from spfde.app.compare.table import ACCURACY, ComparisonTable, Row
from spfde.app.report.canvas import (
    HEIGHT,
    LIGHT,
    WIDTH,
    Theme,
    add_axes,
    as_percent,
    label,
    picture,
    style_of_mark,
)
from spfde.app.report.plots import LOG_FROM

MOST_NAMED = 40
"""Candidates with a number, a colour and a marker of their own. Of more, only those on a front and the baseline."""
_SMALL = {"fontsize": 8}
_LEGEND_ROW = 0.17  # inches
_DIRECTIONS = ((1, 0.85), (-1, 0.85), (1, -0.85), (-1, -0.85), (1, 0), (-1, 0), (0, 1), (0, -1))
_RADII = (9, 16, 25, 36, 48)  # points between a marker and its number
_OFFSETS = [(radius * dx, radius * dy) for radius in _RADII for dx, dy in _DIRECTIONS]
_BOX = 5.5, 4.5  # half of a number's width and height, in points


@dataclass(frozen=True)
class CostPlot:
    """Accuracy over one cost; the key is the end of the file's name.

    Attributes:
        cost: a figure of the candidates, of which the table knows the front.
        axis: what the cost is called below it.
    """

    key: str
    cost: str
    axis: str
    title: str
    caption: str
    absent: str = "No run is finished yet."

    def png(self, table: ComparisonTable, theme: Theme = LIGHT) -> bytes | None:
        """The picture; None where no candidate has both figures."""
        if not _points(table, self.cost):
            return None
        return picture(lambda figure, theme: self.draw(figure, table, theme), theme)

    def draw(self, figure: Any, table: ComparisonTable, theme: Theme) -> None:
        """Fill a figure."""
        points = _points(table, self.cost)
        shown = set(named(table))
        of_own = [point for point in points if point.at in shown]
        figure.set_size_inches(WIDTH, HEIGHT + _LEGEND_ROW * -(-len(of_own) // 2))
        axes = add_axes(figure, theme, x=self.axis, y="test accuracy (measured)")
        others = [point for point in points if point.at not in shown]
        axes.plot([point.x for point in others], [point.y for point in others], ".", color=theme.text, alpha=0.35)
        front = sorted((point.x, point.y) for point in points if self.cost in point.row.is_cheapest_by)
        steps = {"drawstyle": "steps-post", "color": theme.text, "linestyle": "--", "linewidth": 1.1, "zorder": 1.5}
        axes.plot([x for x, _ in front], [y for _, y in front], **steps)
        for point in of_own:
            bars = {"yerr": point.y_sd, "xerr": point.x_sd, "elinewidth": 1.0, "capsize": 2.5}
            axes.errorbar(point.x, point.y, **bars, **style_of_mark(point.at, theme))
        costs = [point.x for point in points]
        if min(costs) > 0 and max(costs) > LOG_FROM * min(costs):
            axes.set_xscale("log")
            axes.set_xlabel(f"{self.axis}, logarithmic", color=theme.text)
        axes.margins(0.08)
        as_percent(axes.yaxis)
        _number(axes, of_own, points, theme)
        _name(figure, of_own, theme)


@dataclass(frozen=True)
class _Point:
    at: int
    row: Row
    x: float
    y: float
    x_sd: float | None
    y_sd: float | None


def _points(table: ComparisonTable, cost: str) -> list[_Point]:
    """Candidates with a finished run; a spread of one seed is none."""
    found = []
    for at, row in enumerate(table.rows):
        x, y = row.spreads.get(cost), row.spreads.get(ACCURACY)
        if x is not None and y is not None:
            x_sd = x.sd if x.sd and x.sd < x.mean else None  # a logarithm has no place for zero
            found.append(_Point(at, row, x.mean, y.mean, x_sd, y.sd))
    return found


def named(table: ComparisonTable) -> list[int]:
    """Which candidates have a number in the plots."""
    if len(table.rows) <= MOST_NAMED:
        return list(range(len(table.rows)))
    return [at for at, row in enumerate(table.rows) if row.is_baseline or row.is_cheapest_by][:MOST_NAMED]


def _number(axes: Any, named: Sequence[_Point], points: Sequence[_Point], theme: Theme) -> None:
    """A number beside each point, where it covers no other one, no bar and no other number."""
    axes.autoscale_view()  # until then the limits are those of before
    size = 72 * WIDTH * 0.85, 72 * HEIGHT * 0.75  # of the axes, about
    place = axes.transScale + axes.transLimits
    spots = {point.at: place.transform((point.x, point.y)) * size for point in points}
    taken = [(x, y, 3.0, 3.0) for x, y in spots.values()]
    for point in named:
        (x, y), (_, top) = spots[point.at], place.transform((point.x, point.y + (point.y_sd or 0))) * size
        taken.append((x, y, 1.0, top - y))
    for point in named:
        x, y = spots[point.at]
        near = [box for box in taken if abs(box[0] - x) < 2 * _RADII[-1]]
        covered = ((_covered((x + dx, y + dy), near), dx, dy) for dx, dy in _OFFSETS)
        dx, dy = _first_or_least(covered)
        taken.append((x + dx, y + dy, *_BOX))
        line = {"arrowstyle": "-", "color": theme.text, "linewidth": 0.5, "alpha": 0.6, "shrinkB": 3, "shrinkA": 0}
        number = axes.annotate(
            str(point.at + 1), (point.x, point.y), (dx, dy), textcoords="offset points", ha="center", va="center",
            color=theme.text, arrowprops=line if max(abs(dx), abs(dy)) > _RADII[0] else None, **_SMALL,
        )  # fmt: skip
        number.set_in_layout(False)  # it is inside, and measuring it takes long


def _first_or_least(covered: Iterator[tuple[float, float, float]]) -> tuple[float, float]:
    """The first place that covers nothing, or else the one that covers least."""
    seen = []
    for area, dx, dy in covered:
        if not area:
            return dx, dy
        seen.append((area, dx, dy))
    return min(seen)[1:]


def _covered(spot: tuple[float, float], taken: Sequence[tuple[float, float, float, float]]) -> float:
    """How much a number there would cover, in square points."""
    x, y = spot
    return sum(
        max(0.0, _BOX[0] + wide - abs(x - other)) * max(0.0, _BOX[1] + high - abs(y - above))
        for other, above, wide, high in taken
    )


def _name(figure: Any, points: Sequence[_Point], theme: Theme) -> None:
    handles = [Line2D([], [], **style_of_mark(point.at, theme)) for point in points]
    names = [f"{point.at + 1}  {label(point.row.name, 46)}" for point in points]
    handles.append(Line2D([], [], color=theme.text, linestyle="--", linewidth=1.1))
    names.append("Pareto front")
    figure.legend(
        handles, names, loc="outside lower center", ncols=2, frameon=False, labelcolor=theme.text, handletextpad=0.4,
        labelspacing=0.25, columnspacing=1.2, handlelength=1.6, **_SMALL,
    )  # fmt: skip


_CAPTION = (
    "A point is a candidate, by its number in the table; bars are one standard deviation over its seeds. Along the "
    "dashed line nothing is as cheap and more accurate."
)
PLOTS = (
    CostPlot(
        key="flops",
        cost="training_flops",
        axis="training FLOPs (modelled)",
        title="Accuracy over training FLOPs",
        caption=f"{_CAPTION} FLOPs are modelled.",
    ),
    CostPlot(
        key="seconds",
        cost="seconds",
        axis="seconds of training (measured)",
        title="Accuracy over time",
        caption=f"{_CAPTION} Time is measured, so it is that of this machine and this engine.",
    ),
)
