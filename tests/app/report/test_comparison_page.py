"""The page of a comparison: its table, its points, and what it refuses."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from helpers.commands import Spfde
from helpers.comparisons import made_comparison
from spfde.app.compare.folder import read
from spfde.app.compare.table import ComparisonTable, table_of
from spfde.app.report.canvas import DARK, LIGHT, mark_of
from spfde.app.report.comparison import draw_comparison
from spfde.app.report.html import MOST_COLUMNS, Line, WideTable
from spfde.app.report.page import write_report
from spfde.app.report.scatter import MOST_NAMED, PLOTS, named
from spfde.app.report.tables import Heading
from spfde.core.errors import InvalidArgument, RunFolderError

MakeRun = Callable[..., Path]

ACCURACIES = {"dense": [0.80, 0.82], "mest sparsity=0.9": [0.78, 0.82], "static": [0.70], "rigl": []}
COSTS = {"dense": 1.0, "mest sparsity=0.9": 0.1, "static": 0.2, "rigl": 0.3}


def table_in(folder: Path) -> ComparisonTable:
    return table_of(read(folder), folder)


def drawn(table: ComparisonTable) -> Any:
    """The figure of accuracy over FLOPs, to look at its axes."""
    figure = Figure(layout="constrained")
    PLOTS[0].draw(figure, table, LIGHT)
    return figure


def text_of(folder: Path) -> str:
    text, _ = draw_comparison(folder)
    return re.sub(r"base64,[^\"]*", "", text).replace("\N{NO-BREAK SPACE}", " ")


@pytest.fixture
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where plots are not the point: drawing takes its time."""
    monkeypatch.setattr("spfde.app.report.comparison.PLOTS", ())


def test_the_page_and_its_plots_are_written_by_the_command(spfde: Spfde, here: Path) -> None:
    made_comparison(here / "table", ACCURACIES, costs=COSTS)
    outcome = spfde("report", "table")
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out.split() == ["report.html", "report-flops.png", "report-seconds.png"]
    text = (here / "report.html").read_text(encoding="utf-8")
    assert text.count("data:image/png;base64,") == 4  # light and dark
    assert not re.search(r"<script|https?://|url\(|@import", text)


@pytest.mark.usefixtures("no_plots")
def test_the_table_says_what_the_seeds_carry(tmp_path: Path) -> None:
    text = text_of(made_comparison(tmp_path / "table", ACCURACIES, costs=COSTS))
    rows = re.findall(r"<tr>\s*<th scope=\"row\">(.*?)</tr>", text, re.DOTALL)
    cells = [re.findall(r"<td class=\"\w*\" data-title=\"[^\"]*\">(.*?)</td>", row) for row in rows[:4]]
    assert [row[:2] for row in cells] == [["2", "81.00 ± 1.41"], ["2", "80.00 ± 2.83"], ["1", "70.00"], ["0", "–"]]
    assert cells[0][3:] == [
        "baseline",
        "1.00 × 10¹²",
        "100.0 %",
        "1 min 40 s ± 0.707 s",
        "512 MiB",
        "0.0 %",
        "FLOPs, time",
    ]
    # Differences of -2 and 0 points: mean -1, standard deviation sqrt 2, t(0.975, 1) = 12.706, so 12.706 to each side.
    assert cells[1][3] == "-1.00 [-13.71, +11.71] not carried"
    assert cells[1][-1] == "FLOPs, time"
    assert cells[2][3] == "-10.00 (one seed)"
    assert cells[2][-1] == cells[3][-1] == "–"
    assert "5 of 8 runs finished" in text
    assert "4 candidates with 2 seeds each; resnet8 on fashion-mini; 20 epochs; baseline: dense" in text
    assert "mest sparsity=0.9: 2 seeds do not carry the difference of -1.00 points" in text


@pytest.mark.usefixtures("no_plots")
def test_settings_are_told_once_where_all_have_them(tmp_path: Path) -> None:
    text = text_of(made_comparison(tmp_path / "table", {"a": [0.5], "b": [0.5]}))
    shared, *own = re.findall(r"<details>\s*<summary>(.*?)</details>", text, re.DOTALL)
    assert "What all candidates have in common" in shared
    assert re.findall(r"<th scope=\"row\">(.*?)</th><td>(.*?)</td>", shared) == [
        ("data", "fashion-mini"), ("model", "resnet8"), ("epochs", "20"), ("recipe.sparsity.method", "mest"),
    ]  # fmt: skip
    assert [re.findall(r"<th scope=\"row\">(.*?)</th><td>(.*?)</td>", each) for each in own] == [
        [("lr", "1")],
        [("lr", "2")],
    ]


def test_a_point_is_a_mean_with_its_bars_and_the_front_goes_through_what_nothing_beats(tmp_path: Path) -> None:
    (axes,) = drawn(table_in(made_comparison(tmp_path / "table", ACCURACIES, costs=COSTS))).axes
    bars = [container.lines for container in axes.containers]
    assert [(point.get_xdata()[0], round(point.get_ydata()[0], 3)) for point, _, _ in bars] == [
        (1e12, 0.81),
        (1e11, 0.8),
        (2e11, 0.7),
    ]
    ends = [[round(end, 3) for end in segments[0].get_segments()[0][:, 1]] for _, _, segments in bars[:2] if segments]
    assert ends == [[0.796, 0.824], [0.772, 0.828]]  # 0.81 and 0.8, less and more by sqrt 2 and 2 sqrt 2 points
    assert not bars[2][2]  # of one seed
    front = next(line for line in axes.lines if line.get_linestyle() == "--")
    assert [list(front.get_xdata()), [round(y, 3) for y in front.get_ydata()]] == [[1e11, 1e12], [0.8, 0.81]]
    assert front.get_drawstyle() == "steps-post"
    assert axes.get_xscale() == "log"


def test_candidates_are_named_and_told_apart_by_colour_marker_and_number(tmp_path: Path) -> None:
    figure = drawn(table_in(made_comparison(tmp_path / "table", ACCURACIES, costs=COSTS)))
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == ["1  dense", "2  mest sparsity=0.9", "3  static", "Pareto front"]
    assert [text.get_text() for text in figure.axes[0].texts] == ["1", "2", "3"]
    assert len({mark_of(at) for at in range(36)}) == 36


def test_numbers_of_equal_points_do_not_cover_each_other(tmp_path: Path) -> None:
    equal = {f"c{at}": [0.5] for at in range(12)}
    (axes,) = drawn(table_in(made_comparison(tmp_path / "table", equal, costs=dict.fromkeys(equal, 1.0)))).axes
    places = [text.xyann for text in axes.texts]
    near = [
        (one, other)
        for at, one in enumerate(places)
        for other in places[:at]
        if abs(one[0] - other[0]) < 10 and abs(one[1] - other[1]) < 8
    ]
    assert near == []


@pytest.mark.usefixtures("no_plots")
def test_of_very_many_candidates_those_on_a_front_and_the_baseline_are_named(tmp_path: Path) -> None:
    count = MOST_NAMED + 20
    found = {f"c{at}": [0.9 if at in (7, 9) else 0.5] for at in range(count)}
    costs = {f"c{at}": 0.5 if at == 9 else 1 + at for at in range(count)}
    folder = made_comparison(tmp_path / "table", found, costs=costs)
    table = table_in(folder)
    assert named(table) == [0, 9]
    assert len(drawn(table).axes[0].lines[0].get_xdata()) == count - 2
    text = text_of(folder)
    assert text.count("<svg") == 2
    assert f"Of more than {MOST_NAMED} candidates only those on a front" in text


@pytest.mark.parametrize("accuracies", [{"a": [], "b": []}, {"a": [0.5], "b": [0.5, 0.5]}])
def test_little_to_show_is_shown(tmp_path: Path, accuracies: dict[str, list[float]]) -> None:
    folder = made_comparison(tmp_path / "table", accuracies, seeds=2, costs=dict.fromkeys(accuracies, 0.0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", ".*deprecated")  # what matplotlib calls in packages of its own
        text = text_of(folder)
    assert ("No run is finished yet." in text) == (not accuracies["a"])
    assert "nan" not in text.lower()


def test_figures_that_no_run_has_are_left_out(tmp_path: Path) -> None:
    folder = made_comparison(tmp_path / "table", {"a": [0.5], "b": [0.6]})
    summary = folder / "runs" / "0-a" / "seed-0" / "summary.json"
    odd = {"training_flops": "<b>", "seconds": None, "test_accuracy": 1e300, "peak_memory_bytes": True}
    summary.write_text(json.dumps(json.loads(summary.read_text()) | odd))
    assert [container.lines[0].get_ydata()[0] for container in drawn(table_in(folder)).axes[0].containers] == [0.6]


@pytest.mark.usefixtures("no_plots")
def test_whatever_the_folder_says_is_escaped(tmp_path: Path) -> None:
    bad = "<script>alert(1)</script>$x_{"
    folder = made_comparison(
        tmp_path / "<i>table", {bad: [0.5, 0.6], "_b": [0.5, 0.4]}, options={"data": bad, bad: bad}
    )
    text = text_of(folder)
    assert "<script" not in text
    assert "<i>" not in text
    assert text.count("&lt;script&gt;") >= 4
    # No mathematics, and not hidden.
    assert PLOTS[0].png(table_in(folder), DARK) is not None


def test_a_comparison_beside_runs_is_refused(make_run: MakeRun, tmp_path: Path) -> None:
    folder = made_comparison(tmp_path / "table", {"a": [0.5]})
    with pytest.raises(InvalidArgument, match=r"table.*page of its own.*Pass it alone"):
        write_report([make_run(), folder], tmp_path / "report.html")
    with pytest.raises(InvalidArgument, match="page of its own"):
        write_report([folder, made_comparison(tmp_path / "other", {"a": [0.5]})], tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize("damaged", ["comparison.json", "runs/0-a/seed-0/summary.json"])
def test_a_damaged_file_is_named(tmp_path: Path, damaged: str) -> None:
    folder = made_comparison(tmp_path / "table", {"a": [0.5]})
    (folder / damaged).write_text('{"half')
    with pytest.raises(RunFolderError, match=f"{re.escape(damaged)}: is damaged"):
        write_report([folder], tmp_path / "report.html")


def test_a_table_that_is_wider_than_a_page_has_parts_of_about_one_width() -> None:
    headings = tuple(Heading(str(at), "set", "") for at in range(MOST_COLUMNS + 3))
    table = WideTable("x", "Run", headings, (Line("a", tuple(map(str, range(MOST_COLUMNS + 3)))),))
    first, second = table.parts()
    assert [heading.title for heading in (*first.headings, *second.headings)] == [heading.title for heading in headings]
    assert first.lines[0].cells + second.lines[0].cells == table.lines[0].cells
    assert (len(first.headings), len(second.headings)) == (7, 6)


def test_pytorch_and_the_global_state_of_pyplot_stay_out(tmp_path: Path) -> None:
    folder = made_comparison(tmp_path / "table", {"a": [0.5]})
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from spfde.app.report.page import write_report\n"
        f"write_report([{str(folder)!r}], {str(tmp_path / 'report.html')!r})\n"
        "print(*[name for name in ('matplotlib.pyplot', 'spfde.session') if name in sys.modules])"
    )
    ended = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert ended.stdout.strip() == ""
    assert "</html>" in (tmp_path / "report.html").read_text(encoding="utf-8")


@pytest.mark.long
@pytest.mark.parametrize(("candidates", "seeds"), [(100, 10), (1000, 1)])
def test_a_thousand_runs_are_put_on_a_page(tmp_path: Path, candidates: int, seeds: int) -> None:
    found = {f"c{at}": [0.5 + 0.0001 * at + 0.01 * seed for seed in range(seeds)] for at in range(candidates)}
    folder = made_comparison(tmp_path / "table", found)
    page, *plots = write_report([folder], tmp_path / "report.html")
    assert len(plots) == 2
    assert page.read_text(encoding="utf-8").count('<th scope="row">') > candidates
