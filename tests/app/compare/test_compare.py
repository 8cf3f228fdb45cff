"""`spfde compare` from the command line to the table."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from helpers.commands import Spfde, start
from spfde.app.compare import command
from spfde.app.compare.command import quick_images
from spfde.app.compare.folder import Comparison
from spfde.app.compare.running import check
from spfde.app.compare.spec import read_spec

TRAINING = ("--epochs", "2", "--batch-size", "16", "--engine", "masked", "--lr", "0.05")
MEASURED = ("seconds", "loader_wait_seconds", "peak_memory_bytes")


def words(data: Path, *more: str) -> list[str]:
    return ["compare", "--data", str(data), "--recipe", "dense,set", "--sparsity", "0.5,0.8", *TRAINING, *more]


def table(folder: Path) -> dict[str, Any]:
    """``table.json`` without what is measured."""
    found: dict[str, Any] = json.loads((folder / "table.json").read_text())
    for candidate in found["candidates"]:
        for place in (candidate, *candidate["runs"]):
            for name in (*MEASURED, "pareto"):
                place.pop(name, None)
    return found


def stamps(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.glob("runs/*/*/summary.json")}


@pytest.fixture(autouse=True)
def no_page_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """By what runs in this process: plots take longer than a run does; `test_page_at_the_end.py` is about them."""
    monkeypatch.setattr(command, "find_spec", lambda name: None)


@pytest.fixture(scope="module")
def whole(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A comparison of three candidates over two seeds."""
    folder = tmp_path_factory.mktemp("whole")
    ended = start(words(tiny, "--seeds", "2", "--out", "table"), log=folder / "log", cwd=folder).end()
    assert ended.code == 0, ended.err
    return folder / "table"


def test_lists_become_runs_and_runs_a_table(whole: Path, spfde: Spfde) -> None:
    names = ["dense", "set sparsity=0.5", "set sparsity=0.8"]
    found = table(whole)
    assert [each["name"] for each in found["candidates"]] == names
    assert [each["n"] for each in found["candidates"]] == [2, 2, 2]
    assert found["runs"] == {"wanted": 6, "finished": 6}
    assert [each["flops_ratio"]["mean"] for each in found["candidates"]] == sorted(
        (each["flops_ratio"]["mean"] for each in found["candidates"]), reverse=True
    )
    for run in whole.glob("runs/*/*"):
        summary = json.loads((run / "summary.json").read_text())
        [candidate] = [each for each in found["candidates"] if each["name"].replace(" ", "-") == run.parent.name]
        assert summary["test_accuracy"] in [each["test_accuracy"] for each in candidate["runs"]]
        assert f"seed-{summary['seed']}" == run.name
    ended = spfde("train", "--resume", whole / "runs" / "dense" / "seed-0")
    assert "is finished: test accuracy" in ended.out, "they are ordinary run folders"


def test_a_finished_comparison_does_nothing_and_more_seeds_train_those_alone(whole: Path, spfde: Spfde) -> None:
    before = stamps(whole)
    ended = spfde("compare", "--resume", whole, "--format", "latex", "--baseline", "set sparsity=0.5")
    assert (ended.code, stamps(whole)) == (0, before)
    assert table(whole)["baseline"] == "set sparsity=0.5"
    assert "\\toprule" in (whole / "table.tex").read_text()
    ended = spfde("compare", "--resume", whole, "--seeds", "3", "--baseline", "dense")
    assert ended.code == 0, ended.err
    assert {path: stamp for path, stamp in stamps(whole).items() if path in before} == before
    assert [each["n"] for each in table(whole)["candidates"]] == [3, 3, 3]
    fewer = spfde("compare", "--resume", whole, "--seeds", "2")
    assert (fewer.code, "lacks seed 2" in fewer.err) == (2, True)


def test_a_killed_comparison_goes_on_to_the_same_table(tiny: Path, whole: Path, tmp_path: Path) -> None:
    argv = words(tiny, "--seeds", "1", "--out", "killed")
    killed = start(argv, log=tmp_path / "killed-log", cwd=tmp_path, wait_at="after an epoch")
    killed.reach()
    killed.kill(signal.SIGKILL)
    assert not list((tmp_path / "killed").glob("runs/*/*/summary.json"))
    [begun] = (tmp_path / "killed").glob("runs/*/*")
    assert (begun / "checkpoints" / "latest").is_dir()
    ended = start(["compare", "--resume", "killed"], log=tmp_path / "log", cwd=tmp_path).end()
    assert ended.code == 0, ended.err
    runs = list((tmp_path / "killed").glob("runs/*/*"))
    assert len(runs) == 3
    for run in runs:
        other = whole / run.relative_to(tmp_path / "killed")
        ours, theirs = (
            [{k: v for k, v in json.loads(line).items() if k not in MEASURED} for line in text.splitlines()]
            for text in ((run / "metrics.jsonl").read_text(), (other / "metrics.jsonl").read_text())
        )
        assert ours == theirs


@pytest.mark.long
def test_ctrl_c_says_how_to_go_on(tiny: Path, tmp_path: Path) -> None:
    stopped = start(words(tiny, "--out", "x"), log=tmp_path / "log", cwd=tmp_path, wait_at="after an epoch")
    stopped.reach()
    ended = stopped.kill(signal.SIGINT)
    assert ended.code == 130
    assert "Go on with `spfde compare --resume x`" in ended.err


def test_several_processes_come_to_the_same_figures(tiny: Path, whole: Path, spfde: Spfde, here: Path) -> None:
    ended = spfde(*words(tiny, "--seeds", "1", "--out", "side", "--jobs", "2"))
    assert ended.code == 0, ended.err
    ours, theirs = (
        {
            (each["name"], run["seed"]): run["test_accuracy"]
            for each in table(path)["candidates"]
            for run in each["runs"]
        }
        for path in (here / "side", whole)
    )
    assert ours == {key: theirs[key] for key in ours}
    assert len(ours) == 3


@pytest.mark.long
def test_processes_end_with_the_one_that_started_them(tiny: Path, tmp_path: Path) -> None:
    argv = [
        sys.executable,
        "-m",
        "spfde",
        *words(tiny, "--seeds", "2", "--out", "x", "--jobs", "2", "--epochs", "5000"),
    ]
    with subprocess.Popen(argv, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as parent:
        until = time.monotonic() + 60
        while len(list(tmp_path.glob("x/runs/*/*/metrics.jsonl"))) < 2 and time.monotonic() < until:
            time.sleep(0.1)
        parent.kill()
    until = time.monotonic() + 30
    while (ended := _are_free(tmp_path)) is False and time.monotonic() < until:
        time.sleep(0.1)
    assert ended, "the runs' folders are still in use"


def _are_free(folder: Path) -> bool:
    import fcntl

    for lock in folder.glob("x/runs/*/*/.lock"):
        with lock.open("r+") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
    return True


@pytest.mark.parametrize("jobs", ["1", pytest.param("2", marks=pytest.mark.long)])
def test_a_run_that_fails_ends_no_other_and_is_tried_again(jobs: str, tiny: Path, spfde: Spfde, here: Path) -> None:
    argv = [
        "compare",
        "--data",
        tiny,
        "--recipe",
        "dense",
        *TRAINING[:-2],
        "--seeds",
        "1",
        "--lr",
        "0.05,1e30",
        "--out",
        "x",
    ]
    ended = spfde(*argv, "--jobs", jobs)
    assert ended.code == 2
    assert "1 of 2 runs failed; --resume tries them again" in ended.err
    assert "dense lr=1e+30, seed 0: the loss became" in ended.err
    found = table(here / "x")
    assert [each["n"] for each in found["candidates"]] == [1, 0]
    assert "In no figure, for they failed: dense lr=1e+30, seed 0" in "".join(found["notes"])
    assert spfde("compare", "--resume", "x", "--jobs", jobs).code == 2


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--seeds", "none"], "--seeds='none'"),
        (["--jobs", "0"], "--jobs=0"),
        (["--format", "pdf"], "--format='pdf'"),
        (["--baseline", "sett"], "--baseline='sett': is no candidate"),
        (["--recipe", "dense,sett"], "Did you mean 'set'"),
        (["--sparsity", "0.5,high"], "--sparsity='high'"),
        (["--sparsity", "0.5,1.5"], "1.5"),
        (["--model", "resnet8,resnet9"], "resnet9"),
        (["--recipe", "mest", "--freeze", "0.1,0.9"], "cannot be reached"),
        (["--data", "gone.npz"], "gone.npz"),
        (["--engine", "fast"], "--engine='fast'"),
        (["spfde_cifar100", "--lr", "0.1,0.2"], "is a list beside a specification"),
        (["spfde_cifar1000"], "spfde_cifar10"),
        (["--resume", "x", "--lr", "0.1"], "takes no"),
        (["spfde_cifar10", "--resume", "x"], "is not read with --resume"),
        (["spfde_cifar10", "--quick", "--seeds", "2"], "--quick=True: takes no"),
        (["--seed", "1"], "No such option: --seed"),
        (["--resume", "gone"], "gone: is no folder of `spfde compare` (there is no such folder)"),
    ],
)
def test_a_mistake_is_told_before_anything_is_made(
    more: list[str], told: str, tiny: Path, spfde: Spfde, here: Path
) -> None:
    base = [] if "--resume" in more else words(tiny)[1:]
    ended = spfde("compare", *base, *more)
    assert (ended.code, "Traceback" in ended.err) == (2, False)
    assert told in " ".join(ended.err.split())
    assert not list(here.iterdir())


def test_a_folder_that_is_in_use_or_holds_something_is_left_alone(whole: Path, tiny: Path, spfde: Spfde) -> None:
    held = spfde(*words(tiny, "--out", str(whole)))
    assert (held.code, f"spfde compare --resume {whole}" in held.err) == (2, True)
    run = next(whole.glob("runs/*/*"))
    ended = spfde("compare", "--resume", run)
    assert (ended.code, "It is a run" in ended.err) == (2, True)
    copied = whole.with_name("copied")
    copied.mkdir()
    own, lone = {"epochs": 1}, {"version": 1, "baseline": "a", "seeds": [0]}
    a = {"name": "a", "folder": "a", "options": own}
    damaged = (
        *("{", "{}", '{"version": 2}'),
        json.dumps(lone | {"candidates": [a | {"folder": "../../elsewhere"}]}),
        json.dumps(lone | {"candidates": [a, a | {"name": "b"}]}),
        json.dumps(lone | {"candidates": [a, a | {"folder": "b"}]}),
        json.dumps(lone | {"candidates": [a | {"name": "b"}]}),
        json.dumps(lone | {"candidates": [a | {"options": {}}]}),
        json.dumps(lone | {"candidates": [a | {"name": "a\nb"}], "baseline": "a\nb"}),
    )
    for text in damaged:
        (copied / "comparison.json").write_text(text)
        ended = spfde("compare", "--resume", copied)
        assert (ended.code, "is damaged" in ended.err) == (2, True), text


def test_runs_that_are_elsewhere_or_other_ones_are_refused(whole: Path, spfde: Spfde, here: Path) -> None:
    """A folder of somebody else's may hold links, and a comparison that was written by hand."""
    copied = here / "copied"
    shutil.copytree(whole, copied)
    run = copied / "runs" / "dense"
    elsewhere = here / "elsewhere"
    elsewhere.mkdir()
    shutil.rmtree(run)
    run.symlink_to(elsewhere)
    ended = spfde("compare", "--resume", copied)
    assert (ended.code, "is a link that leads out" in ended.err) == (2, True)
    assert not list(elsewhere.iterdir())
    run.unlink()
    shutil.copytree(whole / "runs" / "dense", run)
    text = (copied / "comparison.json").read_text()
    (copied / "comparison.json").write_text(text.replace('"lr": 0.05', '"lr": 5.0'))
    ended = spfde("compare", "--resume", copied)
    assert (ended.code, "holds another run: there lr is 0.05, and here 5.0" in ended.err) == (2, True)


def test_the_papers_experiments_are_all_taken_in_their_short_form_and_some_of_them_run(
    spfde: Spfde, here: Path
) -> None:
    whole = Comparison.of(read_spec("spfde_cifar100").quickened(str(quick_images(here / "images.npz"))), quick=True)
    assert len(whole.candidates) == 22
    check(whole)
    head, *candidates = spfde("compare", "spfde_cifar100", "--print").out.split("[[candidates]]")
    *_, last = candidates
    options = last[last.index("# Each method once") :]
    kept = [text for text in candidates if "SpFDE 10 %" in text or '"freezing by convergence"' in text]
    kept.insert(0, '\nrecipe = ["dense", "snip"]\nsparsity = [0.9, 0.95]\n')
    text = head.replace("MEST EM&S sparsity=0.9", "dense")
    (here / "some.toml").write_text("[[candidates]]".join([text, *kept[:-1], kept[-1].replace(options, "")]) + options)
    ended = spfde("compare", "some.toml", "--quick", "--out", "quick", "--quiet")
    assert ended.code == 0, ended.err
    found = table(here / "quick")
    assert found["runs"] == {"wanted": 5, "finished": 5}
    assert any("short form" in note for note in found["notes"])


@pytest.mark.long
def test_the_papers_experiments_run_in_their_short_form(spfde: Spfde, here: Path) -> None:
    ended = spfde("compare", "spfde_cifar100", "--quick", "--out", "quick", "--quiet")
    assert ended.code == 0, ended.err
    found = table(here / "quick")
    assert found["runs"] == {"wanted": 22, "finished": 22}
    assert any("short form" in note for note in found["notes"])


@pytest.mark.long
def test_imagenet_s_table_runs_in_its_short_form(spfde: Spfde, here: Path) -> None:
    ended = spfde("compare", "spfde_imagenet", "--quick", "--out", "quick", "--quiet")
    assert ended.code == 0, ended.err
    assert table(here / "quick")["runs"] == {"wanted": 12, "finished": 12}


def test_a_specification_is_printed_to_be_changed(spfde: Spfde) -> None:
    printed = spfde("compare", "spfde_cifar10", "--print")
    assert (printed.code, "[[candidates]]" in printed.out) == (0, True)


@pytest.mark.long
def test_a_thousand_finished_runs_make_a_table(tiny: Path, spfde: Spfde, here: Path) -> None:
    """Of fabricated summaries; how long it takes is in `benchmarks/compare.py`."""
    lrs = ",".join(f"{0.001 * k:g}" for k in range(1, 101))
    code = start(["compare", "--data", str(tiny), "--lr", lrs, "--seeds", "10", "--out", "x", *TRAINING[:4]],
                 log=here / "log", cwd=here, wait_at="after an epoch")  # fmt: skip
    code.reach()
    code.kill(signal.SIGKILL)
    summary = {"test_accuracy": 0.5, "best_test_accuracy": 0.5, "training_flops": 1, "flops_ratio": 1.0, "seconds": 1.0}
    candidates = json.loads((here / "x" / "comparison.json").read_text())["candidates"]
    for candidate in candidates:
        for seed in range(10):
            folder = here / "x" / "runs" / candidate["folder"] / f"seed-{seed}"
            os.makedirs(folder, exist_ok=True)
            (folder / "summary.json").write_text(json.dumps(summary))
    ended = spfde("compare", "--resume", "x", "--quiet")
    assert ended.code == 0, ended.err
    assert table(here / "x")["runs"] == {"wanted": 1000, "finished": 1000}
