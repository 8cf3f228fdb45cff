"""What the benchmarks share does what it says, and the one that times nothing runs."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from torch import nn

import spfde


def a_result(common: ModuleType, **changes: Any) -> Any:
    figures = (
        common.Figure("good", 0.5, "ratio", high=0.6, n=3, spread=(0.4, 0.7), of_medians=0.55, headline=True),
        common.Figure("bad", 0.031, "share", high=0.02, n=3, headline=True),
        common.Figure("minor", 1e16, "flops", kind="modelled"),
    )
    fields: dict[str, Any] = {
        "name": "freezing",
        "title": "Freezing",
        "question": "What?",
        "command": "python x.py",
        "figures": figures,
        "tables": (common.Table("Parts", ("part", "time"), (("one", "1 ms"),)),),
        "settings": {"rounds": 3},
        "notes": ("A note.",),
        "stamp": common.stamp(),
    }
    return common.Result(**{**fields, **changes})


def test_rounds_call_every_variant_once_and_start_one_further_each_time(common: ModuleType) -> None:
    called: list[str] = []
    calls = {name: (lambda name=name: called.append(name)) for name in "abc"}

    timings = common.interleave(calls, 3, warmup=1)

    assert "".join(called) == "abc" + "abc" + "bca" + "cab"
    assert {name: timing.n for name, timing in timings.items()} == {"a": 3, "b": 3, "c": 3}


def test_each_call_is_given_the_time_that_passed_in_it(common: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]

    def lasting(seconds: float) -> Callable[[], None]:
        return lambda: now.__setitem__(0, now[0] + seconds)

    monkeypatch.setattr(common.time, "perf_counter", lambda: now[0])
    timings = common.interleave({"short": lasting(1.0), "long": lasting(4.0)}, 2)
    assert timings["short"].seconds == (1.0, 1.0)
    assert timings["long"].seconds == (4.0, 4.0)


def test_what_surrounds_a_call_takes_no_time_of_it(common: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    now, order = [0.0], []

    def lasting(seconds: float, name: str) -> None:
        now[0] += seconds
        order.append(name)

    @contextlib.contextmanager
    def around() -> Iterator[None]:
        lasting(10.0, "before")
        yield
        lasting(10.0, "after")

    monkeypatch.setattr(common.time, "perf_counter", lambda: now[0])
    calls = {"a": lambda: lasting(1.0, "a"), "b": lambda: lasting(2.0, "b")}
    timings = common.interleave(calls, 1, around={"a": around})
    assert order == ["before", "a", "after", "b"] * 2
    assert (timings["a"].seconds, timings["b"].seconds) == ((1.0,), (2.0,))


def test_no_rounds_are_refused(common: ModuleType) -> None:
    with pytest.raises(ValueError, match="rounds=0"):
        common.interleave({"a": lambda: None}, 0)


def test_the_paired_ratio_is_the_median_within_rounds_and_not_the_ratio_of_medians(common: ModuleType) -> None:
    fast, slow = common.Timing((1.0, 2.0, 6.0, 3.0)), common.Timing((2.0, 8.0, 6.0, 9.0))

    ratio = common.compare(fast, slow)

    # Within rounds 0.5, 0.25, 1, 1/3; medians 2.5 and 7.
    assert ratio.paired == pytest.approx((1 / 3 + 0.5) / 2)
    assert ratio.of_medians == pytest.approx(2.5 / 7)
    assert ratio.quartiles == pytest.approx((0.25 + 0.75 * (1 / 3 - 0.25), 0.625))
    assert ratio.n == 4


def test_timings_of_different_rounds_are_not_compared(common: ModuleType) -> None:
    with pytest.raises(ValueError, match="longer"):
        common.compare(common.Timing((1.0,)), common.Timing((1.0, 2.0)))


def test_a_single_value_is_both_of_its_quartiles(common: ModuleType) -> None:
    assert common.quartiles([3.0]) == (3.0, 3.0)
    assert common.quartiles([1.0, 2.0, 3.0, 4.0, 5.0]) == (2.0, 4.0)


def test_the_stamp_names_the_machine_and_the_versions(common: ModuleType) -> None:
    found = common.stamp()
    assert found["threads"] == torch.get_num_threads()
    assert found["cpu"]
    assert found["versions"]["torch"] == importlib.metadata.version("torch")
    assert found["date"][:2] == "20"
    assert json.loads(json.dumps(found)) == found
    assert found["cpu"] in common.stamp_line(found)


@pytest.mark.parametrize(
    ("low", "high", "met", "target"),
    [
        (None, None, None, "–"),
        (None, 0.5, True, "at most 0.5x"),
        (None, 0.4, False, "at most 0.4x"),
        (0.5, None, True, "at least 0.5x"),
        (0.6, None, False, "at least 0.6x"),
        (0.4, 0.6, True, "0.4x to 0.6x"),
        (0.6, 0.7, False, "0.6x to 0.7x"),
    ],
)
def test_a_figure_meets_its_bounds_inclusively(
    common: ModuleType, low: float | None, high: float | None, met: bool | None, target: str
) -> None:
    figure = common.Figure("x", 0.5, "ratio", low=low, high=high)
    assert figure.met is met
    assert figure.target == target


@pytest.mark.parametrize(
    ("bounds", "aim", "reached"),
    [({}, None, None), ({"high": 0.6}, 0.5, True), ({"high": 0.6}, 0.4, False), ({"low": 0.4}, 0.6, False)],
)
def test_an_aim_is_reached_on_the_side_that_the_target_bounds(
    common: ModuleType, bounds: dict[str, float], aim: float | None, reached: bool | None
) -> None:
    assert common.Figure("x", 0.5, "ratio", aim=aim, **bounds).meets_aim is reached


def test_aims_have_columns_where_there_are_any(common: ModuleType) -> None:
    plain, aiming = common.Figure("a", 0.5, "ratio"), common.Figure("b", 0.5, "ratio", high=0.6, aim=0.4)
    assert "aim" not in common.figures_table([plain])
    text = common.figures_table([plain, aiming])
    assert "| a | 0.5x | – | – | – | – | – | – |" in text
    assert "| b | 0.5x | at most 0.6x | yes | 0.4x | **no** | – | – |" in text


def test_a_result_survives_its_json(common: ModuleType) -> None:
    result = a_result(common, data={"curve": [{"seconds": 1.5}]})
    assert common.Result.from_json(result.to_json()) == result


def test_a_smoke_test_keeps_no_result_and_a_run_does(
    common: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(common, "RESULTS", tmp_path / "results")

    common.publish(a_result(common), argparse.Namespace(quick=True, results=None))
    assert not (tmp_path / "results").exists()
    assert "| good | 0.5x | at most 0.6x | yes |" in capsys.readouterr().out

    common.publish(a_result(common), argparse.Namespace(quick=False, results=None))
    assert (tmp_path / "results" / "freezing.json").is_file()


def test_the_page_has_every_result_and_says_what_misses_its_target(common: ModuleType, render: ModuleType) -> None:
    text = render.page([a_result(common)])
    assert "| bad | 3.10% | at most 2.00% | **no** |" in text
    assert "| one | 1 ms |" in text
    assert "Not measured yet" in text
    assert "`python benchmarks/sieving.py`" in text


def test_rendering_replaces_the_readme_region_alone_and_check_finds_drift(
    common: ModuleType, render: ModuleType, tmp_path: Path
) -> None:
    results, readme = tmp_path / "results", tmp_path / "README.md"
    results.mkdir()
    label, name, what = render.README_ROWS[0]
    figures = (common.Figure(what, 4.5, "ratio", n=3), common.Figure("minor", 1e16, "flops"))
    text = a_result(common, name=name, title="Freezing", figures=figures).to_json()
    (results / f"{name}.json").write_text(text, encoding="utf-8")
    readme.write_text("before\n<!-- results:start -->\nold\n<!-- results:end -->\nafter\n", encoding="utf-8")
    arguments = ["--results", str(results), "--root", str(tmp_path)]

    assert render.main([*arguments, "--check"]) == 1
    assert "old" in readme.read_text(encoding="utf-8")
    assert render.main(arguments) == 0
    assert render.main([*arguments, "--check"]) == 0

    text = readme.read_text(encoding="utf-8")
    assert text.startswith("before\n<!-- results:start -->\n![")
    assert text.endswith("<!-- results:end -->\nafter\n")
    assert f"| {label} | 4.5x | – | 3 |" in text
    assert "old" not in text
    assert "minor" not in text
    assert "## Freezing" in (tmp_path / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    assert (tmp_path / render.PICTURE).is_file()


def test_what_the_repository_says_of_results_is_what_the_scripts_wrote(render: ModuleType) -> None:
    assert render.main(["--check"]) == 0


def test_the_readme_names_at_most_eight_results_and_each_of_them_exists(render: ModuleType) -> None:
    recorded = {(result.name, figure.what) for result in render.load(render.RESULTS) for figure in result.figures}
    named = {(name, what) for _, name, what in render.README_ROWS}
    assert len(named) == len(render.README_ROWS) <= 8
    assert named <= recorded


def test_the_picture_draws_the_figures_that_there_are(common: ModuleType, render: ModuleType) -> None:
    drawing = importlib.import_module("_picture")
    label, name, what, _ = drawing.BARS[0]
    figures = (
        common.Figure(what, 3.25, "ratio", spread=(3.0, 3.5)),
        common.Figure("test accuracy: dense", 0.9, "accuracy"),
    )
    curve = [{"seconds": 10.0 * n, "test_accuracy": 0.7 + 0.1 * n} for n in range(3)]
    fast = a_result(common, name=name, figures=figures)
    run = a_result(
        common, name="same_budget", data={"curves": {"dense": curve}}, settings={"model": "m", "data": "d", "epochs": 2}
    )

    root = ElementTree.fromstring(drawing.picture([fast, run]))
    said = [text.text for text in root.iter("{http://www.w3.org/2000/svg}text")]
    assert label in said
    assert "3.25" in said
    assert "dense: 90.0% in 20 s" in said
    assert ElementTree.fromstring(drawing.picture([])) is not None


def test_a_group_that_is_taken_apart_leaves_what_is_recorded_of_the_others(common: ModuleType) -> None:
    native = importlib.import_module("native")
    columns = ("what", "variant")
    old = a_result(
        common,
        figures=(common.Figure("a", 1.0, "ratio"), common.Figure("b", 2.0, "ratio")),
        tables=(common.Table("Each", columns, (("one: x", "1"), ("two: x", "2"))),),
    )
    new = a_result(
        common,
        figures=(common.Figure("b", 3.0, "ratio"), common.Figure("c", 4.0, "ratio")),
        tables=(common.Table("Each", columns, (("two: x", "3"), ("two: y", "4"))),),
    )
    both = native.beside_recorded(new, old, ["two"])
    assert [(figure.what, figure.value) for figure in both.figures] == [("a", 1.0), ("b", 3.0), ("c", 4.0)]
    assert both.tables[0].rows == (("one: x", "1"), ("two: x", "3"), ("two: y", "4"))
    assert both.stamp == old.stamp
    assert any("two" in note and new.stamp["date"] in note for note in both.notes)


def test_a_readme_without_markers_is_left_alone(render: ModuleType) -> None:
    assert render.with_region("# Title\n", "region") == "# Title\n"


def test_the_modelled_figures_meet_their_targets(
    common: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    importlib.import_module("planned_figures").main(["--quick", "--results", str(tmp_path)])

    result = common.Result.from_json((tmp_path / "planned_figures.json").read_text(encoding="utf-8"))
    assert {figure.kind for figure in result.figures} == {"modelled"}
    assert [figure.what for figure in result.figures if figure.met is False] == []
    starts = [figure.value for figure in result.figures if figure.unit == "epoch"]
    assert starts == [65, 55]


@pytest.fixture
def mutation(common: ModuleType) -> ModuleType:
    pytest.importorskip("torchvision")
    return importlib.import_module("mutation")


def three_layers() -> nn.Module:
    return nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 8))


@pytest.mark.long
def test_every_method_changes_its_masks_in_every_round(common: ModuleType, mutation: ModuleType) -> None:
    for method in mutation.methods().values():
        mutating = mutation.Mutating(three_layers, method, torch.zeros(1, 256))
        common.interleave({"mutate": mutating.mutate}, 3, around={"mutate": mutating.checked})


def test_a_round_that_changes_no_mask_is_not_timed_silently(common: ModuleType, mutation: ModuleType) -> None:
    mutating = mutation.Mutating(three_layers, spfde.StaticSparse(sparsity=0.9), torch.zeros(1, 256))
    with pytest.raises(AssertionError, match=r"static.* epoch 10"):
        common.interleave({"mutate": mutating.mutate}, 1, around={"mutate": mutating.checked})


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_what_needs_a_gpu_says_so_and_keeps_no_result_where_there_is_none(
    common: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    importlib.import_module("block_linear").main(["--results", str(tmp_path)])
    assert "CUDA" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())
