"""Run folders as the trainer leaves them, made without training anything."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

DENSE_EPOCH = 1000.0
"""FLOPs of a dense epoch on all samples."""

MakeRun = Callable[..., Path]


def epoch_row(
    epoch: int, *, epochs: int = 6, frozen: int = 0, removed: int = 0, sparsity: float = 0.0
) -> dict[str, Any]:
    """One line of metrics.jsonl; figures are chosen so that sums can be worked out by hand."""
    population, partial = 100, 100 - removed
    sparse = DENSE_EPOCH * (1 - sparsity)
    unfrozen = sparse * (1 - 0.1 * frozen)
    spent = unfrozen * partial / population
    swapped = 10 if removed and epoch % 2 == 0 and 0 < epoch < epochs - 1 else 0
    return {
        "epoch": epoch,
        "train_loss": 2.0 / (epoch + 1),
        "train_accuracy": 0.5 + 0.05 * epoch,
        "test_loss": 2.1 / (epoch + 1),
        "test_accuracy": 0.4 + 0.05 * epoch,
        "learning_rate": 0.1 * (1 - epoch / epochs),
        "density": 1 - sparsity,
        "frozen_blocks": frozen,
        "total_blocks": 3,
        "partial_samples": partial,
        "removed_samples": removed,
        "samples": partial,
        "steps": 10,
        "training_flops": spent,
        "dense_training_flops": DENSE_EPOCH,
        "saved_by_sparsity": DENSE_EPOCH - sparse,
        "saved_by_freezing": sparse - unfrozen,
        "saved_by_sieving": unfrozen - spent,
        "dense_gradient_flops": 0.0,
        "seconds": 2.0,
        "peak_memory_bytes": 3 * 2**20 + epoch,
        "saved_tensor_bytes": 2**20 - 1000 * frozen,
        "modelled_memory_bytes": 2**20,
        "sieve_moved": swapped,
        "sieve_ever_used": min(population, partial + 5 * epoch),
    }


def config(*, epochs: int = 6, frozen: list[int] | None = None, recipe: str = "spfde") -> dict[str, Any]:
    return {
        "command": {
            "data": "fashion-mini",
            "model": "resnet8",
            "recipe_name": recipe,
            "epochs": epochs,
            "seed": 7,
            "engine": "auto",
        },
        "data": {"name": "fashion-mini", "train_samples": 100},
        "model": "resnet8",
        "recipe": {"update_interval_epochs": 2},
        "engine": "masked",
        "plan": {"block_names": ["stem", "stage1", "stage2"]},
        "timeline": {"epochs": epochs, "rows": [[1, {"frozen_blocks": count}] for count in frozen or [0] * epochs]},
        "versions": {"spfde": "0.1.0", "torch": "2.6.0"},
        "hardware": {"device": "cpu", "name": "A processor", "threads": 2},
    }


def summary_of(rows: list[dict[str, Any]], *, recipe: str = "spfde") -> dict[str, Any]:
    spent, dense = (sum(row[name] for row in rows) for name in ("training_flops", "dense_training_flops"))
    return {
        "test_accuracy": rows[-1]["test_accuracy"],
        "best_test_accuracy": max(row["test_accuracy"] for row in rows),
        "epochs": len(rows),
        "training_flops": spent,
        "dense_training_flops": dense,
        "flops_ratio": spent / dense if dense else 1.0,
        "seconds": sum(row["seconds"] for row in rows),
        "samples_seen": sum(row["samples"] for row in rows),
        "peak_memory_bytes": max(row["peak_memory_bytes"] or 0 for row in rows),
        "final_sparsity": 1 - (rows[-1]["density"] or 0),
        "frozen_blocks": rows[-1]["frozen_blocks"],
        "total_blocks": 3,
        "engine": "masked",
        "recipe": recipe,
        "seed": 7,
        "versions": {"spfde": "0.1.0", "torch": "2.6.0"},
    }


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """Make a run folder: by default a finished SpFDE run of six epochs that freezes and sieves."""

    def make(
        name: str = "runs/a",
        *,
        epochs: int = 6,
        done: int | None = None,
        freeze: bool = True,
        removed: int = 20,
        sparsity: float = 0.9,
        recipe: str = "spfde",
        changes: dict[str, Any] | None = None,
        validated: bool = False,
    ) -> Path:
        folder = tmp_path / name
        folder.mkdir(parents=True)
        done = epochs if done is None else done
        frozen = [min(2, max(0, epoch - 1) // 2) if freeze else 0 for epoch in range(epochs)]
        rows = [
            epoch_row(epoch, epochs=epochs, frozen=frozen[epoch], removed=removed, sparsity=sparsity) | (changes or {})
            for epoch in range(done)
        ]
        summary = summary_of(rows, recipe=recipe) if done == epochs else None
        if validated:
            for row in rows:
                row |= {f"val_{name}": row.pop(f"test_{name}") - 0.01 for name in ("loss", "accuracy")}
            if summary is not None:
                best = max(row["val_accuracy"] for row in rows)
                summary |= {"val_accuracy": rows[-1]["val_accuracy"], "best_val_accuracy": best, "best_epoch": done - 1}
        settings = config(epochs=epochs, frozen=frozen, recipe=recipe)
        (folder / "config.json").write_text(json.dumps(settings))
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        if summary is not None:
            (folder / "summary.json").write_text(json.dumps(summary))
        return folder

    return make


@pytest.fixture
def dense_run(make_run: MakeRun) -> Path:
    return make_run("runs/dense", freeze=False, removed=0, sparsity=0.0, recipe="dense")
