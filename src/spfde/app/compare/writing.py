"""A comparison's table as files: Markdown, CSV, JSON and LaTeX.

``table.json``, version 1, and the columns of ``table.csv`` are documented in ``docs/compare.md``. Accuracies are
fractions in JSON and CSV, and per cent in Markdown and LaTeX; FLOPs are modelled, seconds and bytes measured.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping
from typing import Any

from spfde.app.compare.statistics import Difference, Spread
from spfde.app.compare.table import ACCURACY, BEST, FIGURES, ComparisonTable, Row
from spfde.app.report import figures

VERSION = 1
HEADINGS = (
    "candidate", "n", "test accuracy, last", "of the best epoch", "difference", "training FLOPs", "of dense", "seconds",
    "peak memory", "sparsity",
)  # fmt: skip
"""Of the columns that ``cells`` fills."""


def as_json(table: ComparisonTable) -> str:
    """All figures, those of each run too."""
    content = {
        "version": VERSION,
        "baseline": table.baseline,
        "confidence": table.confidence,
        "runs": {"wanted": table.wanted, "finished": table.finished},
        "candidates": [_content(row) for row in table.rows],
        "notes": list(table.notes),
    }
    return json.dumps(content, indent=2, allow_nan=False) + "\n"


def _content(row: Row) -> dict[str, Any]:
    found = row.difference
    return {
        "name": row.name,
        "baseline": row.is_baseline,
        "n": row.n,
        "engines": list(row.engines),
        **{name: {"mean": spread.mean, "sd": spread.sd} for name, spread in row.spreads.items()},
        "difference": found and (vars(found) | {"carried": found.is_carried}),
        "pareto": list(row.is_cheapest_by),
        "runs": [{"seed": seed, **run} for seed, run in row.runs.items()],
    }


def as_csv(table: ComparisonTable) -> str:
    """A line for each candidate."""
    file = io.StringIO()
    rows = [_flat(row) for row in table.rows]
    writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def _flat(row: Row) -> dict[str, Any]:
    line: dict[str, Any] = {"candidate": row.name, "baseline": int(row.is_baseline), "n": row.n}
    for name in FIGURES:
        spread = row.spreads.get(name)
        line |= {name: spread and spread.mean, f"{name}_sd": spread and spread.sd}
    found = row.difference
    names = ("n", "mean", "low", "high", "p", "seeds_needed")
    line |= {f"difference_{name}": found and getattr(found, name) for name in names}
    line["difference_carried"] = "" if found is None or found.n == 1 else int(found.is_carried)
    return line | {f"pareto_{cost}": int(cost in row.is_cheapest_by) for cost in ("training_flops", "seconds")}


def cells(row: Row) -> tuple[str, ...]:
    """The line of a candidate, as people read it."""

    def mean(name: str, words: Callable[[float | None], str]) -> str:
        return words(row.spreads[name].mean) if name in row.spreads else figures.MISSING

    return (
        row.name,
        str(row.n),
        spread_text(row.spreads.get(ACCURACY)),
        spread_text(row.spreads.get(BEST)),
        difference_text(row),
        mean("training_flops", figures.flops),
        mean("flops_ratio", figures.percent),
        _seconds(row),
        mean("peak_memory_bytes", lambda count: figures.memory(count or None)),
        mean("final_sparsity", figures.percent),
    )


def _seconds(row: Row) -> str:
    found = row.spreads.get("seconds")
    if found is None:
        return figures.MISSING
    return figures.duration(found.mean) + ("" if found.sd is None else f" ± {figures.duration(found.sd)}")


def spread_text(spread: Spread | None) -> str:
    """An accuracy in per cent, with its standard deviation."""
    if spread is None:
        return figures.MISSING
    return f"{100 * spread.mean:.2f}" + ("" if spread.sd is None else f" ± {100 * spread.sd:.2f}")


def difference_text(row: Row) -> str:
    """Percentage points, their interval, and whether the seeds carry it."""
    found = row.difference
    if row.is_baseline or found is None:
        return "baseline" if row.is_baseline else figures.MISSING
    if found.low is None:
        return f"{interval_text(found)} (one seed)"
    return interval_text(found) if found.is_carried else f"{interval_text(found)} not carried"


def interval_text(found: Difference) -> str:
    """Percentage points and their interval, where several seeds give one."""
    if found.low is None or found.high is None:
        return f"{100 * found.mean:+.2f}"
    return f"{100 * found.mean:+.2f} [{100 * found.low:+.2f}, {100 * found.high:+.2f}]"


def as_markdown(table: ComparisonTable) -> str:
    """A table that is read as it is, too."""
    lines = [_markdown_line(HEADINGS), "|---|" + "---:|" * (len(HEADINGS) - 1)]
    lines += [_markdown_line(cells(row)) for row in table.rows]
    return "\n".join([*lines, "", *(f"- {note}" for note in (*legend(table), *table.notes)), ""])


def _markdown_line(texts: tuple[str, ...]) -> str:
    return "| " + " | ".join(" ".join(text.replace("|", "\\|").split()) for text in texts) + " |"


def legend(table: ComparisonTable) -> tuple[str, ...]:
    """How the figures are to be read."""
    return (
        f"Accuracies in per cent, mean ± standard deviation over n seeds. Difference: of the last epoch's accuracy "
        f"from that of {table.baseline}, in points, paired by seed, with its {table.confidence:.0%} interval "
        "(Student's t); not carried: the interval holds zero.",
        "FLOPs are modelled, and of dense is their share of the same net's, as long, without any saving.",
        "Seconds, memory and sparsity are measured. Seconds of runs that shared the machine (--jobs, side by side on a "
        "GPU) are longer than alone. Memory on a CPU is the whole process's: of small nets it says little, and runs "
        "that follow each other in one process have what is left of earlier ones.",
    )


def as_latex(table: ComparisonTable) -> str:
    """A tabular for booktabs; what there is to say of it stands in comments."""
    lines = [f"% {note}" for note in (*legend(table), *table.notes)]
    lines += [r"\begin{tabular}{l" + "r" * (len(HEADINGS) - 1) + "}", r"\toprule", _latex_line(HEADINGS), r"\midrule"]
    lines += [_latex_line(cells(row)) for row in table.rows]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])


_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$", "×": r"$\times$", "–": "--",
    "\N{NO-BREAK SPACE}": "~", "\u202f": r"\,",
}  # fmt: skip
_RAISED = str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789")


def _latex_line(texts: tuple[str, ...]) -> str:
    return " & ".join(_latex(text) for text in texts) + r" \\"


def _latex(text: str) -> str:
    written, raised = "", ""
    for letter in f"{text}\0":
        if letter.translate(_RAISED) != letter:
            raised += letter.translate(_RAISED)
            continue
        if raised:
            written, raised = f"{written}$^{{{raised}}}$", ""
        written += _LATEX.get(letter, letter)
    return written.rstrip("\0")


WRITERS: Mapping[str, Callable[[ComparisonTable], str]] = {
    "table.md": as_markdown,
    "table.csv": as_csv,
    "table.json": as_json,
}
"""Files of a comparison's folder, written after each run."""
