"""A run's metrics, an epoch a row: what is asked of rows that come from a file."""

from __future__ import annotations

from typing import Annotated, Any

from annotated_types import Ge
from pydantic import AllowInfNan, BaseModel, ConfigDict, TypeAdapter, ValidationError

from spfde.core.errors import StateMismatch

Number = Annotated[float, AllowInfNan(False)]


class _Row(BaseModel):
    """What is read of a row by its name; all else is a number, too, or None for what was not measured."""

    model_config = ConfigDict(strict=True, extra="allow")
    __pydantic_extra__: dict[str, int | Number | None]

    epoch: Annotated[int, Ge(0)]
    density: Number
    test_accuracy: Number
    saved_tensor_bytes: int


_ROWS = TypeAdapter(list[_Row])


def check_rows(rows: Any) -> None:
    """Raise ``StateMismatch`` unless these are rows of metrics, of the epochs from the first one on.

    Example:
        >>> from spfde.app.runs.rows import check_rows
        >>> check_rows([{"epoch": 0, "density": 0.1, "test_accuracy": 0.9, "saved_tensor_bytes": 0, "lr": None}])
    """
    try:
        epochs = [row.epoch for row in _ROWS.validate_python(rows)]
    except ValidationError as error:
        wrong = error.errors(include_url=False)[0]
        place = ".".join(map(str, wrong["loc"]))
        raise StateMismatch(f"the rows of metrics are damaged ({place}: {wrong['msg']}).") from None
    if epochs != list(range(len(epochs))):
        raise StateMismatch("the rows of metrics are not those of the epochs from the first one on. They are damaged.")


def is_row(row: Any) -> bool:
    """Whether this is an epoch's row."""
    try:
        _Row.model_validate(row)
    except ValidationError:
        return False
    return True
