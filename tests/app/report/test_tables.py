"""The figures of the tables: worked out by hand, put into words, and labelled by origin."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spfde.app.report import figures, read_run, tables
from spfde.app.report.folders import RecordedRun

MakeRun = Callable[..., Path]


def words(text: str) -> str:
    """Text with ordinary spaces in it."""
    return text.replace("\N{NO-BREAK SPACE}", " ").replace("\u202f", " ")


def row(table: tables.Table, index: int = 0) -> dict[str, str]:
    _, cells = table.rows[index]
    return {column.title: words(cell) for column, cell in zip(table.columns, cells, strict=True)}


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (figures.percent(0.8765), "87.6 %"),
        (figures.percent(0.0), "0.0 %"),
        (figures.percent(None), "–"),
        (figures.times(0.08703), "0.087×"),
        (figures.times(1.0), "1×"),
        (figures.times(123.4), "123×"),
        (figures.flops(1.321e16), "1.32 × 10¹⁶"),
        (figures.flops(9.999e9), "1.00 × 10¹⁰"),
        (figures.flops(0), "0"),
        (figures.flops(None), "–"),
        (figures.duration(0.25), "0.25 s"),
        (figures.duration(47.23), "47.2 s"),
        (figures.duration(99.99), "1 min 40 s"),
        (figures.duration(723), "12 min 03 s"),
        (figures.duration(3599.7), "1 h 00 min"),
        (figures.memory(512), "512 B"),
        (figures.memory(1536), "1.5 KiB"),
        (figures.memory(300 * 2**20), "300 MiB"),
        (figures.memory(3 * 2**50), "3072 TiB"),
        (figures.count(1234567), "1 234 567"),
        (figures.count(None), "–"),
    ],
)
def test_figures_are_put_into_words(said: str, expected: str) -> None:
    assert words(said) == expected


@given(st.floats(min_value=1e-3, max_value=1e30))
def test_flops_in_words_are_the_number_to_three_digits(number: float) -> None:
    mantissa, power = words(figures.flops(number)).split(" × 10")
    exponent = power.translate(str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789"))
    assert float(f"{mantissa}e{exponent}") == pytest.approx(number, rel=0.006)


def test_the_comparison_holds_the_figures_of_the_summary(make_run: MakeRun) -> None:
    cells = row(tables.comparison([read_run(make_run())]))
    # Six epochs of 1000 FLOPs, a tenth by sparsity, 0.8 by sieving; 0.1 less in epochs 3 and 4, 0.2 less in epoch 5.
    assert cells["Training FLOPs"] == "4.48 × 10²"
    assert cells["FLOPs vs dense"] == "0.0747×"
    assert cells["Test accuracy, last / best"] == "65.0 % / 65.0 %, best by test"
    assert cells["Time"] == "12.0 s"
    assert cells["Peak memory"] == "3.0 MiB"
    assert cells["Final sparsity"] == "90.0 %"
    assert cells["Frozen blocks"] == "2 / 3"
    assert cells["Samples seen"] == "480"
    assert (cells["Recipe"], cells["Engine"], cells["Seed"]) == ("spfde", "masked", "7")
    assert cells["Versions"] == "spfde 0.1.0, torch 2.6.0"


def test_an_unfinished_run_has_the_figures_of_its_epochs(make_run: MakeRun) -> None:
    run = read_run(make_run(done=2))
    cells = row(tables.comparison([run]))
    assert cells["Training FLOPs"] == "1.60 × 10²"
    assert cells["FLOPs vs dense"] == "0.08×"
    assert cells["Test accuracy, last / best"] == "45.0 % / 45.0 %, best by test"
    assert (cells["Recipe"], cells["Engine"], cells["Seed"]) == ("spfde", "masked", "7")
    assert cells["Time vs dense"] == "–"
    assert figures.state(run) == "unfinished: 2 of 6 epochs"


def test_best_accuracy_is_the_largest_and_last_is_the_last(make_run: MakeRun) -> None:
    folder = make_run(done=3)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rows[1]["test_accuracy"] = 0.9
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert row(tables.comparison([read_run(folder)]))["Test accuracy, last / best"] == "50.0 % / 90.0 %, best by test"


def test_the_best_epoch_of_an_unfinished_run_is_one_of_the_sparsest(make_run: MakeRun) -> None:
    folder = make_run(done=3)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rows[0] |= {"density": 1.0, "test_accuracy": 0.9}
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert row(tables.comparison([read_run(folder)]))["Test accuracy, last / best"] == "50.0 % / 50.0 %, best by test"


def test_a_run_with_a_validation_set_says_what_its_best_epoch_was_chosen_by(make_run: MakeRun) -> None:
    whole, running, plain = (
        make_run("runs/a", validated=True),
        make_run("runs/b", validated=True, done=2),
        make_run("c"),
    )
    table = tables.comparison([read_run(folder) for folder in (whole, running, plain)])
    name = "Validation accuracy, last / best"
    assert row(table, 0)["Test accuracy, last / best"] == "65.0 % / 65.0 %, best by validation"
    assert row(table, 1)["Test accuracy, last / best"] == "– / –"
    assert row(table, 2)["Test accuracy, last / best"] == "65.0 % / 65.0 %, best by test"
    assert [row(table, at)[name] for at in range(3)] == ["64.0 % / 64.0 %", "44.0 % / 44.0 %", "–"]
    assert name not in row(tables.comparison([read_run(plain)]))
    assert [figures.headline(read_run(folder)) for folder in (whole, running, plain)] == [
        ("test accuracy", pytest.approx(0.65)),
        ("validation accuracy", pytest.approx(0.44)),
        ("test accuracy", pytest.approx(0.65)),
    ]


def test_a_model_of_another_width_says_so(make_run: MakeRun) -> None:
    folder = make_run()
    assert figures.model(read_run(folder)) == "resnet8"
    config = json.loads((folder / "config.json").read_text())
    config["command"]["width"] = 0.5
    (folder / "config.json").write_text(json.dumps(config))
    assert figures.model(read_run(folder)) == "resnet8, width 0.5"


def test_savings_and_what_was_spent_add_up_to_the_dense_run(make_run: MakeRun) -> None:
    run = read_run(make_run())
    shares = [figures.share_of_dense(run, name) or 0.0 for name, _ in tables.PARTS_OF_DENSE]
    assert sum(shares) == pytest.approx(1.0)
    cells = row(tables.savings([run]))
    assert cells["Saved by sparsity"] == "90.0 %"
    assert cells["Saved by freezing"] == "0.7 %"  # a tenth of (0.1 + 0.1 + 0.2) / 6


def test_time_is_held_against_a_dense_run_of_the_same_setup(make_run: MakeRun, dense_run: Path) -> None:
    sparse, dense = read_run(make_run("runs/a", changes={"seconds": 1.5})), read_run(dense_run)
    table = tables.comparison([sparse, dense])
    assert row(table, 0)["Time vs dense"] == "0.75×"
    assert row(table, 1)["Time vs dense"] == "1×"


def test_time_is_not_held_against_a_dense_run_on_another_machine(make_run: MakeRun, dense_run: Path) -> None:
    settings = json.loads((dense_run / "config.json").read_text())
    settings["hardware"]["name"] = "Another processor"
    (dense_run / "config.json").write_text(json.dumps(settings))
    assert row(tables.comparison([read_run(make_run()), read_run(dense_run)]))["Time vs dense"] == "–"


def test_an_extrapolated_dense_time_is_marked_as_such(make_run: MakeRun) -> None:
    folder = make_run()
    summary = json.loads((folder / "summary.json").read_text()) | {"dense_seconds_extrapolated": 24.0}
    (folder / "summary.json").write_text(json.dumps(summary))
    assert row(tables.comparison([read_run(folder)]))["Time vs dense"] == "≈ 0.5×"


def test_every_column_says_where_its_figures_come_from(make_run: MakeRun) -> None:
    run = read_run(make_run())
    origins = {
        column.title: column.origin
        for table in (tables.comparison([run]), tables.savings([run]), tables.memory_table([run]))
        for column in table.columns
    }
    modelled = {title for title, origin in origins.items() if origin == "modelled"}
    assert {"Training FLOPs", "FLOPs vs dense", "Saved by freezing", "Weights, activations, gradients"} <= modelled
    assert {title for title, origin in origins.items() if origin == "set"} == {"Recipe", "Engine", "Seed", "Versions"}
    assert {origins[title] for title in ("Time", "Time vs dense", "Peak memory", "Kept for backward")} == {"measured"}


def test_a_run_of_which_nothing_is_known_has_dashes(tmp_path: Path) -> None:
    run = RecordedRun(path=tmp_path, name="x", config={})
    for table in (tables.comparison([run]), tables.savings([run]), tables.memory_table([run])):
        assert set(row(table).values()) <= {"–", "– / –"}


def test_settings_are_flattened(tmp_path: Path) -> None:
    config = {
        "command": {"lr": 0.1, "track": [], "none": None},
        "plan": {"freeze_epochs": [1, None]},
        "model": "resnet8",
    }
    found = dict(tables.settings(RecordedRun(path=tmp_path, name="x", config=config)))
    assert found == {"command.lr": "0.1", "command.track": "", "plan.freeze_epochs": "1, None", "model": "resnet8"}


def test_modules_that_are_not_counted_are_named_once_for_all_their_runs(tmp_path: Path) -> None:
    plans = {"a": {"ReLU": 7}, "b": {"ReLU": 7}, "c": {}, "d": {"Odd": 1, "ReLU": 2}}
    runs = [RecordedRun(path=tmp_path, name=name, config={"plan": {"uncounted": plan}}) for name, plan in plans.items()]
    assert tables.uncounted(runs) == [("a, b", "ReLU (7)"), ("d", "Odd (1), ReLU (2)")]
