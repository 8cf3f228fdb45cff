"""Reading run folders: what counts, what does not, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from spfde.app.report import read_run
from spfde.core.errors import RunFolderError

MakeRun = Callable[..., Path]


def test_a_finished_run_is_read_as_it_was_written(make_run: MakeRun) -> None:
    run = read_run(make_run())
    assert run.finished
    assert run.name == "a"
    assert run.summary is not None
    assert run.summary["seed"] == 7
    assert list(run.epochs) == [0, 1, 2, 3, 4, 5]
    assert run.epochs[2]["training_flops"] == pytest.approx(1000 * 0.1 * 0.8)
    assert run.total("saved_by_sparsity") == pytest.approx(6 * 900)
    assert run.last("frozen_blocks") == 2
    assert run.freezes
    assert run.sieves


def test_an_unfinished_run_is_allowed_and_marked(make_run: MakeRun) -> None:
    run = read_run(make_run(done=2))
    assert not run.finished
    assert run.summary is None
    assert len(run.epochs) == 2
    assert run.planned_epochs == 6


def test_a_run_killed_before_its_first_epoch_has_no_epochs(make_run: MakeRun) -> None:
    folder = make_run(done=0)
    assert read_run(folder).epochs == {}
    (folder / "metrics.jsonl").unlink()
    run = read_run(folder)
    assert run.epochs == {}
    assert run.last("test_accuracy") is None
    assert run.total("seconds") is None


@pytest.mark.parametrize(
    "half", ['{"epoch": 6, "train_l', '{"epoch": 6}\x00\x00', "\x00\x00\x00", '{"train_loss": 1', '"ep"']
)
def test_a_half_written_last_line_does_not_count(make_run: MakeRun, half: str) -> None:
    folder = make_run()
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(half)
    assert list(read_run(folder).epochs) == [0, 1, 2, 3, 4, 5]


def test_a_last_line_without_its_newline_counts_when_it_is_whole(make_run: MakeRun) -> None:
    folder = make_run()
    text = (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text(text.rstrip("\n"))
    assert len(read_run(folder).epochs) == 6


def test_a_damaged_line_in_the_middle_is_an_error_that_names_it(make_run: MakeRun) -> None:
    folder = make_run()
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    lines[2] = lines[2][:20]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.raises(RunFolderError, match=r"metrics\.jsonl.*line 3 is damaged"):
        read_run(folder)


@pytest.mark.parametrize(
    "bad", ['{"epoch": -1}', '{"epoch": 1.5}', '{"epoch": true}', '{"epoch": 1, "seconds": "2"}', "[]"]
)
def test_a_line_of_something_else_is_an_error(make_run: MakeRun, bad: str) -> None:
    folder = make_run()
    (folder / "metrics.jsonl").write_text(f'{bad}\n{{"epoch": 2}}\n')
    with pytest.raises(RunFolderError, match="line 1 is damaged"):
        read_run(folder)


def test_of_two_lines_about_one_epoch_the_later_counts(make_run: MakeRun) -> None:
    folder = make_run(done=2)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"epoch": 1, "test_accuracy": 0.99}) + "\n")
    run = read_run(folder)
    assert [row["test_accuracy"] for row in run.epochs.values()] == [0.4, 0.99]


def test_nan_and_missing_fields_are_not_recorded(make_run: MakeRun) -> None:
    folder = make_run(done=1)
    (folder / "metrics.jsonl").write_text('{"epoch": 0, "test_loss": NaN, "train_loss": Infinity, "seconds": null}\n')
    run = read_run(folder)
    assert run.epochs == {0: {}}
    assert run.last("seconds") is None


def test_the_freezing_of_a_run_is_the_timeline_that_it_was_planned_with(make_run: MakeRun) -> None:
    for run in (read_run(make_run("runs/a")), read_run(make_run("runs/b", done=2))):
        assert run.planned_freezing() == [0, 0, 0, 1, 1, 2]
        assert run.frozen_blocks() == [0, 0, 0, 1, 1, 2]
        assert run.block_names() == ["stem", "stage1", "stage2"]
        assert run.freezes


def test_a_timeline_is_coded_by_run_lengths_and_blocks_may_thaw(make_run: MakeRun) -> None:
    folder = make_run(changes={"frozen_blocks": 0})
    settings = json.loads((folder / "config.json").read_text())
    settings["timeline"]["rows"] = [[1, {"frozen_blocks": 0}], [2, {"frozen_blocks": 2}], [3, {"frozen_blocks": 1}]]
    (folder / "config.json").write_text(json.dumps(settings))
    assert read_run(folder).frozen_blocks() == [0, 2, 2, 1, 1, 1]
    settings["timeline"]["rows"][1][1]["frozen_blocks"] = 0
    (folder / "config.json").write_text(json.dumps(settings))
    assert read_run(folder).frozen_blocks() == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize(
    "timeline", [None, {}, {"rows": 3}, {"rows": [[1, {}]]}, {"rows": [["x", {"frozen_blocks": 1}]]}]
)
def test_without_a_timeline_the_freezing_is_what_was_counted(make_run: MakeRun, timeline: object) -> None:
    folder = make_run(done=5)
    settings = json.loads((folder / "config.json").read_text()) | {"timeline": timeline, "plan": None}
    (folder / "config.json").write_text(json.dumps(settings))
    run = read_run(folder)
    assert run.planned_freezing() == []
    assert run.frozen_blocks() == [0, 0, 0, 1, 1, 0]
    assert run.block_names() == ["block 0", "block 1", "block 2"]


def test_a_missing_folder_is_refused_with_its_path_and_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match=r"no-such: .*no such folder.*spfde train"):
        read_run(tmp_path / "no-such")


def test_a_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("")
    with pytest.raises(RunFolderError, match="is no run folder"):
        read_run(path)


def test_a_folder_of_runs_is_refused_and_the_runs_in_it_are_named(make_run: MakeRun) -> None:
    folder = make_run("runs/first")
    make_run("runs/second")
    with pytest.raises(RunFolderError, match=r"no config\.json.*inside it: first, second"):
        read_run(folder.parent)


@pytest.mark.parametrize("name", ["config.json", "summary.json"])
@pytest.mark.parametrize("content", ['{"half', "[1, 2]", "", "[" * 100_000])
def test_a_damaged_file_is_refused_by_name(make_run: MakeRun, name: str, content: str) -> None:
    folder = make_run()
    (folder / name).write_text(content)
    with pytest.raises(RunFolderError, match=name.replace(".", r"\.")):
        read_run(folder)
