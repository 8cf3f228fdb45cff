from __future__ import annotations

import dataclasses
import io
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spfde.core.errors import InvalidArgument, StateMismatch
from spfde.cost import Ledger, LedgerRow, format_bytes, format_flops, format_seconds
from spfde.cost.training import epoch_cost


def row(epoch: int = 0, **changes: object) -> LedgerRow:
    cost = epoch_cost(
        (10**9, 10**8),
        (1.0, 0.25),
        (epoch > 0, False),
        samples=80,
        population=100,
        dense_gradient_samples=2,
    )
    made = LedgerRow(
        **dataclasses.asdict(cost),
        epoch=epoch,
        samples=80,
        steps=8,
        density=0.25,
        frozen_blocks=min(epoch, 1),
        partial_samples=80,
        seconds=1.5 + epoch,
        peak_memory_bytes=(300 - epoch) * 2**20,
        modelled_memory_bytes=(100 - 50 * epoch) * 2**20,
        lr=0.1,
    )
    return dataclasses.replace(made, **changes)  # type: ignore[arg-type]


def ledger(epochs: int = 2) -> Ledger:
    made = Ledger(uncounted={"ReLU": 3, "BatchNorm2d": 2}, dense_memory_bytes=200 * 2**20)
    for epoch in range(epochs):
        made.add(row(epoch))
    return made


def test_totals_are_sums_with_the_largest_peak_and_the_mean_and_least_modelled_memory() -> None:
    totals = ledger().totals
    assert (totals.epochs, totals.samples, totals.steps, totals.seconds) == (2, 160, 16, 4.0)
    assert totals.cost == row(0).cost + row(1).cost
    # An epoch active: 80 x 3 (1e9 + 0.25e8); frozen front: 80 (1e9 + 3 x 0.25e8); dense gradients 2 x 0.75e8 each.
    assert totals.cost.training_flops == 80 * 3 * 1_025_000_000 + 80 * 1_075_000_000 + 2 * 150_000_000
    assert totals.flops_ratio == totals.cost.training_flops / (2 * 300 * 1_100_000_000)
    assert totals.peak_memory_bytes == 300 * 2**20
    assert (totals.average_memory_bytes, totals.minimum_memory_bytes) == (75 * 2**20, 50 * 2**20)


def test_a_neutral_ledger_costs_exactly_what_dense_training_costs() -> None:
    cost = epoch_cost((10**12 + 7, 3), (1.0, 1.0), (False, False), samples=50_001, population=50_001)
    made = Ledger()
    for epoch in range(160):
        made.add(dataclasses.replace(row(epoch), **dataclasses.asdict(cost)))
    assert made.totals.cost.training_flops == made.totals.cost.dense_training_flops == 160 * 3 * 50_001 * (10**12 + 10)
    assert made.totals.flops_ratio == 1.0


def test_a_state_written_and_read_gives_an_equal_ledger() -> None:
    made = ledger()
    file = io.BytesIO()
    torch.save(made.state_dict(), file)
    file.seek(0)
    loaded = Ledger()
    loaded.load_state_dict(torch.load(file, weights_only=True))
    assert loaded == made
    assert loaded.rows == made.rows
    assert str(loaded) == str(made)
    loaded.add(row(2))
    assert loaded != made


@given(
    st.lists(
        st.tuples(
            st.floats(0, 1e9), st.one_of(st.none(), st.integers(0, 10**15)), st.one_of(st.none(), st.floats(0, 10))
        ),
        max_size=5,
    )
)
def test_any_ledger_resumes_to_the_same_rows(entries: list[tuple[float, int | None, float | None]]) -> None:
    whole, first = Ledger(), Ledger()
    rows = [row(e, seconds=s, peak_memory_bytes=p, lr=lr) for e, (s, p, lr) in enumerate(entries)]
    for entry in rows:
        whole.add(entry)
    for entry in rows[: len(rows) // 2]:
        first.add(entry)
    resumed = Ledger()
    resumed.load_state_dict(first.state_dict())
    for entry in rows[len(rows) // 2 :]:
        resumed.add(entry)
    assert resumed == whole
    assert resumed.totals == whole.totals


def test_a_state_is_not_tied_to_the_ledger_it_came_from() -> None:
    made = ledger()
    state = made.state_dict()
    made.add(row(2))
    assert len(state["rows"]) == 2


def test_an_epoch_is_entered_once_and_in_order() -> None:
    made = ledger()
    with pytest.raises(InvalidArgument, match=r"row\.epoch=1: must be later than the last one \(1\)"):
        made.add(row(1))
    assert len(made) == 2


def test_a_row_whose_savings_do_not_add_up_is_refused() -> None:
    made = Ledger()
    with pytest.raises(InvalidArgument, match=r"row\.training_flops"):
        made.add(row(0, saved_by_freezing=1))
    assert made == Ledger()


ENTRIES = ["uncounted", "dense_memory_bytes", "rows"]


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        *((lambda s, name=name: s.pop(name), name) for name in ENTRIES),
        *((lambda s, name=name: s.update({name: "text"}), name) for name in ENTRIES),
        *((lambda s, field=field: s["rows"][0].pop(field.name), field.name) for field in dataclasses.fields(LedgerRow)),
        *(
            (lambda s, field=field: s["rows"][1].update({field.name: "text"}), field.name)
            for field in dataclasses.fields(LedgerRow)
        ),
        (lambda s: s.update(version=1), "version"),
        (lambda s: s.update(uncounted={"ReLU": "three"}), "ReLU"),
        (lambda s: s["rows"].append("text"), "row"),
        (lambda s: s["rows"][1].update(epoch=0), "row.epoch=0"),
        (lambda s: s["rows"][1].update(training_flops=5), "row.training_flops=5"),
    ],
)
def test_a_damaged_state_is_refused_and_changes_nothing(damage: Callable[[Any], object], told: str) -> None:
    made = ledger()
    state = ledger(3).state_dict()
    damage(state)
    with pytest.raises(StateMismatch, match=re.escape(told)):
        made.load_state_dict(state)
    assert made == ledger()


def test_the_table_keeps_modelled_and_measured_apart_and_names_what_is_not_counted() -> None:
    text = str(ledger())
    lines = text.splitlines()
    header = lines[2]
    assert header.split() == ["modelled", "measured", "dense", "of", "dense"]
    ends = {name: header.index(name) + len(name) for name in ("modelled", "measured")}

    def line(label: str) -> str:
        (found,) = [candidate for candidate in lines if candidate.strip().startswith(label)]
        return found

    def cell(label: str, column: str) -> str:
        end = ends[column]
        return re.split(r"\s{2,}", line(label)[:end])[-1]

    assert lines[0] == "Cost of 2 epochs, 16 steps, 160 samples"
    assert cell("training FLOPs", "modelled") == "332.3 GFLOP"
    assert line("training FLOPs").split() == ["training", "FLOPs", "332.3", "GFLOP", "660", "GFLOP", "50.3%"]
    assert line("saved by sparsity").split()[-1] == "-6.8%"
    assert line("saved by freezing").split()[-1] == "-30.3%"
    assert line("saved by sieving").split()[-1] == "-12.6%"
    assert line("added by dense gradients").split() == ["added", "by", "dense", "gradients", "300", "MFLOP", "+0.0%"]
    assert line("step memory, average").split()[3:] == ["75", "MiB", "200", "MiB", "37.5%"]
    assert line("step memory, least").split()[3:] == ["50", "MiB", "200", "MiB", "25.0%"]
    assert cell("peak memory", "measured") == "300 MiB"
    assert cell("time", "measured") == "4.0 s"
    assert lines[-2:] == [
        "The dense column is modelled.",
        "Modelled FLOPs leave out: BatchNorm2d x2, ReLU x3.",
    ]


def test_an_empty_ledger_prints_and_unknown_figures_show_as_a_dash() -> None:
    text = str(Ledger())
    assert "Cost of 0 epochs" in text
    assert re.search(r"peak memory\s+-$", text, re.MULTILINE)
    assert "leave out" not in text
    assert str(Ledger(uncounted={})).endswith("leave out: nothing.")
    assert Ledger().totals.flops_ratio == 1.0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (format_flops(0), "0 FLOP"),
        (format_flops(999), "999 FLOP"),
        (format_flops(13_229_000_000_000_000), "13.23 PFLOP"),
        (format_flops(-1500), "-1.5 kFLOP"),
        (format_flops(999_999), "1 MFLOP"),
        (format_bytes(None), "-"),
        (format_bytes(1023), "1023 B"),
        (format_bytes(1536), "1.5 KiB"),
        (format_seconds(59.97), "1 min 00 s"),
        (format_seconds(12.34), "12.3 s"),
        (format_seconds(312), "5 min 12 s"),
        (format_seconds(11_100), "3 h 05 min"),
    ],
)
def test_figures_are_written_for_people(text: str, expected: str) -> None:
    assert text == expected
