"""What to cite: BibTeX for exactly the methods that a recipe uses, and for this software."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from spfde import __version__
from spfde.recipe import Recipe
from spfde.sparsity import Unstructured
from spfde.technique import Technique

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


def cite(recipe: Recipe) -> str:
    """BibTeX entries of the methods that the recipe uses, then this software; each once.

    Every technique in the recipe counts, those inside others too; not those that are set to save nothing.
    """
    entries: dict[str, str] = {}
    for technique in _in_use(recipe):
        told = [getattr(technique, "bibtex", ""), *(source.bibtex for source in technique.further_sources)]
        for entry in _entries("\n\n".join(told)):
            entries.setdefault(_key(entry), entry)
    return "\n\n".join([*entries.values(), SOFTWARE])


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


def _entries(bibtex: str) -> list[str]:
    """A technique may have several sources."""
    return [entry.strip() for entry in _ENTRY.split(bibtex) if entry.strip()]


def _key(entry: str) -> str:
    found = _KEY.match(entry)
    assert found is not None, f"no BibTeX entry: {entry[:40]!r}"
    return found[1]
