"""The base of every technique: a frozen, validated, printable, comparable set of hyper-parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from spfde.core.errors import InvalidArgument, Problem, nearest
from spfde.core.registry import find


class Technique(BaseModel):
    """Plain data: fields are hyper-parameters, checked when the object is made.

    Raises:
        InvalidArgument: a field is unknown or breaks its rule; all such fields are named together.
    """

    name: ClassVar[str]
    """What it is called in recipes and on the command line."""
    references: ClassVar[tuple[str, ...]] = ()
    """What to cite for it: keys of ``recipe/references.bib``, or whole BibTeX entries."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def __init__(self, **fields: Any) -> None:
        try:
            super().__init__(**fields)
        except ValidationError as error:
            raise InvalidArgument(*_problems(type(self), error)) from None

    @property
    def cited(self) -> tuple[str, ...]:
        """What to cite for it as it is set: its references, and those that its fields call for."""
        return self.references


def read_named(kind: str, value: Any, *, argument: str, key: str = "name") -> Any:
    """The registered technique that a name, or a mapping of fields with the name under ``key``, stands for.

    Anything else is left to a validator. ``argument`` says in errors where the value stands.
    """
    if isinstance(value, str):
        return find(kind, value, argument=argument)()
    if not isinstance(value, Mapping):
        return value
    fields = dict(value)
    return find(kind, fields.pop(key, None), argument=f"{argument}.{key}")(**fields)


def write_named(technique: Technique, *, key: str = "name") -> dict[str, Any]:
    """A technique as primitives, with its name: what ``read_named`` reads."""
    return {key: technique.name, **technique.model_dump(mode="json")}


def _problems(technique: type[BaseModel], error: ValidationError) -> list[Problem]:
    problems: list[Problem] = []
    for item in error.errors(include_url=False):
        cause = item.get("ctx", {}).get("error")
        if isinstance(cause, InvalidArgument):  # a validator that names argument and remedy itself
            problems.extend(cause.problems)
            continue
        path = ".".join(str(part) for part in item["loc"]) or technique.__name__
        if item["type"] == "extra_forbidden":
            rule, remedy = f"is no field of {technique.__name__}", nearest(path, technique.model_fields)
        else:
            message = item["msg"].removeprefix("Value error, ")
            rule = message[:1].lower() + message[1:]
            field = technique.model_fields.get(str(item["loc"][0])) if item["loc"] else None
            meaning = field.description if field is not None else None
            remedy = f"Expected: {meaning}." if meaning else f"See help({technique.__name__})."
            if item["type"] == "literal_error" and field is not None:
                known = map(str, get_args(field.annotation))
                remedy = nearest(str(item["input"]), known).partition("Known names")[0] + remedy
        problems.append(Problem(path, item.get("input"), rule, remedy))
    return problems
