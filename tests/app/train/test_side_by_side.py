"""Runs side by side come to what each comes to alone, and one that ends leaves the others as they are."""

from __future__ import annotations

import doctest
import json
import os
import random
import signal
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import spfde
from helpers.recording import Replays, on_cpu
from spfde import presets
from spfde.app.data.datasets import load_data
from spfde.app.train import models, side_by_side
from spfde.app.train.events import Display
from spfde.app.train.loop import train
from spfde.app.train.options import TrainOptions
from spfde.app.train.side_by_side import Job, train_side_by_side
from spfde.core.errors import DataError, InvalidArgument, RunFolderError, TrainingDiverged, UsageError

__all__ = ["on_cpu"]
OWN_TIME = {"seconds", "loader_wait_seconds", "peak_memory_bytes", "dense_step_seconds", "dense_seconds_extrapolated"}
ALL_SAVINGS = spfde.Recipe(
    sparsity=spfde.MEST(sparsity=0.8),
    freezing=spfde.ProgressiveFreezing(flops_reduction=0.1, as_far_as_possible=True),
    sieving=spfde.DataSieving(removed_fraction=0.25),
    update_interval_epochs=2,
)


class Draws(nn.Module):
    """Draws from each of the process's generators in training."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        noise = torch.randn(()) + random.gauss(0, 1) + float(np.random.normal())  # noqa: NPY002
        return nn.functional.dropout(x, 0.3) + 0.1 * noise


def drawing(num_classes: int, in_channels: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(in_channels, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 3), nn.BatchNorm2d(6),
        Draws(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, num_classes),
    )  # fmt: skip


def dropping(num_classes: int, in_channels: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(in_channels, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.4), nn.Conv2d(6, 6, 3),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, num_classes),
    )  # fmt: skip


@pytest.fixture(autouse=True)
def _models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(models.MODELS, "drawing", drawing)
    monkeypatch.setitem(models.MODELS, "dropping", dropping)


@pytest.fixture
def options(tiny: Path) -> Callable[..., TrainOptions]:
    def made(recipe: spfde.Recipe = presets.dense, **changes: Any) -> TrainOptions:
        given = {"data": str(tiny), "model": "drawing", "epochs": 3, "batch_size": 16, "engine": "masked"}
        return TrainOptions(recipe=recipe.to_dict(), **(given | {"dense_timing_steps": 0, "device": "cpu"} | changes))

    return made


class Notes(Display):
    """Writes down what its run does in a list that all runs share."""

    def __init__(self, name: str, notes: list[str], *, at: Callable[[int], object] = lambda epochs: None) -> None:
        self._name, self._notes, self._at, self._epochs = name, notes, at, 0

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._notes.append(f"{self._name} over: {kind.__name__ if kind else 'done'}")

    def started(self, run: Any) -> None:
        self._notes.append(f"{self._name} ready")

    def batch_done(self, run: Any, done: int, total: int, loss: float) -> None:
        self._notes.append(f"{self._name} {done}/{total}")

    def epoch_done(self, run: Any, row: dict[str, Any]) -> None:
        self._epochs += 1
        self._at(self._epochs)


def left_by(folder: Path) -> dict[str, Any]:
    """What a run leaves, but for what a clock or a gauge of memory said."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((folder / "summary.json").read_text())
    latest = folder / "checkpoints" / "latest"
    return {
        "rows": [{name: value for name, value in row.items() if name not in OWN_TIME} for row in rows],
        "summary": {name: value for name, value in summary.items() if name not in OWN_TIME},
        "weights": (latest / "model.safetensors").read_bytes(),
        "optimizer": (latest / "optimizer.pt").read_bytes(),
        "generators": (latest / "generators.pt").read_bytes(),
    }


def states() -> tuple[Any, ...]:
    name, keys, *rest = np.random.get_state()  # noqa: NPY002
    return random.getstate(), (name, np.asarray(keys).tolist(), rest), torch.get_rng_state().tolist()


def test_each_run_comes_to_what_it_comes_to_alone(options: Callable[..., TrainOptions], tmp_path: Path) -> None:
    # Of other lengths, sizes of batches, models and recipes; all but the last draw from the global generators.
    asked = [
        options(seed=1),
        options(ALL_SAVINGS, epochs=5, seed=1, batch_size=32),
        options(ALL_SAVINGS, model="resnet8", epochs=4, seed=2, data_on="device", validation_share=0.25),
    ]
    for number, each in enumerate(asked):
        train(each, tmp_path / f"alone-{number}")
    before = states()
    found = train_side_by_side([(each, tmp_path / f"beside-{number}") for number, each in enumerate(asked)])
    assert states() == before
    for number, summary in enumerate(found):
        alone = left_by(tmp_path / f"alone-{number}")
        assert left_by(tmp_path / f"beside-{number}") == alone
        assert isinstance(summary, dict)
        assert {name: value for name, value in summary.items() if name not in OWN_TIME} == alone["summary"]
    assert len({left_by(tmp_path / f"beside-{number}")["generators"] for number in range(3)}) == 3


def test_so_many_run_at_a_time_and_the_next_one_begins_when_one_is_over(
    options: Callable[..., TrainOptions], tmp_path: Path
) -> None:
    notes: list[str] = []
    lengths = {"a": 2, "b": 4, "c": 2}
    jobs = [
        Job(options(seed=seed, epochs=epochs), tmp_path / name, Notes(name, notes))
        for seed, (name, epochs) in enumerate(lengths.items())
    ]
    found = train_side_by_side(jobs, at_once=2, ended=lambda job, summary: notes.append(f"{job.out.name} told"))
    assert [summary["epochs"] for summary in found if isinstance(summary, dict)] == [2, 4, 2]
    order = [note for note in notes if note.split()[1] in ("ready", "over:", "told")]
    assert order == [
        "a ready", "b ready", "a over: done", "a told", "c ready", "c over: done", "c told", "b over: done", "b told",
    ] or order == [
        "a ready", "b ready", "a over: done", "a told", "c ready", "b over: done", "b told", "c over: done", "c told",
    ]  # fmt: skip
    train(jobs[2].options, tmp_path / "alone")
    assert left_by(tmp_path / "c") == left_by(tmp_path / "alone")


@pytest.mark.long
def test_recorded_passes_of_two_runs_do_not_mix(
    options: Callable[..., TrainOptions], on_cpu: type[Replays], tmp_path: Path
) -> None:
    asked = [options(ALL_SAVINGS, model="dropping", engine="cudagraph", epochs=4, seed=seed) for seed in (1, 2)]
    for seed, each in enumerate(asked):
        train(each, tmp_path / f"alone-{seed}")
        assert on_cpu.newest.replays > 0
    train_side_by_side([(each, tmp_path / f"beside-{seed}") for seed, each in enumerate(asked)])
    for seed in range(2):
        assert left_by(tmp_path / f"beside-{seed}") == left_by(tmp_path / f"alone-{seed}")


def test_all_are_ready_before_the_first_step_and_then_take_steps_in_turn(
    options: Callable[..., TrainOptions], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("spfde.app.train.loop.PULSE", 1)
    notes: list[str] = []
    # 96 images: six batches of 16, or three of 32; behind them one of evaluation.
    long, short = options(epochs=1), options(epochs=1, batch_size=32)
    train_side_by_side([Job(long, tmp_path / "a", Notes("a", notes)), Job(short, tmp_path / "b", Notes("b", notes))])
    in_turn = ["a 1/6", "b 1/3", "a 2/6", "b 2/3", "a 3/6", "b 3/3", "a 4/6", "a 5/6", "b over: done", "a 6/6"]
    assert notes == ["a ready", "b ready", *in_turn, "a over: done"]


def test_equal_data_are_loaded_once(
    options: Callable[..., TrainOptions], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[Any] = []
    monkeypatch.setattr(side_by_side, "load_data", lambda data, **how: loaded.append(data) or load_data(data, **how))
    asked = [options(epochs=1, seed=seed, data_on="device") for seed in range(3)]
    train_side_by_side([(each, tmp_path / str(number)) for number, each in enumerate(asked)])
    assert loaded == [asked[0].data]


class TestOneThatFails:
    @pytest.mark.long
    def test_a_run_that_diverges_ends_alone(self, options: Callable[..., TrainOptions], tmp_path: Path) -> None:
        good, notes = options(seed=1), list[str]()
        train(good, tmp_path / "alone")
        bad = options(model="resnet8", lr=1e30)
        found = train_side_by_side([Job(bad, tmp_path / "bad", Notes("bad", notes)), Job(good, tmp_path / "good")])
        assert isinstance(found[0], TrainingDiverged)
        assert notes[-1] == "bad over: TrainingDiverged"
        assert left_by(tmp_path / "good") == left_by(tmp_path / "alone")
        assert not (tmp_path / "bad").exists(), "as train leaves nothing of a run that came to nothing"

    def test_a_mistake_in_one_of_them_is_told_for_it_alone(
        self, options: Callable[..., TrainOptions], tmp_path: Path
    ) -> None:
        (tmp_path / "full").mkdir()
        (tmp_path / "full" / "note").write_text("mine")
        asked = [
            Job(options(data="nowhere.npz"), tmp_path / "a"),
            Job(options(), tmp_path / "full"),
            Job(options(model="none"), tmp_path / "c"),
            Job(options(epochs=1), tmp_path / "d"),
            Job(options(epochs=1), tmp_path / "d"),
        ]
        found = train_side_by_side(asked)
        assert [type(each) for each in found] == [DataError, RunFolderError, InvalidArgument, dict, RunFolderError]
        assert sorted(each.name for each in tmp_path.iterdir()) == ["d", "full"]

    def test_one_without_memory_gives_back_what_it_had(
        self, options: Callable[..., TrainOptions], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        alive: list[bool] = []
        gone: list[Any] = []

        class Greedy(Display):
            def epoch_done(self, run: Any, row: dict[str, Any]) -> None:
                gone.append(weakref.ref(run.model))
                raise torch.OutOfMemoryError("CUDA out of memory")

        look = Notes("good", [], at=lambda epochs: alive.append(gone[0]() is not None))
        found = train_side_by_side(
            [Job(options(), tmp_path / "greedy", Greedy()), Job(options(), tmp_path / "good", look)]
        )
        assert isinstance(found[0], UsageError)
        assert isinstance(found[0].__cause__, torch.OutOfMemoryError)
        assert alive == [False, False, False]
        assert found[0].__traceback__ is not None
        # What was safe on disk stays, and the run can go on.
        assert (tmp_path / "greedy" / "checkpoints" / "latest").is_dir()
        train(options(), tmp_path / "greedy", resume=True)
        assert left_by(tmp_path / "greedy") == left_by(tmp_path / "good")


class TestStopped:
    @pytest.mark.parametrize("how", [pytest.param(signal.SIGINT, marks=pytest.mark.long), signal.SIGTERM])
    def test_a_signal_ends_all_and_each_goes_on_alone_or_side_by_side(
        self, how: signal.Signals, options: Callable[..., TrainOptions], tmp_path: Path
    ) -> None:
        asked = [options(ALL_SAVINGS, seed=seed, epochs=4) for seed in range(3)]
        names = ["alone", "first", "second"]
        for seed, each in enumerate(asked):
            train(each, tmp_path / f"whole-{seed}")
        handlers = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
        usual, notes = states(), list[str]()
        stops = Notes("b", notes, at=lambda epochs: os.kill(os.getpid(), how) if epochs == 2 else None)
        displays = [Notes("a", notes), stops, Notes("c", notes)]
        jobs = [Job(each, tmp_path / name, display) for each, name, display in zip(asked, names, displays, strict=True)]
        with pytest.raises(KeyboardInterrupt):
            train_side_by_side(jobs)
        assert states() == usual
        assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == handlers
        stopped = "Terminated" if how == signal.SIGTERM else "KeyboardInterrupt"
        assert sorted(notes[-3:]) == ["a over: GeneratorExit", f"b over: {stopped}", "c over: GeneratorExit"]
        assert not any((tmp_path / name / "summary.json").exists() for name in names)
        train(asked[0], tmp_path / "alone", resume=True)
        train_side_by_side(
            [Job(each, tmp_path / name, None, True) for each, name in zip(asked[1:], names[1:], strict=True)]
        )
        for seed, name in enumerate(names):
            assert left_by(tmp_path / name) == left_by(tmp_path / f"whole-{seed}")

    @pytest.mark.long
    def test_a_run_of_its_own_goes_on_beside_others(self, options: Callable[..., TrainOptions], tmp_path: Path) -> None:
        def stop(epochs: int) -> None:
            raise KeyboardInterrupt

        mine, other = options(seed=3), options(seed=4)
        train(mine, tmp_path / "whole")
        with pytest.raises(KeyboardInterrupt):
            train(mine, tmp_path / "mine", Notes("mine", [], at=stop))
        found = train_side_by_side([Job(mine, tmp_path / "mine", resume=True), Job(other, tmp_path / "other")])
        assert all(isinstance(each, dict) for each in found)
        assert left_by(tmp_path / "mine") == left_by(tmp_path / "whole")


class TestRefused:
    def test_what_a_process_has_once_is_refused_for_several_before_anything_is_done(
        self, options: Callable[..., TrainOptions], tmp_path: Path
    ) -> None:
        asked = [options(profile=3), options(track=("tensorboard",))]
        with pytest.raises(InvalidArgument) as error:
            train_side_by_side([(each, tmp_path / str(number)) for number, each in enumerate(asked)])
        assert [problem.argument for problem in error.value.problems] == ["profile", "track"]
        assert not list(tmp_path.iterdir())

    def test_devices_must_be_one_and_be_there(
        self, options: Callable[..., TrainOptions], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        if not torch.cuda.is_available():
            with pytest.raises(InvalidArgument) as error:
                train_side_by_side([(options(device="cuda"), tmp_path / "a"), (options(), tmp_path / "b")])
            assert [problem.argument for problem in error.value.problems] == ["device"]
        monkeypatch.setattr(side_by_side, "check_device", lambda name: None)
        for names in (("cpu", "cuda:1"), ("mps", "mps")):
            with pytest.raises(InvalidArgument) as error:
                train_side_by_side([(options(device=name), tmp_path / "a") for name in names])
            assert [(problem.argument, problem.value) for problem in error.value.problems] == [("device", names[1])]

    def test_several_processes_are_refused(
        self, options: Callable[..., TrainOptions], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("WORLD_SIZE", "2")
        with pytest.raises(InvalidArgument) as error:
            train_side_by_side([(options(), tmp_path / "run")])
        assert [(problem.argument, problem.value) for problem in error.value.problems] == [("torchrun", 2)]
        assert not list(tmp_path.iterdir())

    def test_none_are_none(self) -> None:
        assert train_side_by_side([]) == []


@pytest.mark.long
def test_one_run_is_what_train_makes_of_it(options: Callable[..., TrainOptions], tmp_path: Path) -> None:
    train(options(epochs=1), tmp_path / "alone")
    train_side_by_side([(options(epochs=1, profile=2), tmp_path / "beside")])
    assert left_by(tmp_path / "beside") == left_by(tmp_path / "alone")
    assert (tmp_path / "beside" / "trace.json").is_file()


def test_the_example_does_what_it_says() -> None:
    runner = doctest.DocTestRunner(verbose=False, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    text, told = train_side_by_side.__doc__ or "", list[str]()
    names = {"spfde": spfde}
    runner.run(doctest.DocTestParser().get_doctest(text, names, "example", None, 0), out=told.append)
    assert runner.tries > 0
    assert not told, "".join(told)
