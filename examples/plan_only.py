"""What would it cost? The bill of several recipes for one model, before any training and without data.

Every figure printed here is modelled.

    python examples/plan_only.py
    python examples/plan_only.py --model vgg19 --epochs 200
"""

from __future__ import annotations

import argparse

import torch

import spfde
from spfde.app.train.models import build_model
from spfde.cost import format_bytes, format_flops


def recipes(sparsity: float) -> dict[str, spfde.Recipe]:
    mest = spfde.MEST(sparsity=sparsity)
    return {
        "dense": spfde.presets.dense,
        "MEST": spfde.Recipe(sparsity=mest),
        "freezing 20 %": spfde.Recipe(freezing=spfde.ProgressiveFreezing(flops_reduction=0.2)),
        "sieving 20 %": spfde.Recipe(sieving=spfde.DataSieving(removed_fraction=0.2)),
        "MEST, 20 % + 20 %": spfde.Recipe(
            sparsity=mest,
            freezing=spfde.ProgressiveFreezing(flops_reduction=0.2),
            sieving=spfde.DataSieving(removed_fraction=0.2),
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet32")
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--epochs", type=int, default=160)
    parser.add_argument("--samples", type=int, default=50_000)
    options = parser.parse_args()

    model = build_model(options.model, num_classes=100, in_channels=3, image_size=32)
    sample = torch.zeros(1, 3, 32, 32)  # only its shape counts
    print(f"{'recipe':<20}{'training FLOPs':>16}{'of dense':>10}{'T_frz':>7}{'frozen':>8}{'least memory':>14}")
    for name, recipe in recipes(options.sparsity).items():
        plan = spfde.plan(model, sample, recipe, options.epochs, options.samples)
        frozen = sum(epoch is not None for epoch in plan.freeze_epochs)
        print(
            f"{name:<20}{format_flops(plan.training_flops):>16}{plan.flops_ratio:>10.1%}"
            f"{'-' if plan.start_epoch is None else plan.start_epoch:>7}{frozen:>5}/{len(plan.freeze_epochs):<2}"
            f"{format_bytes(plan.memory['actual'].minimum):>14}"
        )

    print("\nAn impossible wish is refused, with what is possible:")
    try:
        greedy = spfde.Recipe(freezing=spfde.ProgressiveFreezing(flops_reduction=0.6))
        spfde.plan(model, sample, greedy, options.epochs, options.samples)
    except spfde.InvalidArgument as error:
        print(f"  {error}")


if __name__ == "__main__":
    main()
