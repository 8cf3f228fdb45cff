"""A tiny data set, and the command line in this process."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from helpers.commands import Outcome, Spfde
from helpers.tracing import equal_networks_are_traced_once  # noqa: F401  # for all tests here

os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """96 + 32 grey images of 8 x 8 pixels in 3 classes, told apart by a bright bar."""
    random = np.random.default_rng(0)
    arrays = {}
    for part, count in (("train", 96), ("test", 32)):
        labels = np.arange(count) % 3
        images = random.integers(0, 120, (count, 8, 8), dtype=np.uint8)
        for image, label in zip(images, labels, strict=True):
            image[:, 2 * label : 2 * label + 3] += 100
        arrays |= {f"x_{part}": images, f"y_{part}": labels}
    path = tmp_path_factory.mktemp("data") / "tiny.npz"
    np.savez(path, **arrays)
    return path


@pytest.fixture
def few_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two plots in a report instead of all, where the plots are not the point: drawing takes its time."""
    from spfde.app.report.plots import PLOTS

    monkeypatch.setattr("spfde.app.report.page.PLOTS", tuple(plot for plot in PLOTS if plot.key in ("cost", "sieving")))


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def spfde(here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Spfde:
    """Runs the command line in this process, in the folder ``here``."""
    from spfde.app.cli import main

    monkeypatch.setenv("COLUMNS", "80")

    def run(*argv: object) -> Outcome:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in argv])
        printed = capsys.readouterr()
        code = ended.value.code
        return Outcome(0 if code is None else int(code), printed.out, printed.err)

    return run
