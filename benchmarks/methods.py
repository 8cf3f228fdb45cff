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

from _common import Result, publish
from _compared import Compared, Values, opened_runs, run_parser

METHODS = (
    "static", "set", "rigl", "mest", "snip", "grasp", "synflow", "deepr", "dsr", "snfs", "set-itop", "rigl-itop",
    "topkast", "gmp", "str",
)  # fmt: skip
QUICK_METHODS = ("static", "snip")
# Patterns are for 3x3 kernels: the shortcuts stay dense.
GROUPS: dict[str, Values] = {"block": {}, "kernel": {}, "pattern": {"exclude": ["*downsample*"]}, "channel": {}}


def candidates(asked: argparse.Namespace) -> dict[str, Values]:
    """The dense net, the methods, and MEST on groups of weights."""
    wanted = asked.only or (QUICK_METHODS if asked.quick else METHODS)
    found: dict[str, Values] = {name: {"recipe": name} for name in ("dense", *wanted)}
    if not (asked.only or asked.quick):
        found |= {f"mest, {name}": {"recipe": "mest", "structure": name, **more} for name, more in GROUPS.items()}
    return found


def result(compared: Compared) -> Result:
    """Put it side by side."""
    more = {
        "explored": lambda label: f"{compared.curve(label, 'explored')[-1]['explored']:.1%}",
        "engine": lambda label: ", ".join(compared.rows[label].engines),
    }
    return compared.result(
        "Every method at 90 %",
        "How accurate and how dear is each sparse training method, all else equal?",
        compared.accuracy_figures(),
        [compared.table("Each method", more)],
        [
            "explored: share of the masked weights that have been active at some time (ITOP's rate).",
            "Each run chooses its own engine (auto).",
        ],
    )


def main(argv: list[str] | None = None) -> None:
    """Run it."""
    made = run_parser(__doc__, "methods")
    made.add_argument("--only", nargs="+", default=None, metavar="NAME", help="some of the methods, and dense")
    asked = made.parse_args(argv)
    with opened_runs(asked, quick_epochs=4) as runs:
        publish(result(runs.compared(candidates(asked))), asked)


if __name__ == "__main__":
    main()
