"""The processes of a run: what each may do, and what one does for all. Those that exchange: test_torchrun.py."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from torch import nn

from spfde.app.train.options import TrainOptions
from spfde.app.train.processes import (
    FolderElsewhere,
    Processes,
    check_together,
    current,
    joined,
    open_folder,
)
from spfde.core.errors import InvalidArgument, RunFolderError

ALONE, SECOND = Processes(), Processes(rank=1, size=2, local_rank=1)


def refused(options: TrainOptions, processes: Processes = SECOND) -> list[str]:
    with pytest.raises(InvalidArgument) as raised:
        check_together(options, processes)
    return [problem.argument for problem in raised.value.problems]


class TestAlone:
    def test_one_process_does_all_itself_and_nothing_is_exchanged(self, tmp_path: Path) -> None:
        model = nn.Linear(1, 1)
        assert ALONE.first(lambda: 3) == ALONE.in_turn(lambda: 3) == 3
        assert ALONE.wrapped(model, torch.device("cpu")) is model
        with ALONE.copied(tmp_path) as copy:
            assert copy == tmp_path
        with pytest.raises(ZeroDivisionError), ALONE.together("a test"):
            raise ZeroDivisionError

    def test_its_generators_go_on_where_they_stand(self) -> None:
        before = torch.get_rng_state(), random.getstate()
        ALONE.seed_epoch(seed=0, epoch=1)
        assert torch.equal(torch.get_rng_state(), before[0])
        assert random.getstate() == before[1]

    def test_it_joins_nobody(self) -> None:
        with joined() as processes:
            assert processes == current() == ALONE
        assert not torch.distributed.is_initialized()

    def test_a_launcher_that_does_not_say_where_to_meet_is_told_so(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("WORLD_SIZE", "2")
        for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
            monkeypatch.delenv(name, raising=False)
        with pytest.raises(InvalidArgument, match="RANK"), joined():
            pass


class TestTogether:
    def test_what_works_is_let_through(self) -> None:
        check_together(TrainOptions(), SECOND)
        check_together(TrainOptions(device="cpu", engine="native"), SECOND)
        check_together(TrainOptions(device="cuda:0", cache_variants=2), ALONE)

    @pytest.mark.parametrize("device", ["cuda:0", "cuda:1", "mps"])
    def test_a_device_for_all_is_refused(self, device: str) -> None:
        assert refused(TrainOptions(device=device)) == ["device"]

    def test_more_processes_than_gpus_are_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        check_together(TrainOptions(), Processes(rank=0, size=2, local_rank=0))
        check_together(TrainOptions(device="cpu"), SECOND)
        assert refused(TrainOptions()) == ["device"]

    def test_all_that_is_wrong_is_told(self) -> None:
        assert refused(TrainOptions(device="mps", cache_variants=2)) == ["device", "cache_variants"]

    def test_each_process_and_epoch_has_random_numbers_of_its_own(self) -> None:
        drawn = []
        with torch.random.fork_rng():
            for rank, epoch in ((0, 0), (1, 0), (0, 1), (1, 1), (0, 0)):
                Processes(rank=rank, size=2).seed_epoch(seed=5, epoch=epoch)
                drawn.append(float(torch.rand(())))
        assert drawn[0] == drawn[4]
        assert len(set(drawn)) == 4


class TestTheFolder:
    def test_one_process_holds_it(self, tmp_path: Path) -> None:
        folder = open_folder(ALONE, tmp_path / "run", resume=False)
        with pytest.raises(RunFolderError):
            open_folder(ALONE, tmp_path / "run", resume=False)
        folder.close()

    def test_elsewhere_it_is_a_name_of_which_nothing_is_read_or_written(self, tmp_path: Path) -> None:
        folder = FolderElsewhere(tmp_path / "run")
        folder.write_json("config.json", {"a": 1})
        folder.write_metrics([{"epoch": 0}])
        folder.append_metrics({"epoch": 0})
        folder.checkpoints.save(lambda _: None, epoch=1, best=True, about={})
        folder.checkpoints.keep(lambda _: None, epoch=1, about={})
        folder.discard()
        folder.close()
        assert folder.read_json("config.json") == {}
        assert not list(tmp_path.iterdir())
