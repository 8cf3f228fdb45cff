"""Libraries of native code that compile in no time, built by this process or another one."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from helpers.commands import Command, start_code
from spfde.engines.native import build

WHOLE = 'extern "C" __attribute__((visibility("default"))) int spfde_lanes() { return 1; }\n'
needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "c++", "clang++"))), reason="needs a C++ compiler"
)


def library_path(**options: Any) -> Path:
    """Where the library that is loaded lies."""
    return Path(build.load(**options)._name)


def start_load(sources: Path) -> Command:
    """Another process that loads the library, and tells where it lies and how often it was told to wait."""
    code = (
        "import sys; from pathlib import Path; from spfde.engines.native import build; said = [];"
        "build.SOURCES = Path(sys.argv[1]); print(build.load(on_build=said.append)._name, len(said))"
    )
    return start_code(code, str(sources), folder=sources.parent)
