"""The options of ``spfde search``. Heavy imports wait until it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from spfde.app.command import given_options
from spfde.app.declaring import takes
from spfde.app.options import LISTS, OF_RUNS


@takes(
    *OF_RUNS,
    lists=LISTS,
    without=("profile", "track"),
    shown=dict.fromkeys(("sparsity", "freeze", "sieve", "width"), "searched"),
)
def search(
    context: typer.Context,
    budget: Annotated[
        str | None,
        typer.Option(
            help='what a trial may cost: "10% flops" of the dense run, "600 seconds" or "2 GiB"', show_default=False
        ),
    ] = None,
    trials: Annotated[int, typer.Option(help="how many are trained; two of them are dense nets")] = 20,
    epochs: Annotated[
        int, typer.Option(help="of the dense run, and at most of a trial", rich_help_panel="How to train")
    ] = 20,
    validation_share: Annotated[
        float,
        typer.Option(
            help="share of the training set that trials are chosen by, above 0", rich_help_panel="How to train"
        ),
    ] = 0.1,
    out: Annotated[Path | None, typer.Option(help="folder", show_default="a new one under runs/")] = None,
    resume: Annotated[
        Path | None,
        typer.Option(help="go on with the search in this folder; takes --trials, --plugin and --quiet alone"),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print nothing but errors.")] = False,
    **asked: Any,
) -> None:
    """Find the recipe, width and length that are best under a budget, by successive halving.

    Options may be lists with commas; --sparsity, --freeze, --sieve and --width are searched by themselves.
    """
    from spfde.app.compare.search_command import search_recipes

    asked |= {"epochs": epochs, "validation_share": validation_share}
    given = given_options(context)
    search_recipes(asked, given, budget=budget, trials=trials, out=out, resume=resume, quiet=quiet)
