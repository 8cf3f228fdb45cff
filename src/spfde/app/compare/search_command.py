"""The command ``spfde search``, behind its options: what is searched, and how it ends."""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import typer
from rich.console import Console

from spfde.app.compare import search_state as states
from spfde.app.compare.folder import created
from spfde.app.compare.search_budget import Budget, longest, widest
from spfde.app.compare.search_display import TrialBoard
from spfde.app.compare.search_running import Searcher, dense_flops
from spfde.app.compare.search_state import SEARCH, Search
from spfde.app.compare.search_study import Study
from spfde.app.compare.search_writing import TABLE, keep
from spfde.app.compare.spec import DEFAULTS
from spfde.app.declaring import flag, listed, names_of
from spfde.app.ending import end, fail
from spfde.app.options import LISTS
from spfde.app.runs.folder import RunFolder, free_folder
from spfde.app.terminating import terminable
from spfde.app.train.checks import check_named
from spfde.app.train.models import check_model
from spfde.app.train.options import TrainOptions
from spfde.core.errors import InvalidArgument, Problem, Problems
from spfde.core.say import n_started
from spfde.recipe.presets import PRESETS

SPACE: Mapping[str, tuple[float, ...]] = {
    "sparsity": (0.0, 0.5, 0.7, 0.8, 0.9, 0.95),
    "freeze": (0.0, 0.1, 0.2, 0.3),
    "sieve": (0.0, 0.1, 0.2, 0.3),
    "width": (0.25, 0.5, 0.75, 1.0),
}
"""What is searched where nothing else is said."""
_FIXED = ("data", "image_size", "model", "epochs", "seed", "keep_every")


def search_recipes(
    asked: Mapping[str, Any],
    given: Collection[str],
    *,
    budget: str | None,
    trials: int,
    out: Path | None,
    resume: Path | None,
    quiet: bool,
) -> None:
    """Search, or go on with a search, and print what came of it.

    Raises:
        InvalidArgument, RunFolderError: a mistake; nothing is trained then.
    """
    problems = Problems()
    if n_started() > 1:
        problems.add("torchrun", n_started(), "searches in one process", "Start one.")
    if trials < 1:
        problems.add("--trials", trials, "must be 1 or more", "Two of them are dense nets.")
    problems.raise_if_any()
    Study({}, 0)
    with ExitStack() as afterwards:
        if resume is not None:
            if others := sorted(set(given) - {"resume", "trials", "quiet", "plugin"}):
                rule, remedy = f"takes no {', '.join(map(flag, others))}", "It goes on as it was begun; leave that out."
                raise InvalidArgument(Problem("--resume", str(resume), rule, remedy))
            folder, search = afterwards.enter_context(states.reopened(resume))
            search = search.model_copy(update={"wanted": trials if "trials" in given else search.wanted})
        else:
            search = asked_for(asked, given, budget, trials)
            folder = afterwards.enter_context(created(out or free_folder("search"), SEARCH))
        _go_on(folder, search, quiet=quiet)


def asked_for(asked: Mapping[str, Any], given: Collection[str], budget: str | None, trials: int) -> Search:
    """The search that was asked for: options with several values are searched, and those of ``SPACE``.

    Raises:
        InvalidArgument: an option that is not valid or cannot be searched, or a budget that nothing fits.
    """
    problems = Problems()
    if budget is None:
        problems.add("--budget", None, "is missing", 'Give "10% flops" of the dense run, "600 seconds" or "2 GiB".')
    else:
        with problems.collecting():
            Budget.read(budget)
    options: dict[str, Any] = {name: asked[name] for name in ("validation_share", "data_root")}
    space: dict[str, list[Any]] = {}
    for name in (name for name in DEFAULTS if name in given):
        with problems.collecting():
            values = _values(name, asked[name])
            if len(values) == 1:
                options[name] = values[0]
            else:
                space[name] = values
    if not options["validation_share"]:
        remedy = "Give the share of the training set that trials are chosen by."
        problems.add("--validation-share", 0, "must be above 0", remedy)
    problems.raise_if_any()
    search = _checked(Search(budget=budget or "", wanted=trials, options=_absolute(options), space=space))
    _check_fits(search)
    return search


def _values(name: str, value: Any) -> list[Any]:
    """The values of an option; numbers in order."""
    group = next((group for group in LISTS if name in names_of(group)), None)
    values = [value] if group is None or not isinstance(value, str) else listed(group, name, value)
    if len(values) > 1 and name in _FIXED:
        raise InvalidArgument(Problem(flag(name), value, "is one for all trials", "Give one value."))
    are_numbers = all(isinstance(each, int | float) for each in values)
    return sorted(set(values)) if are_numbers else list(dict.fromkeys(values))


def _absolute(options: dict[str, Any]) -> dict[str, Any]:
    """With paths that hold wherever the search goes on."""
    found = dict(options)
    for name in ("data", "recipe", "weights"):
        if name in found and found[name] not in PRESETS and Path(found[name]).exists():
            found[name] = str(Path(found[name]).absolute())
    for name in ("data_root", "cache_folder"):
        if found.get(name) is not None:
            found[name] = str(Path(found[name]).absolute())
    return found


def _checked(search: Search) -> Search:
    """With what of ``SPACE`` is left to search.

    Raises:
        InvalidArgument: an option, or a value that is to be searched, is not valid.
    """
    problems, space = Problems(), dict(search.space)
    with problems.collecting():
        check_named(search.dense.model_dump())
    for name, values in search.space.items():
        for value in values:
            with problems.collecting():
                _check(search.of({name: value}))
    problems.raise_if_any()
    for name in (name for name in SPACE if name not in search.space and name not in search.options):
        sound = tuple(value for value in SPACE[name] if _is_sound(search, {name: value}))
        if len(sound) > 1:
            space[name] = sound
    if not space:
        remedy = "Give an option several values, such as --sparsity 0.8,0.9, or leave it out."
        raise InvalidArgument(Problem("search", sorted(search.options), "leave nothing to search", remedy))
    _check(search.of({name: values[0] for name, values in space.items()}))
    return search.model_copy(update={"space": space})


def _check(options: TrainOptions) -> None:
    check_model(options.model, options.width)


def _is_sound(search: Search, values: Mapping[str, Any]) -> bool:
    try:
        _check(search.of(values))
    except InvalidArgument:
        return False
    return True


def _check_fits(search: Search) -> None:
    """Find whether the thriftiest trial, or one of the dense ones, keeps to the budget.

    Raises:
        InvalidArgument: none does. What takes how many seconds is not known before it is trained.
    """
    whole = dense_flops(search)
    budget = Budget.read(search.budget)
    if budget.kind == "seconds":
        return
    fits = budget.fits(dense_flops=whole, seconds_per_flop=math.nan)
    thrifty = {name: values[-1 if name in ("sparsity", "sieve") else 0] for name, values in search.space.items()}
    for found in (longest(search.dense, fits), widest(search.dense, fits), longest(search.of(thrifty), fits)):
        if isinstance(found, TrainOptions):
            return
    remedy = "Give more, or smaller values of --width, --batch-size or --model."
    raise InvalidArgument(Problem("--budget", search.budget, "is less than what the cheapest trial costs", remedy))


def _go_on(folder: RunFolder, search: Search, *, quiet: bool) -> None:
    console, whole = Console(quiet=quiet), dense_flops(search)

    def kept(changed: Search) -> None:
        keep(folder, changed, whole)

    kept(search)
    board = TrialBoard(console)
    searcher = Searcher(search, folder, board, kept)
    board.line(f"spfde search · {search.budget} · {search.wanted} trials · {folder.path}")
    logging.getLogger("spfde").setLevel(logging.WARNING)  # which engine each trial has is in its own folder
    try:
        with terminable(), board:
            found_all = searcher.run()
    except KeyboardInterrupt as error:
        end(error, f" Go on with `spfde search --resume {folder.path}`.")
    finally:
        logging.getLogger("spfde").setLevel(logging.NOTSET)
    if not found_all:
        board.line("Nothing is left to try.")
    if not quiet:
        typer.echo(f"\n{(folder.path / TABLE).read_text(encoding='utf-8')}\nfolder: {folder.path}")
    if not any(trial.state == "finished" for trial in searcher.search.trials):
        fail("no trial was finished; search.json says why.")
