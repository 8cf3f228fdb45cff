"""One HTML file that needs nothing else: tables, pictures inside it, and where every figure comes from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from spfde.app.compare.folder import COMPARISON
from spfde.app.report import figures, tables
from spfde.app.report.canvas import DARK, LIGHT
from spfde.app.report.comparison import draw_comparison
from spfde.app.report.folders import RecordedRun, read_run
from spfde.app.report.html import Line, Picture, WideTable, render
from spfde.app.report.plots import PLOTS
from spfde.core.errors import InvalidArgument, Problem
from spfde.core.files import clear_errors, written_whole


def write_report(runs: Sequence[str | Path], out: str | Path) -> list[Path]:
    """Write one page about all of ``runs``, or about one comparison, and its plots as PNG files beside it.

    Args:
        runs: run folders, finished or not, or the folder of one comparison; one that is given twice counts once.
        out: the page; its folder is made. The plots are named after it: ``report.html``, ``report-accuracy.png``, ….

    Returns:
        The files that were written, the page first.

    Raises:
        InvalidArgument: no run is given, a comparison is not alone, or ``out`` is a folder.
        RunFolderError: a folder is no run folder or is damaged, or ``out`` cannot be written. Files are written only
            after everything has been read and drawn.
    """
    page = Path(out)
    if not runs:
        raise InvalidArgument(Problem("runs", list(runs), "must name at least one run folder", "Pass runs/NAME."))
    if page.is_dir():
        rule, remedy = "must be a file, and is a folder", f"Pass a file in it: {page / 'report.html'}."
        raise InvalidArgument(Problem("out", str(page), rule, remedy))
    paths = list({Path(path).resolve(): Path(path) for path in runs}.values())
    text, pictures = draw_comparison(paths[0]) if _is_comparison(paths) else _draw_runs(paths)
    files = {page: text.encode(errors="replace")}  # names of folders may be no text
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


def _is_comparison(paths: Sequence[Path]) -> bool:
    """Whether the page is about a comparison, and not about runs."""
    found = [path for path in paths if (path / COMPARISON).is_file()]
    if found and len(paths) > 1:
        rule = "is the folder of a comparison, which has a page of its own"
        remedy = "Pass it alone, or pass run folders, which lie in its runs/CANDIDATE/."
        raise InvalidArgument(Problem("runs", str(found[0]), rule, remedy))
    return bool(found)


def _draw_runs(paths: Sequence[Path]) -> tuple[str, list[Picture]]:
    runs = told_apart([read_run(path) for path in paths])
    pictures: list[Picture] = [(plot, plot.png(runs, LIGHT), plot.png(runs, DARK)) for plot in PLOTS]
    sparse = [run for run in runs if (figures.figure(run, "final_sparsity") or 0) > 0]
    text = render(
        "report.html.j2",
        pictures,
        title="spfde: " + ", ".join(run.name for run in runs[:3]) + (", …" if len(runs) > 3 else ""),
        runs=runs,
        figures=figures,
        tables=[_wide(table) for table in (tables.comparison(runs), tables.savings(runs), tables.memory_table(runs))],
        details=[(run, tables.settings(run)) for run in runs],
        masked=[run.name for run in sparse if figures.setting(run, "engine") == "masked"],
        uncounted=tables.uncounted(runs),
    )
    return text, pictures


def _wide(table: tables.Table) -> WideTable:
    lines = [Line(run.name, cells, badge="" if run.finished else "unfinished") for run, cells in table.rows]
    return WideTable(table.caption, "Run", table.columns, tuple(lines))
