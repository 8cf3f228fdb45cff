"""The command line. Heavy imports wait until a command runs, so that ``--help`` answers at once."""

from __future__ import annotations

import io
import logging
import os
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

try:
    import typer
except ModuleNotFoundError:  # the library is installed without the command line's dependencies
    sys.exit("spfde: the command line needs more packages. Install them with `pip install 'spfde[train,vision]'`.")

from spfde.app.command import PlainCommand, given_options
from spfde.app.compare.search_cli import search
from spfde.app.declaring import flag, names_of, takes
from spfde.app.ending import EXIT_ERROR, cause_of, end, fail, leave
from spfde.app.options import (
    LISTS,
    OF_RUNS,
    AnalysisOptions,
    CacheOptions,
    DataOptions,
    EvaluationOptions,
    LengthOptions,
    PluginOptions,
    PredictionOptions,
    RecipeOptions,
)
from spfde.app.terminating import EXIT_TERMINATED, terminable
from spfde.core.say import is_by_launcher, n_started, tells

if TYPE_CHECKING:
    from spfde.app.train.options import TrainOptions

app = typer.Typer(
    name="spfde",
    help="Train neural networks for less: weight sparsity, layer freezing and data sieving under one schedule.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode="markdown",
)


command = partial(app.command, cls=PlainCommand)

# What may be given with --resume: where the run goes on, what is recorded of it, and what has to be imported for it.
_WITH_RESUME = {
    *("resume", "quiet", "plugin", "engine", "device", "data_on", "workers", "profile"),
    *names_of(CacheOptions),
}

Quiet = Annotated[bool, typer.Option("--quiet", help="Print nothing but errors.")]


@app.callback(invoke_without_command=True)
def _main(version: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False) -> None:
    if version:
        from spfde import __version__

        typer.echo(__version__)
        raise typer.Exit


@command()
@takes(*OF_RUNS)
def train(
    context: typer.Context,
    out: Annotated[Path | None, typer.Option(help="run folder", show_default="a new one under runs/")] = None,
    resume: Annotated[
        Path | None,
        typer.Option(
            help="go on with the run in this folder; takes --engine, --device, --data-on, --workers, --profile, "
            "--cache-…, --plugin and --quiet alone"
        ),
    ] = None,
    quiet: Quiet = False,
    **asked: Any,
) -> None:
    """Train a model; with no options, the paper's recipe on the embedded data set, in minutes on two cores."""
    quiet = quiet or not tells()
    if resume is not None:
        _resume(resume, asked, given=given_options(context), quiet=quiet)
        return
    from spfde.app.train.options import options_from
    from spfde.app.train.processes import current

    options = options_from(asked)
    _run(options, out or current().first(partial(_new_folder, options)), quiet=quiet, resume=False)


@command()
@takes(DataOptions, PluginOptions, RecipeOptions, LengthOptions)
def plan(
    epochs: Annotated[
        int,
        typer.Option(
            help="length of the run in epochs; here the paper's, where spfde train takes 20",
            rich_help_panel="How to train",
        ),
    ] = 160,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
    **asked: Any,
) -> None:
    """Print the freeze timeline and the whole bill before training; named data sets need not be on disk."""
    import json

    import torch

    from spfde import plan as draw_plan
    from spfde.app.data.datasets import describe_data
    from spfde.app.data.validation import trained_on
    from spfde.app.train.models import build_for
    from spfde.app.train.options import check_full_batch, recipe_from

    chosen = recipe_from(asked)
    batch_size = asked["batch_size"]
    spec = trained_on(describe_data(asked["data"], asked["image_size"]), asked["validation_share"], batch_size)
    check_full_batch(chosen, samples=spec.train_samples, batch_size=batch_size, epochs=epochs)
    sample = torch.zeros(1, *spec.sample_shape)
    model = build_for(asked["model"], spec, width=asked["width"])
    bill = draw_plan(model, sample, chosen, epochs, spec.train_samples, batch_size=batch_size)
    typer.echo(json.dumps(bill.to_dict(), allow_nan=False) if as_json else str(bill))


@command()
@takes(
    *OF_RUNS,
    lists=LISTS,
    without=("seed", "profile", "track"),
)
def compare(
    context: typer.Context,
    spec: Annotated[
        str | None,
        typer.Argument(
            help="a TOML file, or spfde_cifar10 and the like, which come with the package; without one the "
            "options say what is compared, by lists with commas",
            show_default=False,
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="folder", show_default="a new one under runs/")] = None,
    resume: Annotated[
        Path | None,
        typer.Option(
            help="go on with the comparison in this folder; takes --seeds, --baseline, --jobs, --format, "
            "--plugin and --quiet alone"
        ),
    ] = None,
    seeds: Annotated[str | None, typer.Option(help="so many, from 0 on, or a list", show_default="3")] = None,
    baseline: Annotated[
        str | None,
        typer.Option(help="the candidate that others are compared with", show_default="the first dense one"),
    ] = None,
    jobs: Annotated[
        int | None,
        typer.Option(help="runs at a time", show_default="1; on a GPU as many as are found fastest"),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="the short form: one seed, few embedded images, few epochs")
    ] = False,
    format: Annotated[list[str], typer.Option(help="latex, for table.tex beside the others", show_default=False)] = [],  # noqa: B006
    print_: Annotated[bool, typer.Option("--print", help="Print SPEC, to be copied and changed, and leave.")] = False,
    quiet: Quiet = False,
    **asked: Any,
) -> None:
    """Train candidates over several seeds, and compare them: a table with spread, paired differences and cost."""
    from spfde.app.compare.command import compare_runs, print_spec

    if print_:
        typer.echo(print_spec(spec or ""), nl=False)
        return
    given = given_options(context) - {"spec"}
    compare_runs(
        spec, asked, given, out=out, resume=resume, seeds=seeds, baseline=baseline, jobs=jobs, quick=quick,
        formats=format, quiet=quiet,
    )  # fmt: skip


command()(search)


@command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="run folders, or one folder of `spfde compare`")],
    out: Annotated[Path, typer.Option(help="the HTML file; PNGs are written beside it")] = Path("report.html"),
) -> None:
    """Runs, or a comparison, in one self-contained HTML file, with PNGs beside it."""
    from spfde.app.report.page import write_report

    for path in write_report(runs, out):
        typer.echo(path)


@command()
@takes(PluginOptions)
def export(
    run: Annotated[Path, typer.Argument(help="run folder; its training need not be over")],
    kind: Annotated[str, typer.Option("--format", help="dense, compressed or onnx")] = "compressed",
    out: Annotated[Path | None, typer.Option(help="the file", show_default="in the run folder")] = None,
    best: Annotated[
        bool,
        typer.Option(
            "--best/--last",
            help="the best checkpoint, chosen by validation accuracy (by test accuracy where the run has no validation "
            "share), or the last one",
        ),
    ] = True,
    **_: Any,
) -> None:
    """Write a run's weights to a file: dense, without their zeros, or as an ONNX graph."""
    from spfde.app.export import export_run

    typer.echo(export_run(run, kind=kind, out=out, which="best" if best else "last"))


@command()
@takes(PluginOptions)
def cite(
    source: Annotated[str, typer.Argument(metavar="RUN|RECIPE", help="a run folder, a preset or a TOML file")],
    **_: Any,
) -> None:
    """Print BibTeX for exactly the methods that a run or a recipe uses."""
    from spfde.app.cite import cite_source

    typer.echo(cite_source(source))


@command()
@takes(AnalysisOptions, PluginOptions)
def analyze(
    run: Annotated[Path, typer.Argument(help="folder of a run that was trained with --keep-every")],
    out: Annotated[Path | None, typer.Option(help="folder of the results", show_default="RUN/analysis")] = None,
    quiet: Quiet = False,
    **asked: Any,
) -> None:
    """Structural similarity, CKA and gradient norms over a run's kept checkpoints: plots, and one JSON file."""
    from spfde.app.analyze import AnalyzeOptions, analyze_run
    from spfde.app.report.analysis import draw_analysis

    def tell(line: object) -> None:
        if not quiet:
            typer.echo(line)

    options = AnalyzeOptions(**{name: asked[name] for name in names_of(AnalysisOptions)})
    written = analyze_run(run, options, out or run / "analysis", tell=tell)
    for path in (written, *draw_analysis(written)):
        tell(path)


@command()
@takes(EvaluationOptions, PluginOptions)
def evaluate(
    run: Annotated[Path, typer.Argument(help="run folder; its training need not be over")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
    **asked: Any,
) -> None:
    """Loss, top-1, top-5 and accuracy of each class of a run's last and best weights, on its test set or other data."""
    from spfde.app.evaluate import EvaluateOptions, evaluate_run

    found = evaluate_run(run, EvaluateOptions(**{name: asked[name] for name in names_of(EvaluationOptions)}))
    typer.echo(found.to_json() if as_json else str(found))


@command()
@takes(PredictionOptions, PluginOptions)
def predict(
    run: Annotated[Path, typer.Argument(help="run folder; its training need not be over")],
    images: Annotated[
        Path, typer.Argument(help="an image, a folder with images in it and below, or an .npz with x_test, x or images")
    ],
    out: Annotated[Path | None, typer.Option(help="the file", show_default="standard output")] = None,
    best: Annotated[
        bool, typer.Option("--best/--last", help="the best checkpoint, chosen as for spfde export, or the last one")
    ] = True,
    **asked: Any,
) -> None:
    """The class of each image by a run's weights, as CSV: file or index, label and probability."""
    from spfde.app.predict import PredictOptions, predict_images

    options = PredictOptions(**{name: asked[name] for name in names_of(PredictionOptions)})
    predicted = predict_images(run, images, options, out=out, which="best" if best else "last")
    for line in predicted.unread:
        typer.echo(f"spfde: {line}", err=True)
    if out is not None:
        typer.echo(f"{out}: {predicted}")
    if predicted.unread:
        fail(f"{len(predicted.unread)} of {predicted.n + len(predicted.unread)} images could not be read.")


@command()
@takes(PluginOptions)
def methods(**_: Any) -> None:
    """List what there is: presets, and techniques with a line and a citation each."""
    from spfde.app.methods import render_catalogue

    typer.echo(render_catalogue())


def _resume(folder: Path, asked: dict[str, Any], *, given: set[str], quiet: bool) -> None:
    from spfde.app.train.options import TrainOptions, options_in
    from spfde.app.train.processes import current

    if others := sorted(given - _WITH_RESUME):
        flags = ", ".join(map(flag, others))
        fail(
            f"--resume={folder}: takes no other options, and {flags} was given. "
            "Leave the rest out: the run goes on as it was started."
        )
    options, accuracy = current().first(partial(options_in, folder))
    if options is None:
        if not quiet:
            typer.echo(f"{folder} is finished: test accuracy {accuracy}")
        return
    changed = {name: asked[name] for name in given - {"resume", "quiet", "plugin"}}
    _run(TrainOptions(**(options.model_dump() | changed)), folder, quiet=quiet, resume=True)


def _run(options: TrainOptions, out: Path, *, quiet: bool, resume: bool) -> None:
    from rich.console import Console

    from spfde.app.machine_errors import is_lost_process, machine_error
    from spfde.app.train.display import ConsoleDisplay
    from spfde.app.train.loop import train as train_loop

    display = ConsoleDisplay(Console(quiet=quiet))
    logging.getLogger("spfde").setLevel(logging.WARNING)  # the display tells which engine was chosen
    try:
        with terminable() as ending:
            train_loop(options, out, display, resume=resume)
    except (KeyboardInterrupt, RuntimeError) as error:
        is_kept = (out / "config.json").is_file()
        hint = f" Go on with `spfde train --resume {out}`." if is_kept else ""
        if isinstance(error, KeyboardInterrupt):
            end(error, hint)
        told = machine_error(error) if is_lost_process(error) else None
        if told is None:
            raise
        leave(EXIT_TERMINATED if ending.asked else EXIT_ERROR, cause_of(error), f"{told}{hint}", hint)
    finally:
        logging.getLogger("spfde").setLevel(logging.NOTSET)
    if not quiet:
        typer.echo(f"run folder: {out}")


def _new_folder(options: TrainOptions) -> Path:
    from spfde.app.runs.folder import free_folder

    data = Path(options.data).stem
    model = options.model.replace("timm:", "").replace("/", "-")
    width = "" if options.width == 1 else f"-width-{options.width:g}"
    return free_folder(f"{data}-{model}{width}-{Path(options.recipe_name).stem}-seed{options.seed}")


def main(argv: list[str] | None = None) -> Any:
    """Run a command; what ``spfde`` and ``python -m spfde`` come to."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A terminal that lacks a character gets a question mark, not a crash.
            stream.reconfigure(errors="replace")
    if n_started() == 1:
        return _main_of_one(argv)
    words = sys.argv[1:] if argv is None else argv
    if not tells() and is_by_launcher() and (words[:1] != ["train"] or "--help" in words):
        raise SystemExit(0)  # what does not train is done by the first process
    try:
        _main_of_one(argv)
    except SystemExit as ended:
        code = ended.code
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    # Threads of the group outlive it, and may abort an interpreter that winds down: then a run that is done has failed.
    os._exit(code if isinstance(code, int) else int(code is not None))


def _main_of_one(argv: list[str] | None) -> Any:
    with terminable() as ending:
        try:
            return app(args=argv, prog_name="spfde")
        except BaseException as error:
            # What a library made of it, or it came between a command and its end.
            has_said = isinstance(error, SystemExit) and (error.code == EXIT_TERMINATED or n_started() > 1)
            if ending.asked and not has_said:
                if tells():
                    typer.echo("spfde: terminated.", err=True)
                raise SystemExit(EXIT_TERMINATED) from None
            raise
