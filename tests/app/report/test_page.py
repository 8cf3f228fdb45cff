"""The page: one file that needs nothing else, and that believes nothing a run folder says about HTML."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest

from spfde.app.report import read_run
from spfde.app.report.page import told_apart, write_report
from spfde.core.errors import InvalidArgument, RunFolderError

MakeRun = Callable[..., Path]

KEYS = ["accuracy", "flops", "cost", "epochs", "freezing", "sieving", "schedule"]
VOID = {"meta", "img", "source", "br", "link"}


class Page(HTMLParser):
    """Tags, links to elsewhere, and whether every tag is closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.sources: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [value or "" for name, value in attrs if name in ("src", "srcset", "href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_needs_nothing_from_elsewhere_and_its_pictures_lie_beside_it(
    make_run: MakeRun, tmp_path: Path
) -> None:
    out = tmp_path / "new" / "report.html"
    written = write_report([make_run()], out)
    assert written == [out, *(out.with_name(f"report-{key}.png") for key in KEYS)]
    assert sorted(out.parent.iterdir()) == sorted(written)
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written[1:])
    text = out.read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == []
    assert len(page.sources) == 2 * len(KEYS)
    assert all(source.startswith("data:image/png;base64,") for source in page.sources)
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert not re.search(r"https?://|url\(|@import", text)


@pytest.mark.usefixtures("few_plots")
def test_figures_and_their_origins_are_on_the_page(make_run: MakeRun, dense_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    write_report([make_run(), dense_run], out)
    text = out.read_text(encoding="utf-8").replace("\N{NO-BREAK SPACE}", " ")
    assert re.search(r"<dd>65\.0 %</dd><dt>test accuracy</dt><span class=\"origin measured\">", text)
    assert re.search(r"<dd>0\.0747×</dd><dt>of the dense training FLOPs</dt><span class=\"origin modelled\">", text)
    assert "Engine “masked” (a)" in text
    assert "resnet8 on fashion-mini" in text
    assert "unfinished:" not in text


@pytest.mark.usefixtures("few_plots")
def test_an_unfinished_run_is_marked_on_the_page(make_run: MakeRun, tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    write_report([make_run(done=2)], out)
    text = out.read_text(encoding="utf-8")
    assert "unfinished: 2 of 6 epochs" in text
    assert "test accuracy so far" in text


def test_a_run_without_an_epoch_gives_a_page_without_pictures(make_run: MakeRun, tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    written = write_report([make_run(done=0, freeze=False)], out)
    assert written == [out]
    text = out.read_text(encoding="utf-8")
    assert "No run has finished an epoch yet." in text
    assert "nan" not in re.sub(r"base64,[^\"]*", "", text).lower()


@pytest.mark.usefixtures("few_plots")
def test_what_a_run_folder_says_is_escaped(make_run: MakeRun, tmp_path: Path) -> None:
    folder = make_run("runs/<script>alert(1)<")
    settings = json.loads((folder / "config.json").read_text())
    settings["command"]["data"] = "\"><img src=x onerror='alert(2)'>"
    settings["plan"]["uncounted"] = {"<b>Odd</b>": 2}
    (folder / "config.json").write_text(json.dumps(settings))
    out = tmp_path / "report.html"
    write_report([folder], out)
    text = out.read_text(encoding="utf-8")
    page = Page(text)
    assert "script" not in page.tags
    assert "b" in page.tags  # the page's own
    assert all(source.startswith("data:") for source in page.sources)
    assert "&lt;b&gt;Odd&lt;/b&gt; (2)" in text


@pytest.mark.usefixtures("few_plots")
def test_a_report_can_be_written_again(make_run: MakeRun, tmp_path: Path) -> None:
    folder, out = make_run(), tmp_path / "report.html"
    write_report([folder], out)
    first = out.read_bytes()
    write_report([folder], out)
    assert out.read_bytes() == first


@pytest.mark.usefixtures("few_plots")
def test_a_report_may_lie_in_the_run_folder_itself(make_run: MakeRun) -> None:
    folder = make_run()
    write_report([folder], folder / "report.html")
    assert read_run(folder).finished


def test_runs_of_one_name_are_told_apart_by_their_folders(make_run: MakeRun) -> None:
    runs = [read_run(make_run(name)) for name in ("x/runs/a", "y/runs/a", "y/runs/b")]
    assert [run.name for run in told_apart(runs)] == ["x/runs/a", "y/runs/a", "b"]


@pytest.mark.usefixtures("few_plots")
def test_a_run_that_is_given_twice_counts_once(make_run: MakeRun, tmp_path: Path) -> None:
    folder, out = make_run(), tmp_path / "report.html"
    write_report([folder, str(folder), folder / "."], out)
    assert out.read_text(encoding="utf-8").count("<article") == 1


def test_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="must name at least one run folder"):
        write_report([], tmp_path / "report.html")


def test_a_folder_as_the_page_is_refused_with_the_remedy(make_run: MakeRun, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match=r"must be a file.*report\.html"):
        write_report([make_run()], tmp_path)


@pytest.mark.usefixtures("few_plots")
def test_one_bad_folder_among_good_ones_leaves_nothing_behind(make_run: MakeRun, tmp_path: Path) -> None:
    out = tmp_path / "out" / "report.html"
    with pytest.raises(RunFolderError, match="no-such"):
        write_report([make_run(), tmp_path / "no-such"], out)
    assert not out.parent.exists()


@pytest.mark.usefixtures("few_plots")
def test_a_place_that_cannot_be_written_is_named(make_run: MakeRun, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError, match=f"{tmp_path}.*cannot be written"):
        write_report([make_run()], tmp_path / "file" / "report.html")


@pytest.mark.usefixtures("few_plots")
def test_a_full_disk_leaves_the_former_report_and_no_drafts(
    make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out" / "report.html"
    out.parent.mkdir()
    out.write_text("former")
    write = Path.write_bytes

    def full(path: Path, content: bytes) -> int:
        if "-sieving.png" in path.name:
            write(path, content[:10])
            raise OSError(28, os.strerror(28))
        return write(path, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(RunFolderError, match=f"{out.parent}: .*No space left"):
        write_report([make_run()], out)
    assert [path.name for path in out.parent.iterdir()] == ["report.html"]
    assert out.read_text() == "former"
