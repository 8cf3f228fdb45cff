"""SIGTERM ends a command with a line and exit code 143, whatever it is doing, and a checkpoint that is near is kept."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from helpers import ROOT
from spfde import presets
from spfde.app import terminating
from spfde.app.runs.checkpoints import epoch_of
from spfde.app.terminating import Terminated, terminable
from spfde.app.train import loop, setup
from spfde.app.train.events import Display
from spfde.app.train.loop import train
from spfde.app.train.options import TrainOptions

LONG = 60.0
"""Seconds that nothing here really takes."""


def terminate() -> None:
    """Send SIGTERM to this process."""
    os.kill(os.getpid(), signal.SIGTERM)


def held(*steps: Callable[[], object]) -> None:
    with terminable() as ending, ending.held():
        for step in steps:
            step()


class Thing:
    """Something that a weak reference can be made to."""


@pytest.fixture
def near(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terminating, "NEAR", 0.05)


@pytest.fixture
def control_c() -> Iterator[None]:
    """As in a terminal: what a shell starts in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class TestTheHandler:
    def test_sigterm_is_raised_where_the_main_thread_stands_and_the_old_handler_comes_back(self) -> None:
        before = signal.getsignal(signal.SIGTERM)
        with terminable() as ending:
            assert not ending.asked
            with pytest.raises(Terminated):
                terminate()
            assert ending.asked
        assert signal.getsignal(signal.SIGTERM) is before

    def test_what_is_held_ends_first(self) -> None:
        done = []
        with pytest.raises(Terminated):
            held(terminate, lambda: done.append("all of it"))
        assert done == ["all of it"]

    def test_the_second_sigterm_waits_for_nothing(self) -> None:
        done = []
        with pytest.raises(Terminated):
            held(terminate, terminate, lambda: done.append("too much"))
        assert done == []

    def test_what_is_held_too_long_is_left(self, near: None) -> None:
        with pytest.raises(Terminated):
            held(terminate, lambda: time.sleep(LONG))

    def test_an_error_in_what_is_held_is_told_and_not_the_signal(self) -> None:
        with pytest.raises(ZeroDivisionError):
            held(terminate, lambda: 1 // 0)

    def test_control_c_waits_for_nothing_and_is_no_termination(self) -> None:
        with pytest.raises(KeyboardInterrupt) as raised:
            held(lambda: signal.default_int_handler(signal.SIGINT, None))
        assert not isinstance(raised.value, Terminated)

    def test_what_a_library_swallows_is_raised_again(self, near: None) -> None:
        with terminable():
            with suppress(BaseException):
                terminate()
            with pytest.raises(Terminated):
                time.sleep(LONG)

    @pytest.mark.parametrize(("number", "kind"), [(signal.SIGTERM, Terminated), (signal.SIGINT, KeyboardInterrupt)])
    def test_what_python_could_only_note_is_raised_soon_after_and_not_told(
        self, number: signal.Signals, kind: type[BaseException], control_c: None, capfd: pytest.CaptureFixture[str]
    ) -> None:
        thing = Thing()
        with terminable():
            reference = weakref.ref(thing, lambda _: signal.raise_signal(number))
            del thing
            with pytest.raises(KeyboardInterrupt) as raised:
                time.sleep(LONG)
        assert type(raised.value) is kind
        assert reference() is None
        assert capfd.readouterr().err == ""

    def test_of_two_that_are_open_the_outer_one_is_asked(self) -> None:
        with terminable() as outer, terminable() as inner:
            assert inner is outer

    def test_in_another_thread_nothing_changes(self) -> None:
        before, found = signal.getsignal(signal.SIGTERM), []

        def elsewhere() -> None:
            with terminable() as ending, ending.held():
                found.append(signal.getsignal(signal.SIGTERM))

        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        assert found == [before]

    def test_a_fork_dies_by_the_signal(self) -> None:
        with terminable():
            child = os.fork()
            if child == 0:
                try:
                    terminate()
                finally:
                    os._exit(1)
            _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status)
        assert os.WTERMSIG(status) == signal.SIGTERM

    def test_a_process_that_ignores_sigterm_goes_on_to_do_so(self) -> None:
        before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
        try:
            terminating.from_the_start()
            with terminable() as ending:
                terminate()
            assert not ending.asked
        finally:
            signal.signal(signal.SIGTERM, before)


def options_for(data: Path) -> TrainOptions:
    recipe = presets.mest.replace(update_interval_epochs=1).to_dict()
    return TrainOptions(data=str(data), recipe=recipe, epochs=3, batch_size=16, dense_timing_steps=0)


@pytest.fixture(scope="module")
def whole(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody disturbed."""
    out = tmp_path_factory.mktemp("whole") / "run"
    train(options_for(tiny), out)
    return out


class TestTraining:
    @pytest.mark.parametrize(
        ("owner", "name", "epochs"),
        [(loop, "train_step", 1), (loop, "evaluate", 2), (setup, "save_state", 2)],
        ids=["amid an epoch", "while it is tested", "while it is written"],
    )
    def test_an_epoch_that_is_trained_is_kept_and_the_run_goes_on_from_it(
        self,
        owner: Any,
        name: str,
        epochs: int,
        tiny: Path,
        whole: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        seen = Seen()
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, seen.asking_in_the_second_epoch(getattr(owner, name)))
            with pytest.raises(Terminated):
                train(options_for(tiny), tmp_path / "run", seen)
        assert epoch_of(tmp_path / "run" / "checkpoints" / "latest") + 1 == epochs
        train(options_for(tiny), tmp_path / "run", resume=True)
        weights = Path("checkpoints") / "latest" / "model.safetensors"
        assert (tmp_path / "run" / weights).read_bytes() == (whole / weights).read_bytes()


class Seen(Display):
    """Counts epochs."""

    def __init__(self) -> None:
        self.epochs = 0

    def epoch_done(self, run: Any, row: dict[str, Any]) -> None:
        self.epochs += 1

    def asking_in_the_second_epoch(self, usual: Any) -> Any:
        """The function, before whose work SIGTERM comes once."""
        sent = []

        def asking(*arguments: Any, **options: Any) -> Any:
            if self.epochs == 1 and not sent:
                sent.append(True)
                terminate()
            return usual(*arguments, **options)

        return asking


# A finder that is asked before all others, and sends SIGTERM when a module is looked for.
_AT_IMPORT = """
import os, runpy, signal, sys
class Asking:
    def find_spec(self, name, path=None, target=None):
        if name == sys.argv[1]:
            os.kill(os.getpid(), signal.SIGTERM)
sys.meta_path.insert(0, Asking())
asked, sys.argv = sys.argv[1], ["spfde", *sys.argv[2:]]
runpy.run_module("spfde", run_name="__main__")
"""


class TestCommands:
    @pytest.mark.parametrize("module", ["spfde.app.cli", "typer", "torch", "torch._C", "spfde.app.train.models"])
    def test_while_it_imports_what_it_needs(self, module: str, tmp_path: Path) -> None:
        # In front of the finder's module comes what is asked for: the second argument is the command.
        script = _AT_IMPORT.replace("sys.argv[1]:", f"{module!r}:")
        argv = [sys.executable, "-c", script, "", "plan"]
        ended = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=LONG)
        assert (ended.returncode, ended.stderr) == (143, "spfde: terminated.\n")

    @pytest.mark.skipif(sys.platform != "linux", reason="the kernels' compiler is named by $CXX")
    @pytest.mark.long
    def test_while_it_compiles_kernels(self, tiny: Path, tmp_path: Path) -> None:
        compiler, cache = tmp_path / "compiler", tmp_path / "cache"
        compiler.write_text(
            f'#!/bin/sh\n[ "$1" = --version ] && echo slow && exit 0\ntouch {tmp_path}/compiles\nexec sleep {LONG}\n'
        )
        compiler.chmod(0o755)
        running = subprocess.Popen(
            [sys.executable, "-m", "spfde", "train", "--engine", "native", "--data", str(tiny), "--out", "run"],
            cwd=tmp_path,
            env=os.environ | {"CXX": str(compiler), "SPFDE_CACHE_DIR": str(cache), "PYTHONPATH": str(ROOT / "src")},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        deadline = time.monotonic() + LONG
        while not (tmp_path / "compiles").exists() and running.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        running.send_signal(signal.SIGTERM)
        _, told = running.communicate(timeout=LONG)
        assert running.returncode == 143
        assert told.splitlines()[1:] == ["spfde: terminated."]  # the first says that kernels are compiled
        assert not list(cache.glob("building-*"))
        assert not (tmp_path / "run").exists()  # nothing had begun

    def test_what_a_library_made_of_it_is_no_traceback(self, spfde: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        def wrapping(*_: Any, **__: Any) -> None:
            try:
                terminate()
            except KeyboardInterrupt as error:
                raise RuntimeError("a worker is gone") from error

        monkeypatch.setattr("spfde.plan", wrapping)
        ended = spfde("plan")
        assert (ended.code, ended.err) == (143, "spfde: terminated.\n")
