"""A comparison's folder as ``spfde compare`` leaves it, made without training anything."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from spfde.app.compare.folder import slug


def made_comparison(
    folder: Path,
    accuracies: Mapping[str, Sequence[float]],
    *,
    costs: Mapping[str, float] | None = None,
    seeds: int | None = None,
    options: Mapping[str, Any] | None = None,
) -> Path:
    """Write a comparison whose first candidate is the baseline.

    Args:
        accuracies: for each candidate the test accuracies of its finished runs, from seed 0 on.
        costs: for each candidate its share of the dense run's training FLOPs, of 1e12, and of its 100 seconds; by
            default 1 for the first, 1/2 for the second and so on.
        seeds: how many there are; by default as many as the longest list has accuracies.
        options: of all runs.
    """
    costs = costs or {name: 1 / (place + 1) for place, name in enumerate(accuracies)}
    candidates = [
        {
            "name": name,
            "folder": f"{place}-{slug(name)}"[:100],
            "options": {**_OPTIONS, **(options or {}), "lr": place + 1},
        }
        for place, name in enumerate(accuracies)
    ]
    for candidate in candidates:
        for seed, accuracy in enumerate(accuracies[str(candidate["name"])]):
            run = folder / "runs" / str(candidate["folder"]) / f"seed-{seed}"
            run.mkdir(parents=True)
            (run / "summary.json").write_text(json.dumps(_summary(accuracy, costs[str(candidate["name"])], seed)))
    count = seeds or max(map(len, accuracies.values()))
    content = {"version": 1, "baseline": next(iter(accuracies)), "seeds": list(range(count)), "candidates": candidates}
    folder.mkdir(exist_ok=True)
    (folder / "comparison.json").write_text(json.dumps(content))
    return folder


_OPTIONS = {"data": "fashion-mini", "model": "resnet8", "epochs": 20, "recipe": {"sparsity": {"method": "mest"}}}


def _summary(accuracy: float, cost: float, seed: int) -> dict[str, Any]:
    return {
        "test_accuracy": accuracy,
        "best_test_accuracy": accuracy + 0.01,
        "training_flops": 1e12 * cost,
        "flops_ratio": cost,
        "seconds": 100.0 * cost + seed,
        "peak_memory_bytes": 2**29,
        "final_sparsity": 1 - cost,
        "engine": "masked",
        "seed": seed,
    }
