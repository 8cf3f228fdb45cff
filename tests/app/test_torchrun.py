"""Several processes train one run: `torchrun -m spfde train`."""

from __future__ import annotations

import json
import re
import shutil
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from helpers.commands import Command, Outcome, run, start, start_together
from helpers.processes import start as run_module
from spfde.app.runs.checkpoints import epoch_of

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no distributed package")

EPOCHS = 4
MEASURED = ("seconds", "loader_wait_seconds", "peak_memory_bytes", "saved_tensor_bytes")


def words(data: Path, out: str = "run", *more: str) -> list[str]:
    options = ["--epochs", str(EPOCHS), "--batch-size", "16", "--interval", "1", "--engine", "masked"]
    return ["train", "--data", str(data), "--out", out, *options, *more]


RESUME = ["train", "--resume", "run"]


def end(commands: Sequence[Command]) -> list[Outcome]:
    return [command.end() for command in commands]


def together(folder: Path, argv: Sequence[str], *, ranks: int = 2) -> list[Outcome]:
    """Processes that train together, without a launcher that looks after them, to their end."""
    return end(start_together(argv, log=folder / "together", cwd=folder, ranks=ranks))


def alone(folder: Path, argv: Sequence[str]) -> Outcome:
    return start(argv, log=folder / "alone", cwd=folder).end()


def torchrun(folder: Path, *argv: str, ranks: int = 2) -> Outcome:
    """The real launcher; its own exit code is 1 whenever one of its processes has another one than 0."""
    ended = run_module("-m", "spfde", *argv, ranks=ranks, cwd=folder)
    return Outcome(ended.returncode, ended.stdout, ended.stderr)


def codes(launched: Outcome) -> list[int]:
    """The exit codes of the processes, as the launcher tells them."""
    return [int(code) for code in re.findall(r"^  exitcode  : (-?\d+)", launched.err, re.MULTILINE)]


def said(*outcomes: Outcome) -> list[str]:
    """What the processes have said beside warnings."""
    lines = [line for outcome in outcomes for line in outcome.err.splitlines()]
    return [line for line in lines if line.startswith("spfde: ") and not line.startswith("spfde: warning: ")]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / "latest" / "model.safetensors")


def rows(run: Path) -> list[dict[str, Any]]:
    """The epochs' lines without what is measured."""
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in MEASURED} for row in found]


def summary(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "summary.json").read_text())
    return found


def equal(one: Path, other: Path) -> bool:
    mine, theirs = weights(one), weights(other)
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.fixture(scope="module")
def launched(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome]:
    """A run of two processes that nobody disturbed, and how it ended."""
    folder = tmp_path_factory.mktemp("whole")
    return folder / "run", torchrun(folder, *words(tiny))


@pytest.fixture
def whole(launched: tuple[Path, Outcome]) -> Path:
    return launched[0]


def test_two_processes_train_one_run_and_the_first_one_tells_of_it(launched: tuple[Path, Outcome]) -> None:
    run, ended = launched
    assert ended.code == 0, ended.err
    assert "2 processes, 16 samples each: 32 a step" in " ".join(ended.out.split())
    assert ended.out.count("plan (modelled)") == ended.out.count("run folder: run") == 1
    assert ended.err.count("spfde: warning: ") == 1  # both have come to it: --interval is too short for forgetting
    assert summary(run)["processes"] == 2
    assert sorted(path.name for path in run.iterdir()) == [
        ".lock", "checkpoints", "config.json", "metrics.jsonl", "recipe.toml", "summary.json",
    ]  # fmt: skip


def test_the_figures_are_those_of_all_processes(whole: Path) -> None:
    # 77 samples of 96 in batches of 16: five, and the first one comes again, so that each process has three.
    samples = 77 + 16
    assert [row["samples"] for row in rows(whole)] == [samples] * EPOCHS
    assert [row["steps"] for row in rows(whole)] == [3] * EPOCHS
    assert summary(whole)["samples_seen"] == EPOCHS * samples
    # Of 32 test images each counts once, so that accuracies are whole parts of 32.
    assert all((row["test_accuracy"] * 32).is_integer() for row in rows(whole))
    assert all(round(row["train_accuracy"] * samples, 6).is_integer() for row in rows(whole))


def test_the_test_set_is_shared_exactly_once(tiny: Path, whole: Path, tmp_path: Path) -> None:
    # One process goes on with the last epoch only to test: what two have found is what one finds of the same weights.
    from spfde.app.data.datasets import load_data
    from spfde.app.train.augment import normalise
    from spfde.app.train.models import build_for

    data = load_data(tiny, root=tmp_path)
    model = build_for("resnet8", data.spec, width=1).to(memory_format=torch.channels_last).eval()
    model.load_state_dict(weights(whole))
    with torch.no_grad():
        images = normalise(data.test.images, data.mean, data.std).contiguous(memory_format=torch.channels_last)
        logits = model(images)
    loss = torch.nn.functional.cross_entropy(logits, data.test.labels)
    assert rows(whole)[-1]["test_loss"] == pytest.approx(float(loss), rel=1e-5)
    hits = (logits.argmax(1) == data.test.labels).double().mean()
    assert rows(whole)[-1]["test_accuracy"] == float(hits)


@pytest.mark.long
def test_a_second_run_of_two_processes_is_the_same_bit_for_bit(tiny: Path, whole: Path, tmp_path: Path) -> None:
    together(tmp_path, words(tiny))
    assert equal(whole, tmp_path / "run")
    assert rows(whole) == rows(tmp_path / "run")


@pytest.mark.parametrize(
    ("rank", "moment"),
    [
        pytest.param(1, "in the third of shared epochs", marks=pytest.mark.long),
        pytest.param(0, "in the third of shared epochs", marks=pytest.mark.long),
        pytest.param(0, "in a checkpoint", marks=pytest.mark.long),
        pytest.param(0, "before the summary", marks=pytest.mark.long),
    ],
)
def test_when_one_process_is_killed_the_other_ends_and_the_run_goes_on_to_the_same(
    rank: int, moment: str, tiny: Path, whole: Path, tmp_path: Path
) -> None:
    running = start_together(words(tiny), log=tmp_path / "killed", cwd=tmp_path, wait_at={rank: moment})
    running[rank].reach()
    running[rank].kill(signal.SIGKILL)
    other = running[1 - rank].end()
    assert other.code == 2, other.err
    assert "Traceback" not in other.err
    if rank:
        (line,) = said(other)
        assert "spfde train --resume run" in line
    assert [ended.code for ended in together(tmp_path, RESUME)] == [0, 0]
    assert equal(whole, tmp_path / "run")
    assert rows(whole) == rows(tmp_path / "run")


@pytest.mark.long
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_all_with_one_code_and_one_line_and_the_run_goes_on(
    number: int, code: int, tiny: Path, whole: Path, tmp_path: Path
) -> None:
    moment = "in the third of shared epochs"
    running = start_together(words(tiny), log=tmp_path / "told", cwd=tmp_path, wait_at={0: moment, 1: moment})
    for command in running:
        command.reach()
    for command in running:
        command.send(number)
    ended = end(running)
    assert [each.code for each in ended] == [code, code]
    (line,) = said(*ended)
    assert "spfde train --resume run" in line
    together(tmp_path, RESUME)
    assert equal(whole, tmp_path / "run")


@pytest.mark.long
def test_sigterm_waits_for_the_checkpoint_that_the_first_process_writes(tiny: Path, tmp_path: Path) -> None:
    running = start_together(
        words(tiny), log=tmp_path / "told", cwd=tmp_path, wait_at={0: "slowly before a checkpoint"}
    )
    running[0].reach()
    for command in running:
        command.send(signal.SIGTERM)
    ended = end(running)
    assert [each.code for each in ended] == [143, 143]
    assert len(said(*ended)) == 1
    assert epoch_of(tmp_path / "run" / "checkpoints" / "latest") == 2  # the one that was under way


@pytest.mark.long
def test_what_one_process_alone_finds_wrong_ends_all_with_its_words(tiny: Path, tmp_path: Path) -> None:
    running = start_together(words(tiny), log=tmp_path / "wrong", cwd=tmp_path, wait_at={1: "no data"})
    ended = end(running)
    assert [each.code for each in ended] == [2, 2]
    assert said(*ended) == ["spfde: the disk of this host is gone"]
    assert not (tmp_path / "run").exists()


@pytest.mark.long
def test_under_the_launcher_too_that_ends_all_with_its_code_and_its_words_once(tiny: Path, tmp_path: Path) -> None:
    """Each of two hosts with one process: the launcher stops the first one as soon as the second has ended."""
    script = tmp_path / "second_has_no_data.py"
    script.write_text(
        "import os, sys\n"
        "from pathlib import Path\n"
        "from helpers import commands\n"
        "from spfde.app.cli import main\n"
        "os.environ['LOCAL_RANK'] = '0'\n"
        "if os.environ['RANK'] == '1':\n"
        "    commands.MOMENTS['no data'](Path('flag'))\n"
        "main()\n"
    )
    ended = run_module(str(script), *words(tiny), ranks=2, cwd=tmp_path)
    launched = Outcome(ended.returncode, ended.stdout, ended.stderr)
    assert set(codes(launched)) == {2}
    assert said(launched) == ["spfde: the disk of this host is gone"]


@pytest.mark.long
def test_what_no_launcher_started_is_done_whatever_the_rank(tmp_path: Path) -> None:
    """A container of a job names its rank to every command, not to those of a launcher alone."""
    ended = run("report", "nowhere", cwd=tmp_path, WORLD_SIZE="2", RANK="1")
    assert (ended.code, ended.err.count("nowhere: is no run folder")) == (2, 1)


@pytest.mark.long
def test_a_run_goes_on_in_one_process_and_in_two_again(tiny: Path, tmp_path: Path) -> None:
    stopped = start_together(words(tiny), log=tmp_path / "two", cwd=tmp_path, wait_at={0: "before a checkpoint"})
    stopped[0].reach()
    for command in stopped:
        command.send(signal.SIGKILL)
    end(stopped)
    one = start(RESUME, log=tmp_path / "one", cwd=tmp_path, wait_at="after an epoch")
    one.reach()
    one.kill(signal.SIGKILL)
    assert [ended.code for ended in together(tmp_path, RESUME)] == [0, 0]
    # Five batches of 77 samples: in two processes the first one comes again, in one none does.
    assert [row["samples"] for row in rows(tmp_path / "run")] == [93, 93, 77, 93]
    assert [row["steps"] for row in rows(tmp_path / "run")] == [3, 3, 5, 3]
    assert summary(tmp_path / "run")["processes"] == 2


@pytest.mark.long
@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["train", "--lr", "-1"], "--lr=-1.0"),
        (["train", "--data", "gone.npz"], "gone.npz"),
        (["train", "--resume", "nowhere"], "nowhere: is no run folder"),
        (["train", "--cache-variants", "2"], "--cache-variants=2"),
        (["train", "--engine", "fastest"], "--engine='fastest'"),
        (["train", "--bogus"], "No such option"),
        (["report", "nowhere"], "nowhere: is no run folder"),
    ],
)
def test_a_mistake_is_told_once_and_all_end_with_its_code(argv: list[str], line: str, tmp_path: Path) -> None:
    ended = torchrun(tmp_path, *argv)
    assert ended.code == 1
    assert ended.err.count(line) == 1, ended.err
    assert set(codes(ended)) == {2}
    assert ended.err.count("Traceback") == 1  # the launcher's own


@pytest.mark.long
def test_a_folder_that_holds_a_run_is_refused_once_and_left_as_it_is(tiny: Path, whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "run")
    ended = together(tmp_path, words(tiny))
    assert [each.code for each in ended] == [2, 2]
    assert len(said(*ended)) == 1
    assert equal(whole, tmp_path / "run")
    finished = together(tmp_path, RESUME)
    assert [each.code for each in finished] == [0, 0]
    assert (finished[0].out.count("is finished"), finished[1].out) == (1, "")


@pytest.mark.long
@pytest.mark.parametrize("engine", ["native", "auto"])
def test_the_engine_that_is_taken_trains_in_several_processes(engine: str, tiny: Path, tmp_path: Path) -> None:
    for out in ("run", "again"):
        ended = together(tmp_path, words(tiny, out, "--engine", engine, "--track", "tensorboard", "--profile", "1"))
        assert [each.code for each in ended] == [0, 0], ended
    assert equal(tmp_path / "run", tmp_path / "again")
    assert (tmp_path / "run" / "trace.json").is_file()
