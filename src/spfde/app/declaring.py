"""What turns options that a class declares into parameters of a command, and into words of an error.

Nothing here loads PyTorch: ``--help`` answers at once. Only ``takes`` loads Typer: a trainer that is called from Python
needs none.
"""

import inspect
from collections.abc import Callable, Collection, Mapping
from copy import copy
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

if TYPE_CHECKING:
    from pydantic import BaseModel


@dataclass(frozen=True)
class Words:
    """What ``--help`` says of an option, in which panel, and whether or as what it shows the default."""

    help: str
    panel: str | None = None
    shown: bool | str = True


@dataclass(frozen=True)
class Sets:
    """Which field of a recipe an option sets, of which of its tables."""

    table: str
    field: str


Command = TypeVar("Command", bound=Callable[..., None])
Model = TypeVar("Model", bound="BaseModel")


def takes(
    *groups: type, lists: Collection[type] = (), without: Collection[str] = (), shown: Mapping[str, str] | None = None
) -> Callable[[Command], Command]:
    """Give a command the options that the groups declare, as keyword arguments; what it declares itself comes first.

    Args:
        groups: classes that declare options.
        lists: those whose options are text, which may hold several values with commas between them (``listed``).
        without: options that the command does not take.
        shown: what ``--help`` shows as the default of some.
    """

    def give(command: Command) -> Command:
        signature = inspect.signature(command, eval_str=True)
        own = [each for each in signature.parameters.values() if each.kind is not each.VAR_KEYWORD]
        first = [each for each in own if each.default is each.empty]
        rest = {name: each for group in groups for name, each in _parameters(group, of_lists=group in lists).items()}
        rest = {name: each for name, each in rest.items() if name not in without}
        for name, default in (shown or {}).items():
            rest[name] = _showing(rest[name], default)
        rest |= {each.name: each.replace(kind=each.KEYWORD_ONLY) for each in own if each not in first}
        command.__signature__ = signature.replace(parameters=[*first, *rest.values()])  # type: ignore[attr-defined]
        return command

    return give


def names_of(group: type) -> list[str]:
    """Names of the options in a group."""
    return list(get_type_hints(group))


def flag(name: str) -> str:
    """An option as it is typed."""
    return "--" + name.replace("_", "-")


def with_words(model: type[Model]) -> type[Model]:
    """Let a pydantic model that inherits options say in its errors what ``--help`` says of them."""
    for field in model.model_fields.values():
        field.description = next((note.help for note in field.metadata if isinstance(note, Words)), None)
    return model


def listed(group: type, name: str, text: str) -> list[Any]:
    """The values in the text of an option that may have several, each as the option's type has it.

    Raises:
        InvalidArgument: one is not of that type.
    """
    from pydantic import TypeAdapter, ValidationError

    from spfde.core.errors import InvalidArgument, Problem

    kind = get_type_hints(group)[name]
    values = []
    for part in (part.strip() for part in text.split(",")):
        try:
            values.append(TypeAdapter(kind).validate_python(part))
        except ValidationError as error:
            rule = error.errors()[0]["msg"]
            raise InvalidArgument(Problem(flag(name), part, rule[:1].lower() + rule[1:], "See --help.")) from None
    return values


def _showing(parameter: inspect.Parameter, default: str) -> inspect.Parameter:
    kind, option = get_args(parameter.annotation)
    changed = copy(option)
    changed.show_default = default
    return parameter.replace(annotation=Annotated[kind, changed])


@cache
def _parameters(group: type, *, of_lists: bool = False) -> dict[str, inspect.Parameter]:
    """As Typer takes them: names of a set are text that is checked later, with all else, and tuples are lists."""
    import typer

    parameters = {}
    plain = get_type_hints(group)  # without ranges inside
    for name, hint in get_type_hints(group, include_extras=True).items():
        kind, *notes = get_args(hint)
        default = getattr(group, name)
        if get_origin(kind) is Literal:
            kind = str
        elif get_origin(kind) is tuple:
            kind, default = list[str], list(default)
        else:
            kind = plain[name]
        words = next(note for note in notes if isinstance(note, Words))
        if of_lists and kind not in (list[str], bool, bool | None):
            shown = words.shown if isinstance(words.shown, str) else str(default)
            words, kind, default = replace(words, shown=shown), str | None, None
        option = typer.Option(help=words.help, rich_help_panel=words.panel, show_default=words.shown)
        parameters[name] = inspect.Parameter(
            name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, option]
        )
    return parameters
