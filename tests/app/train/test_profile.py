"""How busy the GPU was, by its own times; and a profile that leaves the run alone."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers.commands import Spfde
from spfde.app.train import profile
from spfde.app.train.display import profile_lines
from spfde.app.train.profile import Profile, busy_share, profiled

CPU = torch.device("cpu")


def test_overlapping_work_counts_once() -> None:
    assert busy_share([(10.0, 14.0), (12.0, 15.0), (13.0, 14.0), (20.0, 20.0), (19.0, 20.0)]) == (10.0, 0.6)
    assert busy_share([(3.0, 5.0)]) == (2.0, 1.0)
    assert busy_share([(3.0, 3.0)]) == (0.0, 1.0)


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 10)), min_size=1))
def test_the_share_is_that_of_the_moments_with_work(spans: list[tuple[int, int]]) -> None:
    intervals = [(start, start + length) for start, length in spans]
    first, last = min(start for start, _ in intervals), max(end for _, end in intervals)
    moments = [any(start <= moment < end for start, end in intervals) for moment in range(first, last)]
    elapsed, share = busy_share(intervals)
    assert elapsed == last - first
    assert share == pytest.approx(sum(moments) / len(moments) if moments else 1.0)


class TestProfiled:
    @pytest.mark.parametrize(
        ("asked", "n_batches", "recorded"), [(3, 30, 3), (3, 5, 3), (5, 5, 4), (50, 30, 20), (1, 1, 1), (2, 2, 1)]
    )
    # PyTorch warns where there is no step to warm up with.
    @pytest.mark.filterwarnings("ignore:Profiler won't be using warmup")
    def test_steps_are_recorded_behind_a_warm_up_as_far_as_the_epoch_has_them(
        self, asked: int, n_batches: int, recorded: int, tmp_path: Path
    ) -> None:
        found: list[Profile] = []
        with profiled(asked, n_batches, CPU, tmp_path, found.append) as after_step:
            for _ in range(n_batches):
                torch.ones(10).sum()
                after_step()
        [profile] = found
        assert (profile.steps, profile.gpu_busy, profile.gpu_seconds) == (recorded, None, None)
        assert profile.trace == tmp_path / "trace.json"
        events = json.loads(profile.trace.read_text())["traceEvents"]
        assert sum(event["name"] == "aten::ones" for event in events) == recorded
        assert {"aten::sum", "aten::ones"} <= {name for name, *_ in profile.dearest}
        assert next(calls for name, calls, *_ in profile.dearest if name == "aten::sum") == recorded

    def test_an_interruption_ends_it_and_writes_nothing(self, tmp_path: Path) -> None:
        def interrupted() -> None:
            with profiled(2, 9, CPU, tmp_path, lambda found: pytest.fail("nothing was recorded")) as after_step:
                after_step()
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            interrupted()
        assert list(tmp_path.iterdir()) == []
        assert not torch.autograd.profiler._is_profiler_enabled

    def test_the_gpu_s_share_is_read_from_the_trace_without_annotations(self, tmp_path: Path) -> None:
        events = [
            {"cat": "kernel", "ts": 100.0, "dur": 30.0},
            {"cat": "gpu_memcpy", "ts": 120.0, "dur": 20.0},
            {"cat": "gpu_memset", "ts": 190.0, "dur": 10.0},
            {"cat": "gpu_user_annotation", "ts": 100.0, "dur": 100.0},
            {"cat": "cuda_runtime", "ts": 0.0, "dur": 500.0},
            {"name": "a mark", "ts": 5.0},
        ]
        recorded: Any = SimpleNamespace(
            export_chrome_trace=lambda path: Path(path).write_text(json.dumps({"traceEvents": events})),
            key_averages=list,
        )
        found = profile._written(recorded, 2, tmp_path / "trace.json", on_gpu=True)
        assert found.gpu_busy == 0.5
        assert found.gpu_seconds == pytest.approx(100e-6)
        [line] = profile_lines(found, on_gpu=True)
        assert "busy 50.0%" in line
        assert "0.05 ms a step" in line  # a tenth of a millisecond over two steps
        events[:3] = []
        found = profile._written(recorded, 2, tmp_path / "trace.json", on_gpu=True)
        assert (found.gpu_busy, found.gpu_seconds) == (None, None)
        assert profile_lines(found, on_gpu=True)[0].endswith("saw nothing of the GPU")


@pytest.mark.cli
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_profiled_run_is_the_same_run_and_a_resumed_one_is_profiled_only_if_asked(
    tiny: Path, spfde: Spfde, here: Path
) -> None:
    argv = ["train", "--data", tiny, "--recipe", "mest", "--epochs", 2, "--batch-size", 16, "--device", "cpu"]
    ended = spfde(*argv, "--out", "profiled", "--profile", 3)
    assert ended.code == 0, ended.err
    assert max(map(len, ended.out.splitlines())) <= 80
    assert "profile of 3 steps (measured), trace in profiled/trace.json: there is no GPU" in " ".join(ended.out.split())
    assert sum(line.endswith(" calls") for line in ended.out.splitlines()) == 10
    assert json.loads((here / "profiled" / "trace.json").read_text())["traceEvents"]
    assert spfde(*argv, "--out", "plain").code == 0
    weights = [(here / name / "checkpoints/latest/model.safetensors").read_bytes() for name in ("profiled", "plain")]
    assert weights[0] == weights[1]
    for name, profiles in (("profiled", False), ("plain", True)):
        (here / name / "trace.json").unlink(missing_ok=True)
        (here / name / "summary.json").unlink()
        latest = here / name / "checkpoints" / "latest"
        for each in sorted(latest.rglob("*")):
            each.unlink()
        latest.rmdir()  # as if it had been killed in its second epoch
        ended = spfde("train", "--resume", name, *(["--profile", 2] if profiles else []))
        assert ended.code == 0, ended.err
        assert "going on after 1 of 2 epochs" in ended.out
        assert (here / name / "trace.json").exists() == profiles
