"""The callback in Hugging Face's own Trainer: it sieves, freezes, counts its steps right, and resumes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn

import spfde
from helpers import transformers_runs as runs
from helpers.processes import start
from helpers.strangers import RunsCode
from spfde.integrations.trainer_checkpoints import STATE_NAME, session_state
from spfde.integrations.transformers import SpfdeCallback

pytestmark = pytest.mark.filterwarnings("ignore")
SPARSE = spfde.Recipe(sparsity=spfde.MEST(sparsity=0.8), update_interval_epochs=2)


def same(one: nn.Module, other: nn.Module) -> bool:
    theirs = other.state_dict()
    return all(torch.equal(tensor, theirs[name]) for name, tensor in one.state_dict().items())


def test_a_neutral_recipe_is_the_trainer_without_the_callback_bit_for_bit(tmp_path: Path) -> None:
    plain, neutral = runs.trainer(tmp_path), runs.trainer(tmp_path, SpfdeCallback(spfde.Recipe()))
    plain.train()
    neutral.train()
    assert same(plain.model, neutral.model)
    assert plain.state.global_step == neutral.state.global_step == 8 * 5


def test_it_sieves_freezes_and_counts_the_steps_of_the_partial_set(tmp_path: Path) -> None:
    callback = SpfdeCallback(runs.RECIPE, engine="masked")
    run = runs.trainer(tmp_path, callback, lr_scheduler_type="linear")
    run.train()
    session = callback.session
    assert session is not None
    assert [row.samples for row in session.cost.rows] == [32] * 8  # of 40
    assert session.step == run.state.global_step == run.state.max_steps == 8 * 4
    assert run.state.epoch == 8
    assert set(run.lr_scheduler.get_last_lr()) == {0.0}  # the schedule ends with the run
    assert session.cost.rows[-1].frozen_blocks >= 1
    assert not session.holds(run.model)
    weights = dict(run.model.named_parameters())
    assert all(not weights[name][~mask].any() for name, mask in session.masks.items())


def test_accumulated_batches_are_reported_one_by_one(tmp_path: Path) -> None:
    callback = SpfdeCallback(runs.RECIPE, engine="masked")
    runs.trainer(tmp_path, callback, gradient_accumulation_steps=3).train()
    assert callback.session is not None
    assert callback.session.step == 8 * 2  # 3 batches and 1
    assert [row.samples for row in callback.session.cost.rows] == [32] * 8


@pytest.mark.parametrize("pops", [False, True], ids=["kept", "taken out"])
def test_what_is_reported_is_the_batch_that_the_model_got_on_its_device(tmp_path: Path, pops: bool) -> None:
    """A move to a GPU makes new tensors, as this Trainer does; those that were moved are on the logits' device."""
    given, reported = list[int](), list[int]()

    class Moving(transformers.Trainer):
        def _prepare_inputs(self, inputs: Any) -> Any:
            return {name: tensor.clone() for name, tensor in super()._prepare_inputs(inputs).items()}

        def compute_loss(self, model: Any, inputs: Any, *_: Any, **__: Any) -> Any:
            given.append(inputs["labels"].data_ptr())
            labels = inputs.pop("labels") if pops else inputs["labels"]
            return nn.functional.cross_entropy(model(inputs["x"])["logits"], labels)

    def report(batch: Any, outputs: Any) -> Any:
        reported.append(batch["labels"].data_ptr())
        return {"correct": outputs["logits"].argmax(1) == batch["labels"]}

    run = runs.trainer(tmp_path, SpfdeCallback(runs.RECIPE, engine="masked", report=report), kind=Moving)
    run.train()
    assert len(given) == 8 * 4
    assert reported == given


def test_a_step_of_ones_own_that_prepares_nothing_is_reported_as_the_trainer_would_prepare_it(tmp_path: Path) -> None:
    class Own(transformers.Trainer):
        def training_step(self, model: Any, inputs: Any, *_: Any) -> Any:
            model.train()
            loss = nn.functional.cross_entropy(model(inputs["x"])["logits"], inputs["labels"])
            self.accelerator.backward(loss)
            return loss.detach()

    own, usual = (SpfdeCallback(runs.RECIPE, engine="masked") for _ in range(2))
    one, other = runs.trainer(tmp_path, own, kind=Own), runs.trainer(tmp_path, usual)
    one.train()
    other.train()
    assert same(one.model, other.model)


@pytest.mark.parametrize(
    "sieving", [spfde.DataSieving(criterion="random"), spfde.DataSieving(removed_fraction=0.0)], ids=["random", "none"]
)
def test_a_recipe_that_needs_no_reports_asks_for_none(tmp_path: Path, sieving: Any) -> None:
    class Wordless(runs.Classifier):
        def forward(self, x: Any, labels: Any = None) -> Any:  # type: ignore[override]
            return {"loss": super().forward(x, labels)["loss"]} if labels is not None else super().forward(x)

    callback = SpfdeCallback(spfde.Recipe(sieving=sieving, update_interval_epochs=2))
    runs.trainer(tmp_path, callback, model=Wordless()).train()
    assert callback.session is not None
    assert callback.session.epoch == 8


@pytest.mark.long
def test_labels_that_the_trainer_takes_out_of_the_batch_are_reported_all_the_same(tmp_path: Path) -> None:
    class Own(transformers.Trainer):
        def compute_loss(self, model: Any, inputs: Any, *_: Any, **__: Any) -> Any:
            labels = inputs.pop("labels")
            return nn.functional.cross_entropy(model(**inputs)["logits"], labels)

    callback = SpfdeCallback(runs.RECIPE, engine="masked")
    run = runs.trainer(tmp_path, callback, kind=Own)
    run.train()
    whole = runs.trainer(tmp_path, SpfdeCallback(runs.RECIPE, engine="masked"))
    whole.train()
    assert same(run.model, whole.model)


def test_a_task_without_one_class_a_sample_is_asked_for_a_report(tmp_path: Path) -> None:
    class Regression(runs.Classifier):
        def forward(self, x: Any, labels: Any = None) -> Any:  # type: ignore[override]
            found = super().forward(x)
            if labels is not None:
                found["loss"] = (found["logits"][:, 0] - labels).square().mean()
            found["logits"] = found["logits"][:, :1]
            return found

    class Twice(transformers.Trainer):
        def compute_loss(self, model: Any, inputs: Any, *rest: Any, **named: Any) -> Any:
            model(**inputs)
            return super().compute_loss(model, inputs, *rest, **named)

    class Floats(runs.Items):
        def __getitem__(self, index: int) -> Any:
            return {**super().__getitem__(index), "labels": torch.tensor(0.5)}

    def run(callback: Any, **options: Any) -> None:
        trainer = runs.trainer(tmp_path, callback, **options)
        if "model" in options:
            trainer.train_dataset = Floats()
        trainer.train()

    with pytest.raises(spfde.UsageError, match="report="):
        run(SpfdeCallback(runs.RECIPE, engine="masked"), model=Regression())
    with pytest.raises(spfde.UsageError, match="2 times"):
        run(SpfdeCallback(runs.RECIPE, engine="masked"), kind=Twice)

    def errors(batch: Any, outputs: Any) -> dict[str, torch.Tensor]:
        return {"loss": (outputs["logits"][:, 0] - batch["labels"]).square()}

    recipe = runs.RECIPE.model_copy(update={"sieving": spfde.DataSieving(removed_fraction=0.2, criterion="loss")})
    callback = SpfdeCallback(recipe, engine="masked", report=errors)
    run(callback, model=Regression())
    assert callback.session is not None
    assert callback.session.epoch == 8


@pytest.mark.parametrize(
    ("options", "argument"),
    [
        ({"max_steps": 10}, "max_steps"),
        ({"num_train_epochs": 2.5}, "num_train_epochs"),
        ({"lr_scheduler_type": "linear"}, "lr_scheduler_type"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_changed(
    options: dict[str, Any], argument: str, tmp_path: Path
) -> None:
    recipe = runs.RECIPE.model_copy(update={"learning_rate": spfde.BlockwiseCosine()})
    run = runs.trainer(tmp_path, SpfdeCallback(recipe, engine="masked"), **options)
    with pytest.raises(spfde.InvalidArgument) as caught:
        run.train()
    assert [problem.argument for problem in caught.value.problems] == [argument]
    assert same(run.model, runs.Classifier())


@pytest.mark.parametrize(
    "sieving", [spfde.OneTimeRemoval(removed_fraction=0.2), spfde.DataSieving(removed_fraction=0.2, full_last=0.3)]
)
def test_a_sieve_that_changes_the_length_of_an_epoch_is_refused(tmp_path: Path, sieving: Any) -> None:
    recipe = runs.RECIPE.model_copy(update={"sieving": sieving})
    with pytest.raises(spfde.InvalidArgument) as caught:
        runs.trainer(tmp_path, SpfdeCallback(recipe, engine="masked")).train()
    assert caught.value.problems[0].argument == "recipe.sieving"


def test_a_callback_that_is_added_after_the_trainer_was_made_is_refused(tmp_path: Path) -> None:
    run = runs.trainer(tmp_path)
    run.add_callback(SpfdeCallback(runs.RECIPE))
    with pytest.raises(spfde.UsageError, match="callbacks="):
        run.train()


@pytest.mark.parametrize("rates", [pytest.param(None, marks=pytest.mark.long), spfde.BlockwiseCosine()])
def test_a_resumed_run_is_the_uninterrupted_one_from_every_epochs_end(tmp_path: Path, rates: Any) -> None:
    recipe = runs.RECIPE.model_copy(update={"learning_rate": rates})
    whole = runs.trainer(tmp_path, SpfdeCallback(recipe, engine="masked"), save_strategy="epoch")
    whole.train()
    for step in (4, 24):
        callback = SpfdeCallback(recipe, engine="masked")
        resumed = runs.trainer(tmp_path, callback)
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert same(whole.model, resumed.model), step
        assert callback.session is not None
        assert [row.epoch for row in callback.session.cost.rows] == list(range(8))


def test_a_checkpoint_without_the_session_is_refused(tmp_path: Path) -> None:
    runs.trainer(tmp_path, save_strategy="epoch", num_train_epochs=2).train()
    with pytest.raises(spfde.StateMismatch, match="resume_from_checkpoint"):
        runs.trainer(tmp_path, SpfdeCallback(runs.RECIPE, engine="masked")).train(resume_from_checkpoint=True)


def test_the_newest_checkpoint_that_was_saved_to_its_end_is_gone_on_from_and_the_others_are_told(
    tmp_path: Path,
) -> None:
    def resumed() -> Any:
        run = runs.trainer(tmp_path, SpfdeCallback(SPARSE), num_train_epochs=4)
        run.train(resume_from_checkpoint=True)
        return run

    whole = runs.trainer(tmp_path, SpfdeCallback(SPARSE), save_strategy="epoch", num_train_epochs=4)
    whole.train()
    (tmp_path / "checkpoint-20" / "trainer_state.json").write_text('{"epoch": ')
    (tmp_path / "checkpoint-15" / STATE_NAME).unlink()
    with pytest.warns(UserWarning, match="passed over") as warned:
        assert same(resumed().model, whole.model)
    told = [str(each.message) for each in warned if "passed over" in str(each.message)]
    assert ["checkpoint-20" in line for line in told] == [True, False]
    assert all("goes on from" in line and "checkpoint-10" in line for line in told)
    for step in (20, 10):
        (tmp_path / f"checkpoint-{step}" / STATE_NAME).unlink(missing_ok=True)
    (tmp_path / "checkpoint-5" / "trainer_state.json").unlink()
    with pytest.raises(spfde.StateMismatch):
        resumed()
    with pytest.raises(spfde.StateMismatch):
        runs.trainer(tmp_path, SpfdeCallback(SPARSE)).train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))


def test_older_checkpoints_are_removed_only_when_the_new_one_has_the_session(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill between the two would leave nothing to go on from."""
    remaining: list[bool] = []
    remove = shutil.rmtree

    def note(path: Any, *rest: Any, **named: Any) -> None:
        newest = max(tmp_path.glob("checkpoint-*"), key=lambda folder: int(folder.name.rpartition("-")[2]))
        remaining.append((newest / STATE_NAME).is_file() and (newest / "trainer_state.json").is_file())
        remove(path, *rest, **named)

    monkeypatch.setattr(shutil, "rmtree", note)
    options = {"save_strategy": "epoch", "save_total_limit": 1, "num_train_epochs": 3}
    runs.trainer(tmp_path, SpfdeCallback(SPARSE), **options).train()
    assert remaining == [True, True]


@pytest.mark.long
def test_a_second_train_is_a_new_run(tmp_path: Path) -> None:
    callback = SpfdeCallback(runs.RECIPE, engine="masked")
    run = runs.trainer(tmp_path, callback)
    run.train()
    first = callback.session
    run.train()
    assert callback.session is not None
    assert callback.session is not first
    assert callback.session.epoch == 8


@pytest.mark.long
def test_two_ranks_share_the_samples_and_end_with_the_same_weights(tmp_path: Path) -> None:
    done = start(runs.__file__, str(tmp_path), ranks=2)
    assert done.returncode == 0, done.stderr
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2))
    assert first["samples"] == second["samples"] == [32] * 8
    assert first["steps"] == 8 * 2
    assert all(torch.equal(tensor, second["weights"][name]) for name, tensor in first["weights"].items())


@pytest.mark.parametrize(
    "options",
    [
        {"dataloader_drop_last": True, "per_device_train_batch_size": 12},
        {"bf16": True},
        pytest.param({"dataloader_num_workers": 1}, marks=pytest.mark.long),
        pytest.param({"eval_strategy": "steps", "eval_steps": 3}, marks=pytest.mark.long),
    ],
    ids=lambda options: next(iter(options)),
)
def test_settings_of_the_trainer_go_together_with_a_session(tmp_path: Path, options: dict[str, Any]) -> None:
    callback = SpfdeCallback(runs.RECIPE, engine="masked")
    run = runs.trainer(tmp_path, callback, **options)
    run.train()
    session = callback.session
    assert session is not None
    assert session.epoch == 8
    expected = 24 if "dataloader_drop_last" in options else 32
    assert [row.samples for row in session.cost.rows] == [expected] * 8


def test_a_train_dataloader_of_ones_own_is_sieved(tmp_path: Path) -> None:
    class Own(transformers.Trainer):
        def get_train_dataloader(self) -> Any:
            return torch.utils.data.DataLoader(self.train_dataset, batch_size=10, shuffle=True)

    callback = SpfdeCallback(runs.RECIPE, engine="masked")
    runs.trainer(tmp_path, callback, kind=Own).train()
    assert callback.session is not None
    assert callback.session.step == 8 * 4  # 32 samples in batches of 10


class OwnBatches(torch.utils.data.BatchSampler):
    """A batch sampler of one's own: the session does not know how it would batch the partial set."""


class Batched(transformers.Trainer):
    """With batches that cannot be sieved."""

    def get_train_dataloader(self) -> Any:
        order = torch.utils.data.SequentialSampler(self.train_dataset)  # type: ignore[arg-type]
        sampler = OwnBatches(order, 16, drop_last=False)
        return torch.utils.data.DataLoader(self.train_dataset, batch_sampler=sampler)


class BatchedAndPrepared(Batched):
    def get_train_dataloader(self) -> Any:
        return self.accelerator.prepare(super().get_train_dataloader())


@pytest.mark.parametrize("kind", [pytest.param(Batched, marks=pytest.mark.long), BatchedAndPrepared])
def test_batches_of_ones_own_that_are_not_sieved_are_trained_on(tmp_path: Path, kind: Any) -> None:
    callback = SpfdeCallback(SPARSE, engine="masked")
    runs.trainer(tmp_path, callback, kind=kind, gradient_accumulation_steps=2).train()
    assert callback.session is not None
    assert [(row.samples, row.steps) for row in callback.session.cost.rows] == [(40, 2)] * 8  # 16 and 16, 8


def test_a_checkpoint_from_within_an_epoch_that_would_begin_anew_is_refused(tmp_path: Path) -> None:
    """Batches that are of no samples with ids cannot be passed over, and the Trainer counts its steps once."""
    saving: Any = {"save_strategy": "steps", "save_steps": 2}
    runs.trainer(tmp_path, SpfdeCallback(SPARSE, engine="masked"), kind=Batched, **saving).train()
    with pytest.raises(spfde.UsageError, match="anew"):
        runs.trainer(tmp_path, SpfdeCallback(SPARSE, engine="masked"), kind=Batched).train(
            resume_from_checkpoint=str(tmp_path / "checkpoint-2")
        )


def test_a_sampler_that_does_not_tell_how_many_samples_are_left_is_refused(tmp_path: Path) -> None:
    class Grouping(transformers.Trainer):
        def _get_train_sampler(self, *_: Any) -> Any:
            return transformers.trainer_pt_utils.LengthGroupedSampler(8, lengths=list(range(40)))

    with pytest.raises(spfde.InvalidArgument) as caught:
        runs.trainer(tmp_path, SpfdeCallback(runs.RECIPE, engine="masked"), kind=Grouping).train()
    assert caught.value.problems[0].argument == "train_sampling_strategy"


@pytest.mark.long
def test_the_best_model_has_the_weights_of_its_checkpoint(tmp_path: Path) -> None:
    options = {"eval_strategy": "epoch", "save_strategy": "epoch", "load_best_model_at_end": True}
    run = runs.trainer(tmp_path, SpfdeCallback(runs.RECIPE, engine="masked"), learning_rate=1.0, **options)
    run.train()
    best = load_file(Path(run.state.best_model_checkpoint, "model.safetensors"))
    assert all(torch.equal(tensor, best[name]) for name, tensor in run.model.state_dict().items())


@pytest.mark.parametrize("accumulation", [pytest.param(1, marks=pytest.mark.long), 2])
@pytest.mark.parametrize(
    "sieving", [runs.RECIPE.sieving, pytest.param(None, marks=pytest.mark.long)], ids=["sieved", "unsieved"]
)
def test_what_is_saved_within_an_epoch_goes_on_with_its_other_batches(
    tmp_path: Path, sieving: Any, accumulation: int
) -> None:
    recipe = runs.RECIPE.model_copy(update={"sieving": sieving})
    # Four batches an epoch, sieved or not.
    options = {"gradient_accumulation_steps": accumulation, "per_device_train_batch_size": 8 if sieving else 10}
    whole = runs.trainer(
        tmp_path, SpfdeCallback(recipe, engine="masked"), save_strategy="steps", save_steps=1, **options
    )
    whole.train()
    for step in (1, 6 // accumulation):
        callback = SpfdeCallback(recipe, engine="masked")
        run = runs.trainer(tmp_path, callback, **options)
        run.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert callback.session is not None
        assert run.state.global_step == 32 // accumulation
        assert [row.samples for row in callback.session.cost.rows] == [32 if sieving else 40] * 8
        assert same(whole.model, run.model)


def test_an_epoch_whose_last_step_the_trainer_would_leave_out_is_not_gone_on_with(tmp_path: Path) -> None:
    options = {"gradient_accumulation_steps": 3}  # 3 batches and 1
    saving = {"save_strategy": "steps", "save_steps": 1}
    whole = runs.trainer(tmp_path, SpfdeCallback(runs.RECIPE, engine="masked"), **options, **saving)
    whole.train()
    callback = SpfdeCallback(runs.RECIPE, engine="masked")
    with pytest.raises(spfde.UsageError, match="save_strategy"):
        runs.trainer(tmp_path, callback, **options).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    resumed = runs.trainer(tmp_path, callback, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert same(whole.model, resumed.model)


@pytest.mark.parametrize("content", [b"", b"no checkpoint", "code"])
def test_a_state_that_cannot_be_read_or_would_run_code_is_refused(content: bytes | str, tmp_path: Path) -> None:
    path = tmp_path / STATE_NAME
    if content == "code":
        torch.save(RunsCode(tmp_path / "mark"), path)
    else:
        path.write_bytes(bytes(content))  # type: ignore[arg-type]
    with pytest.raises(spfde.StateMismatch, match="cannot be read"):
        session_state(str(tmp_path))
    assert not (tmp_path / "mark").exists()
