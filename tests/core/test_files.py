"""What must survive a power cut is put on disk by the system itself."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from helpers import REAL_FSYNC
from spfde.core.files import sync_file, sync_folder


@pytest.fixture(autouse=True)
def real(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", REAL_FSYNC)


def test_the_system_takes_a_file_and_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("what it holds")
    sync_file(tmp_path / "file")
    sync_folder(tmp_path)
    assert (tmp_path / "file").read_text() == "what it holds"


def test_what_is_not_there_is_an_error(tmp_path: Path) -> None:
    for sync in (sync_file, sync_folder):
        with pytest.raises(FileNotFoundError):
            sync(tmp_path / "nothing")
