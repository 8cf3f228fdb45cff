"""What to cite: BibTeX for exactly the methods that a recipe uses, and for this software."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import cache
from importlib import resources

from spfde import __version__
from spfde.core.technique import Technique
from spfde.recipe.recipe import Recipe
from spfde.sparsity import Unstructured

# What CITATION.cff says, which an installed package does not have.
SOFTWARE = f"""@software{{spfde,
  title = {{spfde: Sparse training, progressive layer freezing and data sieving for PyTorch, under one schedule and with
           an honest bill}},
  author = {{{{The spfde authors}}}},
  version = {{{__version__}}},
  license = {{Apache-2.0}}
}}"""

_ENTRY = re.compile(r"^(?=@\w+\s*\{)", re.MULTILINE)
_KEY = re.compile(r"@\w+\s*\{\s*([^,\s]+)\s*,")
_FIELD = re.compile(r"^  (\w+) = \{(.*?)\},?$", re.MULTILINE | re.DOTALL)


def cite(recipe: Recipe) -> str:
    """BibTeX entries of the methods that the recipe uses, then this software; each once.

    Every technique in the recipe counts, those inside others too; not those that are set to save nothing.

    Example:
        >>> print(spfde.cite(spfde.presets.rigl).splitlines()[0])
        @inproceedings{evci2020rigl,
    """
    entries: dict[str, str] = {}
    for technique in _in_use(recipe):
        for reference in technique.cited:
            for entry in bibtex(reference):
                entries.setdefault(_key(entry), entry)
    return "\n\n".join([*entries.values(), SOFTWARE])


def bibtex(reference: str) -> list[str]:
    """The entries of a reference: that of its key, or those that it writes out itself."""
    return _entries(reference) if reference.lstrip().startswith("@") else [_library()[reference]]


def describe(reference: str) -> str:
    """A reference in one line: authors, title, where and when."""
    lines = []
    for entry in bibtex(reference):
        field = {name.lower(): re.sub(r"[{}\\\n]|\s(?=\s)", "", value) for name, value in _FIELD.findall(entry)}
        authors = ", ".join(_short_name(name) for name in field.get("author", "").split(" and ") if name)
        where = next((field[name] for name in ("journal", "booktitle") if name in field), "")
        line = f"{authors}: {field.get('title', '')}. {where + ', ' if where else ''}{field.get('year', '')}."
        arxiv = field.get("eprint")
        lines.append(line + (f" arXiv {arxiv}" if arxiv and arxiv not in where else ""))
    return " ".join(lines)


@cache
def _library() -> Mapping[str, str]:
    text = (resources.files("spfde.recipe") / "references.bib").read_text(encoding="utf-8")
    return {_key(entry): entry for entry in _entries(text)}


def _short_name(name: str) -> str:
    family, _, given = name.strip().partition(", ")
    initials = " ".join(f"{part[0]}." for part in given.split())
    return f"{initials} {family}".strip()


def _in_use(recipe: Recipe) -> Iterator[Technique]:
    idle = {"sparsity": not recipe.is_sparse, "freezing": not recipe.freezes, "sieving": not recipe.sieves}
    for name in type(recipe).model_fields:
        if not idle.get(name, False):
            yield from _techniques(getattr(recipe, name))


def _techniques(value: object) -> Iterator[Technique]:
    """The techniques in a field's value, the outer before the inner; masks without structure are no method."""
    if isinstance(value, Unstructured):
        return
    if isinstance(value, Technique):
        yield value
        for name in type(value).model_fields:
            yield from _techniques(getattr(value, name))
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _techniques(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _techniques(item)


def _entries(text: str) -> list[str]:
    return [entry.strip() for entry in _ENTRY.split(text) if entry.strip()]


def _key(entry: str) -> str:
    found = _KEY.match(entry)
    assert found is not None, f"no BibTeX entry: {entry[:40]!r}"
    return found[1]
