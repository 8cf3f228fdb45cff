"""``attach`` with Accelerate: prepared before or after, it trains what the library's loop trains."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import nn

import spfde
from helpers import accelerate_runs as runs
from helpers.processes import start
from helpers.strangers import RunsCode
from helpers.training import make_parts, train
from spfde.integrations.accelerate import attach

pytestmark = pytest.mark.filterwarnings("ignore")
UNSIEVED = runs.RECIPE.model_copy(update={"sieving": None})


def same(one: nn.Module, other: nn.Module) -> bool:
    theirs = other.state_dict()
    return all(torch.equal(tensor, theirs[name]) for name, tensor in one.state_dict().items())


@pytest.mark.parametrize("prepared", ["before", "after", pytest.param("never", marks=pytest.mark.long)])
@pytest.mark.parametrize("recipe", [runs.RECIPE, UNSIEVED, spfde.Recipe()], ids=["all", "unsieved", "neutral"])
def test_it_trains_what_the_loop_of_the_library_trains_in_any_order_of_prepare(prepared: str, recipe: Any) -> None:
    run = runs.Run(recipe, prepared=prepared)
    run.train()
    parts = make_parts()
    session = spfde.attach(parts.model, parts.optimizer, parts.loader, recipe, epochs=runs.EPOCHS, engine="masked")
    assert run.losses == train(parts, session)
    assert same(run.net, parts.model)
    assert [row.cost for row in run.session.cost.rows] == [row.cost for row in session.cost.rows]


def test_accumulation_ends_with_the_epoch() -> None:
    run = runs.Run(runs.RECIPE, accumulation=3)
    run.train()
    assert run.session.step == runs.EPOCHS * 2  # 3 batches and 1
    assert [row.samples for row in run.session.cost.rows] == [32] * runs.EPOCHS


@pytest.mark.long
@pytest.mark.parametrize("prepared", ["before", "after"])
def test_two_ranks_share_the_samples_and_end_with_the_same_weights(tmp_path: Path, prepared: str) -> None:
    done = start(runs.__file__, str(tmp_path), prepared, ranks=2)
    assert done.returncode == 0, done.stderr
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2))
    assert first["samples"] == second["samples"] == [32] * runs.EPOCHS
    assert all(torch.equal(tensor, second["weights"][name]) for name, tensor in first["weights"].items())


def test_a_session_loader_that_is_prepared_all_the_same_stays_what_it_is() -> None:
    run = runs.Run()
    assert run.accelerator.prepare(run.session.loader) is run.session.loader


@pytest.mark.parametrize("placed", [True, False])
def test_the_model_is_where_prepare_puts_it_before_masks_and_engine_go_by_that(placed: bool) -> None:
    class Placed(nn.Sequential):
        moves: list[Any] = []  # noqa: RUF012  # of this class alone

        def to(self, *args: Any, **named: Any) -> Any:
            self.moves.append(args)
            return super().to(*args, **named)

    accelerator, parts = Accelerator(cpu=True, device_placement=placed), make_parts()
    model = Placed(parts.model)
    session = attach(accelerator, model, parts.optimizer, parts.loader, UNSIEVED, epochs=runs.EPOCHS)
    assert model.moves == ([(accelerator.device,)] if placed else [])
    session.detach()


@pytest.mark.parametrize("left", [0, 1, 0.5, None])
def test_a_folder_that_was_not_saved_to_its_end_is_refused_and_the_one_before_it_goes_on(
    left: float | None, tmp_path: Path
) -> None:
    """Accelerate writes the registered objects last: of the session's file a part is there, or nothing."""
    whole, run = runs.Run(), runs.Run()
    whole.train(tmp_path)
    last = tmp_path / "epoch5" / "custom_checkpoint_0.pkl"
    if left is None:
        last.unlink()
    else:
        os.truncate(last, int(left * last.stat().st_size) if left < 1 else 1)
    before = {name: tensor.clone() for name, tensor in run.net.state_dict().items()}
    with pytest.raises(spfde.StateMismatch):
        run.accelerator.load_state(str(last.parent))
    assert all(torch.equal(tensor, before[name]) for name, tensor in run.net.state_dict().items())
    run.accelerator.load_state(str(tmp_path / "epoch4"))
    run.train()
    assert same(run.net, whole.net)
    assert [row.epoch for row in run.session.cost.rows] == list(range(runs.EPOCHS))


@pytest.mark.parametrize("number", [0, 1])
def test_a_folder_whose_files_would_run_code_is_refused_and_nothing_of_it_is_loaded(
    number: int, tmp_path: Path
) -> None:
    saved, run = runs.Run(), runs.Run()
    saved.train()
    mark = tmp_path / "mark"
    for each in (saved, run):
        each.accelerator.register_for_checkpointing(torch.optim.lr_scheduler.ConstantLR(each.optimizer))
    folder = Path(saved.accelerator.save_state(str(tmp_path / "state")))
    before = {name: tensor.clone() for name, tensor in run.net.state_dict().items()}
    usual = (folder / f"custom_checkpoint_{number}.pkl").read_bytes()
    torch.save({"format": RunsCode(mark)}, folder / f"custom_checkpoint_{number}.pkl")
    with pytest.raises(spfde.StateMismatch, match=f"custom_checkpoint_{number}.pkl.*would run code"):
        run.accelerator.load_state(str(folder))
    assert not mark.exists()
    assert all(torch.equal(tensor, before[name]) for name, tensor in run.net.state_dict().items())
    (folder / f"custom_checkpoint_{number}.pkl").write_bytes(usual)
    run.accelerator.load_state(str(folder))
    assert same(run.net, saved.net)
