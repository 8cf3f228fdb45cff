"""The callback in Lightning's own trainer trains what the library's loop trains, and goes on from its checkpoints."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

import spfde
from helpers import lightning_runs as runs
from helpers.processes import start
from helpers.training import make_parts, step
from spfde.integrations.lightning import SpfdeCallback

pytestmark = pytest.mark.filterwarnings("ignore")


def fit(callback: Any, module: Any = None, **options: Any) -> Any:
    module = runs.Module() if module is None else module
    runs.trainer(callback, **options).fit(module)
    return module


def same(one: nn.Module, other: nn.Module) -> bool:
    theirs = other.state_dict()
    return all(torch.equal(tensor, theirs[name]) for name, tensor in one.state_dict().items())


def bill(row: Any) -> tuple[Any, ...]:
    return row.epoch, row.samples, row.cost


def test_it_trains_what_the_loop_of_the_library_trains_bit_for_bit_and_at_the_same_bill() -> None:
    callback = SpfdeCallback(runs.RECIPE, engine="masked")
    module = fit(callback)
    parts = make_parts()
    session = spfde.attach(parts.model, parts.optimizer, parts.loader, runs.RECIPE, epochs=8, engine="masked")
    losses = []
    for _ in session.epochs():
        batches = iter(session.loader)
        # Lightning never asks for one batch more, which draws from the sampler's generator once again.
        losses += [float(step(parts, session, *next(batches))) for _ in range(len(session.loader))]
    assert module.losses == losses
    assert same(module.net, parts.model)
    assert [bill(row) for row in callback.session.cost.rows] == [bill(row) for row in session.cost.rows]
    assert callback.session.cost.rows[-1].samples == 32  # of 40
    assert not callback.session.holds(module.net)


def test_a_neutral_recipe_is_the_trainer_without_the_callback_bit_for_bit() -> None:
    assert same(fit(SpfdeCallback(spfde.Recipe())).net, fit(None).net)


def test_validation_within_an_epoch_changes_nothing() -> None:
    plain = fit(SpfdeCallback(runs.RECIPE, engine="masked"))
    validated = fit(SpfdeCallback(runs.RECIPE, engine="masked"), limit_val_batches=1.0, val_check_interval=2)
    assert same(plain.net, validated.net)


def test_manual_optimization_trains_the_same_weights() -> None:
    callback = SpfdeCallback(runs.RECIPE, engine="masked")
    manual = fit(callback, runs.Manual(callback))
    assert same(manual.net, fit(SpfdeCallback(runs.RECIPE, engine="masked")).net)
    assert callback.session.step == 8 * 4


def test_accumulated_batches_are_reported_one_by_one_and_steps_are_counted_once() -> None:
    callback = SpfdeCallback(runs.RECIPE, engine="masked")
    fit(callback, accumulate_grad_batches=2)
    assert callback.session.step == 8 * 2
    assert [row.samples for row in callback.session.cost.rows] == [32] * 8


def test_each_epoch_has_its_own_number_of_batches_where_all_samples_come_back() -> None:
    """A fifth of 40 in each of 8 epochs are 64: 11 in each of the 6 before the last two. A validation follows each."""

    class Watched(runs.Module):
        def on_validation_epoch_start(self) -> None:
            validated.append(self.trainer.global_step)

    validated: list[int] = []
    sieving = spfde.DataSieving(removed_fraction=0.2, full_last=0.25, offset_epochs=1)
    callback = SpfdeCallback(runs.RECIPE.model_copy(update={"sieving": sieving}), engine="masked")
    fit(callback, Watched(), limit_val_batches=1.0)
    assert callback.session is not None
    assert [row.samples for row in callback.session.cost.rows] == [29] * 6 + [40] * 2
    assert validated == [4, 8, 12, 16, 20, 24, 29, 34]
    fit(SpfdeCallback(callback.session.recipe, engine="masked"), fast_dev_run=True)


def test_a_step_that_does_not_report_is_told_what_to_return() -> None:
    class Silent(runs.Module):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step(batch, batch_idx)["loss"]

    with pytest.raises(spfde.UsageError, match="'logits'"):
        fit(SpfdeCallback(runs.RECIPE, engine="masked"), Silent())
    fit(SpfdeCallback(runs.RECIPE.model_copy(update={"sieving": None}), engine="masked"), Silent())


@pytest.mark.parametrize(
    "sieving", [spfde.DataSieving(criterion="random"), spfde.DataSieving(removed_fraction=0.0)], ids=["random", "none"]
)
def test_a_recipe_that_needs_no_reports_asks_for_none(sieving: Any) -> None:
    class Silent(runs.Module):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step(batch, batch_idx)["loss"]

    recipe = spfde.Recipe(sieving=sieving, update_interval_epochs=2)
    silent, telling = (SpfdeCallback(recipe) for _ in range(2))
    fit(silent, Silent())
    fit(telling)
    assert silent.session is not None
    assert telling.session is not None
    assert [bill(row) for row in silent.session.cost.rows] == [bill(row) for row in telling.session.cost.rows]
    assert not silent.session.needs_reports


@pytest.mark.parametrize(
    ("options", "argument"),
    [
        ({"max_epochs": -1}, "max_epochs"),
        ({"max_steps": 10}, "max_steps"),
        ({"limit_train_batches": 2}, "limit_train_batches"),
        ({"overfit_batches": 2}, "overfit_batches"),
        ({"reload_dataloaders_every_n_epochs": 1}, "reload_dataloaders_every_n_epochs"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_changed(options: dict[str, Any], argument: str) -> None:
    module = runs.Module()
    before = {name: tensor.clone() for name, tensor in module.net.state_dict().items()}
    with pytest.raises(spfde.InvalidArgument) as caught:
        fit(SpfdeCallback(runs.RECIPE, engine="masked"), module, **options)
    assert argument in {problem.argument for problem in caught.value.problems}
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.net.state_dict().items())


def test_a_scheduler_beside_the_block_wise_cosine_is_refused() -> None:
    class Scheduled(runs.Module):
        def configure_optimizers(self) -> Any:
            optimizer = super().configure_optimizers()
            return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)}

    recipe = runs.RECIPE.model_copy(update={"learning_rate": spfde.BlockwiseCosine()})
    with pytest.raises(spfde.InvalidArgument) as caught:
        fit(SpfdeCallback(recipe, engine="masked"), Scheduled())
    assert caught.value.problems[0].argument == "configure_optimizers"


def test_the_module_that_is_trained_sparsely_is_named_where_there_are_several() -> None:
    class Two(runs.Module):
        def __init__(self) -> None:
            super().__init__()
            self.aside = nn.Linear(2, 2)  # trained by nobody

    with pytest.raises(spfde.InvalidArgument) as caught:
        fit(SpfdeCallback(runs.RECIPE, engine="masked"), Two())
    assert caught.value.problems[0].argument == "model"
    callback = SpfdeCallback(runs.RECIPE, engine="masked", model="net")
    fit(callback, Two())
    assert callback.session.epoch == 8


@pytest.mark.parametrize("rates", [None, spfde.BlockwiseCosine()])
def test_a_resumed_run_is_the_uninterrupted_one_from_every_epochs_end(tmp_path: Path, rates: Any) -> None:
    recipe = runs.RECIPE.model_copy(update={"learning_rate": rates})
    whole = runs.Module()
    runs.trainer(SpfdeCallback(recipe, engine="masked"), runs.saving(tmp_path)).fit(whole)
    saved = sorted(tmp_path.glob("*.ckpt"))
    assert len(saved) == 8
    for path in (saved[1], saved[4]):
        resumed, callback = runs.Module(), SpfdeCallback(recipe, engine="masked")
        runs.trainer(callback).fit(resumed, ckpt_path=path)
        assert same(whole.net, resumed.net), path
        assert [row.epoch for row in callback.session.cost.rows] == list(range(8))


def test_a_checkpoint_without_the_session_is_refused(tmp_path: Path) -> None:
    runs.trainer(None, runs.saving(tmp_path), max_epochs=2).fit(runs.Module())
    with pytest.raises(spfde.UsageError, match="ckpt_path"):
        runs.trainer(SpfdeCallback(runs.RECIPE, engine="masked")).fit(
            runs.Module(), ckpt_path=sorted(tmp_path.glob("*.ckpt"))[-1]
        )


def test_a_second_fit_is_a_new_run() -> None:
    callback, module = SpfdeCallback(runs.RECIPE, engine="masked"), runs.Module()
    fit(callback, module)
    first = callback.session
    fit(callback, module)
    assert callback.session is not first
    assert callback.session.epoch == 8
    assert len(callback.session.cost.rows) == 8


def test_early_stopping_ends_the_run_between_two_epochs() -> None:
    class Stop(pl.Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            trainer.should_stop = trainer.current_epoch == 3

    callback = SpfdeCallback(runs.RECIPE, engine="masked")
    with warnings.catch_warnings():
        runs.trainer(callback, Stop()).fit(runs.Module())
    assert callback.session.epoch == 4


@pytest.mark.long
def test_two_ranks_share_the_samples_and_end_with_the_same_weights(tmp_path: Path) -> None:
    done = start(runs.__file__, str(tmp_path), ranks=2)
    assert done.returncode == 0, done.stderr
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2))
    assert first["refused"] == second["refused"] == ["loader.batch_sampler"]  # nobody would deal them out
    assert first["samples"] == second["samples"] == [32] * 8
    assert all(torch.equal(tensor, second["weights"][name]) for name, tensor in first["weights"].items())


@pytest.mark.parametrize("precision", ["bf16-mixed", pytest.param("bf16-true", marks=pytest.mark.long)])
def test_lower_precision_trains_and_keeps_the_masks(precision: str) -> None:
    callback = SpfdeCallback(runs.RECIPE, engine="masked")
    module = fit(callback, precision=precision)
    weights = dict(module.net.named_parameters())
    assert callback.session.epoch == 8
    assert all(not weights[name][~mask].any() for name, mask in callback.session.masks.items())


def test_an_epoch_that_is_cut_short_is_billed_for_what_was_drawn() -> None:
    callback = SpfdeCallback(runs.RECIPE.model_copy(update={"sieving": None}), engine="masked")
    fit(callback, limit_train_batches=2)
    assert [row.samples for row in callback.session.cost.rows] == [16] * 8


def test_a_scheduler_counts_the_batches_that_are_left_or_is_told_that_it_cannot() -> None:
    class Scheduled(runs.Module):
        def configure_optimizers(self) -> Any:
            optimizer = super().configure_optimizers()
            steps = self.trainer.estimated_stepping_batches
            scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=steps)
            return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    with pytest.raises(spfde.InvalidArgument, match="estimated_stepping_batches"):
        fit(SpfdeCallback(runs.RECIPE, engine="masked"), Scheduled())

    class Repeating(Scheduled):
        def train_dataloader(self) -> Any:
            images = super().train_dataloader().dataset
            order = torch.utils.data.RandomSampler(images, replacement=True)
            return torch.utils.data.DataLoader(images, batch_size=runs.BATCH, sampler=order)

    with pytest.raises(spfde.InvalidArgument, match="estimated_stepping_batches"):
        fit(SpfdeCallback(runs.RECIPE, engine="masked"), Repeating())
    callback = SpfdeCallback(runs.RECIPE.model_copy(update={"sieving": None}), engine="masked")
    fit(callback, Scheduled())
    assert callback.session.step == 8 * 5
    limited = SpfdeCallback(runs.RECIPE.model_copy(update={"sieving": None}), engine="masked")
    fit(limited, Scheduled(), limit_train_batches=2)
    assert limited.session.step == 8 * 2


def test_what_is_saved_after_the_validation_of_an_epoch_resumes_bit_for_bit(tmp_path: Path) -> None:
    options: dict[str, Any] = {"limit_val_batches": 1.0}
    whole = runs.Module()
    saving = runs.saving(tmp_path, save_on_train_epoch_end=False)
    runs.trainer(SpfdeCallback(runs.RECIPE, engine="masked"), saving, **options).fit(whole)
    saved = sorted(tmp_path.glob("*.ckpt"))
    assert len(saved) == 8
    for path in (saved[1], saved[4]):
        resumed, callback = runs.Module(), SpfdeCallback(runs.RECIPE, engine="masked")
        runs.trainer(callback, **options).fit(resumed, ckpt_path=path)
        assert same(whole.net, resumed.net), path
        assert [row.epoch for row in callback.session.cost.rows] == list(range(8))


@pytest.mark.parametrize(("sieving", "batches"), [(runs.RECIPE.sieving, 4), (None, 5)], ids=["sieved", "unsieved"])
def test_what_is_saved_after_the_last_batch_of_an_epoch_goes_on_to_the_end(
    tmp_path: Path, sieving: Any, batches: int
) -> None:
    recipe = runs.RECIPE.model_copy(update={"sieving": sieving})
    saving = runs.saving(tmp_path, every_n_train_steps=batches)
    whole = runs.Module()
    runs.trainer(SpfdeCallback(recipe, engine="masked"), saving).fit(whole)
    saved = sorted(tmp_path.glob("*.ckpt"))
    assert len(saved) == 8
    for path in (saved[0], saved[3]):
        callback, module = SpfdeCallback(recipe, engine="masked"), runs.Module()
        runs.trainer(callback).fit(module, ckpt_path=path)
        assert callback.session.step == 8 * batches
        assert [row.samples for row in callback.session.cost.rows] == [8 * batches] * 8
        assert same(whole.net, module.net)
    weights = dict(module.net.named_parameters())
    assert all(not weights[name][~mask].any() for name, mask in callback.session.masks.items())


@pytest.mark.parametrize("batches", [3, 4])
def test_a_run_goes_on_after_the_last_batch_of_an_epoch_and_then_from_what_it_saved_next(
    tmp_path: Path, batches: int
) -> None:
    """The second checkpoint is from the epoch that followed: amid it, or from its last batch."""
    recipe = runs.RECIPE.model_copy(update={"sparsity": spfde.RigL(sparsity=0.8)})

    def run(path: Path | None, *others: Any) -> Any:
        callback, module = SpfdeCallback(recipe, engine="masked"), runs.Module()
        runs.trainer(callback, *others).fit(module, ckpt_path=path)
        return module, [bill(row) for row in callback.session.cost.rows]

    def saved(name: str, step: int) -> Path:
        return tmp_path / name / f"epoch={(step - 1) // 4}-step={step}.ckpt"

    whole, cost = run(None, runs.saving(tmp_path / "first", every_n_train_steps=4))
    run(saved("first", 4), runs.saving(tmp_path / "second", every_n_train_steps=batches))
    again, same_cost = run(saved("second", 2 * batches))
    assert same(whole.net, again.net)
    assert same_cost == cost


def test_what_is_saved_within_an_epoch_goes_on_with_its_other_batches(tmp_path: Path) -> None:
    saving = runs.saving(tmp_path, every_n_train_steps=3)
    whole = runs.Module()
    runs.trainer(SpfdeCallback(runs.RECIPE, engine="masked"), saving).fit(whole)
    assert len(sorted(tmp_path.glob("*.ckpt"))) == 10
    for path in sorted(tmp_path.glob("*.ckpt"))[:3:2]:
        callback, module = SpfdeCallback(runs.RECIPE, engine="masked"), runs.Module()
        runs.trainer(callback).fit(module, ckpt_path=path)
        assert callback.session.epoch == 8
        assert [row.samples for row in callback.session.cost.rows] == [32] * 8
        assert same(whole.net, module.net)


def test_a_checkpoint_from_within_an_epoch_that_would_begin_anew_is_refused(tmp_path: Path) -> None:
    """Batches that are of no samples with ids cannot be passed over, and Lightning goes on behind them."""
    saving = runs.saving(tmp_path, every_n_train_steps=3)
    runs.trainer(SpfdeCallback(runs.SPARSE, engine="masked"), saving).fit(runs.Batched())
    within = min(tmp_path.glob("*.ckpt"))
    with pytest.raises(spfde.UsageError, match="anew"):
        runs.trainer(SpfdeCallback(runs.SPARSE, engine="masked")).fit(runs.Batched(), ckpt_path=within)


class TwoOptimizers(runs.Manual):
    """One optimizer for the body, another for the head."""

    def configure_optimizers(self) -> Any:
        head = list(self.net.fc.parameters())
        body = [each for each in self.net.parameters() if not any(each is own for own in head)]
        return torch.optim.SGD(body, lr=0.05, momentum=0.9), torch.optim.AdamW(head, lr=1e-3)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        logits = self.net(batch[0])
        self.manual_backward(nn.functional.cross_entropy(logits, batch[1]))
        for optimizer in self.optimizers():
            optimizer.step()
            optimizer.zero_grad()
        self.report(logits, batch[1])


@pytest.mark.parametrize("rates", [None, pytest.param(spfde.BlockwiseCosine(), marks=pytest.mark.long)])
def test_several_optimizers_are_one_run_and_resume_as_one(tmp_path: Path, rates: Any) -> None:
    recipe = runs.RECIPE.model_copy(update={"learning_rate": rates})
    callback = SpfdeCallback(recipe, engine="masked")
    whole = TwoOptimizers(callback)
    runs.trainer(callback, runs.saving(tmp_path)).fit(whole)
    weights = dict(whole.net.named_parameters())
    assert callback.session.step == 8 * 4
    assert all(not weights[name][~mask].any() for name, mask in callback.session.masks.items())
    callback = SpfdeCallback(recipe, engine="masked")
    resumed = TwoOptimizers(callback)
    runs.trainer(callback).fit(resumed, ckpt_path=sorted(tmp_path.glob("*.ckpt"))[4])
    assert same(whole.net, resumed.net)


def test_an_optimizer_for_a_module_beside_the_sparse_one_is_left_to_lightning() -> None:
    class Beside(TwoOptimizers):
        def __init__(self, callback: SpfdeCallback) -> None:
            super().__init__(callback)
            self.critic = nn.Linear(4, 1)

        def configure_optimizers(self) -> Any:
            return *super().configure_optimizers(), torch.optim.SGD(self.critic.parameters(), lr=0.1)

        def training_step(self, batch: Any, batch_idx: int) -> None:
            self.manual_backward(self.critic(torch.ones(1, 4)).square().mean())
            super().training_step(batch, batch_idx)

    callback = SpfdeCallback(runs.RECIPE, engine="masked", model="net")
    module = fit(callback, Beside(callback))
    beside = TwoOptimizers(callback := SpfdeCallback(runs.RECIPE, engine="masked"))
    assert same(module.net, fit(callback, beside).net)
    assert module.critic(torch.ones(1, 4)).abs() < 0.1


def test_the_validation_after_an_epoch_is_not_among_its_seconds() -> None:
    running = []

    class Look(pl.Callback):
        def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
            running.append(callback.session._clock.started is not None)

    callback = SpfdeCallback(runs.RECIPE, engine="masked")
    runs.trainer(callback, Look(), limit_val_batches=1.0).fit(runs.Module())
    assert running == [False] * 8
