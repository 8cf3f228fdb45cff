"""Write docs/benchmarks.md, and the README's picture and results, from benchmarks/results/*.json.

    python benchmarks/render.py                     # docs/benchmarks.md, the picture, pages between their markers
    python benchmarks/render.py --check             # change nothing; exit 1 where a file is not up to date
    python benchmarks/render.py --print             # print the README's part

In README.md the results stand between ``<!-- results:start -->`` and ``<!-- results:end -->``; without them the README
is left alone. The table of all methods stands in docs/methods/README.md in the same way, the paper's tables row by row
in docs/reproducing.md, and what bf16 and structures cost in accuracy in their cards.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from _common import BENCHMARKS, RESULTS, Figure, Result, markdown, markdown_table, met_text, show, stamp_line
from _picture import picture

ROOT = BENCHMARKS.parent
START, END = "<!-- results:start -->", "<!-- results:end -->"
METHODS_START, METHODS_END = "<!-- methods:start -->", "<!-- methods:end -->"
PAPERS = "papers"
PAPERS_START, PAPERS_END = "<!-- papers:start -->", "<!-- papers:end -->"
PRECISION = "precision"
PRECISION_START, PRECISION_END = "<!-- precision:start -->", "<!-- precision:end -->"
# Which of its tables stand in which card, by how their titles begin.
PRECISION_CARDS = {"native.md": "bf16", "structures.md": "Structures"}
# The order of the page; a result that is not named here follows after.
ORDER = (
    "bookkeeping",
    "verify",
    "integrations",
    "freezing",
    "sieving",
    "data_path",
    "decoding",
    "image_list",
    "imagenette",
    "distributed",
    "accuracy",
    PRECISION,
    "same_budget",
    "crash",
    "start_up",
    "export",
    "inference",
    "attention",
    "versions",
    "analysis",
    "methods",
    "mutation",
    "freezing_schemes",
    "planned_figures",
    "gpu",
    "block_linear",
)
PICTURE = "docs/images/results.svg"
PICTURE_SAYS = "Speed of a training step over dense fp32 PyTorch, and test accuracy over seconds of training"
# What a user decides by: the words for it, the benchmark, and its figure.
README_ROWS = (
    ("step at 90 % sparsity, speed over dense fp32 PyTorch", "native", "native step at 90%, speed over dense"),
    (
        "the same in bf16, over the fastest dense PyTorch (bf16 autocast and compiled among them)",
        "native",
        "native bf16 step at 90%, speed over the fastest dense PyTorch",
    ),
    (
        "epoch with all three savings, speed over a dense fp32 epoch",
        "native",
        "an epoch of SpFDE 20 % + 20 % at 90 %, mean over its schedule, speed over a dense epoch",
    ),
    (
        "training FLOPs with all three savings, of dense",
        "planned_figures",
        "SpFDE 20 % + 20 % at 90 %, training FLOPs of dense",
    ),
    (
        "peak memory of a step at 90 % in bf16, over dense fp32",
        "native",
        "peak memory of a native bf16 step at 90 % over dense fp32",
    ),
    ("test accuracy with all three savings", "same_budget", "test accuracy: SpFDE 20 % + 20 % at 90 %"),
    ("test accuracy of the dense net, as many epochs", "same_budget", "test accuracy: dense"),
    (
        "test accuracy of the dense net, as many seconds",
        "same_budget",
        "test accuracy: dense, fewer epochs, equal seconds",
    ),
)
HEAD = """# Benchmarks

Written by `python benchmarks/render.py` from `benchmarks/results/*.json`, not by hand. Each question has a script of
its own (`make bench` runs them all); `--quick` is a smoke test.

Times are measured, on the machine named under each table, and told as ratios of variants that were timed turn by turn
in one process (processes started turn by turn for start-up): the median of the ratios within a round, with their
quartiles; n is the number of rounds, of timed steps, or of seeds. Training FLOPs are modelled: one multiply-add is two
FLOPs, and a sparse layer costs its density times the dense figure, whatever kernel runs it. Figures that miss their
target say **no**."""


def load(folder: Path) -> list[Result]:
    """The results in a folder, in the page's order."""
    found = [Result.from_json(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    return sorted(found, key=lambda result: ORDER.index(result.name) if result.name in ORDER else len(ORDER))


def page(results: Sequence[Result]) -> str:
    """The whole of docs/benchmarks.md."""
    missing = [name for name in ORDER if name not in {result.name for result in results}]
    parts = [HEAD]
    if missing:
        commands = ", ".join(f"`python benchmarks/{name}.py`" for name in missing)
        parts.append(f"Not measured yet: {commands}.")
    if results:
        parts += ["## Summary", summary_table(results)]
    parts += [markdown(result) for result in results if result.name != PAPERS]
    return "\n\n".join(parts) + "\n"


def summary_table(results: Sequence[Result]) -> str:
    """The figures that matter most, with their targets."""
    rows = [
        (figure.what, _with_spread(figure), figure.target, met_text(figure), _n(figure))
        for result in results
        for figure in result.figures
        if figure.headline
    ]
    return markdown_table(("result", "value", "target", "met", "n"), rows)


def readme_region(results: Sequence[Result]) -> str:
    """What stands in the README between the markers, the markers included."""
    found = {(result.name, figure.what): (result, figure) for result in results for figure in result.figures}
    chosen = [(label, *found[name, what]) for label, name, what in README_ROWS if (name, what) in found]
    parts = [f"![{PICTURE_SAYS}]({PICTURE})"] if chosen else ["Nothing has been measured yet: run `make bench`."]
    if chosen:
        rows = [(label, _with_spread(figure), _quartiles(figure), _n(figure)) for label, _, figure in chosen]
        parts.append(markdown_table(("result", "value", "quartiles", "n"), rows))
        stamps = [result.stamp for _, result, _ in chosen if result.stamp]
        machines = sorted({f"{s['cpu']}, {s['threads']} threads, PyTorch {s['versions']['torch']}" for s in stamps})
        parts.append(f"Taken on {'; '.join(machines)}; n is rounds or seeds.")
    return START + "\n" + "\n\n".join(parts) + f"\n{END}"


def methods_region(results: Sequence[Result]) -> str:
    """What stands in docs/methods/README.md between its markers: the table of all methods."""
    return _tables_region(results, "methods", METHODS_START, METHODS_END)


def papers_region(results: Sequence[Result]) -> str:
    """What stands in docs/reproducing.md between its markers: the paper's tables, row by row."""
    return _tables_region(results, PAPERS, PAPERS_START, PAPERS_END, titled=True)


def precision_region(results: Sequence[Result], card: str) -> str:
    """What stands in a card between its markers: differences in accuracy, without what there is to say of them."""
    tables = [
        f"**{table.title}**\n\n{markdown_table(table.columns, table.rows)}"
        for result in results
        for table in result.tables
        if result.name == PRECISION and table.title.startswith(PRECISION_CARDS[card])
    ]
    return "\n\n".join([PRECISION_START, *(tables or [f"Run `python benchmarks/{PRECISION}.py`."]), PRECISION_END])


def _tables_region(results: Sequence[Result], name: str, start: str, end: str, *, titled: bool = False) -> str:
    """The tables of a benchmark with its notes, the markers included."""
    parts = []
    for result in (result for result in results if result.name == name):
        for table in result.tables:
            parts += [f"**{table.title}**"] if titled else []
            parts.append(markdown_table(table.columns, table.rows))
        parts.append("\n".join(f"- {note}" for note in result.notes))
        parts.append(", ".join(f"{name} {value}" for name, value in result.settings.items()) + ".")
        parts.append(f"`{result.command}` · {stamp_line(result.stamp)}")
    parts = parts or [f"Run `python benchmarks/{name}.py`."]
    return start + "\n" + "\n\n".join(part for part in parts if part) + "\n" + end


def with_region(text: str, region: str) -> str:
    """A page with the region replaced that has the same markers; as it was where there are none."""
    lines = region.splitlines()
    start, end = lines[0], lines[-1]
    return re.sub(re.escape(start) + ".*?" + re.escape(end), lambda _: region, text, count=1, flags=re.DOTALL)


def _with_spread(figure: Figure) -> str:
    value = show(figure.value, figure.unit)
    if figure.kind == "modelled":
        return f"{value} (modelled)"
    if figure.spread is not None and figure.spread_is == "sd":
        return f"{value} ± {show((figure.spread[1] - figure.spread[0]) / 2, figure.unit)}"
    return value


def _quartiles(figure: Figure) -> str:
    if figure.spread is None or figure.spread_is != "quartiles":
        return "–"
    return " … ".join(show(value, figure.unit) for value in figure.spread)


def _n(figure: Figure) -> str:
    return "–" if figure.n is None else str(figure.n)


def main(argv: list[str] | None = None) -> int:
    """Run it; 1 where ``--check`` found a file that is not up to date."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER", help="where the results are")
    made.add_argument("--root", type=Path, default=ROOT, metavar="FOLDER", help="where README.md and docs/ are")
    made.add_argument("--check", action="store_true", help="change nothing; exit 1 where a file is not up to date")
    made.add_argument("--print", action="store_true", dest="only_print", help="print the README's part")
    options = made.parse_args(argv)
    results = load(options.results)
    region = readme_region(results)
    if options.only_print:
        print(region)
        return 0
    readme, docs = options.root / "README.md", options.root / "docs" / "benchmarks.md"
    wanted = {docs: page(results), options.root / PICTURE: picture(results)}
    pages = options.root / "docs"
    regions = (
        (readme, region),
        (pages / "methods" / "README.md", methods_region(results)),
        (pages / "reproducing.md", papers_region(results)),
        *((pages / "methods" / card, precision_region(results, card)) for card in PRECISION_CARDS),
    )
    for path, part in regions:
        if path.is_file():
            wanted[path] = with_region(path.read_text(encoding="utf-8"), part)
    stale = [path for path, text in wanted.items() if not path.is_file() or path.read_text(encoding="utf-8") != text]
    for path in stale:
        if options.check:
            print(
                f"{path}: is not up to date with {options.results}. Run python benchmarks/render.py.", file=sys.stderr
            )
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(wanted[path], encoding="utf-8")
            print(f"written: {path}")
    return 1 if options.check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
