"""Which freezing scheme keeps the accuracy, at equal training FLOPs?

ResNet-8 on fashion-mini, as `spfde compare` trains it, MEST at 90 %: the four schemes of SpFDE's appendix B with the
same learning rate and seeds, beside no freezing at all; and the two criteria that freeze a block earlier where it has
converged, which cost less. With three blocks and few update epochs a scheme can save certain shares only, so the target
is the periodic scheme's bill, and of each other scheme the plan is run whose bill comes nearest. FLOPs are modelled.

    python benchmarks/freezing_schemes.py           # about half an hour on two cores
    python benchmarks/freezing_schemes.py --epochs 20 --seeds 0 1 2 --freeze 0.2

Runs are kept and taken up again as _compared.py says.
"""

from __future__ import annotations

from collections.abc import Iterator

import spfde
from _common import Result, publish
from _compared import SAMPLE, Compared, Values, network, opened_runs, run_parser
from spfde.app.train.options import choose_recipe
from spfde.core.errors import InvalidArgument

SCHEMES = ("single-shot", "single-shot-resume", "periodic", "delayed-periodic")
CRITERIA = ("structure", "representation")
COARSEST = "periodic"
"""The scheme with the fewest bills to choose from: all others are brought near to its."""
UNFROZEN = "no freezing"
QUICK = (UNFROZEN, "single-shot", "periodic", "single-shot, structure")


def bills(scheme: str, epochs: int, step: int) -> Iterator[tuple[float, int]]:
    """The FLOPs reductions that can be asked of a scheme, so many per cent apart, with the training FLOPs of each."""
    for percent in range(step, 60, step):
        recipe = choose_recipe("mest", freeze=percent / 100, freeze_scheme=scheme)
        try:
            yield percent / 100, spfde.plan(network(), SAMPLE, recipe, epochs, 1000).training_flops
        except InvalidArgument:
            return  # out of reach, and so is all beyond


def equalised(share: float, epochs: int, step: int) -> dict[str, float]:
    """For each scheme the FLOPs reduction to ask for, so that their training FLOPs are as equal as can be."""
    at_hand = {scheme: list(bills(scheme, epochs, step)) for scheme in SCHEMES}
    wanted = min(at_hand[COARSEST], key=lambda bill: abs(bill[0] - share))[1]
    return {scheme: min(found, key=lambda bill: abs(bill[1] - wanted))[0] for scheme, found in at_hand.items()}


def candidates(shares: dict[str, float]) -> dict[str, Values]:
    """MEST without freezing, with each scheme, and with each criterion."""
    found: dict[str, Values] = {UNFROZEN: {}}
    found |= {scheme: {"freeze": share, "freeze_scheme": scheme} for scheme, share in shares.items()}
    first = SCHEMES[0]
    found |= {f"{first}, {by}": {"freeze": shares[first], "freeze_criterion": by} for by in CRITERIA}
    return {label: {"recipe": "mest", **values} for label, values in found.items()}


def result(compared: Compared, shares: dict[str, float]) -> Result:
    """Put it side by side."""
    flops = {label: compared.mean(label, "training_flops") for label in compared.rows}
    return compared.result(
        "Freezing schemes",
        "Which freezing scheme keeps the accuracy, at equal training FLOPs?",
        compared.accuracy_figures(),
        [compared.table("Each scheme", {"saved": lambda label: f"{1 - flops[label] / flops[UNFROZEN]:.1%}"})],
        [
            "What is asked for counts backward FLOPs alone. What is saved is of the whole bill without freezing: a "
            "block that is at its target before it is frozen for good saves part of the soft bound, too.",
            "The criteria freeze blocks earlier than the schedule where they have converged, and so save more.",
        ],
        settings={
            "method": "mest",
            "FLOPs reduction asked for": ", ".join(f"{share:.0%} of {scheme}" for scheme, share in shares.items()),
        },
    )


def main(argv: list[str] | None = None) -> None:
    """Run it."""
    made = run_parser(__doc__, "freezing_schemes")
    made.add_argument("--freeze", type=float, default=0.25, help="FLOPs reduction of the periodic scheme (0.25)")
    asked = made.parse_args(argv)
    with opened_runs(asked, quick_epochs=8) as runs:
        shares = equalised(asked.freeze, runs.epochs, step=5 if asked.quick else 1)
        wanted = candidates(shares)
        compared = runs.compared({label: wanted[label] for label in QUICK} if asked.quick else wanted)
        publish(result(compared, shares), asked)


if __name__ == "__main__":
    main()
