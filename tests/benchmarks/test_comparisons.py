"""Benchmarks that train with several seeds put the runs of a comparison side by side."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from helpers.native import needs_kernels


def published(name: str, common: ModuleType, folder: Path, *options: str) -> Any:
    """The result of a benchmark's short form."""
    importlib.import_module(name).main(["--quick", "--results", str(folder), *options])
    return common.Result.from_json((folder / f"{name}.json").read_text(encoding="utf-8"))


def test_methods_are_compared_with_the_dense_net(common: ModuleType, tmp_path: Path) -> None:
    result = published("methods", common, tmp_path, "--only", "static", "--seeds", "0", "1", "--epochs", "1")

    assert [figure.what for figure in result.figures] == [f"test accuracy: {name}" for name in ("dense", "static")]
    [table] = result.tables
    cells = [dict(zip(table.columns, row, strict=True)) for row in table.rows]
    assert [row["candidate"] for row in cells] == ["dense", "static"]
    assert [row["explored"] for row in cells] == ["100.0%", "10.0%"]
    dense, static = (figure.value for figure in result.figures)
    assert cells[0]["difference"] == "baseline"
    assert cells[1]["difference"].startswith(f"{100 * (static - dense):+.2f} [")
    assert any("paired by seed" in note for note in result.notes)


@needs_kernels
def test_bf16_is_compared_with_fp32_seed_by_seed(common: ModuleType, render: ModuleType, tmp_path: Path) -> None:
    asked = ("--only", "fashion", "--seeds", "0", "1", "--epochs", "1")
    result = published("precision", common, tmp_path, *asked)

    [table] = result.tables
    rows = [dict(zip(table.columns, row, strict=True)) for row in table.rows]
    assert [(row["trained with"], row["n"]) for row in rows] == [("fp32", "2"), ("bf16", "2")]
    [less] = result.figures
    assert less.what == "bf16 less fp32, resnet8, fashion-mini"
    assert rows[1]["difference"].startswith(f"{100 * less.value:+.2f} [")
    assert common.markdown_table(table.columns, table.rows) in render.precision_region([result], "native.md")
    assert "Run `python benchmarks/precision.py`" in render.precision_region([result], "structures.md")


@needs_kernels
@pytest.mark.long
def test_structures_and_images_of_a_file_are_compared_too(common: ModuleType, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    parts = {
        f"{kind}_{part}": np.repeat(np.arange(2, dtype=np.uint8), 5)
        if kind == "y"
        else generator.integers(0, 256, (10, 16, 16, 3), dtype=np.uint8)
        for part in ("train", "test")
        for kind in "xy"
    }
    np.savez(tmp_path / "images.npz", **parts)
    result = published("precision", common, tmp_path, "--cifar100", str(tmp_path / "images.npz"))

    fashion, cifar, structures = result.tables
    assert [len(table.rows) for table in (fashion, cifar)] == [2, 2]
    shapes = ["unstructured", "1x2", "1x2-kernel", "1x2-inputs", "2x2-inputs", "unstructured, 95 %"]
    assert [row[0] for row in structures.rows] == shapes
    assert [figure.n for figure in result.figures] == [1] * 7


@pytest.mark.long
def test_freezing_schemes_are_compared_with_no_freezing(common: ModuleType, tmp_path: Path) -> None:
    result = published("freezing_schemes", common, tmp_path)
    [table] = result.tables
    assert [row[0] for row in table.rows] == ["no freezing", "single-shot", "periodic", "single-shot, structure"]
    assert [row[table.columns.index("difference")] for row in table.rows].index("baseline") == 0
    saved = [float(row[-1].rstrip("%")) for row in table.rows]
    assert saved[0] == 0
    assert min(saved[1:]) > 20


@pytest.mark.long
def test_what_the_readme_and_its_picture_say_of_the_same_budget_is_among_the_results(
    common: ModuleType, render: ModuleType, tmp_path: Path
) -> None:
    result = published("same_budget", common, tmp_path)
    drawn = {run for _, run, _, _ in importlib.import_module("_picture").CURVES}
    named = {what for _, name, what in render.README_ROWS if name == "same_budget"}
    assert named <= {figure.what for figure in result.figures}
    assert drawn <= set(result.data["curves"])
    assert result.tables[0].rows[1][0] == "dense"
    labels = [row[0] for row in result.tables[0].rows]
    assert [label for label in labels if label.startswith("dense, ")] == [
        f"dense, {how}, equal {cost}" for cost in ("FLOPs", "seconds") for how in ("fewer epochs", "narrower")
    ]


def test_candidates_that_come_to_the_same_share_a_run_and_keep_their_rows(common: ModuleType, tmp_path: Path) -> None:
    shared = importlib.import_module("_compared")
    options = {"data": str(shared.quick_images(tmp_path / "quick.npz")), "batch_size": 16, "engine": "masked"}
    runs = shared.Runs("x", tmp_path / "runs", [0], 1, options, {})
    dense = {"recipe": "dense", "width": 0.25}
    compared = runs.compared({"a": dense, "b": {**dense, "epochs": 2}, "c": dict(dense)})
    table = compared.table("t", {"epochs": lambda label: str(compared.options(label)["epochs"])})
    assert [(row[0], row[-1]) for row in table.rows] == [("a", "1"), ("b", "2"), ("c", "1")]
    assert len(list((tmp_path / "runs" / "runs").iterdir())) == 2
    assert compared.pairs("a", "c", "seconds")[0][0] == compared.pairs("a", "c", "seconds")[0][1]
    assert [len(compared.curve(label, "test_accuracy")) for label in "abc"] == [1, 2, 1]


def test_a_figure_over_seeds_has_their_mean_and_standard_deviation(common: ModuleType) -> None:
    over_seeds = importlib.import_module("_compared").over_seeds
    three = over_seeds("x", [1.0, 2.0, 3.0], "ratio", low=1.5)
    assert (three.value, three.spread, three.n, three.met) == (2.0, (1.0, 3.0), 3, True)
    assert over_seeds("x", [1.0], "ratio").spread is None
