"""How accurate, and how dear, is each sparse training method at 90 %?

ResNet-8 on fashion-mini, as `spfde compare` trains it: every method of ``spfde methods`` with its preset, the same
learning rate, length and seeds, beside the dense net; and MEST on groups of weights. Training FLOPs are modelled by
each method's own rule, seconds are measured.

    python benchmarks/methods.py                    # about an hour and a half on two cores
    python benchmarks/methods.py --epochs 20 --seeds 0 1 2 --only snip grasp

Runs are kept and taken up again as _compared.py says; a method that is added later is trained alone.
"""

from __future__ import annotations

import argparse
from typing import Any

from _common import Result, begin, parser, publish
from _compared import Runs, Values, add_run_options, opened_runs

METHODS = (
    "static", "set", "rigl", "mest", "snip", "grasp", "synflow", "deepr", "dsr", "snfs", "set-itop", "rigl-itop",
    "topkast", "gmp", "str",
)  # fmt: skip
QUICK_METHODS = ("static", "snip")
# Patterns are for 3x3 kernels: the shortcuts stay dense.
GROUPS: dict[str, Values] = {"block": {}, "kernel": {}, "pattern": {"exclude": ["*downsample*"]}, "channel": {}}


def candidates(options: argparse.Namespace) -> dict[str, Values]:
    """The dense net, the methods, and MEST on groups of weights."""
    wanted = options.only or (QUICK_METHODS if options.quick else METHODS)
    found: dict[str, Values] = {name: {"recipe": name} for name in ("dense", *wanted)}
    if not (options.only or options.quick):
        found |= {f"mest, {name}": {"recipe": "mest", "structure": name, **more} for name, more in GROUPS.items()}
    return found


def result(runs: Runs, options: argparse.Namespace, stamped: dict[str, Any]) -> Result:
    """Train what is missing, and put it side by side."""
    compared = runs.compared(candidates(options))
    more = {
        "explored": lambda label: f"{compared.curve(label, 'explored')[-1]['explored']:.1%}",
        "engine": lambda label: ", ".join(compared.rows[label].engines),
    }
    return Result(
        name="methods",
        title="Every method at 90 %",
        question="How accurate and how dear is each sparse training method, all else equal?",
        command="python benchmarks/methods.py",
        figures=tuple(compared.accuracy_figures()),
        tables=(compared.table("Each method", more),),
        settings=runs.settings,
        notes=(
            *compared.notes,
            "explored: share of the masked weights that have been active at some time (ITOP's rate).",
            "Each run chooses its own engine (auto).",
        ),
        stamp=stamped,
    )


def main(argv: list[str] | None = None) -> None:
    """Run it."""
    made = parser(__doc__)
    add_run_options(made, "methods")
    made.add_argument("--only", nargs="+", default=None, metavar="NAME", help="some of the methods, and dense")
    options = made.parse_args(argv)
    stamped = begin(options)
    with opened_runs(options, quick_epochs=4) as runs:
        publish(result(runs, options, stamped), options)


if __name__ == "__main__":
    main()
