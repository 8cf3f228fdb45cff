"""What there is: presets and techniques, with a line and a citation each."""

from __future__ import annotations

import textwrap

import spfde.engines.builtin  # noqa: F401  # registers them
from spfde.core.registry import registered
from spfde.freezing import BlockwiseCosine, ProgressiveFreezing
from spfde.freezing.plan import FREEZE_CRITERIA
from spfde.recipe import presets
from spfde.recipe.citation import describe

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
    lines += ["", "Sparse training:", *_listed("method")]
    lines += ["", "Of drop-grow, by which weights are dropped (drop = NAME in a recipe):", *_listed("drop")]
    lines += ["", "and by which others grow (grow = NAME):", *_listed("grow")]
    lines += ["", "Structures (--structure NAME; what exists or not as a whole, at no cost):"]
    lines += _listed("structure")
    paper = describe(*ProgressiveFreezing.references)
    lines += ["", "Layer freezing (spfde train --freeze SHARE):"]
    lines += _entry("freezing", ProgressiveFreezing.summary, f"Cost: {ProgressiveFreezing.cost}.", paper)
    lines += ["", "Schemes of it (--freeze-scheme NAME; all from the same paper, at equal FLOPs):"]
    lines += _listed("freezing-scheme")
    lines += ["", "What lets a block be frozen (--freeze-criterion NAME):"]
    for name, (summary, cost) in FREEZE_CRITERIA.items():
        further = ProgressiveFreezing(criterion=name).cited[1:]
        lines += _entry(name, summary, f"Cost: {cost}.", *map(describe, further))
    lines += ["", "Learning rate:"]
    lines += _entry(BlockwiseCosine.name, BlockwiseCosine.summary, "Cost: none.", paper)
    lines += ["", "Data sieving (spfde train --sieve SHARE):", *_listed("sieving-method")]
    lines += ["", "Which samples are easy (--sieve-criterion NAME; read off what a step computes):"]
    lines += _listed("sieving-criterion")
    lines += ["", "Engines (--engine NAME):", *_listed("engine")]
    return "\n".join(lines)


def _listed(kind: str) -> list[str]:
    """All of a kind, each with its line, its cost where it has one of its own, and its citation."""
    lines = []
    for name, found in registered(kind).items():
        cost = [f"Cost: {found.cost}."] if hasattr(found, "cost") else []
        references = getattr(found, "references", ())
        lines += _entry(name, getattr(found, "summary", ""), *cost, *map(describe, references))
    return lines


def _entry(name: str, summary: str, *more: str) -> list[str]:
    """A technique's line, and what else there is to say down to its citation, at most 80 columns wide."""
    indent = " " * 13
    lines = [f"  {name}"] if len(name) > 10 else []
    first = indent if lines else f"  {name:<10} "
    lines += textwrap.wrap(summary, WIDTH, initial_indent=first, subsequent_indent=indent, break_on_hyphens=False)
    for text in more:
        lines += textwrap.wrap(text, WIDTH, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)
    return lines
