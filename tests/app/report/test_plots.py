"""The plots: what they are about, and that they cope with runs that have little to show."""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure
from PIL import Image

from spfde.app.report import read_run
from spfde.app.report.canvas import DARK, LIGHT, Theme, label
from spfde.app.report.folders import RecordedRun
from spfde.app.report.plots import PLOTS, Plot, accuracy_over_flops

MakeRun = Callable[..., Path]

BY_KEY = {plot.key: plot for plot in PLOTS}


def drawn(key: str, *runs: RecordedRun) -> Any:
    """The figure of a plot, to look at its axes."""
    figure = Figure(layout="constrained")
    BY_KEY[key].draw(figure, runs, LIGHT)
    return figure


def luminance(colour: str) -> float:
    channels = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("plot", PLOTS, ids=lambda plot: plot.key)
@pytest.mark.parametrize(
    "made",
    [
        {"epochs": 1, "freeze": False},
        {"done": 3},
        {"freeze": False, "removed": 0, "sparsity": 0.0},
        {"changes": dict.fromkeys(("frozen_blocks", "sieve_moved", "sieve_ever_used", "density", "learning_rate"))},
        {"changes": {"training_flops": 0, "dense_training_flops": 0, "removed_samples": None, "total_blocks": None}},
    ],
    ids=["one epoch", "unfinished", "dense", "fields left out", "no FLOPs"],
)
def test_a_plot_is_drawn_or_says_why_not(make_run: MakeRun, plot: Plot, made: dict[str, Any]) -> None:
    folder = make_run(**({"epochs": 4} | made))
    run = read_run(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", ".*deprecated")  # what matplotlib calls in packages of its own
        png = plot.png([run], DARK)
    if plot.wants(run):
        assert png is not None
        assert Image.open(io.BytesIO(png)).format == "PNG"
    else:
        assert png is None
        assert plot.absent.endswith(".")


@pytest.mark.parametrize("plot", PLOTS, ids=lambda plot: plot.key)
def test_a_run_without_epochs_stands_beside_others(make_run: MakeRun, plot: Plot) -> None:
    empty, full = read_run(make_run("runs/empty", done=0)), read_run(make_run("runs/full"))
    assert plot.png([empty, full]) is not None
    if plot.key != "freezing":  # what is planned can be drawn before the first epoch
        assert plot.png([empty]) is None


def test_a_dense_run_has_no_freeze_timeline_and_no_turnover(dense_run: Path) -> None:
    run = read_run(dense_run)
    assert [plot.key for plot in PLOTS if not plot.wants(run)] == ["freezing", "sieving"]


def test_accuracy_is_drawn_over_the_flops_spent_up_to_then() -> None:
    spent, accuracy = "training_flops", "test_accuracy"
    rows = [{spent: 10.0, accuracy: 0.1}, {spent: 5.0}, {accuracy: 0.2}, {spent: 1.0, accuracy: 0.3}]
    run = RecordedRun(path=Path("x"), name="x", config={}, epochs=dict(enumerate(rows)))
    assert accuracy_over_flops(run) == ([10.0, 15.0, 16.0], [0.1, 0.2, 0.3])


def test_the_curve_of_a_run_with_a_validation_set_is_its_own_and_says_so(make_run: MakeRun) -> None:
    plain, validated = read_run(make_run("a")), read_run(make_run("b", validated=True))
    for key in ("accuracy", "flops"):
        figure = drawn(key, plain, validated)
        (axes,) = figure.axes
        curves = [line.get_ydata()[-1] for line in axes.lines[-2:]]
        assert curves == [pytest.approx(0.65), pytest.approx(0.64)]
        assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b (validation)"]


def test_bars_of_the_cost_end_where_the_dense_run_does(make_run: MakeRun) -> None:
    (axes,) = drawn("cost", read_run(make_run())).axes
    bars = [(bar.get_x(), bar.get_width()) for bar in axes.patches]
    assert bars[0] == (0.0, pytest.approx(448 / 6000))
    assert bars[1] == (pytest.approx(448 / 6000), pytest.approx(0.9))
    assert sum(bars[-1]) == pytest.approx(1.0)


def test_a_block_of_the_timeline_is_trained_until_it_is_frozen(make_run: MakeRun) -> None:
    (axes,) = drawn("freezing", read_run(make_run())).axes
    *found, counted = axes.patches
    bars = [(round(bar.get_y() + bar.get_height() / 2), bar.get_x(), bar.get_width()) for bar in found]
    assert bars == [(0, 0, 3), (0, 3, 3), (1, 0, 5), (1, 5, 1), (2, 0, 6)]
    assert [text.get_text() for text in axes.get_yticklabels()] == ["stem", "stage1", "stage2"]
    assert axes.yaxis_inverted()
    assert list(counted.get_data().values) == [count - 0.5 for count in (0, 0, 0, 1, 1, 2)]


def test_a_block_of_the_timeline_may_thaw(make_run: MakeRun) -> None:
    folder = make_run()
    settings = json.loads((folder / "config.json").read_text())
    settings["timeline"]["rows"] = [[1, {"frozen_blocks": 0}], [2, {"frozen_blocks": 2}], [3, {"frozen_blocks": 1}]]
    (folder / "config.json").write_text(json.dumps(settings))
    *found, _ = drawn("freezing", read_run(folder)).axes[0].patches
    bars = [(round(bar.get_y() + bar.get_height() / 2), bar.get_x(), bar.get_width()) for bar in found]
    assert bars == [(0, 0, 1), (0, 1, 5), (1, 0, 1), (1, 1, 2), (1, 3, 3), (2, 0, 6)]


def test_what_was_frozen_is_shown_over_the_plan_up_to_where_the_run_is(make_run: MakeRun) -> None:
    run = read_run(make_run(done=4, changes={"frozen_blocks": 3}))
    counted = drawn("freezing", run).axes[0].patches[-1].get_data()
    assert (list(counted.values), list(counted.edges)) == ([2.5] * 4, [0, 1, 2, 3, 4])


def test_a_folder_without_a_plan_says_that_its_timeline_is_counted(make_run: MakeRun) -> None:
    planned, folder = make_run("runs/a"), make_run("runs/b")
    settings = json.loads((folder / "config.json").read_text())
    del settings["timeline"]
    (folder / "config.json").write_text(json.dumps(settings))
    titles = [axes.get_title(loc="left") for axes in drawn("freezing", read_run(planned), read_run(folder)).axes]
    assert titles == ["a (planned)", "b (as counted: the folder has no plan)"]


def test_turnover_shows_swaps_where_they_happened_and_shares_of_all_samples(make_run: MakeRun) -> None:
    swaps, used = drawn("sieving", read_run(make_run())).axes
    assert [list(line.get_xdata()) for line in swaps.lines] == [[2, 4]]
    ever_used, in_use = used.lines
    assert list(ever_used.get_ydata()) == [0.8, 0.85, 0.9, 0.95, 1.0, 1.0]
    assert set(in_use.get_ydata()) == {0.8}


def test_runs_that_cost_much_less_than_others_are_drawn_over_a_logarithm(make_run: MakeRun, dense_run: Path) -> None:
    sparse, dense = read_run(make_run()), read_run(dense_run)
    assert drawn("flops", sparse).axes[0].get_xscale() == "linear"
    assert drawn("flops", sparse, dense).axes[0].get_xscale() == "log"


def test_the_same_runs_give_the_same_bytes(make_run: MakeRun) -> None:
    run = read_run(make_run())
    assert BY_KEY["cost"].png([run]) == BY_KEY["cost"].png([run])


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=["light", "dark"])
def test_colours_stand_out_from_the_page(theme: Theme) -> None:
    page = luminance(theme.background)
    for colour in (*theme.runs, *theme.parts, theme.text):
        lighter, darker = sorted([page, luminance(colour)], reverse=True)
        assert (lighter + 0.05) / (darker + 0.05) >= 3.0, colour


def test_a_name_is_neither_read_as_mathematics_nor_hidden() -> None:
    assert label("a$b$") == r"a\$b\$"
    assert not label("_hidden").startswith("_")
    assert label("x" * 50) == "…" + "x" * 31


def test_odd_names_are_drawn(make_run: MakeRun) -> None:
    runs = [read_run(make_run(f"runs/{name}")) for name in ("_$x_{", "試験", "<b>&", "a" * 90)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", ".*deprecated")  # what matplotlib calls in packages of its own
        for key in ("accuracy", "cost", "freezing"):
            assert BY_KEY[key].png(runs) is not None
