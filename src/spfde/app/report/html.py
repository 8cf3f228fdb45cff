"""What the pages have in common: their environment, where everything from files is escaped, and wide tables."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from jinja2 import Environment, PackageLoader, StrictUndefined

from spfde.app.report.tables import Heading

MOST_COLUMNS = 10
"""What fits side by side on a page 1280 pixels wide, beside a name."""


class Pictured(Protocol):
    """A plot as a page speaks of it."""

    @property
    def key(self) -> str: ...
    @property
    def title(self) -> str: ...
    @property
    def caption(self) -> str: ...
    @property
    def absent(self) -> str: ...


Picture = tuple[Pictured, bytes | None, bytes | None]
"""One plot on the page: for a light and a dark one its PNG, or None where there is nothing to show."""


@dataclass(frozen=True)
class Line:
    """A line of a table: what it is about, and a cell for each column.

    Attributes:
        badge: what is to be seen at once of it.
        mark: colour and marker in the plots, as numbers.
        number: its name in the plots.
    """

    name: str
    cells: tuple[str, ...]
    badge: str = ""
    mark: tuple[int, int] | None = None
    number: int | None = None


@dataclass(frozen=True)
class WideTable:
    """A table with a name before each line, of which no part is wider than a page."""

    caption: str
    about: str
    headings: tuple[Heading, ...]
    lines: tuple[Line, ...]

    def parts(self) -> Iterator[WideTable]:
        """Columns that fit side by side, in as few tables of about the same width as it takes."""
        count = -(-len(self.headings) // MOST_COLUMNS)
        size = -(-len(self.headings) // count)
        for start in range(0, len(self.headings), size):
            shown = slice(start, start + size)
            lines = tuple(replace(line, cells=line.cells[shown]) for line in self.lines)
            yield replace(self, headings=self.headings[shown], lines=lines)


def render(template: str, pictures: Sequence[Picture], **content: Any) -> str:
    """A page as text. Everything that comes from a folder is escaped."""
    environment = Environment(
        loader=PackageLoader("spfde.app.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["base64"] = lambda png: base64.b64encode(png).decode("ascii")
    return environment.get_template(template).render(pictures=pictures, **content)
