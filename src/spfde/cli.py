"""The command line. Heavy imports wait until a command runs, so that ``--help`` answers at once."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

try:
    import typer
except ModuleNotFoundError:  # the library is installed without the command line's dependencies
    sys.exit("spfde: the command line needs more packages. Install them with `pip install 'spfde[train,vision]'`.")

if TYPE_CHECKING:
    from spfde.app.options import TrainOptions

app = typer.Typer(
    name="spfde",
    help="Train neural networks for less: weight sparsity, layer freezing and data sieving under one schedule.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)

EXIT_ERROR = 2
EXIT_INTERRUPTED = 130

Data = Annotated[
    str,
    typer.Option(help="fashion-mini (embedded), a torchvision name (cifar10, cifar100, …), an image folder or an .npz"),
]
Model = Annotated[str, typer.Option(help="resnet8, resnet20, resnet32, vgg19, … or timm:NAME")]
RecipeName = Annotated[str, typer.Option("--recipe", help="a preset (see `spfde methods`) or a TOML file")]
Sparsity = Annotated[float | None, typer.Option(help="target sparsity in [0, 1)")]
Freeze = Annotated[float | None, typer.Option(help="training FLOPs to save by freezing, in [0, 1)")]
Sieve = Annotated[float | None, typer.Option(help="share of the samples to leave out, in [0, 1)")]
SoftBound = Annotated[bool | None, typer.Option("--soft-bound/--no-soft-bound", help="MEST's soft memory bound (EM&S)")]
Interval = Annotated[str, typer.Option(help="epochs between two structure updates, or auto")]
Epochs = Annotated[int, typer.Option(help="length of the run in epochs")]
BatchSize = Annotated[int, typer.Option(help="samples per step")]


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
    recipe: RecipeName = "spfde",
    sparsity: Sparsity = None,
    freeze: Freeze = None,
    sieve: Sieve = None,
    soft_bound: SoftBound = None,
    interval: Interval = "auto",
    epochs: Epochs = 20,
    out: Annotated[Path | None, typer.Option(help="run folder; a new one under runs/ by default")] = None,
    resume: Annotated[Path | None, typer.Option(help="go on with the run in this folder")] = None,
    batch_size: BatchSize = 64,
    lr: Annotated[float, typer.Option(help="initial learning rate (cosine decay)")] = 0.1,
    momentum: Annotated[float, typer.Option(help="SGD momentum")] = 0.9,
    weight_decay: Annotated[float, typer.Option(help="L2 penalty")] = 1e-4,
    augment: Annotated[str, typer.Option(help="auto, none, crop or crop+flip")] = "auto",
    engine: Annotated[str, typer.Option(help="auto, masked or native")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps")] = "auto",
    precision: Annotated[str, typer.Option(help="fp32, bf16 or fp16")] = "fp32",
    seed: Annotated[int, typer.Option(help="seed of weights, masks, sieving and batches")] = 0,
    workers: Annotated[int, typer.Option(help="loader processes; images in memory need none")] = 0,
    data_root: Annotated[str, typer.Option(help="where torchvision's sets lie or are put")] = "data",
    track: Annotated[list[str] | None, typer.Option(help="tracker: tensorboard, wandb, …; may be repeated")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print nothing but errors.")] = False,
) -> None:
    """Train a model; with no options, the paper's recipe on the embedded data set."""
    if resume is not None:
        given = sorted(_given_options(context) - {"resume", "quiet"})
        if given:
            flags = ", ".join("--" + name.replace("_", "-") for name in given)
            _fail(
                f"--resume={resume}: cannot be changed by {flags}. Leave them out: the run goes on as it was started."
            )
    from spfde.errors import SpfdeError

    try:
        if resume is not None:
            _resume(resume, quiet=quiet)
            return
        from spfde.app.options import TrainOptions, choose_recipe

        chosen = choose_recipe(
            recipe, sparsity=sparsity, freeze=freeze, sieve=sieve, soft_bound=soft_bound, interval=interval
        )
        options = TrainOptions(
            data=data,
            data_root=data_root,
            model=model,
            recipe_name=recipe,
            recipe=chosen.to_dict(),
            epochs=epochs,
            batch_size=batch_size,
            lr=lr,
            momentum=momentum,
            weight_decay=weight_decay,
            augment=augment,
            engine=engine,
            device=device,
            precision=precision,
            seed=seed,
            workers=workers,
            track=tuple(track or ()),
        )
        _run(options, out or _new_folder(options), quiet=quiet, resume=False)
    except SpfdeError as error:
        _fail(str(error))


@app.command()
def plan(
    data: Data = "fashion-mini",
    model: Model = "resnet8",
    recipe: RecipeName = "spfde",
    sparsity: Sparsity = None,
    freeze: Freeze = None,
    sieve: Sieve = None,
    soft_bound: SoftBound = None,
    interval: Interval = "auto",
    epochs: Annotated[int, typer.Option(help="length of the run in epochs")] = 160,
    batch_size: BatchSize = 64,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> None:
    """Print the freeze timeline and the whole bill before training; needs no data on disk."""
    import json

    from spfde.errors import SpfdeError

    try:
        import torch

        from spfde import plan as draw_plan
        from spfde.app.data import describe_data
        from spfde.app.models import build_model
        from spfde.app.options import choose_recipe

        chosen = choose_recipe(
            recipe, sparsity=sparsity, freeze=freeze, sieve=sieve, soft_bound=soft_bound, interval=interval
        )
        spec = describe_data(data)
        built = build_model(model, num_classes=spec.num_classes, in_channels=spec.channels, image_size=spec.image_size)
        sample = torch.zeros(1, *spec.sample_shape)
        bill = draw_plan(built, sample, chosen, epochs, spec.train_samples, batch_size=batch_size)
    except SpfdeError as error:
        _fail(str(error))
    if as_json:
        typer.echo(json.dumps(bill.to_dict(), allow_nan=False))
    else:
        typer.echo(str(bill))


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="run folders")],
    out: Annotated[Path, typer.Option(help="the HTML file; PNGs are written beside it")] = Path("report.html"),
) -> None:
    """Compare runs in one self-contained HTML file, with PNGs beside it."""
    from spfde.errors import SpfdeError

    try:
        from spfde.report import write_report

        for path in write_report(runs, out):
            typer.echo(path)
    except SpfdeError as error:
        _fail(str(error))


@app.command()
def methods() -> None:
    """List what there is: presets, and techniques with a line and a citation each."""
    from spfde.app.catalogue import render_catalogue

    typer.echo(render_catalogue())


def _resume(folder: Path, *, quiet: bool) -> None:
    from spfde.app.options import TrainOptions
    from spfde.app.runs import CONFIG, RunFolder
    from spfde.errors import RunFolderError

    if not (folder / CONFIG).is_file():
        raise RunFolderError(f"--resume={folder}: is no run folder (no {CONFIG}). Pass the folder of an earlier run.")
    look = RunFolder(folder)
    if look.is_finished:
        if not quiet:
            typer.echo(f"{folder} is finished: test accuracy {look.read_json('summary.json')['test_accuracy']:.4f}")
        return
    command = look.read_json(CONFIG).get("command")
    if not isinstance(command, dict):
        raise RunFolderError(f"{folder / CONFIG}: lacks the run's options ('command'). Restore it, or start a new run.")
    _run(TrainOptions(**command), folder, quiet=quiet, resume=True)


def _run(options: TrainOptions, out: Path, *, quiet: bool, resume: bool) -> None:
    from rich.console import Console

    from spfde.app.display import ConsoleDisplay
    from spfde.app.loop import train as train_loop

    display = ConsoleDisplay(Console(quiet=quiet))
    try:
        train_loop(options, out, display, resume=resume)
    except KeyboardInterrupt:
        display.stop()
        hint = f" Go on with `spfde train --resume {out}`." if (out / "config.json").is_file() else ""
        typer.echo(f"interrupted.{hint}", err=True)
        raise typer.Exit(EXIT_INTERRUPTED) from None
    finally:
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


def _given_options(context: typer.Context) -> set[str]:
    """Names of the options that were given on the command line."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    return {name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"}


def _fail(message: str) -> NoReturn:
    typer.echo(f"spfde: {message}", err=True)
    raise typer.Exit(EXIT_ERROR)


def main(argv: list[str] | None = None) -> Any:
    """Entry point of the ``spfde`` command and of ``python -m spfde``."""
    return app(args=argv, prog_name="spfde")
