"""A run folder survives a kill at any moment, and says clearly what is wrong with it."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import pytest

from helpers import commands
from helpers.native import needs_kernels
from spfde import presets
from spfde.app.runs.checkpoints import Checkpoints, described
from spfde.app.runs.folder import CONFIG, RECIPE, RunFolder
from spfde.app.train import models, setup
from spfde.app.train.events import Display
from spfde.app.train.loop import train
from spfde.app.train.options import TrainOptions
from spfde.core.errors import RunFolderError, StateMismatch
from spfde.freezing import ProgressiveFreezing
from spfde.sieving import DataSieving, OneTimeRemoval

MEASURED = ("seconds", "loader_wait_seconds", "peak_memory_bytes", "dense_step_seconds", "dense_seconds_extrapolated")
EPOCHS = 6


class Stopping(Display):
    """Ends the run with Ctrl-C after some epochs."""

    def __init__(self, epochs: int) -> None:
        self.left = epochs

    def epoch_done(self, run: Any, row: dict[str, Any]) -> None:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


def arguments(data: Path, out: str) -> list[str]:
    return [
        "train",
        "--data",
        str(data),
        "--epochs",
        str(EPOCHS),
        "--freeze",
        "0.1",
        "--batch-size",
        "16",
        "--out",
        out,
    ]


def options_for(data: Path, **changes: Any) -> TrainOptions:
    recipe = presets.spfde.replace(freezing=ProgressiveFreezing(flops_reduction=0.1)).to_dict()
    given = {"data": str(data), "recipe": recipe, "epochs": 4, "batch_size": 16, "dense_timing_steps": 0}
    return TrainOptions(**{**given, **changes})


def read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def without_measured(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in MEASURED}


def assert_same_run(folder: Path, expected: Path) -> None:
    """Equal figures but for what was measured, and equal weights bit for bit."""
    rows, wanted = lines(folder / "metrics.jsonl"), lines(expected / "metrics.jsonl")
    assert [without_measured(row) for row in rows] == [without_measured(row) for row in wanted]
    assert without_measured(read(folder / "summary.json")) == without_measured(read(expected / "summary.json"))
    for name in ("latest", "previous", "best"):
        weights = Path("checkpoints") / name / "model.safetensors"
        assert (folder / weights).read_bytes() == (expected / weights).read_bytes(), name
    assert not list(folder.rglob("*.writing*"))


def whole_and_resumed(options: TrainOptions, place: Path) -> Path:
    """The folder of a whole run, which one that was stopped after three epochs has come to, too."""
    train(options, place / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(options, place / "stopped", Stopping(3))
    train(options, place / "stopped", resume=True)
    assert_same_run(place / "stopped", place / "whole")
    return place / "whole"


@pytest.mark.parametrize(
    "sieving",
    [
        DataSieving(removed_fraction=0.25, criterion="loss", rescale_loss=True, balanced=True),
        pytest.param(OneTimeRemoval(removed_fraction=0.25, at_fraction=0.5), marks=pytest.mark.long),
        pytest.param(
            DataSieving(removed_fraction=0.25, criterion="top-loss", full_last=0.3, rescale_loss=True),
            marks=pytest.mark.long,
        ),
    ],
    ids=["rescaled and balanced", "one-time", "all in the end"],
)
def test_a_stopped_run_with_another_sieving_goes_on_as_if_nothing_had_been(
    tiny: Path, tmp_path: Path, sieving: DataSieving | OneTimeRemoval
) -> None:
    recipe = presets.mest.replace(sieving=sieving, update_interval_epochs=1).to_dict()
    whole = whole_and_resumed(options_for(tiny, recipe=recipe), tmp_path)
    in_use = {row["partial_samples"] for row in lines(whole / "metrics.jsonl")}
    assert len(in_use) == (2 if isinstance(sieving, OneTimeRemoval) or sieving.full_last else 1)


@needs_kernels
def test_a_stopped_run_in_bf16_goes_on_as_if_nothing_had_been(tiny: Path, tmp_path: Path) -> None:
    whole = whole_and_resumed(options_for(tiny, precision="bf16", engine="native"), tmp_path)
    assert read(whole / "summary.json")["engine"] == "native"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def uninterrupted(tiny: Path, place: Path) -> Path:
    """A run that nobody disturbed."""
    ended = commands.start(arguments(tiny, "whole"), log=place / "whole", cwd=place).end()
    assert ended.code == 0, ended.err
    return place / "whole"


@pytest.fixture(scope="module")
def _stopped_folder(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.raises(KeyboardInterrupt):
        train(options_for(tiny), out, Stopping(3))
    return out


@pytest.fixture
def stopped(_stopped_folder: Path, tmp_path: Path) -> Path:
    """A copy of a run that was interrupted after three of four epochs."""
    return Path(shutil.copytree(_stopped_folder, tmp_path / "run"))


def resume(folder: Path, display: Display | None = None) -> dict[str, Any]:
    config = RunFolder(folder).read_json(CONFIG)
    options = TrainOptions.from_config(config, folder / CONFIG)
    return train(options, folder, display, resume=True)


class TestKilledRuns:
    @pytest.mark.parametrize(
        "moment",
        [
            "among the first batches",
            # Runs that are stopped otherwise are so at these two.
            pytest.param("among later batches", marks=pytest.mark.long),
            pytest.param("before a checkpoint", marks=pytest.mark.long),
            "in a checkpoint",
            "before a checkpoint is named",
            "before the summary",
        ],
    )
    def test_a_run_killed_at_any_moment_ends_like_one_that_never_stopped(
        self, moment: str, tiny: Path, place: Path, uninterrupted: Path
    ) -> None:
        name = moment.replace(" ", "-")
        running = commands.start(arguments(tiny, name), log=place / name, cwd=place, wait_at=moment)
        running.reach()
        assert running.kill(signal.SIGKILL).code == -signal.SIGKILL
        assert not (place / name / "summary.json").exists()
        ended = commands.start(["train", "--resume", name], log=place / f"{name}-again", cwd=place).end()
        assert ended.code == 0, ended.err
        assert_same_run(place / name, uninterrupted)
        started_over = moment == "among the first batches"
        assert ("starting over" in ended.out) == started_over
        assert ("going on after" in ended.out) != started_over

    @needs_kernels
    @pytest.mark.long
    def test_a_killed_run_with_a_prefix_cache_ends_like_one_that_never_stopped(self, tiny: Path, place: Path) -> None:
        cached = ["--cache-variants", "1", "--engine", "native"]
        ended = commands.start(arguments(tiny, "cached") + cached, log=place / "cached", cwd=place).end()
        assert ended.code == 0, ended.err
        assert read(place / "cached" / "config.json")["command"]["cache_variants"] == 1
        argv = arguments(tiny, "cached-killed") + cached
        running = commands.start(argv, log=place / "cached-killed", cwd=place, wait_at="before a checkpoint")
        running.reach()
        running.kill(signal.SIGKILL)
        ended = commands.start(["train", "--resume", "cached-killed"], log=place / "again", cwd=place).end()
        assert ended.code == 0, ended.err
        assert_same_run(place / "cached-killed", place / "cached")

    @needs_kernels
    def test_a_run_goes_on_with_another_cache_folder(self, tiny: Path, place: Path) -> None:
        for name in ("one", "two"):
            (place / name).mkdir()
        argv = [*arguments(tiny, "moved"), "--cache-variants", "1", "--engine", "native", "--cache-folder", "one"]
        running = commands.start(argv, log=place / "moved", cwd=place, wait_at="before a checkpoint")
        running.reach()
        running.kill(signal.SIGKILL)
        argv = ["train", "--resume", "moved", "--cache-folder", "two"]
        ended = commands.start(argv, log=place / "moved-again", cwd=place).end()
        assert ended.code == 0, ended.err
        assert read(place / "moved" / "summary.json")["epochs"] == EPOCHS

    def test_a_stopped_run_goes_on_from_anywhere(self, tiny: Path, place: Path, uninterrupted: Path) -> None:
        running = commands.start(arguments(tiny, "term"), log=place / "term", cwd=place, wait_at="among later batches")
        running.reach()
        ended = running.kill(signal.SIGTERM)
        assert ended.code == 143
        assert ended.err == "spfde: terminated. Go on with `spfde train --resume term`.\n"
        # From another folder: what the run reads is kept with its absolute path.
        elsewhere = place / "elsewhere"
        elsewhere.mkdir()
        argv = ["train", "--quiet", "--resume", str(place / "term")]
        ended = commands.start(argv, log=place / "term-again", cwd=elsewhere).end()
        assert (ended.code, ended.out, ended.err) == (0, "", "")
        assert_same_run(place / "term", uninterrupted)

    def test_control_c_ends_a_run_with_the_hint_to_resume_it(self, tiny: Path, place: Path) -> None:
        running = commands.start(arguments(tiny, "int"), log=place / "int", cwd=place, wait_at="before a checkpoint")
        running.reach()
        ended = running.kill(signal.SIGINT)
        assert ended.code == 130
        assert ended.err == "spfde: interrupted. Go on with `spfde train --resume int`.\n"

    def test_a_folder_in_use_is_refused_while_its_process_lives_and_no_longer(self, tiny: Path, place: Path) -> None:
        running = commands.start(
            [*arguments(tiny, "busy"), "--workers", "1"],
            log=place / "busy",
            cwd=place,
            wait_at="among the first batches",
        )
        running.reach()
        second = commands.start(["train", "--resume", "busy"], log=place / "second", cwd=place).end()
        assert second.code == 2
        assert second.err.startswith("spfde: busy: is in use by another process. ")
        with pytest.raises(RunFolderError, match="is in use by another process"):
            RunFolder.create(place / "busy")
        running.send(signal.SIGKILL)
        # At once, though the loader's worker looks for its parent only every five seconds.
        deadline = time.monotonic() + 3
        while time.monotonic() < deadline:
            with contextlib.suppress(RunFolderError):
                RunFolder.reopen(place / "busy").close()
                break
        else:
            pytest.fail("the folder is still locked")


class TestResuming:
    def test_the_file_of_metrics_is_restored_whatever_became_of_it(self, stopped: Path) -> None:
        (stopped / "metrics.jsonl").write_text('{"epoch": 0, "tra')
        resume(stopped)
        assert [row["epoch"] for row in lines(stopped / "metrics.jsonl")] == [0, 1, 2, 3]

    @pytest.mark.parametrize("checkpoint", [True, False])
    def test_a_recipe_file_that_was_not_yet_written_is_written(self, stopped: Path, checkpoint: bool) -> None:
        text = (stopped / RECIPE).read_text()
        (stopped / RECIPE).unlink()
        if not checkpoint:
            shutil.rmtree(stopped / "checkpoints")
        resume(stopped)
        assert (stopped / RECIPE).read_text() == text

    def test_half_written_files_are_ignored_and_taken_away(self, stopped: Path) -> None:
        draft = stopped / "checkpoints" / ".writing-latest"
        draft.mkdir()
        (draft / "model.safetensors").write_bytes(b"half")
        (stopped / ".summary.json.writing").write_text("{")
        resume(stopped)
        assert not draft.exists()
        assert not (stopped / ".summary.json.writing").exists()

    @pytest.mark.parametrize(
        ("damage", "told"),
        [
            (lambda latest: _flip_a_byte(latest / "model.safetensors"), "model.safetensors has another checksum"),
            (lambda latest: os.truncate(latest / "optimizer.pt", 100), "optimizer.pt has another checksum"),
            (lambda latest: (latest / "session.pt").unlink(), "session.pt is missing"),
            (lambda latest: (latest / "manifest.json").unlink(), "manifest.json is missing"),
            (lambda latest: (latest / "manifest.json").write_text("[1]"), "manifest.json cannot be read"),
        ],
        ids=["flipped byte", "cut file", "lost file", "lost manifest", "damaged manifest"],
    )
    def test_a_damaged_checkpoint_is_refused_and_the_one_before_it_is_offered(
        self, damage: Any, told: str, stopped: Path
    ) -> None:
        latest, previous = stopped / "checkpoints" / "latest", stopped / "checkpoints" / "previous"
        damage(latest)
        with pytest.raises(RunFolderError) as refused:
            resume(stopped)
        message = str(refused.value)
        assert f"checkpoint {latest}: is damaged ({told}" in message
        assert message.endswith(f"Remove {latest} to go on from {previous}, one epoch earlier.")

    def test_when_the_damaged_one_is_removed_the_run_goes_on_from_the_one_before_it(self, stopped: Path) -> None:
        latest = stopped / "checkpoints" / "latest"
        _flip_a_byte(latest / "model.safetensors")
        with pytest.raises(RunFolderError):
            resume(stopped)
        shutil.rmtree(latest)
        assert resume(stopped)["epochs"] == 4

    def test_without_a_whole_checkpoint_there_is_nothing_to_offer(self, stopped: Path) -> None:
        for name in ("latest", "previous"):
            _flip_a_byte(stopped / "checkpoints" / name / "model.safetensors")
        with pytest.raises(RunFolderError, match=r"Restore it from a copy, or start a new run\.$"):
            resume(stopped)

    @pytest.mark.parametrize(
        ("change", "told"),
        [
            ({"model": "resnet20"}, "there model is 'resnet8', and config.json says 'resnet20'"),
            ({"epochs": 6}, "there epochs is 4, and config.json says 6"),
            ({"lr": 0.2}, "there lr is 0.1, and config.json says 0.2"),
        ],
    )
    def test_a_checkpoint_of_another_run_is_refused(self, change: dict[str, Any], told: str, stopped: Path) -> None:
        config = read(stopped / CONFIG)
        config["command"] |= change
        (stopped / CONFIG).write_text(json.dumps(config))
        with pytest.raises(StateMismatch, match=told):
            resume(stopped)

    def test_a_checkpoint_of_another_recipe_is_refused_with_what_differs(self, stopped: Path) -> None:
        config = read(stopped / CONFIG)
        config["command"]["recipe"]["sparsity"]["sparsity"] = 0.5
        (stopped / CONFIG).write_text(json.dumps(config))
        with pytest.raises(
            StateMismatch, match=r"there recipe\.sparsity\.sparsity is 0\.9, and config\.json says 0\.5"
        ):
            resume(stopped)

    def test_a_checkpoint_that_fits_no_model_of_that_name_is_refused_in_one_line(
        self, stopped: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """As after an update that changed a model: options agree, shapes do not."""
        monkeypatch.setitem(models.MODELS, "resnet8", partial(models.CifarResNet, 1, (20, 32, 64)))
        with pytest.raises(
            RunFolderError, match=r"cannot be loaded .* Resume with the versions that wrote it"
        ) as refused:
            resume(stopped)
        assert "\n" not in str(refused.value)

    @pytest.mark.long
    def test_where_the_run_computes_may_change_and_workers_change_nothing(self, stopped: Path, tiny: Path) -> None:
        config = read(stopped / CONFIG)
        config["command"] |= {"device": "cpu", "workers": 1}
        (stopped / CONFIG).write_text(json.dumps(config))
        resume(stopped)
        whole = stopped.parent / "whole"
        train(options_for(tiny, workers=2), whole)
        assert_same_run(stopped, whole)

    @pytest.mark.parametrize(
        ("content", "told"),
        [
            ("{", "is damaged"),
            ("[]", "holds no JSON object"),
            ("{}", 'lacks the run\'s options ("command")'),
            ('{"command": {"epochs": 0}}', "holds options that are not valid: epochs=0"),
            ('{"command": {"epoch": 1}}', "Did you mean 'epochs'"),
            ('{"command": {"recipe": {"sparsty": {}}}}', "Did you mean 'sparsity'"),
        ],
    )
    def test_a_damaged_config_is_refused(self, content: str, told: str, stopped: Path) -> None:
        (stopped / CONFIG).write_text(content)
        with pytest.raises(RunFolderError) as refused:
            resume(stopped)
        assert str(refused.value).startswith(f"{stopped / CONFIG}: ")
        assert told in str(refused.value)


def _flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


class TestDisk:
    @pytest.mark.parametrize(
        "error",
        [
            OSError(errno.ENOSPC, "No space left on device"),
            pytest.param(
                RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
                marks=pytest.mark.long,
            ),
        ],
        ids=["system", "serialiser"],
    )
    def test_a_full_disk_stops_the_run_and_leaves_it_fit_to_be_resumed(
        self, error: Exception, tiny: Path, tmp_path: Path
    ) -> None:
        out = tmp_path / "run"
        with _failing_checkpoints(error, after=2), pytest.raises(RunFolderError, match="the disk is full") as stopped:
            train(options_for(tiny), out)
        assert str(stopped.value).endswith("Free some space and go on with --resume.")
        assert not list((out / "checkpoints").glob(".writing-*")), "unfinished files take the space that is needed"
        undisturbed = tmp_path / "undisturbed"
        expected = train(options_for(tiny), undisturbed)
        assert without_measured(resume(out)) == without_measured(expected)
        assert_same_run(out, undisturbed)

    def test_a_disk_that_is_full_while_the_best_is_copied_is_called_full(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fill(source: object, target: object, **_: object) -> NoReturn:
            raise OSError(errno.ENOSPC, "No space left on device", str(target))

        checkpoints = Checkpoints(tmp_path / "checkpoints")
        monkeypatch.setattr(shutil, "copyfile", fill)
        with pytest.raises(RunFolderError, match=r"the disk is full .* Free some space and go on with --resume\.$"):
            checkpoints.save(lambda draft: _ignore((draft / "weights").write_text("a")), epoch=1, best=True, about={})
        assert list(checkpoints.path.iterdir()) == []

    def test_a_disk_that_is_full_at_the_first_checkpoint_leaves_a_run_that_starts_over(
        self, tiny: Path, tmp_path: Path
    ) -> None:
        out = tmp_path / "run"
        full = OSError(errno.ENOSPC, "No space left on device")
        with _failing_checkpoints(full, after=0), pytest.raises(RunFolderError, match="the disk is full"):
            train(options_for(tiny), out)
        assert resume(out)["epochs"] == 4

    @pytest.mark.parametrize(
        ("code", "told"),
        [
            (errno.EROFS, "the file system is read-only"),
            (errno.EACCES, "it cannot be written"),
            (errno.ENOSPC, "the disk is full"),
        ],
    )
    def test_a_folder_that_cannot_be_written_is_named_and_nothing_is_left(
        self, code: int, told: str, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        out = tmp_path / "new" / "run"

        def refuse(self: Path, *_: object, **__: object) -> NoReturn:
            raise OSError(code, os.strerror(code), str(self))

        monkeypatch.setattr(Path, "replace", refuse)
        with pytest.raises(RunFolderError, match=f"{out}: {told}"):
            train(options_for(tiny), out)
        assert not (tmp_path / "new").exists()

    @pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs /proc")
    def test_a_folder_that_cannot_be_made_is_named(self, tiny: Path) -> None:
        with pytest.raises(RunFolderError, match=r"/proc/spfde-run: .*Choose another folder"):
            train(options_for(tiny), Path("/proc/spfde-run"))

    def test_a_folder_below_a_file_is_refused(self, tiny: Path) -> None:
        with pytest.raises(RunFolderError, match=r"Not a directory.*Choose another folder"):
            train(options_for(tiny), tiny / "run")


class _failing_checkpoints:
    """Writing the checkpoint after the first ``after`` ones writes a part and fails."""

    def __init__(self, error: Exception, *, after: int) -> None:
        self._error, self._left, self._patch = error, after, pytest.MonkeyPatch()

    def __enter__(self) -> None:
        usual = setup.save_state

        def save_state(folder: Path, *rest: Any) -> None:
            self._left -= 1
            if self._left < 0:
                (folder / "model.safetensors").write_bytes(b"half")
                raise self._error
            usual(folder, *rest)

        self._patch.setattr(setup, "save_state", save_state)

    def __exit__(self, *_: object) -> None:
        self._patch.undo()


class TestFolders:
    def test_what_a_process_killed_while_making_the_folder_left_is_no_reason_to_refuse_it(self, tmp_path: Path) -> None:
        (tmp_path / ".lock").touch()
        (tmp_path / ".config.json.writing").write_text("{")
        RunFolder.create(tmp_path).close()

    @pytest.mark.parametrize(
        ("name", "told"), [("config.json", "holds a run already"), ("notes", r"is not empty \(notes\)")]
    )
    def test_a_folder_with_something_in_it_is_refused(self, name: str, told: str, tmp_path: Path) -> None:
        (tmp_path / name).touch()
        with pytest.raises(RunFolderError, match=told):
            RunFolder.create(tmp_path)
        assert [entry.name for entry in tmp_path.iterdir()] == [name]

    def test_a_discarded_folder_takes_its_new_parents_with_it_and_no_others(self, tmp_path: Path) -> None:
        (tmp_path / "old").mkdir()
        folder = RunFolder.create(tmp_path / "old" / "new" / "run")
        folder.write_json(CONFIG, {})
        folder.discard()
        assert list((tmp_path / "old").iterdir()) == []

    def test_an_empty_folder_that_was_there_before_stays_when_a_run_is_discarded(self, tmp_path: Path) -> None:
        folder = RunFolder.create(tmp_path)
        folder.write_json(CONFIG, {})
        folder.discard()
        assert list(tmp_path.iterdir()) == []

    def test_a_file_is_written_whole_or_not_at_all(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        folder = RunFolder.create(tmp_path)
        folder.write_text("a.txt", "before")

        def fail(_: int) -> NoReturn:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "fsync", fail)
        with pytest.raises(RunFolderError, match="the disk is full"):
            folder.write_text("a.txt", "after")
        assert (tmp_path / "a.txt").read_text() == "before"
        assert sorted(entry.name for entry in tmp_path.iterdir()) == [".lock", "a.txt"]
        folder.close()


class TestCheckpoints:
    @pytest.fixture
    def checkpoints(self, tmp_path: Path) -> Checkpoints:
        return Checkpoints(tmp_path / "checkpoints")

    def _save(self, checkpoints: Checkpoints, text: str, *, best: bool = False) -> None:
        checkpoints.save(
            lambda folder: _ignore((folder / "weights").write_text(text)), epoch=1, best=best, about={"text": text}
        )

    def test_the_latest_the_one_before_and_the_best_are_kept(self, checkpoints: Checkpoints) -> None:
        assert checkpoints.newest() is None
        for text, best in (("a", True), ("b", True), ("c", False), ("d", False)):
            self._save(checkpoints, text, best=best)
        kept = {path.name: (path / "weights").read_text() for path in checkpoints.path.iterdir()}
        assert kept == {"latest": "d", "previous": "c", "best": "b"}
        assert checkpoints.newest() == checkpoints.latest
        assert described(checkpoints.latest) == {"text": "d"}

    def test_a_checkpoint_that_cannot_be_written_leaves_the_others_as_they_were(self, checkpoints: Checkpoints) -> None:
        self._save(checkpoints, "a", best=True)

        def fail(folder: Path) -> None:
            (folder / "weights").write_text("half")
            raise OSError(errno.ENOSPC, "No space left on device")

        with pytest.raises(RunFolderError, match="the disk is full"):
            checkpoints.save(fail, epoch=2, best=True, about={})
        kept = {path.name: (path / "weights").read_text() for path in checkpoints.path.iterdir()}
        assert kept == {"latest": "a", "best": "a"}

    def test_without_the_latest_the_one_before_is_the_newest(self, checkpoints: Checkpoints) -> None:
        self._save(checkpoints, "a")
        self._save(checkpoints, "b")
        shutil.rmtree(checkpoints.latest)
        assert checkpoints.newest() == checkpoints.previous


def _ignore(_: object) -> None:
    """For expressions that return something where nothing is wanted."""
