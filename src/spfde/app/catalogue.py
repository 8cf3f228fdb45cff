"""What there is: presets and techniques, with a line and a citation each."""

from __future__ import annotations

from spfde import presets
from spfde.freezing import ProgressiveFreezing
from spfde.sieving import DataSieving
from spfde.sparsity import METHODS


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
        lines.append(f"  {name:<8} {', '.join(part for part in parts if part)}")
    lines += ["", "Sparse training:"]
    for name, method in METHODS.items():
        lines += [f"  {name:<8} {method.summary}", f"  {'':<8} {method.citation}"]
    lines += [
        "",
        "Layer freezing:",
        f"  freezing {ProgressiveFreezing.summary}",
        f"  {'':<8} {ProgressiveFreezing.citation}",
    ]
    lines += ["", "Data sieving:", f"  sieving  {DataSieving.summary}", f"  {'':<8} {DataSieving.citation}"]
    return "\n".join(lines)
