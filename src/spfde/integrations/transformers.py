"""The Trainer of Hugging Face: a callback that attaches a session where the Trainer makes its train dataloader.

The Trainer counts its steps and makes its schedule from the length of that loader, and calls no callback before. So
the callback takes hold of the Trainer that it is given to, and stands at five of its methods: ``train`` (from which
checkpoint?), ``get_train_dataloader`` (the weights are loaded: here the session is attached, with its saved state),
``training_step`` (how did the batch go?), ``_prepare_inputs`` (what is the batch, on the model's device?) and
``save_model`` (a checkpoint begins: here the session's state is written, before the Trainer removes older ones).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import RandomSampler
from torch.utils.hooks import RemovableHandle

from spfde.core.errors import InvalidArgument, Problem, Problems, UsageError
from spfde.core.files import written_whole
from spfde.integrations.trainer_checkpoints import STATE_NAME, checkpoint_name, session_state, whole_checkpoint
from spfde.recipe import Recipe
from spfde.session.attach import attach, check_options
from spfde.session.session import Session

try:
    from transformers import Trainer, TrainerCallback

    from spfde.integrations.accelerate import is_dealt_by_accelerate, plain_loader, samples_of_process, share_order
except ImportError as error:
    remedy = "Install it: pip install 'spfde[transformers]'."
    raise InvalidArgument(Problem("import", __name__, "needs the package transformers", remedy)) from error

_EVIDENCE = {"logits", "y", "indices", "correct", "loss"}
"""Arguments of ``observe``."""

Report = Callable[[Mapping[str, Any], Any], Mapping[str, Tensor]]


class SpfdeCallback(TrainerCallback):  # type: ignore[misc]  # transformers is not there for mypy
    """Train with SpFDE in a Trainer: ``Trainer(..., callbacks=[SpfdeCallback(recipe)])``.

    ``num_train_epochs`` is the length of the run. With a recipe that sieves by reports, each training step is reported
    from the batch's ``labels`` [N] and the model's ``logits`` [N, classes]; other tasks pass ``report``. Each
    checkpoint folder gets the session's state, and ``train(resume_from_checkpoint=...)`` goes on from it.

    Args:
        recipe: what to save, and how.
        seed: seed of masks, growth and sieving.
        engine: as in ``spfde.attach``.
        report: called with a batch, on the model's device, and the model's outputs for it; returns arguments of
            ``session.observe``, such as ``{"loss": ...}`` with one loss a sample, [N].
        attach_options: further arguments of ``spfde.attach``.

    Attributes:
        session: the session of the newest ``train``; detached when that has ended, with ``cost`` and ``masks`` to read.

    Raises:
        InvalidArgument: as ``train`` begins, where the arguments ask for what cannot work, each with its remedy.
        UsageError: it cannot be told how a batch went.
        StateMismatch: a checkpoint holds no state of the session.

    Example:
        >>> from spfde.integrations.transformers import SpfdeCallback
        >>> callback = SpfdeCallback(spfde.presets.spfde)
        >>> callback.session is None  # until train begins
        True
    """

    def __init__(
        self,
        recipe: Recipe,
        seed: int = 0,
        engine: str = "auto",
        *,
        report: Report | None = None,
        **attach_options: Any,
    ) -> None:
        check_options(recipe, attach_options)
        self.session: Session | None = None
        self._recipe, self._report = recipe, report
        self._options = {**attach_options, "seed": seed, "engine": engine}
        self._trainer: Any = None
        self._checkpoint: str | None = None
        self._order: tuple[torch.Generator, int] | None = None
        self._hook: RemovableHandle | None = None
        self._is_in_step = False
        self._batch: dict[str, Any] | None = None
        self._outputs: list[Any] = []

    # --- the Trainer's methods ---------------------------------------------------------------------------------------

    def on_init_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._trainer = trainer = _calling_trainer(self)
        # The session passes over the batches of an epoch that have been taken; the Trainer would do so once more.
        args.ignore_data_skip = True
        train, make_loader = trainer.train, trainer.get_train_dataloader

        def train_with_session(resume_from_checkpoint: Any = None, *rest: Any, **named: Any) -> Any:
            if self not in trainer.callback_handler.callbacks:
                raise UsageError(
                    "SpfdeCallback was removed from a Trainer that was made with it. Make a new Trainer without it."
                )
            _check_arguments(trainer, self._recipe)
            self._checkpoint = resume_from_checkpoint = whole_checkpoint(resume_from_checkpoint, args.output_dir)
            try:
                return train(resume_from_checkpoint, *rest, **named)
            finally:
                self._leave()

        def loader_of_session() -> Any:
            return self._attach(make_loader())

        trainer.train, trainer.get_train_dataloader = train_with_session, loader_of_session
        self._stand_at_steps(trainer)
        self._stand_at_saving(trainer)

    def _stand_at_saving(self, trainer: Any) -> None:
        save = trainer.save_model

        def save_with_session(output_dir: Any = None, *rest: Any, **named: Any) -> Any:
            saved = save(output_dir, *rest, **named)
            is_checkpoint = output_dir is not None and Path(output_dir).name == checkpoint_name(
                trainer.state.global_step
            )
            if is_checkpoint and self.session is not None and self.session.is_attached:
                state = self.session.state_dict()
                if trainer.args.should_save:
                    with written_whole(Path(output_dir, STATE_NAME)) as (draft,):
                        torch.save(state, draft)
            return saved

        trainer.save_model = save_with_session

    def _stand_at_steps(self, trainer: Any) -> None:
        step, prepare = trainer.training_step, trainer._prepare_inputs

        def step_and_report(model: Any, inputs: Any, *rest: Any, **named: Any) -> Any:
            if self.session is None or not self.session.needs_reports:
                return step(model, inputs, *rest, **named)
            self._outputs.clear()
            self._batch, given, self._is_in_step = None, dict(inputs), True
            try:
                loss = step(model, inputs, *rest, **named)
            finally:
                self._is_in_step = False
            self._observe(prepare(given) if self._batch is None else self._batch)
            return loss

        def prepare_and_note(inputs: Any) -> Any:
            prepared = prepare(inputs)
            if self._is_in_step and self._batch is None:
                self._batch = dict(prepared)  # a copy, for labels are taken out for some losses
            return prepared

        trainer.training_step, trainer._prepare_inputs = step_and_report, prepare_and_note

    def _attach(self, loader: Any) -> Any:
        trainer, args = self._trainer, self._trainer.args
        self._leave()
        plain = plain_loader(loader)
        self._order, options = _reseeded(loader, plain), dict(self._options)
        if is_dealt_by_accelerate(plain, self._recipe):
            plain = trainer.accelerator.prepare_data_loader(loader)
            options.setdefault("samples_per_epoch", samples_of_process(plain, args.world_size))
        elif args.world_size > 1:
            share_order(plain)
        trainer.create_optimizer()
        if self._recipe.learning_rate is not None:
            trainer.lr_scheduler = _NoSchedule(trainer.optimizer)
        model = trainer.model
        state = self._saved_state()
        optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
        epochs = int(args.num_train_epochs)
        session = attach(model, optimizer, plain, self._recipe, epochs=epochs, state=state, **options)
        self.session = session
        try:
            _check_length(session)
            _check_place(session, args.gradient_accumulation_steps)
        except (InvalidArgument, UsageError):
            session.detach()
            raise
        if session.needs_reports:
            self._hook = model.register_forward_hook(self._note_outputs)
        return session.loader

    def _note_outputs(self, model: nn.Module, inputs: Any, outputs: Any) -> None:
        if model.training:
            self._outputs.append(outputs)

    def _observe(self, batch: Mapping[str, Any]) -> None:
        session = self.session
        assert session is not None, "the loader is made first"
        outputs, self._outputs = self._outputs, []
        if len(outputs) != 1:
            raise UsageError(
                f"the model ran {len(outputs)} times in one training step, so that it cannot be told which outputs say "
                "how the batch went. Call the model once in compute_loss, or set sieving=None."
            )
        told = (_class_report if self._report is None else self._report)(batch, outputs[0])
        if not isinstance(told, Mapping) or not told.keys() <= _EVIDENCE:
            given = sorted(told) if isinstance(told, Mapping) else type(told).__name__
            remedy = "Return a dictionary, such as {'loss': losses} with one loss a sample."
            raise InvalidArgument(
                Problem("report", given, f"must return some of {', '.join(sorted(_EVIDENCE))}", remedy)
            )
        session.observe(**told)

    # --- the Trainer's events ----------------------------------------------------------------------------------------

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.session is None or not self.session.is_attached:
            raise UsageError(
                "SpfdeCallback was given to the Trainer too late. Pass it as Trainer(..., callbacks=[...])."
            )
        _check_steps(state.max_steps, len(self.session.loader), args)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        session = self._running()
        session.begin_epoch()
        if self._order is not None:
            generator, seed = self._order
            generator.manual_seed(seed + session.epoch)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._running().end_epoch()

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        session = self._running()
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            session.take_masks(session_state(state.best_model_checkpoint))  # the Trainer has loaded its weights
        session.warn_if_early()

    # -----------------------------------------------------------------------------------------------------------------

    def _leave(self) -> None:
        if self.session is not None:
            self.session.detach()
        if self._hook is not None:
            self._hook.remove()

    def _running(self) -> Session:
        assert self.session is not None, "on_train_begin comes first"
        return self.session

    def _saved_state(self) -> Mapping[str, Any] | None:
        return None if self._checkpoint is None else session_state(self._checkpoint)


class _NoSchedule:
    """Stands where the Trainer's scheduler would: the recipe drives the rates, and the Trainer logs them."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer

    def step(self) -> None:
        """Leave the rates alone."""

    def get_last_lr(self) -> list[float]:
        """The rates as they are."""
        return [group["lr"] for group in self.optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing to load."""


def _calling_trainer(callback: TrainerCallback) -> Trainer:
    """The Trainer whose construction calls the callback: events name everything but it."""
    frame = inspect.currentframe()
    while frame is not None:
        found = frame.f_locals.get("self")
        if isinstance(found, Trainer) and callback in found.callback_handler.callbacks:
            return found
        frame = frame.f_back
    raise UsageError("SpfdeCallback belongs into Trainer(..., callbacks=[...]) and follows no other trainer.")


def _check_arguments(trainer: Any, recipe: Recipe) -> None:
    """Do the training arguments ask for something that cannot work? Nothing has been changed yet."""
    args, problems = trainer.args, Problems()
    if args.max_steps > 0:
        rule = "ends the run at a step, and SpFDE's schedule is made of whole epochs"
        problems.add("max_steps", args.max_steps, rule, "Pass num_train_epochs= instead.")
    elif args.num_train_epochs != int(args.num_train_epochs):
        problems.add("num_train_epochs", args.num_train_epochs, "must be a whole number", "Round it.")
    if args.auto_find_batch_size:
        rule = "starts the run again with another batch size, on weights that have been masked"
        problems.add("auto_find_batch_size", True, rule, "Choose per_device_train_batch_size.")
    if args.n_gpu > 1:
        rule = "copies the model for each step (DataParallel), past the hooks"
        problems.add("n_gpu", args.n_gpu, rule, "Start with torchrun, or set CUDA_VISIBLE_DEVICES to one device.")
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        rule = "shards or replaces the parameters, which masks and freezing work on"
        problems.add("deepspeed or fsdp", True, rule, "Train on one device, or with torchrun alone (DDP).")
    schedule = str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type))
    if recipe.learning_rate is not None and (
        schedule != "constant" or not isinstance(trainer.lr_scheduler, _NoSchedule | None)
    ):
        rule = "sets learning rates, which the recipe's learning_rate does, too"
        remedy = 'Pass lr_scheduler_type="constant", or set learning_rate=None.'
        problems.add("lr_scheduler_type", schedule, rule, remedy)
    problems.raise_if_any()


def _check_length(session: Session) -> None:
    """Is an epoch's number of batches known, and the same in all? The Trainer counts its steps once, before the run."""
    kind = type(session.recipe.sieving).__name__
    if len({row.samples for row in session.timeline}) > 1:
        rule = "changes the number of samples within the run, and the Trainer counts its steps before it"
        raise InvalidArgument(Problem("recipe.sieving", kind, rule, "Take DataSieving(full_last=0), or sieving=None."))
    try:
        len(session.loader)
    except TypeError as error:
        sampler = type(getattr(session.loader, "sampler", None)).__name__
        remedy = "Let the Trainer shuffle (train_sampling_strategy='random'), or set sieving=None."
        raise InvalidArgument(Problem("train_sampling_strategy", sampler, str(error), remedy)) from None


def _check_steps(counted: int, batches: int, args: Any) -> None:
    """Will the Trainer end after the last epoch? Some versions count an epoch's last step only if it is a whole one."""
    steps = -(-batches // args.gradient_accumulation_steps) * int(args.num_train_epochs)
    if counted != steps:
        raise UsageError(
            f"the Trainer counts {counted} steps, and {args.num_train_epochs:g} epochs of {batches} batches have "
            f"{steps}, so that it would not end with the run. Choose gradient_accumulation_steps that divides the "
            "batches of an epoch, or a newer transformers."
        )


def _check_place(session: Session, accumulated: int) -> None:
    """Will the Trainer, which counts a resumed epoch's batches from 0, step after its last one?"""
    batches = len(session.loader)
    if session.begins_anew:
        raise UsageError(
            "the checkpoint is from amid an epoch, which would begin anew (several processes sieve, or its batches are "
            "of no samples with ids), and the Trainer counts its steps once. Resume from a checkpoint of an epoch's "
            "end (save_strategy='epoch')."
        )
    if session.phase == "running" and batches % accumulated:
        raise UsageError(
            f"the checkpoint is from amid an epoch of {batches} batches, which gradient_accumulation_steps="
            f"{accumulated} does not divide: the Trainer would leave out the epoch's last step. Resume from a "
            "checkpoint of an epoch's end (save_strategy='epoch')."
        )


def _reseeded(prepared: Any, plain: Any) -> tuple[torch.Generator, int] | None:
    """Generator and seed of a sampler that the Trainer seeds anew in each epoch, so that the order stays its."""
    batches = prepared.batch_sampler
    seed = getattr(getattr(getattr(batches, "batch_sampler", batches), "sampler", None), "initial_seed", None)
    if seed is None or not isinstance(plain.sampler, RandomSampler):
        return None
    return plain.sampler.generator, seed


def _class_report(batch: Mapping[str, Any], outputs: Any) -> Mapping[str, Tensor]:
    """Logits and labels of a classification with one label a sample; anything else has to be told."""
    labels = batch.get("labels")
    logits = outputs.get("logits") if isinstance(outputs, Mapping) else getattr(outputs, "logits", None)
    if (
        not isinstance(logits, Tensor)
        or not isinstance(labels, Tensor)
        or (logits.ndim, labels.ndim) != (2, 1)
        or labels.is_floating_point()
    ):
        raise UsageError(
            "it cannot be told from the batch's labels and the model's logits how each sample went: only for one class "
            "a sample (labels [N], logits [N, classes]). Pass SpfdeCallback(recipe, report=...), a function of the "
            "batch and the outputs that returns {'loss': one loss a sample} or {'correct': ...}."
        )
    return {"logits": logits.detach(), "y": labels.to(logits.device)}  # a model may lie on several devices
