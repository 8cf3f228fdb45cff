"""The README's picture, drawn from the results alone: how fast a step is, and what a run reaches in how many seconds.

It is plain SVG, so that the same results give the same file, and a change of theirs can be read in a diff.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape

from _common import Figure, Result

WIDTH, HEIGHT, LEFT = 960, 372, 470
INK, QUIET, DENSE, OURS = "#222222", "#777777", "#a3b1bf", "#2f6f9f"

# Bars: what is drawn, the benchmark, its figure, and whether it is the dense net.
BARS = (
    ("dense, bf16", "native", "dense bf16 step, speed over dense fp32", True),
    ("dense, compiled", "native", "compiled dense fp32 step, speed over dense fp32", True),
    ("dense, bf16, compiled", "native", "compiled dense bf16 step, speed over dense fp32", True),
    ("90 % sparse", "native", "native step at 90%, speed over dense", False),
    ("… 5 of 15 blocks frozen", "native", "native step at 90 % with 5 of 15 blocks frozen, speed over dense", False),
    ("… 10 of 15 blocks frozen", "native", "native step at 90 % with 10 of 15 blocks frozen, speed over dense", False),
    (
        "… and their output cached",
        "native",
        "native step at 90 % with 10 of 15 blocks frozen, their output cached, speed over dense",
        False,
    ),
    (
        "an epoch, all three savings",
        "native",
        "an epoch of SpFDE 20 % + 20 % at 90 %, mean over its schedule, speed over a dense epoch",
        False,
    ),
)
# Curves: what is drawn, the run in the data of same_budget, whether it is the dense net, and whether it is dashed.
CURVES = (
    ("dense", "dense", True, False),
    ("dense, as many seconds", "dense, fewer epochs, equal seconds", True, True),
    ("all three savings", "SpFDE 20 % + 20 % at 90 %", False, False),
)
LEAST_ACCURACY, TICKS = 0.6, (0.6, 0.7, 0.8, 0.9)


def picture(results: Sequence[Result]) -> str:
    """The SVG; a panel whose benchmark has not been run stays empty."""
    found = {(result.name, figure.what): figure for result in results for figure in result.figures}
    named = {result.name: result for result in results}
    budget = named.get("same_budget")
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        f'font-size="13" fill="{INK}">',
        "<title>Measured: speed of a training step over dense fp32 PyTorch, and accuracy over seconds</title>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
        *_bars([(label, found.get((name, what)), dense) for label, name, what, dense in BARS]),
        *(_curves(budget, found) if budget is not None and "curves" in budget.data else ()),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _bars(bars: Sequence[tuple[str, Figure | None, bool]]) -> Iterable[str]:
    """How many times as fast as dense fp32, with quartiles."""
    drawn = [("dense, fp32", 1.0, None, True)]
    drawn += [(label, figure.value, figure.spread, dense) for label, figure, dense in bars if figure is not None]
    across = 210 / max(value for _, value, _, _ in drawn)
    yield _text(16, 28, "A training step of ResNet-32 on the CPU", weight="bold")
    yield _text(16, 47, "times as fast as dense fp32 PyTorch (measured)", fill=QUIET)
    for row, (label, value, spread, dense) in enumerate(drawn):
        y = 66 + 31 * row
        yield _text(208, y + 15, label, anchor="end")
        yield f'<rect x="214" y="{y}" width="{across * value:.1f}" height="21" fill="{DENSE if dense else OURS}"/>'
        end = across * value
        if spread is not None:
            low, high = (214 + across * edge for edge in spread)
            yield _line([(low, y + 10.5), (high, y + 10.5)], INK, 1.5)
            end = max(end, high - 214)
        yield _text(220 + end, y + 15, f"{value:.3g}", weight="bold")


def _curves(budget: Result, found: dict[tuple[str, str], Figure]) -> Iterable[str]:
    """Test accuracy over the seconds of training, means over the seeds, the end with its standard deviation."""
    chosen = [(*curve, budget.data["curves"][curve[1]]) for curve in CURVES if curve[1] in budget.data["curves"]]
    longest = max(point["seconds"] for *_, points in chosen for point in points)
    power = 10 ** math.floor(math.log10(longest))
    step = next(step for step in (power / 5, power / 2, power, 2 * power) if longest / step <= 6)
    ticks = [step * n for n in range(int(longest / step) + 1)]
    left, right, top, bottom = LEFT + 62, WIDTH - 24, 66, HEIGHT - 40

    def place(seconds: float, accuracy: float) -> tuple[float, float]:
        share = (accuracy - LEAST_ACCURACY) / (TICKS[-1] + 0.02 - LEAST_ACCURACY)
        return left + (right - left) * seconds / longest / 1.02, bottom - (bottom - top) * share

    settings = budget.settings
    yield _text(LEFT + 22, 28, f"{settings['model']} on {settings['data']}, {settings['epochs']} epochs", weight="bold")
    yield _text(LEFT + 22, 47, "test accuracy over seconds (measured; bar: sd of the seeds)", fill=QUIET)
    for accuracy in TICKS:
        y = place(0, accuracy)[1]
        yield _line([(left, y), (right, y)], "#e4e4e4", 1)
        yield _text(left - 8, y + 4, f"{accuracy:.0%}", anchor="end", fill=QUIET)
    for seconds in ticks:
        yield _text(place(seconds, 0.7)[0], bottom + 20, f"{seconds:g} s", anchor="middle", fill=QUIET)
    for row, (label, run, dense, dashed, points) in enumerate(chosen):
        colour = QUIET if dense else OURS
        line = [place(p["seconds"], p["test_accuracy"]) for p in points if p["test_accuracy"] >= LEAST_ACCURACY]
        yield _line(line, colour, 2.5, dashed=dashed)
        end, figure = points[-1], found.get((budget.name, f"test accuracy: {run}"))
        if figure is not None and figure.spread is not None:
            x, _ = place(end["seconds"], end["test_accuracy"])
            yield _line([(x, place(0, figure.spread[0])[1]), (x, place(0, figure.spread[1])[1])], INK, 1.5)
        said = f"{label}: {end['test_accuracy']:.1%} in {end['seconds']:.0f} s"
        y = bottom - 64 + 22 * row
        yield _line([(right - 284, y - 4), (right - 260, y - 4)], colour, 2.5, dashed=dashed)
        yield _text(right - 252, y, said)


def _text(x: float, y: float, said: str, *, anchor: str = "start", fill: str = INK, weight: str = "normal") -> str:
    look = f'text-anchor="{anchor}" fill="{fill}" font-weight="{weight}"'
    return f'<text x="{x:.1f}" y="{y:.1f}" {look}>{escape(said)}</text>'


def _line(points: Sequence[tuple[float, float]], colour: str, width: float, *, dashed: bool = False) -> str:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    dash = ' stroke-dasharray="5 4"' if dashed else ""
    return f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{width}"{dash}/>'
