"""Two hosts train one run over real addresses: network namespaces on one machine."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from helpers import ROOT
from helpers.hosts import Host, NoHosts, run_on, two_hosts

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no distributed package"),
]


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[tuple[Host, Host]]:
    made = two_hosts(tmp_path)
    try:
        pair = made.__enter__()
    except NoHosts as reason:
        pytest.skip(str(reason))
    yield pair
    made.__exit__(None, None, None)


def test_an_own_loop_on_two_hosts_has_equal_masks_sets_and_weights(hosts: tuple[Host, Host]) -> None:
    ended = run_on(hosts, str(ROOT / "tests" / "helpers" / "hosts_worker.py"))
    assert [each.returncode for each in ended] == [0, 0], ended[0].stderr + ended[1].stderr
    first, second = (torch.load(host.folder / "found.pt") for host in hosts)
    assert {first["rank"], second["rank"]} == {0, 1}
    for key in ("masks", "weights", "partial"):
        assert first[key].keys() == second[key].keys()
        assert all(torch.equal(value, second[key][name]) for name, value in first[key].items()), key


def test_the_command_trains_on_two_hosts_of_which_one_alone_has_the_run_folder(
    hosts: tuple[Host, Host], tiny: Path
) -> None:
    words = ["--data", str(tiny), "--batch-size", "16", "--engine", "masked", "--epochs", "4"]
    ended = run_on(hosts, "-m", "spfde", "train", *words, "--out", "run")
    assert [each.returncode for each in ended] == [0, 0], ended[0].stderr + ended[1].stderr
    (holder,) = (host for host in hosts if any(host.folder.iterdir()))
    summary = json.loads((holder.folder / "run" / "summary.json").read_text())
    assert summary["processes"] == 2

    # Amid the run the other host is lost; it goes on from what the first one sends, for the other sees no folder.
    run = holder.folder / "run"
    (run / "summary.json").unlink()
    whole = (run / "checkpoints" / "latest" / "model.safetensors").read_bytes()
    lines = (run / "metrics.jsonl").read_text()
    latest, previous = run / "checkpoints" / "latest", run / "checkpoints" / "previous"
    latest.rename(run / "gone")
    previous.rename(latest)
    again = run_on(hosts, "-m", "spfde", "train", "--resume", "run")
    assert [each.returncode for each in again] == [0, 0], again[0].stderr + again[1].stderr
    assert (latest / "model.safetensors").read_bytes() == whole
    figures = [
        [json.loads(line)["test_loss"] for line in text.splitlines()]
        for text in (lines, (run / "metrics.jsonl").read_text())
    ]
    assert figures[0] == figures[1]


def test_a_folder_that_the_first_host_does_not_see_is_an_error_and_no_waiting(hosts: tuple[Host, Host]) -> None:
    ended = run_on(hosts, "-m", "spfde", "train", "--resume", "nowhere")
    told = "".join(each.stderr for each in ended)
    assert told.count("spfde: nowhere: is no run folder") == 1
    assert told.count("exitcode  : 2") == 2
