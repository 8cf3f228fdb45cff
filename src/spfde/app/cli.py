"""The command line. Heavy imports wait until a command runs, so that ``--help`` answers at once."""

from __future__ import annotations

import io
import logging
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TextIO

try:
    import typer
except ModuleNotFoundError:  # the library is installed without the command line's dependencies
    sys.exit("spfde: the command line needs more packages. Install them with `pip install 'spfde[train,vision]'`.")

if TYPE_CHECKING:
    from spfde.app.train.options import TrainOptions
    from spfde.core.errors import SpfdeError

app = typer.Typer(
    name="spfde",
    help="Train neural networks for less: weight sparsity, layer freezing and data sieving under one schedule.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode="markdown",
)

EXIT_ERROR = 2
EXIT_INTERRUPTED = 130

# What the library calls an option's value, where that is not the option's own name.
_OPTION_OF_FIELD = {
    "flops_reduction": "freeze",
    "scheme": "freeze_scheme",
    "removed_fraction": "sieve",
    "update_interval_epochs": "interval",
    "freezing": "freeze",
    "sieving": "sieve",
}

_SAVINGS, _TRAINING, _MACHINE = "What to save", "How to train", "Where to run"

Data = Annotated[
    str,
    typer.Option(help="fashion-mini (embedded), a torchvision name (cifar10, cifar100, …), an image folder or an .npz"),
]
Model = Annotated[str, typer.Option(help="resnet8, resnet20, resnet32, vgg19 or timm:NAME")]
RecipeName = Annotated[
    str, typer.Option("--recipe", help="a preset (see `spfde methods`) or a TOML file", rich_help_panel=_SAVINGS)
]
Sparsity = Annotated[
    float | None,
    typer.Option(help="share of the weights to do without, in [0, 1)", rich_help_panel=_SAVINGS, show_default="recipe"),
]
StructureName = Annotated[
    str | None,
    typer.Option(
        help="what exists or not as a whole: unstructured, 4x1 (blocks), 2:4 (N:M), kernel, pattern or channel",
        rich_help_panel=_SAVINGS,
        show_default="recipe",
    ),
]
Exclude = Annotated[
    list[str] | None,
    typer.Option(
        help="name pattern of weights that stay dense, such as '*downsample*'; may be repeated",
        rich_help_panel=_SAVINGS,
        show_default="recipe",
    ),
]
Freeze = Annotated[
    float | None,
    typer.Option(
        help="share of the training FLOPs to save by freezing, in [0, 1)",
        rich_help_panel=_SAVINGS,
        show_default="recipe",
    ),
]
FreezeScheme = Annotated[
    str | None,
    typer.Option(
        help="single-shot, single-shot-resume, periodic or delayed-periodic",
        rich_help_panel=_SAVINGS,
        show_default="recipe",
    ),
]
FreezeCriterion = Annotated[
    str | None,
    typer.Option(
        help="schedule, or earlier where a block has converged: structure or representation",
        rich_help_panel=_SAVINGS,
        show_default="recipe",
    ),
]
Sieve = Annotated[
    float | None,
    typer.Option(help="share of the samples to leave out, in [0, 1)", rich_help_panel=_SAVINGS, show_default="recipe"),
]
SoftBound = Annotated[
    bool | None,
    typer.Option(
        "--soft-bound/--no-soft-bound",
        help="MEST's soft memory bound (EM&S)",
        rich_help_panel=_SAVINGS,
        show_default="recipe",
    ),
]
Interval = Annotated[
    str, typer.Option(help="epochs between two updates of the structure, or auto", rich_help_panel=_SAVINGS)
]
Epochs = Annotated[int, typer.Option(help="length of the run in epochs", rich_help_panel=_TRAINING)]
BatchSize = Annotated[int, typer.Option(help="samples per step", rich_help_panel=_TRAINING)]


@app.callback(invoke_without_command=True)
def _main(version: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False) -> None:
    if version:
        from spfde import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.command()
def train(
    context: typer.Context,
    data: Data = "fashion-mini",
    model: Model = "resnet8",
    out: Annotated[Path | None, typer.Option(help="run folder", show_default="a new one under runs/")] = None,
    resume: Annotated[
        Path | None,
        typer.Option(help="go on with the run in this folder; takes no others but --engine and --quiet"),
    ] = None,
    recipe: RecipeName = "spfde",
    sparsity: Sparsity = None,
    structure: StructureName = None,
    exclude: Exclude = None,
    freeze: Freeze = None,
    freeze_scheme: FreezeScheme = None,
    freeze_criterion: FreezeCriterion = None,
    cache_variants: Annotated[
        int | None,
        typer.Option(
            help="variants of each sample whose output of the frozen front is kept (native engine)",
            rich_help_panel=_SAVINGS,
            show_default="recipe",
        ),
    ] = None,
    sieve: Sieve = None,
    sieve_criterion: Annotated[
        str | None,
        typer.Option(
            help="which samples are easy: forgetting, loss, el2n or random",
            rich_help_panel=_SAVINGS,
            show_default="recipe",
        ),
    ] = None,
    soft_bound: SoftBound = None,
    interval: Interval = "auto",
    epochs: Epochs = 20,
    batch_size: BatchSize = 64,
    lr: Annotated[float, typer.Option(help="initial learning rate (cosine decay)", rich_help_panel=_TRAINING)] = 0.1,
    momentum: Annotated[float, typer.Option(help="SGD momentum", rich_help_panel=_TRAINING)] = 0.9,
    weight_decay: Annotated[float, typer.Option(help="L2 penalty", rich_help_panel=_TRAINING)] = 1e-4,
    augment: Annotated[str, typer.Option(help="auto, none, crop or crop+flip", rich_help_panel=_TRAINING)] = "auto",
    seed: Annotated[
        int, typer.Option(help="seed of weights, masks, sieving and batches", rich_help_panel=_TRAINING)
    ] = 0,
    keep_every: Annotated[
        int | None,
        typer.Option(
            help="keep weights and masks every so many epochs, for `spfde analyze`",
            rich_help_panel=_TRAINING,
            show_default="none",
        ),
    ] = None,
    engine: Annotated[str, typer.Option(help="auto, masked or native", rich_help_panel=_MACHINE)] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps", rich_help_panel=_MACHINE)] = "auto",
    precision: Annotated[str, typer.Option(help="fp32, bf16 or fp16", rich_help_panel=_MACHINE)] = "fp32",
    workers: Annotated[
        int | None,
        typer.Option(
            help="loader processes", rich_help_panel=_MACHINE, show_default="none for images in memory, else one a core"
        ),
    ] = None,
    data_root: Annotated[
        Path, typer.Option(help="where torchvision's sets lie or are put", rich_help_panel=_MACHINE)
    ] = Path("data"),
    track: Annotated[
        list[str] | None, typer.Option(help="tensorboard, wandb, …; may be repeated", rich_help_panel=_MACHINE)
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print nothing but errors.", rich_help_panel=_MACHINE)] = False,
) -> None:
    """Train a model; with no options, the paper's recipe on the embedded data set, in minutes on two cores."""
    with _clear_endings(context):
        if resume is not None:
            _refuse_other_options(context, resume)
            _resume(resume, engine=engine if "engine" in _given_options(context) else None, quiet=quiet)
            return
        from spfde.app.train.options import TrainOptions, absolute_source, choose_recipe
        from spfde.core.errors import InvalidArgument, Problems

        problems = Problems()
        written = TrainOptions().recipe
        with problems.collecting():
            written = choose_recipe(
                recipe,
                sparsity=sparsity,
                structure=structure,
                exclude=exclude or (),
                freeze=freeze,
                freeze_scheme=freeze_scheme,
                freeze_criterion=freeze_criterion,
                cache_variants=cache_variants,
                sieve=sieve,
                sieve_criterion=sieve_criterion,
                soft_bound=soft_bound,
                interval=interval,
            ).to_dict()
        asked: dict[str, Any] = {
            "data": absolute_source(data),
            "data_root": str(data_root.absolute()),
            "model": model,
            "recipe_name": recipe,
            "recipe": written,
            "epochs": epochs,
            "batch_size": batch_size,
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "augment": augment,
            "engine": engine,
            "device": device,
            "precision": precision,
            "seed": seed,
            "workers": workers,
            "track": tuple(track or ()),
            "keep_every": keep_every,
        }
        options = None
        with problems.collecting():
            options = TrainOptions(**asked)
        if options is None or problems.found:
            # What is named is checked where it is used; told together with the rest, it must be now.
            from spfde.app.train.checks import check_named

            with problems.collecting():
                check_named(asked)
            raise InvalidArgument(*problems.found)
        _run(options, out or _new_folder(options), quiet=quiet, resume=False)


@app.command()
def plan(
    context: typer.Context,
    data: Data = "fashion-mini",
    model: Model = "resnet8",
    recipe: RecipeName = "spfde",
    sparsity: Sparsity = None,
    structure: StructureName = None,
    exclude: Exclude = None,
    freeze: Freeze = None,
    freeze_scheme: FreezeScheme = None,
    freeze_criterion: FreezeCriterion = None,
    sieve: Sieve = None,
    soft_bound: SoftBound = None,
    interval: Interval = "auto",
    epochs: Annotated[
        int,
        typer.Option(
            help="length of the run in epochs; here the paper's, where spfde train takes 20", rich_help_panel=_TRAINING
        ),
    ] = 160,
    batch_size: BatchSize = 64,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> None:
    """Print the freeze timeline and the whole bill before training; named data sets need not be on disk."""
    with _clear_endings(context):
        import json

        import torch

        from spfde import plan as draw_plan
        from spfde.app.data.datasets import describe_data
        from spfde.app.train.models import build_for
        from spfde.app.train.options import check_full_batch, choose_recipe

        chosen = choose_recipe(
            recipe,
            sparsity=sparsity,
            structure=structure,
            exclude=exclude or (),
            freeze=freeze,
            freeze_scheme=freeze_scheme,
            freeze_criterion=freeze_criterion,
            sieve=sieve,
            soft_bound=soft_bound,
            interval=interval,
        )
        spec = describe_data(data)
        check_full_batch(chosen, samples=spec.train_samples, batch_size=batch_size)
        built = build_for(model, spec)
        sample = torch.zeros(1, *spec.sample_shape)
        bill = draw_plan(built, sample, chosen, epochs, spec.train_samples, batch_size=batch_size)
        typer.echo(json.dumps(bill.to_dict(), allow_nan=False) if as_json else str(bill))


@app.command()
def report(
    context: typer.Context,
    runs: Annotated[list[Path], typer.Argument(help="run folders")],
    out: Annotated[Path, typer.Option(help="the HTML file; PNGs are written beside it")] = Path("report.html"),
) -> None:
    """Compare runs in one self-contained HTML file, with PNGs beside it."""
    with _clear_endings(context):
        from spfde.app.report import write_report

        for path in write_report(runs, out):
            typer.echo(path)


@app.command()
def export(
    context: typer.Context,
    run: Annotated[Path, typer.Argument(help="run folder; its training need not be over")],
    kind: Annotated[str, typer.Option("--format", help="dense, compressed or onnx")] = "compressed",
    out: Annotated[Path | None, typer.Option(help="the file", show_default="in the run folder")] = None,
    best: Annotated[
        bool, typer.Option("--best/--last", help="the checkpoint with the best test accuracy, or the last one")
    ] = True,
) -> None:
    """Write a run's weights to a file: dense, without their zeros, or as an ONNX graph."""
    with _clear_endings(context):
        from spfde.app.export import export_run
        from spfde.cost import format_bytes

        done = export_run(run, kind=kind, out=out, which="best" if best else "last")
        share = f"{done.size / done.dense_size:.1%} of the dense weights' {format_bytes(done.dense_size)}"
        typer.echo(f"{done.path}: {format_bytes(done.size)}, {share}, from {done.checkpoint}")


@app.command()
def cite(
    context: typer.Context,
    source: Annotated[str, typer.Argument(metavar="RUN|RECIPE", help="a run folder, a preset or a TOML file")],
) -> None:
    """Print BibTeX for exactly the methods that a run or a recipe uses."""
    with _clear_endings(context):
        from spfde.app.cite import cite_source

        typer.echo(cite_source(source))


@app.command()
def analyze(
    context: typer.Context,
    run: Annotated[Path, typer.Argument(help="folder of a run that was trained with --keep-every")],
    samples: Annotated[int, typer.Option(help="test images that CKA is measured on, at most")] = 2000,
    batch_size: Annotated[int, typer.Option(help="images per minibatch of CKA, at most")] = 128,
    gradient_samples: Annotated[
        int, typer.Option(help="training images that gradient norms are measured on, at most; 0 for none")
    ] = 256,
    data_root: Annotated[
        Path | None, typer.Option(help="where torchvision's sets lie", show_default="the run's")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="folder of the results", show_default="RUN/analysis")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print nothing but errors.")] = False,
) -> None:
    """Structural similarity, CKA and gradient norms over a run's kept checkpoints: plots, and one JSON file."""
    with _clear_endings(context):
        from spfde.app.analyze import AnalyzeOptions, analyze_run
        from spfde.app.report.analysis import draw_analysis

        options = AnalyzeOptions(
            samples=samples,
            batch_size=batch_size,
            gradient_samples=gradient_samples,
            data_root=None if data_root is None else str(data_root.absolute()),
        )

        def tell(line: object) -> None:
            if not quiet:
                typer.echo(line)

        written = analyze_run(run, options, out or run / "analysis", tell=tell)
        for path in (written, *draw_analysis(written)):
            tell(path)


@app.command()
def methods() -> None:
    """List what there is: presets, and techniques with a line and a citation each."""
    from spfde.app.methods import render_catalogue

    typer.echo(render_catalogue())


def _resume(folder: Path, *, engine: str | None, quiet: bool) -> None:
    from spfde.app.runs.folder import CONFIG, SUMMARY, RunFolder
    from spfde.app.train.options import TrainOptions

    look = RunFolder.existing(folder)
    if look.is_finished:
        if not quiet:
            accuracy = look.read_json(SUMMARY).get("test_accuracy")
            typer.echo(f"{folder} is finished: test accuracy {accuracy}")
        return
    options = TrainOptions.from_config(look.read_json(CONFIG), folder / CONFIG)
    if engine is not None:
        options = options.model_copy(update={"engine": engine})
    _run(options, folder, quiet=quiet, resume=True)


def _run(options: TrainOptions, out: Path, *, quiet: bool, resume: bool) -> None:
    display = None
    try:
        from rich.console import Console

        from spfde.app.train.display import ConsoleDisplay
        from spfde.app.train.loop import train as train_loop

        logging.getLogger("spfde").setLevel(logging.WARNING)  # the display tells which engine was chosen
        display = ConsoleDisplay(Console(quiet=quiet))
        train_loop(options, out, display, resume=resume)
    except KeyboardInterrupt:
        if display is not None:
            display.stop()
        hint = f" Go on with `spfde train --resume {out}`." if (out / "config.json").is_file() else ""
        typer.echo(f"spfde: interrupted.{hint}", err=True)
        raise typer.Exit(EXIT_INTERRUPTED) from None
    finally:
        logging.getLogger("spfde").setLevel(logging.NOTSET)
        if display is not None:
            display.stop()
    if not quiet:
        typer.echo(f"run folder: {out}")


def _new_folder(options: TrainOptions) -> Path:
    """The first free name under ``runs/``."""
    data = Path(options.data).stem
    model = options.model.replace("timm:", "").replace("/", "-")
    base = f"{data}-{model}-{Path(options.recipe_name).stem}-seed{options.seed}"
    candidate, number = Path("runs") / base, 1
    while candidate.exists():
        number += 1
        candidate = Path("runs") / f"{base}-{number}"
    return candidate


def _refuse_other_options(context: typer.Context, resume: Path) -> None:
    given = sorted(_given_options(context) - {"resume", "engine", "quiet"})
    if given:
        flags = ", ".join("--" + name.replace("_", "-") for name in given)
        _fail(
            f"--resume={resume}: takes no other options, and {flags} was given. "
            "Leave the rest out: the run goes on as it was started."
        )


def _given_options(context: typer.Context) -> set[str]:
    """Names of the options that were given on the command line."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    return {name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"}


@contextmanager
def _clear_endings(context: typer.Context) -> Iterator[None]:
    """Errors and warnings of the package as plain lines; no traceback for what a person can put right."""
    from spfde.core.errors import SpfdeError

    with warnings.catch_warnings():
        _show_plainly()
        try:
            yield
        except SpfdeError as error:
            _fail(_in_options(error, context))
        except KeyboardInterrupt:
            typer.echo("spfde: interrupted.", err=True)
            raise typer.Exit(EXIT_INTERRUPTED) from None


def _show_plainly() -> None:
    package, usual = Path(__file__).parent.parent, warnings.showwarning

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if package in Path(filename).parents:
            typer.echo(f"spfde: warning: {message}", err=True)
        else:
            usual(message, category, filename, lineno, file, line)

    warnings.showwarning = show


def _in_options(error: SpfdeError, context: typer.Context) -> str:
    """The message; a problem with the value of a given option names the option as it was typed."""
    from spfde.app.train.options import absolute_source
    from spfde.core.errors import DataError, InvalidArgument

    given = _given_options(context)
    if isinstance(error, DataError) and "data" in given:
        typed = context.params["data"]
        is_option = str(error).startswith(tuple(f"data={value!r}: " for value in (typed, absolute_source(typed))))
        return f"--{error}" if is_option else str(error)
    if not isinstance(error, InvalidArgument):
        return str(error)
    lines = []
    for problem in error.problems:
        option = _OPTION_OF_FIELD.get(problem.argument, problem.argument)
        argument = f"--{option.replace('_', '-')}" if option in given else problem.argument
        lines.append(str(replace(problem, argument=argument, remedy=_remedy_in_options(problem.remedy, context))))
    return "\n".join(lines)


def _remedy_in_options(remedy: str, context: typer.Context) -> str:
    """A remedy of the library as a person at the command line can follow it."""
    for field, option in _OPTION_OF_FIELD.items():
        if "_" in field and option in context.params:  # other names are words of the language as well
            remedy = re.sub(rf"\b{field}=", f"--{option} ", remedy)
            remedy = re.sub(rf"\b{field}\b", f"--{option}", remedy)
    if "exclude" in context.params:
        remedy = re.sub(r'exclude=\("([^"]+)",\)', r"--exclude '\1'", remedy)
    remedy = remedy.replace("soft_bound=False", "--no-soft-bound")
    return remedy.replace("raise fraction", "raise fraction in a recipe file")


def _fail(message: str) -> NoReturn:
    typer.echo("\n".join(f"spfde: {line}" for line in message.splitlines()), err=True)
    raise typer.Exit(EXIT_ERROR)


def main(argv: list[str] | None = None) -> Any:
    """Entry point of the ``spfde`` command and of ``python -m spfde``."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A terminal that lacks a character gets a question mark, not a crash.
            stream.reconfigure(errors="replace")
    return app(args=argv, prog_name="spfde")
