"""A cache of the test's own, and a source that compiles in no time."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.libraries import WHOLE
from spfde.engines.native import build


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of the test's own."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("SPFDE_CACHE_DIR", str(folder))
    monkeypatch.delenv("CXX", raising=False)
    return folder


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A source that compiles in no time."""
    folder = tmp_path / "sources"
    folder.mkdir()
    (folder / "kernels.cpp").write_text(WHOLE)
    monkeypatch.setattr(build, "SOURCES", folder)
    return folder
