"""What all commands have in common: errors and warnings of the package in the words of the command line."""

from __future__ import annotations

import re
import warnings
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from typer.core import TyperCommand

from spfde.app.declaring import flag, names_of
from spfde.app.ending import cause_of, end, fail, is_first_to_say, usage_errors_once
from spfde.app.options import CacheOptions, recipe_fields
from spfde.core.say import n_started

if TYPE_CHECKING:
    from spfde.core.errors import SpfdeError


class PlainCommand(TyperCommand):
    """Errors and warnings of the package become plain lines: no traceback for what a person can put right.

    Before all else it imports what ``--plugin`` names.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        with usage_errors_once():
            return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        from spfde.app.machine_errors import machine_error
        from spfde.app.plugins import load_plugins
        from spfde.core.errors import SpfdeError

        with warnings.catch_warnings(), ExitStack() as group:
            _show_plainly(ctx)
            try:
                if self.name == "train" and n_started() > 1:
                    from spfde.app.train.processes import joined

                    group.enter_context(joined())
                if "plugin" in ctx.params:
                    ctx.params["plugin"] = load_plugins(ctx.params["plugin"])
                return super().invoke(ctx)
            except SpfdeError as error:
                fail(_in_options(error, ctx), cause=cause_of(error))
            except (OSError, MemoryError, RuntimeError) as error:
                told = machine_error(error)
                if told is None:
                    raise
                fail(told, cause=cause_of(error))
            except KeyboardInterrupt as error:
                end(error)


def given_options(context: typer.Context) -> set[str]:
    """Names of the options that were typed."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    return {name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"}


def _show_plainly(context: typer.Context) -> None:
    package, usual = Path(__file__).parent.parent, warnings.showwarning

    def show(message: Warning | str, category: type[Warning], filename: str, lineno: int, *place: Any) -> None:
        if not is_first_to_say(str(message)):
            return
        if package in Path(filename).parents:
            typer.echo(f"spfde: warning: {_words_in_options(str(message), context)}", err=True)
        else:
            usual(message, category, filename, lineno, *place)

    warnings.showwarning = show  # type: ignore[assignment]  # it is always called with all six


def _in_options(error: SpfdeError, context: typer.Context) -> str:
    """The message; a problem with the value of a given option names the option as it was typed."""
    from spfde.app.train.options import absolute_source
    from spfde.core.errors import DataError, InvalidArgument

    given = given_options(context)
    if isinstance(error, DataError) and "data" in given:
        typed = context.params["data"]
        is_option = str(error).startswith(tuple(f"data={value!r}: " for value in (typed, absolute_source(typed))))
        return f"--{error}" if is_option else str(error)
    if not isinstance(error, InvalidArgument):
        return str(error)
    lines = []
    for problem in error.problems:
        option = next((name for name in _options_of(problem.argument) if name in given), None)
        argument = problem.argument if option is None else flag(option)
        if problem.argument == "cache" and option is not None:
            problem = replace(problem, value=context.params[option])  # what was typed, not what was made of it
        lines.append(str(replace(problem, argument=argument, remedy=_words_in_options(problem.remedy, context))))
    return "\n".join(lines)


def _options_of(argument: str) -> list[str]:
    """Options that may have set what the library calls so: a field of a recipe, a table of it, or their own name."""
    fields = recipe_fields().items()
    of_cache = [
        name for name in names_of(CacheOptions) if argument in ("cache", name.removeprefix("cache_"), f"{name}_gib")
    ]
    return [
        *(name for name, to in fields if to.field == argument),
        *(name for name, to in fields if to.table == argument),
        *of_cache,
        *(["warmup"] if argument == "warmup_epochs" else []),
        argument,
    ]


def _words_in_options(words: str, context: typer.Context) -> str:
    """A remedy or a warning of the library as a person at the command line can follow it."""
    words = words.replace("soft_bound=False", "--no-soft-bound").replace("batch_size=", f"{flag('batch_size')} ")
    for name, to in recipe_fields().items():
        if "_" in to.field and to.field != name and name in context.params:  # others are words of the language as well
            words = re.sub(rf"\b{to.field}=", f"{flag(name)} ", words)
            words = re.sub(rf"\b{to.field}\b", flag(name), words)
    if "exclude" in context.params:
        words = re.sub(r'exclude=\("([^"]+)",\)', r"--exclude '\1'", words)
    return words.replace("raise fraction", "raise fraction in a recipe file")
