"""One HTML file that needs nothing else: tables, pictures inside it, and where every figure comes from."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from spfde.app.report import figures, tables
from spfde.app.report.canvas import DARK, LIGHT
from spfde.app.report.folders import RecordedRun, read_run
from spfde.app.report.plots import PLOTS, Plot
from spfde.core.errors import InvalidArgument, Problem
from spfde.core.files import clear_errors, written_whole

Picture = tuple[Plot, bytes | None, bytes | None]
"""One plot on the page: for a light and a dark one its PNG, or None where no run has anything to show."""


def write_report(runs: Sequence[str | Path], out: str | Path) -> list[Path]:
    """Write one page about all of ``runs``, and its plots as PNG files beside it.

    Args:
        runs: run folders, finished or not; one that is given twice counts once.
        out: the page; its folder is made. The plots are named after it: ``report.html``, ``report-accuracy.png``, ….

    Returns:
        The files that were written, the page first.

    Raises:
        InvalidArgument: no run is given, or ``out`` is a folder.
        RunFolderError: a folder is no run folder or is damaged, or ``out`` cannot be written. Files are written only
            after everything has been read and drawn.
    """
    page = Path(out)
    if not runs:
        raise InvalidArgument(Problem("runs", list(runs), "must name at least one run folder", "Pass runs/NAME."))
    if page.is_dir():
        rule, remedy = "must be a file, and is a folder", f"Pass a file in it: {page / 'report.html'}."
        raise InvalidArgument(Problem("out", str(page), rule, remedy))
    found = told_apart([read_run(path) for path in {Path(path).resolve(): path for path in runs}.values()])
    pictures = [(plot, plot.png(found, LIGHT), plot.png(found, DARK)) for plot in PLOTS]
    files = {page: render(found, pictures).encode(errors="replace")}  # names of folders may be no text
    for plot, light, _ in pictures:
        if light is not None:
            files[page.with_name(f"{page.stem}-{plot.key}.png")] = light
    with clear_errors(page.parent, again="make the report again"):
        page.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(*files) as drafts:
            for draft, content in zip(drafts, files.values(), strict=True):
                draft.write_bytes(content)
    return list(files)


def told_apart(runs: Sequence[RecordedRun]) -> list[RecordedRun]:
    """The runs, with as much of the path before each name as it takes to tell them apart."""
    parts = [run.path.resolve().parts for run in runs]

    def name(own: tuple[str, ...]) -> str:
        for length in range(1, len(own)):
            if sum(other[-length:] == own[-length:] for other in parts) == 1:
                return "/".join(own[-length:])
        return "/".join(own)

    return [replace(run, name=name(own)) for run, own in zip(runs, parts, strict=True)]


def render(runs: Sequence[RecordedRun], pictures: Sequence[Picture]) -> str:
    """The page as text. Everything that comes from a run folder is escaped."""
    environment = Environment(
        loader=PackageLoader("spfde.app.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    sparse = [run for run in runs if (figures.figure(run, "final_sparsity") or 0) > 0]
    environment.filters["base64"] = lambda png: base64.b64encode(png).decode("ascii")
    return environment.get_template("report.html.j2").render(
        title="spfde: " + ", ".join(run.name for run in runs[:3]) + (", …" if len(runs) > 3 else ""),
        runs=runs,
        figures=figures,
        tables=[tables.comparison(runs), tables.savings(runs), tables.memory_table(runs)],
        pictures=pictures,
        details=[(run, tables.settings(run)) for run in runs],
        masked=[run.name for run in sparse if figures.setting(run, "engine") == "masked"],
        uncounted=tables.uncounted(runs),
    )
