"""The plots of ``analysis.json``: what ``spfde analyze`` found, checkpoint by checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from spfde.app.report.canvas import (
    LIGHT,
    WIDTH,
    Theme,
    add_axes,
    add_legend,
    as_percent,
    label,
    picture,
    style_of,
    whole_epochs,
)
from spfde.core import json_text
from spfde.core.errors import RunFolderError
from spfde.core.files import clear_errors, written_whole

_NAMED = 6  # curves that the legend names; the others are thin lines among them


Curves = Mapping[str, Sequence[float | None]]
"""For blocks or layers by name their values at the checkpoints; None where there is none."""


def draw_analysis(path: str | Path) -> list[Path]:
    """Draw the curves in an ``analysis.json`` as PNG files beside it, which are named.

    Those are ``structural-similarity.png`` (only of sparse runs), ``cka.png`` and ``gradient-norm.png`` (where it was
    measured).

    Raises:
        RunFolderError: the file is missing or damaged, or nothing can be written there.
    """
    source = Path(path)
    try:
        content = json_text.read(source)
        epochs, blocks = list(content["epochs"]), list(content["blocks"])
        layers = [layer for block in blocks for layer in block["layers"]]
        similarity, alignment = _curves(blocks, "structural_similarity"), _curves(blocks, "cka")
        norms, differences = _curves(layers, "gradient_norm"), _curves(layers, "gradient_norm_difference")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunFolderError(f"{source}: is damaged ({error}). Run `spfde analyze` again.") from error
    files: dict[Path, bytes] = {}
    for name, title, curves in (
        ("structural-similarity", "structural similarity to the last (counted)", similarity),
        ("cka", "CKA with the last (measured)", alignment),
    ):
        if curves:
            files[source.with_name(f"{name}.png")] = picture(partial(_shares, epochs, title, curves), LIGHT)
    if norms:
        files[source.with_name("gradient-norm.png")] = picture(partial(_trend, epochs, norms, differences), LIGHT)
    with clear_errors(source.parent, again="run `spfde analyze` again"), written_whole(*files) as drafts:
        for draft, content in zip(drafts, files.values(), strict=True):
            draft.write_bytes(content)
    return list(files)


def _curves(parts: Sequence[Mapping[str, Any]], key: str) -> Curves:
    return {str(part["name"]): part[key] for part in parts if part[key] is not None}


def _shares(epochs: Sequence[int], title: str, curves: Curves, figure: Any, theme: Theme) -> None:
    axes = add_axes(figure, theme, x="epochs trained", y=title)
    handles, names = _plot(axes, epochs, curves, theme)
    lowest, _ = axes.get_ylim()
    axes.set_ylim(top=1.0 + 0.03 * (1.0 - lowest))
    whole_epochs(axes)
    as_percent(axes.yaxis)
    add_legend(figure, theme, handles, names)


def _trend(epochs: Sequence[int], norms: Curves, differences: Curves, figure: Any, theme: Theme) -> None:
    figure.set_size_inches(WIDTH, 5.4)
    above = add_axes(figure, theme, 2, 1, 1, x="", y="gradient norm (measured)")
    below = add_axes(figure, theme, 2, 1, 2, x="epochs trained", y="change since the one before")
    handles, names = _plot(above, epochs, norms, theme)
    _plot(below, epochs[1:], differences, theme)
    for axes in (above, below):
        axes.set_xlim(min(epochs) - 0.5, max(epochs) + 0.5)
        axes.set_yscale("log")
        whole_epochs(axes)
    add_legend(figure, theme, handles, names)


def _plot(axes: Any, epochs: Sequence[int], curves: Curves, theme: Theme) -> tuple[list[Any], list[str]]:
    """Draw all curves; of a few from the front of the model to its end, which stand out, the lines and their names."""
    named = _evenly(len(curves), _NAMED)
    lines, names = [], []
    for index, (name, found) in enumerate(curves.items()):
        values = [float("nan") if value is None else value for value in found]
        if index in named:
            style = style_of(named.index(index), theme, len(epochs))
            lines += axes.plot(epochs, values, **style)
            names.append(label(name.removesuffix(".weight"), 18))
        else:
            axes.plot(epochs, values, color=theme.text, linewidth=0.6, alpha=0.35)
    return lines, names


def _evenly(count: int, most: int) -> list[int]:
    """At most so many indices, the first and the last among them."""
    if count <= most:
        return list(range(count))
    return [round(place * (count - 1) / (most - 1)) for place in range(most)]
