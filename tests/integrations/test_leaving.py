"""How the callbacks leave a model: after an interruption, before the last epoch, with the weights of another moment."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import StochasticWeightAveraging
from torch import nn
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback

import spfde
from helpers import lightning_runs, transformers_runs
from spfde.integrations import lightning, transformers

CALLBACKS = [lightning.SpfdeCallback, transformers.SpfdeCallback]


def same(one: nn.Module, other: nn.Module) -> bool:
    theirs = other.state_dict()
    return all(torch.equal(tensor, theirs[name]) for name, tensor in one.state_dict().items())


def outside(model: nn.Module, session: spfde.Session) -> int:
    weights = dict(model.named_parameters())
    return sum(int(weights[name][~mask].count_nonzero()) for name, mask in session.masks.items())


# --- what the constructor finds --------------------------------------------------------------------------------------


@pytest.mark.parametrize("callback", CALLBACKS)
@pytest.mark.parametrize(
    ("recipe", "options", "argument"),
    [
        ("spfde", {}, "recipe"),
        (spfde.MEST(sparsity=0.9), {}, "recipe"),
        (spfde.Recipe(), {"epochs": 8}, "epochs"),
        (spfde.Recipe(), {"smaple": None}, "smaple"),
    ],
)
def test_what_cannot_be_attached_is_refused_when_the_callback_is_made(
    callback: Any, recipe: Any, options: dict[str, Any], argument: str
) -> None:
    with pytest.raises(spfde.InvalidArgument) as caught:
        callback(recipe, **options)
    assert [problem.argument for problem in caught.value.problems] == [argument]


# --- Lightning -------------------------------------------------------------------------------------------------------


class Interrupt(pl.Callback):
    """Ctrl-C once, within an epoch."""

    def __init__(self, at: tuple[int, int]) -> None:
        self.at: tuple[int, int] | None = at

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if (trainer.current_epoch, batch_idx) == self.at:
            self.at = None
            raise ValueError("stop here")


@pytest.mark.filterwarnings("ignore")
def test_an_interrupted_fit_leaves_the_model_free_and_goes_on_from_its_checkpoint_with_the_same_callback(
    tmp_path: Path,
) -> None:
    whole = lightning_runs.Module()
    first = lightning.SpfdeCallback(lightning_runs.RECIPE, engine="masked")
    lightning_runs.trainer(first).fit(whole)

    callback = lightning.SpfdeCallback(lightning_runs.RECIPE, engine="masked")
    module = lightning_runs.Module()
    saving = lightning_runs.ModelCheckpoint(tmp_path, save_last=True, save_on_train_epoch_end=True)
    with pytest.raises(ValueError, match="stop here"):
        lightning_runs.trainer(callback, saving, Interrupt((5, 2)), enable_checkpointing=True).fit(module)
    assert not callback.session.is_attached
    assert "forward" not in vars(module.net)
    resumed = lightning_runs.Module()
    lightning_runs.trainer(callback).fit(resumed, ckpt_path=str(tmp_path / "last.ckpt"))
    assert same(resumed.net, whole.net)
    rows = [[(row.epoch, row.samples, row.cost) for row in each.session.cost.rows] for each in (first, callback)]
    assert rows[0] == rows[1]


class Average(pl.Callback):
    """Puts other weights in as training ends, as callbacks that average them do."""

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        with torch.no_grad():
            for parameter in pl_module.net.parameters():
                parameter.add_(0.01)


def test_weights_that_another_callback_puts_in_at_the_end_are_masked_with_a_warning() -> None:
    callback, module = lightning.SpfdeCallback(lightning_runs.SPARSE, engine="masked"), lightning_runs.Module()
    with pytest.warns(UserWarning, match="masked again"):
        lightning_runs.trainer(callback, Average()).fit(module)
    assert outside(module.net, callback.session) == 0


@pytest.mark.filterwarnings("ignore")
def test_stochastic_weight_averaging_is_refused_before_anything_is_changed() -> None:
    module = lightning_runs.Module()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    callback = lightning.SpfdeCallback(lightning_runs.SPARSE.replace(learning_rate=None), engine="masked")
    with pytest.raises(spfde.InvalidArgument) as caught:
        lightning_runs.trainer(callback, StochasticWeightAveraging(0.01)).fit(module)
    assert [problem.argument for problem in caught.value.problems] == ["callbacks"]
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


@pytest.mark.filterwarnings("ignore")
def test_a_smoke_test_of_one_batch_passes() -> None:
    callback = lightning.SpfdeCallback(lightning_runs.RECIPE, engine="masked")
    lightning_runs.trainer(callback, fast_dev_run=True).fit(lightning_runs.Module())
    assert callback.session.step == 1


# --- an end before the last epoch ------------------------------------------------------------------------------------


class StopAfter(pl.Callback):
    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        trainer.should_stop = trainer.current_epoch == 4


class StopTrainerAfter(TrainerCallback):
    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop = state.epoch >= 5


def test_an_end_before_the_masks_are_at_their_target_is_warned_of(tmp_path: Path) -> None:
    callback = lightning.SpfdeCallback(lightning_runs.SPARSE, engine="masked")
    with pytest.warns(UserWarning, match="5 of 8 epochs"):
        lightning_runs.trainer(callback, StopAfter()).fit(lightning_runs.Module())
    other = transformers.SpfdeCallback(transformers_runs.RECIPE, engine="masked")
    with pytest.warns(UserWarning, match="5 of 8 epochs"):
        transformers_runs.trainer(tmp_path, other, StopTrainerAfter()).train()
    assert min(callback.session.density, other.session.density) > 0.2


# --- the Trainer -----------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
def test_the_masks_are_those_of_the_best_checkpoint_where_the_trainer_loads_it_at_the_end(tmp_path: Path) -> None:
    callback = transformers.SpfdeCallback(transformers_runs.RECIPE, engine="masked")
    run = transformers_runs.trainer(
        tmp_path,
        callback,
        EarlyStoppingCallback(2),
        save_strategy="epoch",
        eval_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,  # the worst: an early one
        kind=partial(Trainer, eval_dataset=transformers_runs.Items()),
    )
    run.train()
    assert not run.state.best_model_checkpoint.endswith(f"-{run.state.global_step}")
    assert outside(run.model, callback.session) == 0
    active = sum(int(mask.sum()) for mask in callback.session.masks.values())
    numel = sum(mask.numel() for mask in callback.session.masks.values())
    assert callback.session.density == pytest.approx(active / numel)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("told", [None, torch.ones(8), {"losses": torch.ones(8)}])
def test_a_report_of_another_form_is_refused_by_name(tmp_path: Path, told: Any) -> None:
    callback = transformers.SpfdeCallback(transformers_runs.RECIPE, engine="masked", report=lambda *_: told)
    with pytest.raises(spfde.InvalidArgument) as caught:
        transformers_runs.trainer(tmp_path, callback).train()
    assert caught.value.problems[0].argument == "report"


def test_a_callback_that_was_removed_is_missed(tmp_path: Path) -> None:
    run = transformers_runs.trainer(tmp_path, transformers.SpfdeCallback(transformers_runs.RECIPE))
    run.remove_callback(transformers.SpfdeCallback)
    with pytest.raises(spfde.UsageError, match="removed"):
        run.train()
