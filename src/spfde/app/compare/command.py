"""The command ``spfde compare``, behind its options: what to compare, where, and how it ends."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
import typer
from rich.console import Console

from spfde.app.compare import folder as folders
from spfde.app.compare.display import Board
from spfde.app.compare.folder import COMPARISON, Comparison, Planned
from spfde.app.compare.processes import RunFailed
from spfde.app.compare.running import check, check_jobs, epochs_done, train_missing, words_of
from spfde.app.compare.spec import MOST_RUNS, Spec, packaged_text, read_spec
from spfde.app.compare.table import ComparisonTable, table_of
from spfde.app.compare.writing import WRITERS, as_latex
from spfde.app.data.datasets import load_data
from spfde.app.data.images import draw
from spfde.app.declaring import flag, listed, names_of
from spfde.app.ending import end, fail
from spfde.app.options import LISTS, DataOptions, RecipeOptions
from spfde.app.runs.folder import RunFolder, free_folder
from spfde.app.terminating import terminable
from spfde.core.errors import InvalidArgument, Problem
from spfde.core.say import n_started

QUICK, PAGE = "quick.npz", "report.html"
_QUICK_IMAGES = {"train": 48, "test": 40}
_LATEX = "table.tex"


def compare_runs(
    source: str | None,
    asked: Mapping[str, Any],
    given: Collection[str],
    *,
    out: Path | None,
    resume: Path | None,
    seeds: str | None,
    baseline: str | None,
    jobs: int | None,
    quick: bool,
    formats: Collection[str],
    quiet: bool,
) -> None:
    """Train what is missing of a comparison, and write its table after each run.

    Raises:
        InvalidArgument, RunFolderError: a mistake; nothing is trained then.
    """
    if n_started() > 1:
        rule, remedy = "compares in one process", "Start one, with --jobs for several runs at a time."
        raise InvalidArgument(Problem("torchrun", n_started(), rule, remedy))
    check_jobs(jobs)
    for name in formats:
        if name != "latex":
            remedy = "Markdown, CSV and JSON are always written; --format latex adds LaTeX."
            raise InvalidArgument(Problem("--format", name, "is no format", remedy))
    with ExitStack() as afterwards:
        if resume is not None:
            if source is not None:
                remedy = "It goes on as it was begun; compare what is new in another folder."
                raise InvalidArgument(Problem("SPEC", source, "is not read with --resume", remedy))
            if others := sorted(set(given) - {"resume", "seeds", "jobs", "format", "quiet", "plugin", "baseline"}):
                rule, remedy = f"takes no {', '.join(map(flag, others))}", "It goes on as it was begun; leave that out."
                raise InvalidArgument(Problem("--resume", str(resume), rule, remedy))
            folder, comparison = afterwards.enter_context(folders.reopened(resume))
            comparison = _amended(comparison, seeds, baseline)
        else:
            if quick and (others := sorted({"data", "image_size", "seeds", "baseline"} & set(given))):
                rule, remedy = f"takes no {', '.join(map(flag, others))}", "The short form has its own; leave that out."
                raise InvalidArgument(Problem("--quick", True, rule, remedy))
            spec = _spec(source, asked, given, seeds, baseline)
            comparison = Comparison.of(spec)
            if not quick:
                check(comparison)
            folder = afterwards.enter_context(
                folders.created(out or free_folder(f"compare-{Path(source).stem}" if source else "compare"))
            )
            if quick:
                comparison = Comparison.of(spec.quickened(str(quick_images(folder.path / QUICK))), quick=True)
                check(comparison)
        folders.write(folder, comparison)
        _train_and_tell(folder, comparison, jobs=jobs, formats=formats, quiet=quiet)


def run(comparison: Comparison, path: Path, *, jobs: int | None = None, quiet: bool = False) -> ComparisonTable:
    """Begin a comparison in a folder, or go on with the one that is there, and train what is missing.

    Args:
        comparison: it may have more candidates and seeds than the one that the folder has, and must have all of those.
        path: a folder that is not there yet, is empty or is a comparison's.
        jobs: runs at a time; None: one on a CPU, as many as are measured to be best on a GPU.
        quiet: show no progress.

    Returns:
        The table, of all runs.

    Raises:
        InvalidArgument, DataError, RunFolderError: a mistake, or a folder that holds something else; nothing is trained
            then.
        RunFailed: some runs failed; all others are finished.
        KeyboardInterrupt: on Ctrl-C or SIGTERM; called again, it goes on.

    Example:
        ::

            spec = Spec(seeds=2, options={"epochs": 20}, candidates=[{"recipe": ["dense", "mest"]}])
            table = run(Comparison.of(spec), Path("runs/table"))
    """
    check_jobs(jobs)
    with ExitStack() as afterwards:
        if is_comparison(path):
            folder, kept = afterwards.enter_context(folders.reopened(path))
            folders.check_holds(comparison, kept, path)
        else:
            folder = afterwards.enter_context(folders.created(path))
        check(comparison)
        folders.write(folder, comparison)
        if failed := _train(folder, comparison, jobs=jobs, formats=(), quiet=quiet):
            raise RunFailed(failed)
        return table_of(comparison, path)


def _spec(
    source: str | None, asked: Mapping[str, Any], given: Collection[str], seeds: str | None, baseline: str | None
) -> Spec:
    """From the command line, or from a file whose options it changes."""
    options, lists = dict[str, Any](), dict[str, Any]()
    for group in LISTS:
        for name in (name for name in names_of(group) if name in given):
            values = listed(group, name, asked[name]) if isinstance(asked[name], str) else [asked[name]]
            options |= {name: values[0]} if len(values) == 1 else {}
            lists |= {name: values} if len(values) > 1 else {}
    options |= {name: asked[name] for name in asked if name in given and name not in options and name not in lists}
    if asked["plugin"]:
        options["plugin"] = asked["plugin"]
    if source is None:
        # A recipe's own options are of the candidates, so that one that fits none of them is found.
        own = {name: options.pop(name) for name in names_of(RecipeOptions) if name in options}
        return Spec(seeds=_seeds(seeds) or 3, baseline=baseline, options=options, candidates=[own | lists])
    spec = read_spec(source)
    if lists:
        name, values = next(iter(lists.items()))
        remedy = "Give one value, which replaces that of all candidates, or write the list into the file."
        raise InvalidArgument(Problem(flag(name), asked[name], "is a list beside a specification", remedy))
    tables = [{name: value for name, value in table.items() if name not in options} for table in spec.candidates]
    return spec.model_copy(
        update={
            "seeds": Spec(seeds=_seeds(seeds), candidates=[{}]).seeds if seeds else spec.seeds,
            "baseline": baseline or spec.baseline,
            "options": spec.options | options,
            "quick": spec.quick | options,
            "candidates": tuple(tables),
        }
    )


def _seeds(text: str | None) -> Any:
    """A number of seeds, or a list of them."""
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts or not all(part.isascii() and part.isdigit() for part in parts):
        remedy = "Give a number of seeds, such as 3, or a list with a comma, such as 0,1,2 or 7,."
        raise InvalidArgument(Problem("--seeds", text, "is no number and no list", remedy))
    return int(parts[0]) if len(parts) == 1 and "," not in text else [int(part) for part in parts]


def _amended(comparison: Comparison, seeds: str | None, baseline: str | None) -> Comparison:
    """With more seeds, or another baseline."""
    changed: dict[str, Any] = {}
    if seeds is not None:
        wanted = Spec(seeds=_seeds(seeds), candidates=[{}]).seeds
        if missing := sorted(set(comparison.seeds) - set(wanted)):
            rule = f"lacks seed {missing[0]}, which the comparison has"
            remedy = f"Give those that are there too: {', '.join(map(str, comparison.seeds))}."
            raise InvalidArgument(Problem("--seeds", seeds, rule, remedy))
        if len(wanted) * len(comparison.candidates) > MOST_RUNS:
            raise InvalidArgument(Problem("--seeds", seeds, f"are more than {MOST_RUNS:,} runs", "Take fewer."))
        changed["seeds"] = (*comparison.seeds, *(seed for seed in wanted if seed not in comparison.seeds))
    if baseline is not None:
        folders.check_baseline(baseline, comparison.candidates)
        changed["baseline"] = baseline
    return comparison.model_copy(update=changed)


def _train_and_tell(
    folder: RunFolder, comparison: Comparison, *, jobs: int | None, formats: Collection[str], quiet: bool
) -> None:
    """As the command ends: with the table, the page, and what went wrong."""
    before = _text(folder.path / "table.json")
    try:
        failed = _train(folder, comparison, jobs=jobs, formats=formats, quiet=quiet)
    except KeyboardInterrupt as error:
        end(error, f" Go on with `spfde compare --resume {folder.path}`.")
    if not quiet:
        typer.echo(f"\n{(folder.path / 'table.md').read_text(encoding='utf-8')}\nfolder: {folder.path}")
    if _text(folder.path / "table.json") != before or not (folder.path / PAGE).is_file():
        _write_page(folder.path, quiet=quiet)
    if failed:
        fail(failed)


def _train(
    folder: RunFolder, comparison: Comparison, *, jobs: int | None, formats: Collection[str], quiet: bool
) -> str:
    """Train what is missing; returns what is to be told of runs that failed."""
    runs = comparison.runs(folder.path)
    failed = dict(comparison.failed)
    known: dict[Path, dict[str, Any]] = {}
    console = Console(quiet=quiet)

    def write() -> None:
        table = table_of(comparison.model_copy(update={"failed": failed}), folder.path, known)
        for name, text_of in {**WRITERS, **({_LATEX: as_latex} if formats else {})}.items():
            folder.write_text(name, text_of(table))

    def ended(run: Planned, outcome: Any) -> None:
        before = dict(failed)
        failed.pop(run.name, None)
        if isinstance(outcome, Exception):
            failed[run.name] = words_of(outcome)
        if failed != before:
            folders.write(folder, comparison.model_copy(update={"failed": failed}))
        board.ended(run, None if isinstance(outcome, Exception) else outcome, failed.get(run.name, ""))
        write()

    write()
    board = Board(console, runs, {run: epochs_done(run) for run in runs})
    with terminable(), board:
        train_missing(runs, jobs=jobs, display_of=board.of, reached=board.reached, ended=ended)
    each = "\n".join(f"{name}: {why}" for name, why in failed.items())
    return f"{len(failed)} of {len(runs)} runs failed; --resume tries them again.\n{each}" if failed else ""


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _write_page(folder: Path, *, quiet: bool) -> None:
    """The table and plots as a page, where there is what draws it."""
    if missing := [name for name in ("matplotlib", "jinja2") if find_spec(name) is None]:
        told = f"none without {' and '.join(missing)}; install that, and run `spfde report {folder}`"
    else:
        from spfde.app.report.page import write_report

        told = str(write_report([folder], folder / PAGE)[0])
    if not quiet:
        typer.echo(f"page: {told}")


def quick_images(path: Path) -> Path:
    """Write a few of the embedded images, for short forms, as an .npz; returns its path."""
    whole = load_data(DataOptions.data, root=path.parent)
    arrays: dict[str, Any] = {}
    for part, images in (("train", whole.train), ("test", whole.test)):
        pixels, labels = draw(images, _QUICK_IMAGES[part], torch.Generator().manual_seed(0))
        arrays |= {f"x_{part}": pixels[:, 0].numpy(), f"y_{part}": labels.numpy()}
    np.savez(path, **arrays)
    return path


def print_spec(source: str) -> str:
    """A specification that comes with the package, as text to be copied and changed.

    Raises:
        InvalidArgument: there is none of that name, and no such file.
    """
    text = packaged_text(source)
    if text is None:
        read_spec(source)
        text = Path(source).read_text(encoding="utf-8")
    return text


def is_comparison(path: Path) -> bool:
    """Whether a folder is one of a comparison."""
    return (path / COMPARISON).is_file()
