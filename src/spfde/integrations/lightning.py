"""Lightning: a callback that attaches a session to the module, the optimizers and the train dataloader of ``fit``.

Lightning's order decides where what happens. ``fit`` loads the weights and the callbacks' states, wraps the module and
makes the optimizers, calls ``on_fit_start`` (here the session is attached, with the saved state if there is one), loads
the optimizers' states, fetches the train dataloader (here it finds the session's) and iterates it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, IterableDataset

from spfde.core.errors import InvalidArgument, Problem, Problems, UsageError
from spfde.recipe import Recipe
from spfde.session.attach import attach, check_options
from spfde.session.session import Session
from spfde.sieving import DataSieving
from spfde.sieving.stream import is_stream

try:
    if "pytorch_lightning" in sys.modules and "lightning.pytorch" not in sys.modules:
        raise ImportError  # the user's Lightning is the one with the older name
    from lightning.pytorch import Callback
except ImportError:
    try:
        from pytorch_lightning import Callback
    except ImportError as error:
        remedy = "Install it: pip install 'spfde[lightning]'."
        raise InvalidArgument(Problem("import", __name__, "needs the package lightning", remedy)) from error

#: What training_step may return beside "loss", under the names of observe's arguments.
_REPORTS = (("logits", "y"), ("correct",), ("sample_loss",))


class SpfdeCallback(Callback):  # type: ignore[misc]  # Lightning is not there for mypy
    """Train a LightningModule with SpFDE: ``Trainer(callbacks=[SpfdeCallback(recipe)])``.

    ``Trainer(max_epochs=...)`` is the length of the run. With a recipe that sieves by reports, ``training_step`` says
    how the batch went: it returns ``{"loss": loss, "logits": logits, "y": y}`` (or, instead of the last two,
    ``"correct"``, bool [N], or ``"sample_loss"``, the loss of each sample, [N]), or calls
    ``callback.session.observe(...)`` itself. Lightning's checkpoints hold the session's state, and
    ``fit(ckpt_path=...)`` goes on from it.

    Args:
        recipe: what to save, and how.
        seed: seed of masks, growth and sieving.
        engine: as in ``spfde.attach``.
        model: name of the module inside the LightningModule that is trained sparsely, such as ``"net"``; by default the
            only one that holds parameters, or else the LightningModule itself.
        attach_options: further arguments of ``spfde.attach``.

    Attributes:
        session: the session of the newest ``fit``; detached when that has ended, with ``cost`` and ``masks`` to read.

    Raises:
        InvalidArgument: as ``fit`` begins, with all that the trainer is set to and that cannot work, and the remedies.
        UsageError: as training goes on: nobody said how a batch went, or a checkpoint holds no state of this callback.

    Example:
        >>> from spfde.integrations.lightning import SpfdeCallback
        >>> callback = SpfdeCallback(spfde.presets.spfde)
        >>> callback.session is None  # until fit begins
        True
    """

    def __init__(
        self,
        recipe: Recipe,
        seed: int = 0,
        engine: str = "auto",
        *,
        model: str | None = None,
        **attach_options: Any,
    ) -> None:
        check_options(recipe, attach_options)
        self.session: Session | None = None
        self._recipe, self._model_name = recipe, model
        self._options = {**attach_options, "seed": seed, "engine": engine}
        self._state: Mapping[str, Any] | None = None
        self._is_resumed = False
        self._reported = 0

    # --- the life of a session ---------------------------------------------------------------------------------------

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        # The state of an earlier fit counts where the trainer goes on without a checkpoint.
        state = self._state if self._is_resumed or trainer.current_epoch else None
        self._is_resumed = False
        if self.session is not None:
            self.session.detach()
        recipe = _lenient(self._recipe) if trainer.fast_dev_run else self._recipe
        _check_trainer(trainer, recipe)
        model = _model_of(pl_module, self._model_name)
        source = trainer.fit_loop._data_source
        loader = source.dataloader()
        _check_dealt(trainer, loader, self._recipe)
        self.session = attach(
            model,
            _optimizers_of(trainer, model),
            loader,
            recipe,
            epochs=trainer.max_epochs,
            state=state,
            **self._options,
        )
        if self._recipe.sieves:
            _check_batches_counted(trainer, self.session.loader)
        if self.session.begins_anew:
            raise UsageError(
                "the checkpoint is from amid an epoch, which would begin anew (several processes sieve, or its batches "
                "are of no samples with ids), and Lightning goes on behind its batches. Pass the ckpt_path of a "
                "checkpoint of an epoch's end."
            )
        self.session.loader.asks_for_more = False  # Lightning goes by the length
        trainer.fit_loop._combined_loader = None
        trainer.fit_loop._data_source = replace(source, instance=_TrainLoader(self.session.loader))

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        session = self._running()
        if session.phase == "drained" and session.epoch < trainer.current_epoch:
            session.end_epoch()  # saved after an epoch's last batch, and Lightning takes the epoch for ended
            if hasattr(trainer.fit_loop, "reset_restart_stage"):
                # Some versions would go on as amid that epoch: the next one would not be counted as begun, and what is
                # saved in it could not be gone on with.
                trainer.fit_loop.reset_restart_stage()
        if session.epoch != trainer.current_epoch:
            raise UsageError(
                f"the trainer goes on with epoch {trainer.current_epoch}, SpfdeCallback with epoch {session.epoch}: "
                "the checkpoint holds no state of SpfdeCallback. Take one that was saved with this callback in "
                "Trainer(callbacks=[...]), or start a new run without ckpt_path."
            )

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        session = self._running()
        session.begin_epoch()
        if len({row.samples for row in session.timeline}) > 1 and not trainer.fast_dev_run:
            with suppress(TypeError):  # nobody knows it, and Lightning does not count
                _count_batches_anew(trainer, len(session.loader))

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._reported = self._running().samples_observed

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        session = self._running()
        if session.needs_reports and session.samples_observed == self._reported:
            _report(session, outputs)
        if trainer.is_last_batch:
            session.stop_watch()  # what comes now is validation

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        session = self._running()
        if session.epoch == trainer.current_epoch:
            session.end_epoch()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        if self.session is not None:
            self._leave()

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if stage == "fit" and self.session is not None and self.session.is_attached:
            self.session.verify()  # callbacks that average weights put theirs in as training ends
            self.session.warn_if_early()
            self._leave()

    # --- Lightning's checkpoints -------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """What Lightning puts into its checkpoint: the session's state, tensors and primitives alone."""
        state = self.session.state_dict() if self.session is not None and self.session.is_attached else self._state
        return {} if state is None else {"session": state}

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn == "fit":
            self._state = checkpoint.get("callbacks", {}).get(self.state_key, {}).get("session")
            self._is_resumed = True

    # -----------------------------------------------------------------------------------------------------------------

    def _running(self) -> Session:
        assert self.session is not None, "Lightning calls on_fit_start first"
        return self.session

    def _leave(self) -> None:
        session = self._running()
        if session.is_attached:
            with suppress(UsageError):  # in the middle of an epoch that was interrupted
                self._state = session.state_dict()
            session.detach()


class _TrainLoader:
    """The session's loader, iterated when the first batch is taken.

    Lightning asks for the iterator long before, even for an epoch that is over when a run is resumed, and an epoch
    begins as ``session.loader`` is iterated. As it is no DataLoader, Lightning does not give it a sampler of its own
    either: with several processes the session deals out the batches.
    """

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        yield from self.loader


def _count_batches_anew(trainer: Any, n_batches: int) -> None:
    """Let Lightning, which counts the batches of an epoch once a run, go by those of this one."""
    loop = trainer.fit_loop
    loop._combined_loader.limits, loop.max_batches = [n_batches], n_batches
    if isinstance(trainer.val_check_interval, float):
        trainer.val_check_batch = max(1, int(n_batches * trainer.val_check_interval))


def _report(session: Session, outputs: Any) -> None:
    """Tell the session what training_step returned."""
    given = outputs if isinstance(outputs, Mapping) else {}
    for names in _REPORTS:
        if all(name in given for name in names):
            session.observe(**{name.removeprefix("sample_"): given[name] for name in names})
            return
    raise UsageError(
        "training_step did not say how the batch went, which sieving needs. Return {'loss': loss, 'logits': logits, "
        "'y': y} from training_step, or 'correct' or 'sample_loss' with an entry a sample instead of the last two, or "
        "call callback.session.observe(...) in it."
    )


def _check_trainer(trainer: Any, recipe: Recipe) -> None:
    """Is the trainer set to something that cannot work? Nothing has been changed yet."""
    problems = Problems()
    if trainer.max_epochs in (None, -1):
        remedy = "Pass Trainer(max_epochs=...)."
        problems.add("max_epochs", trainer.max_epochs, "must be the length of the run", remedy)
    if not trainer.fast_dev_run:
        _check_limits(trainer, recipe, problems)
    if trainer.overfit_batches:
        rule = "trains on a few batches that Lightning chooses, and the session chooses the samples"
        problems.add("overfit_batches", trainer.overfit_batches, rule, "Leave SpfdeCallback out while you overfit.")
    if trainer.reload_dataloaders_every_n_epochs:
        rule = "makes the loader anew, and the session keeps one for the whole run"
        value = trainer.reload_dataloaders_every_n_epochs
        problems.add("reload_dataloaders_every_n_epochs", value, rule, "Leave it at 0.")
    if recipe.learning_rate is not None and trainer.lr_scheduler_configs:
        names = [type(config.scheduler).__name__ for config in trainer.lr_scheduler_configs]
        rule = "sets learning rates, which the recipe's learning_rate does, too"
        problems.add("configure_optimizers", names, rule, "Return no scheduler, or set learning_rate=None.")
    _check_strategy(trainer, problems)
    averaging = [name for each in trainer.callbacks if (name := type(each).__name__) == "StochasticWeightAveraging"]
    if averaging:
        rule = "runs over the training set once more behind the last epoch, and sets learning rates"
        problems.add("callbacks", averaging[0], rule, "Leave it out.")
    problems.raise_if_any()


def _lenient(recipe: Recipe) -> Recipe:
    """For a smoke test of one epoch: freeze what can be reached, and sieve without what takes several epochs."""
    freezing, sieving = recipe.freezing, recipe.sieving
    if freezing is not None:
        freezing = freezing.model_copy(update={"as_far_as_possible": True})
    if isinstance(sieving, DataSieving):
        sieving = sieving.model_copy(update={"full_last": 0.0, "offset_epochs": 0})
    return recipe.replace(freezing=freezing, sieving=sieving, update_interval_epochs="auto")


def _check_limits(trainer: Any, recipe: Recipe, problems: Problems) -> None:
    if trainer.max_steps != -1:
        rule = "ends the run at a step, and SpFDE's schedule is made of whole epochs"
        problems.add("max_steps", trainer.max_steps, rule, "Pass max_epochs= instead.")
    if recipe.sieves and trainer.limit_train_batches != 1.0:
        rule = "leaves samples out that the sieve has to see"
        problems.add("limit_train_batches", trainer.limit_train_batches, rule, "Leave it at 1.0, or set sieving=None.")


def _check_strategy(trainer: Any, problems: Problems) -> None:
    kinds = {kind.__name__ for kind in type(trainer.strategy).__mro__}
    if not kinds & {"SingleDeviceStrategy", "DDPStrategy"} or "DeepSpeedStrategy" in kinds:
        rule = "shards or replaces the parameters, which masks and freezing work on"
        problems.add("strategy", type(trainer.strategy).__name__, rule, "Take one device, or strategy='ddp'.")


def _check_dealt(trainer: Any, loader: Any, recipe: Recipe) -> None:
    """Would Lightning deal out batches that the session cannot deal out in its place?"""
    if (
        trainer.world_size > 1
        and trainer._accelerator_connector.use_distributed_sampler
        and isinstance(loader, DataLoader)
        and not isinstance(loader.dataset, IterableDataset)
        and not recipe.sieves
        and is_stream(loader)
    ):
        rule = "is your own: the session cannot deal its batches out, and Lightning would not do it here"
        remedy = "Pass sampler= and batch_size= instead; or deal them out in it, with use_distributed_sampler=False."
        raise InvalidArgument(Problem("loader.batch_sampler", type(loader.batch_sampler).__name__, rule, remedy))


def _model_of(module: Any, name: str | None) -> nn.Module:
    """What is trained sparsely: a module inside the LightningModule, or that itself."""
    if name is not None:
        try:
            found: nn.Module = module.get_submodule(name)
        except AttributeError as error:
            remedy = f"Name one of its modules, such as {', '.join(name for name, _ in module.named_children())}."
            raise InvalidArgument(Problem("model", name, str(error), remedy)) from None
        return found
    children = [child for child in module.children() if any(True for _ in child.parameters())]
    if len(children) == 1 and len(list(module.parameters())) == len(list(children[0].parameters())):
        return children[0]  # type: ignore[no-any-return]
    if type(module).forward is not nn.Module.forward and "forward" in _defined(type(module)):
        return module  # type: ignore[no-any-return]
    names = [name for name, _ in module.named_children()]
    raise InvalidArgument(
        Problem(
            "model",
            None,
            f"{type(module).__name__} has several modules with parameters, and no forward",
            f"Name the one that is trained sparsely: SpfdeCallback(recipe, model=...), one of {', '.join(names)}.",
        )
    )


def _defined(kind: type) -> set[str]:
    """Names that a LightningModule's own classes define."""
    own = [parent for parent in kind.__mro__ if not parent.__module__.startswith(("lightning.", "pytorch_lightning."))]
    return {name for parent in own if parent not in (nn.Module, object) for name in vars(parent)}


def _optimizers_of(trainer: Any, model: nn.Module) -> Optimizer | list[Optimizer]:
    """The optimizers that hold parameters of the model; one alone as it is."""
    own = {id(parameter) for parameter in model.parameters()}
    found = [
        optimizer
        for optimizer in trainer.optimizers
        if any(id(parameter) in own for group in optimizer.param_groups for parameter in group["params"])
    ]
    if not found:
        remedy = "Return one from configure_optimizers that holds its parameters."
        raise InvalidArgument(Problem("optimizer", None, "is missing for the module that is trained sparsely", remedy))
    return found[0] if len(found) == 1 else found


def _check_batches_counted(trainer: Any, loader: Any) -> None:
    """Has ``configure_optimizers`` had the batches counted before the session left samples out?"""
    if trainer.fit_loop._combined_loader is None:
        return
    counted = trainer.fit_loop.max_batches
    try:
        left: int | str = len(loader)
    except TypeError:
        left = "a number that is not known in advance"
    if counted != left:
        rule = f"was counted with {counted} batches an epoch, and sieving leaves {left}"
        remedy = "Give the scheduler its number of steps yourself, or let it step once an epoch (interval='epoch')."
        raise InvalidArgument(Problem("trainer.estimated_stepping_batches", None, rule, remedy))
