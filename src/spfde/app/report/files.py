"""Writing what the report makes."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path

from spfde.core.errors import Problem, RunFolderError


def write_all(files: Mapping[Path, bytes]) -> None:
    """Write all files or none: each under a passing name first, the first of them takes its place last.

    Raises:
        RunFolderError: one cannot be written.
    """
    drafts = {path: path.with_name(f".{path.name}.{os.getpid()}.writing") for path in files}
    path = next(iter(files))
    try:
        for path, content in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            drafts[path].write_bytes(content)
        for path in reversed(list(files)):
            drafts[path].replace(path)
    except OSError as error:
        remedy = "Choose another place for the report, or make room there and the folder writable."
        raise RunFolderError(str(Problem("out", str(path), f"cannot be written ({error.strerror})", remedy))) from error
    finally:
        for draft in drafts.values():
            with contextlib.suppress(OSError):
                draft.unlink()
