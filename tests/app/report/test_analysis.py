"""The plots of an analysis: which there are, what they name, and that they cope with little."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from spfde.app.report import analysis
from spfde.app.report.analysis import draw_analysis
from spfde.app.report.canvas import LIGHT
from spfde.core.errors import RunFolderError


def block(name: str, cka: list[float | None] | None, similarity: list[float] | None) -> dict[str, Any]:
    layer = {"name": f"{name}.weight", "gradient_norm": [2.0, 1.0], "gradient_norm_difference": [1.0]}
    return {"name": name, "cka": cka, "structural_similarity": similarity, "layers": [layer]}


def written(path: Path, *blocks: dict[str, Any]) -> Path:
    file = path / "analysis.json"
    file.write_text(json.dumps({"epochs": [1, 3], "blocks": blocks}))
    return file


def test_a_plot_is_drawn_of_what_there_is(tmp_path: Path) -> None:
    dense = written(tmp_path, block("one", [0.5, 1.0], None), block("two", [None, None], None))
    assert draw_analysis(dense) == [tmp_path / "cka.png", tmp_path / "gradient-norm.png"]
    sparse = written(tmp_path, block("one", None, [0.5, 1.0]))
    assert [path.name for path in draw_analysis(sparse)] == ["structural-similarity.png", "gradient-norm.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in tmp_path.glob("*.png"))


def test_of_many_curves_a_few_from_front_to_end_are_named_and_all_are_drawn() -> None:
    curves = {f"layer{index}.weight": [0.1 * index, 1.0] for index in range(17)}
    figure = Figure(layout="constrained")
    analysis._shares([2, 4], "CKA", curves, figure, LIGHT)
    assert len(figure.axes[0].lines) == 17
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == ["layer0", "layer3", "layer6", "layer10", "layer13", "layer16"]


def test_differences_stand_at_the_later_checkpoint() -> None:
    figure = Figure(layout="constrained")
    analysis._trend([2, 4, 6], {"a": [3.0, 2.0, 1.0]}, {"a": [1.0, 1.0]}, figure, LIGHT)
    above, below = figure.axes
    assert list(above.lines[0].get_xdata()) == [2, 4, 6]
    assert list(below.lines[0].get_xdata()) == [4, 6]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"epochs": [1], "blocks": [{"name": "a"}]}'])
def test_a_damaged_file_is_refused_by_its_name(tmp_path: Path, text: str) -> None:
    (tmp_path / "analysis.json").write_text(text)
    with pytest.raises(RunFolderError, match=r"analysis\.json: is damaged .* Run `spfde analyze` again"):
        draw_analysis(tmp_path / "analysis.json")


def test_a_missing_file_too(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match=r"analysis\.json: is damaged"):
        draw_analysis(tmp_path / "analysis.json")
