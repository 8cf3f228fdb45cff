"""What there is: presets and techniques, with a line and a citation each."""

from __future__ import annotations

import textwrap

from spfde import presets
from spfde.freezing import ProgressiveFreezing
from spfde.sieving import CRITERIA, SIEVING_METHODS, SOURCES
from spfde.sparsity import METHODS, STRUCTURES

WIDTH = 80


def render_catalogue() -> str:
    """Plain text, for ``spfde methods``."""
    lines = ["Presets (spfde train --recipe NAME):"]
    for name, recipe in presets.PRESETS.items():
        parts = [
            recipe.sparsity.name if recipe.sparsity is not None else "dense",
            f"freezing {recipe.freezing.flops_reduction:.0%}" if recipe.freezing is not None else "",
            f"sieving {recipe.sieving.removed_fraction:.0%}" if recipe.sieving is not None else "",
            "block-wise cosine" if recipe.learning_rate is not None else "",
        ]
        sparsity = f" at {recipe.sparsity.sparsity:.0%}" if recipe.sparsity is not None else ""
        parts[0] += sparsity
        lines.append(f"  {name:<10} {', '.join(part for part in parts if part)}")
    lines += ["", "Sparse training:"]
    for name, method in METHODS.items():
        lines += _entry(name, method.summary, f"Cost: {method.cost}.", method.citation)
    lines += ["", "Structures (what exists or not as a whole):"]
    for kind, structure in STRUCTURES.items():
        lines += _entry(kind, structure.summary, structure.citation)
    lines += ["", "Layer freezing:", *_entry("freezing", ProgressiveFreezing.summary, ProgressiveFreezing.citation)]
    lines += ["", "Data sieving:"]
    for name, sieving in SIEVING_METHODS.items():
        lines += _entry(name, sieving.summary, sieving.citation)
    lines += ["", "Criteria of data sieving (spfde train --sieve-criterion NAME):"]
    for criterion, summary in CRITERIA.items():
        source = SOURCES.get(criterion)
        lines += _entry(criterion, summary, "" if source is None else source.citation)
    return "\n".join(lines)


def _entry(name: str, summary: str, *more: str) -> list[str]:
    """A technique's line, and what else there is to say down to its citation, at most 80 columns wide."""
    indent = " " * 13
    lines = textwrap.wrap(
        summary, WIDTH, initial_indent=f"  {name:<10} ", subsequent_indent=indent, break_on_hyphens=False
    )
    for text in more:
        lines += textwrap.wrap(text, WIDTH, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)
    return lines
