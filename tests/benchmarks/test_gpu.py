"""benchmarks/gpu.py without a GPU: its arithmetic, what it refuses, and its rows, rehearsed on a tiny network."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import spfde
from helpers import ROOT

BENCHMARKS = ROOT / "benchmarks"
NOT_NEEDED = ("typer", "rich", "accelerate", "safetensors", "matplotlib", "jinja2", "torchvision", "timm", "lightning")

without_a_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("gpu")


@pytest.fixture
def rows(gpu: ModuleType) -> ModuleType:
    return importlib.import_module("_gpu_rows")


@pytest.fixture
def steps(gpu: ModuleType) -> ModuleType:
    return importlib.import_module("_gpu")


@pytest.fixture
def runs(gpu: ModuleType) -> ModuleType:
    return importlib.import_module("_gpu_run")


@pytest.fixture
def recorded(gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where results would be written."""
    monkeypatch.setattr(importlib.import_module("_common"), "RESULTS", tmp_path / "results")
    return tmp_path / "results"


# --- what it refuses -------------------------------------------------------------------------------------------------


@without_a_gpu
def test_without_a_gpu_it_says_so_in_one_line_and_ends_as_a_usage_error(
    gpu: ModuleType, recorded: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        gpu.main([])
    said = capsys.readouterr()
    assert ended.value.code == 2
    assert said.err.count("\n") == 1
    assert "CUDA" in said.err
    assert said.out == ""
    assert not recorded.exists()


@pytest.mark.parametrize(
    ("arguments", "word"), [(["--only", "dense,nonsense"], "nonsense"), (["--results", "somewhere"], "--results")]
)
def test_what_cannot_be_followed_is_a_usage_error(
    gpu: ModuleType, arguments: list[str], word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        gpu.main(["--rehearse", *arguments])
    assert ended.value.code == 2
    assert word in capsys.readouterr().err


# --- the whole run's arithmetic --------------------------------------------------------------------------------------


def a_run(runs: ModuleType) -> Any:
    """Two epochs of four steps with nothing frozen, then two with one block frozen."""
    epochs = (
        runs.Epoch(frozen=0, seconds=30.0, steps=4, step=2.0, to_replay=21.0),
        runs.Epoch(frozen=0, seconds=9.0, steps=4, step=2.0, to_replay=2.0),
        runs.Epoch(frozen=1, seconds=7.0, steps=4, step=1.5, to_replay=3.0),
        runs.Epoch(frozen=1, seconds=5.0, steps=4, step=0.5, to_replay=0.5),
    )
    return runs.WholeRun(first=25.0, epochs=epochs, tail=0.25, blocks=3, eager={"tf32": [4.0]})


def test_a_run_is_the_steps_of_each_front_and_all_else_that_its_epochs_took(runs: ModuleType) -> None:
    run = a_run(runs)
    assert run.step == {0: 2.0, 1: 1.0}
    assert run.new_stages == {1: 3.0}
    # 30 - 8, 9 - 8, 7 - 4 and 5 - 4, and the tail.
    assert run.beside_steps == 22 + 1 + 3 + 1 + 0.25
    # 10, 10, 8 and 9 samples in batches of 4: 3, 3, 2 and 3 steps.
    assert run.seconds_for([10, 10, 8, 9], [0, 0, 1, 1], batch=4) == 6 + 6 + 2 + 3 + 27.25


def test_a_run_that_froze_otherwise_than_planned_and_a_front_that_never_came_are_errors(runs: ModuleType) -> None:
    run = a_run(runs)
    with pytest.raises(ValueError, match="plan"):
        run.seconds_for([10] * 4, [0, 1, 1, 1], batch=4)
    with pytest.raises(ValueError, match="5 blocks"):
        run.steps_at(5)


def test_a_run_survives_its_json(runs: ModuleType) -> None:
    run = a_run(runs)
    assert runs.WholeRun.from_dict(json.loads(json.dumps(dataclasses.asdict(run)))) == run


@pytest.mark.long
def test_short_epochs_freeze_as_long_ones_do_and_come_to_whole_batches(rows: ModuleType) -> None:
    model = dataclasses.replace(rows.FULL, device="cpu").network()
    for scale in (rows.FULL, rows.QUICK):
        short = round(scale.epoch_steps * scale.batch / 0.8)
        bills = [
            spfde.plan(
                model, torch.zeros(2, *scale.sample_shape), scale.recipe("SpFDE"), scale.epochs, n, batch_size=128
            )
            for n in (short, scale.samples)
        ]
        assert bills[0].timeline.frozen == bills[1].timeline.frozen
        assert {0, *scale.fronts} <= set(bills[0].timeline.frozen)
        assert set(bills[0].samples_in_use) == {scale.epoch_steps * scale.batch}
        assert scale.singly < scale.epoch_steps


# --- rows ------------------------------------------------------------------------------------------------------------


def test_a_row_that_fails_is_told_with_its_traceback_and_the_others_go_on(
    gpu: ModuleType, recorded: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    figure = importlib.import_module("_common").Figure

    def breaks(bench: Any) -> Iterator[Any]:
        yield figure("before it breaks", 0.5, "ratio")
        raise RuntimeError("a broken row")

    def refuses(bench: Any) -> Iterator[Any]:
        raise SystemExit("wrong: it computes something else")
        yield

    def works(bench: Any) -> Iterator[Any]:
        yield figure("a row that works", 0.25, "ratio", high=0.5, aim=0.2)

    for name, row in {"dense": breaks, "mest": refuses, "start": works}.items():
        monkeypatch.setitem(gpu.ROWS, name, row)
    assert gpu.main(["--rehearse", "--only", "mest,dense,start"]) == 1
    said = capsys.readouterr()
    assert "| a row that works | 0.25x | at most 0.5x | yes | 0.2x | **no** |" in said.out
    assert said.out.index("before it breaks") < said.out.index("a row that works"), "the table's order"
    assert said.err.index("== start") < said.err.index("== dense") < said.err.index("== mest"), "as they are taken"
    assert said.err.count("Traceback") == 2
    assert "a broken row" in said.err
    assert "it computes something else" in said.err
    assert "failed: dense, mest" in said.err
    assert not recorded.exists()


def test_what_is_said_to_be_captured_and_is_not_replayed_is_an_error(rows: ModuleType, steps: ModuleType) -> None:
    with steps.recorded_without_a_gpu():
        contender = steps.CONTENDERS[steps.DENSE_LOOP](rows.REHEARSAL)
        with pytest.raises(RuntimeError, match="no graph was replayed"):
            contender.warm_up(steps.Replays())  # counts nothing


def test_a_contender_that_cannot_be_made_is_tried_once(
    rows: ModuleType, steps: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []

    def broken(*_: Any) -> Any:
        tried.append(1)
        raise RuntimeError("out of memory")

    monkeypatch.setattr(rows, "make", broken)
    bench = rows.Bench(rows.REHEARSAL, steps.Replays(), tmp_path)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="out of memory"):
            bench.made(steps.DENSE_LOOP)
    assert len(tried) == 1


def test_a_run_that_is_to_find_nothing_compiled_does_not_start_where_something_is(
    rows: ModuleType, steps: ModuleType, tmp_path: Path
) -> None:
    bench = rows.Bench(rows.REHEARSAL, steps.Replays(), tmp_path)
    with rows.compiled_into(bench.compiled):
        (bench.compiled / "inductor").mkdir()
        with pytest.raises(RuntimeError, match="inductor"):
            _ = bench.run


@pytest.mark.long
def test_rows_without_a_captured_step_are_rehearsed_and_record_nothing(
    gpu: ModuleType, recorded: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = {"TRITON_CACHE_DIR": "mine", "TORCHINDUCTOR_CACHE_DIR": "mine, too"}
    for name, value in mine.items():
        monkeypatch.setenv(name, value)
    assert gpu.main(["--rehearse", "--only", "dense,mest,linear,busy"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("REHEARSED")
    for words in ("dense recipe, own loop", "MEST 90 %, own loop", "dense, eager, bf16", "Linear 768", "GPU is busy"):
        assert words in said
    assert not recorded.exists()
    assert mine.items() <= os.environ.items()


def test_a_whole_run_passes_through_every_stage_of_its_plan(
    rows: ModuleType, steps: ModuleType, runs: ModuleType
) -> None:
    scale = rows.REHEARSAL
    with steps.recorded_without_a_gpu() as graph, steps.counting(graph) as replays:
        found = runs.whole_run(scale, replays, steps.BEGUN)
    plan = spfde.plan(
        scale.network(), torch.zeros(2, 3, 8, 8), scale.recipe("SpFDE"), scale.epochs, scale.samples, batch_size=4
    )
    assert [epoch.frozen for epoch in found.epochs] == list(plan.timeline.frozen)
    assert {epoch.steps for epoch in found.epochs} == {scale.epoch_steps}
    assert set(found.step) >= {0, *scale.fronts}
    assert set(found.eager) == set(steps.EAGER)
    assert found.beside_steps + sum(e.steps * found.step[e.frozen] for e in found.epochs) == pytest.approx(
        sum(epoch.seconds for epoch in found.epochs) + found.tail
    )


@without_a_gpu
@pytest.mark.long
def test_every_row_is_rehearsed_in_a_process_that_has_torch_numpy_and_pydantic_alone(tmp_path: Path) -> None:
    for name in NOT_NEEDED:
        (tmp_path / f"{name}.py").write_text(f"raise ImportError('{name} is not needed')\n", encoding="utf-8")
    path = os.pathsep.join([str(tmp_path), str(ROOT / "src")])
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "gpu.py"), "--rehearse"],
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "failed: none" in done.stderr
    figures = [line for line in done.stdout.splitlines() if "| at most" in line or "| at least" in line]
    assert len(figures) == 16
