"""The command ``spfde cite``: what to cite for a run or a recipe."""

from __future__ import annotations

import os
from pathlib import Path

from spfde.app.runs.folder import RECIPE, RunFolder
from spfde.app.train.options import read_recipe
from spfde.core.errors import InvalidArgument, RunFolderError
from spfde.recipe.citation import cite
from spfde.recipe.recipe import Recipe


def cite_source(source: str) -> str:
    """BibTeX for a run folder, a preset or a TOML file.

    Raises:
        InvalidArgument: it is none of them; the nearest preset is named.
        RunFolderError: the path leads nowhere, the folder is no run's, or its recipe is damaged.
    """
    folder = Path(source)
    if not os.path.isdir(folder):
        if os.sep in source and folder.suffix != ".toml" and not os.path.exists(source):
            raise RunFolderError(
                f"{folder}: there is no such folder or file. Pass a run folder, a preset or a TOML file."
            )
        return cite(read_recipe(source))
    path = RunFolder.existing(folder, needs=RECIPE).path / RECIPE
    try:
        return cite(Recipe.from_toml(path.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, InvalidArgument) as error:
        raise RunFolderError(f"{path}: is damaged ({error}). Restore it from a copy.") from error
