"""What a session does beside a step that is replayed: that which its hooks do in one that PyTorch runs."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from spfde.core.hooks import silenced
from spfde.session.backward import BackwardPasses
from spfde.session.freezing import Freezing
from spfde.session.masks import WholeModel
from spfde.session.part import Setting
from spfde.session.passes import Passes, Shapes
from spfde.session.view import SessionView


@dataclass(frozen=True)
class Heard:
    """What hooks hear in a step.

    Attributes:
        passes: shapes of what the model was called with, for each forward pass in training.
        reached: the parameter that each backward pass reached first.
        stepped: the optimizers that stepped.
    """

    passes: tuple[Shapes, ...]
    reached: tuple[Tensor, ...]
    stepped: tuple[Optimizer, ...]


class Beside:
    """Follows replayed steps; see ``engines.cudagraph.step.Following``.

    Args:
        setting: the session's.
        masks: of the weights.
        freezing: of the blocks.
        passes: counts forward passes.
        backward: counts backward passes.
        begin_epoch: begins an epoch that is due.
        before_step: called before each step of an optimizer, as its hook is.
        after_step: likewise, after it.
        silent: whose hooks count nothing while a step is recorded.
        keeps_front: what the frozen front computes is kept: then the model runs in two halves.
    """

    def __init__(
        self,
        setting: Setting,
        masks: WholeModel,
        freezing: Freezing,
        passes: Passes,
        backward: BackwardPasses,
        *,
        begin_epoch: Callable[[], None],
        before_step: Callable[[Optimizer], None],
        after_step: Callable[[Optimizer], None],
        silent: Sequence[object],
        keeps_front: bool,
    ) -> None:
        self._setting, self._masks, self._freezing = setting, masks, freezing
        self._passes, self._backward = passes, backward
        self._begin_epoch, self._before_step, self._after_step = begin_epoch, before_step, after_step
        self._silent = silent
        self._keeps_front = keeps_front

    def begin(self) -> None:
        self._begin_epoch()

    def reason_for_good(self) -> str | None:
        if self._setting.world.is_shared:
            return "several processes train together"
        if self._keeps_front:
            return "what the frozen front computes is kept (cache=), of which a captured step would compute all"
        if self._masks.follows_every_step:
            return f"{self._setting.recipe.sparsity!r} changes weights or masks at every step"
        return None

    def reason_now(self) -> str | None:
        return "a mutation waits for the gradients of a step" if self._masks.follows_next_step else None

    @contextmanager
    def learning(self) -> Iterator[Callable[[], Heard]]:
        passes: list[Shapes] = []
        reached: list[Tensor] = []
        counts = list(self._setting.leading.counts)
        self._passes.heard = passes.append
        self._backward.heard = reached.append

        def heard() -> Heard:
            each = zip(self._setting.optimizer.each, counts, self._setting.leading.counts, strict=True)
            stepped = (optimizer for optimizer, before, now in each for _ in range(now - before))
            return Heard(tuple(passes), tuple(reached), tuple(stepped))

        try:
            yield heard
        finally:
            self._passes.heard = self._backward.heard = None

    def silence(self) -> AbstractContextManager[None]:
        return silenced(*self._silent)

    def before(self, heard: Any) -> None:
        self._freezing.on_replay()
        self._passes.is_called = True
        for shapes in heard.passes:
            self._passes.add(shapes)
        for parameter in heard.reached:
            self._backward.count_pass(parameter)
        for optimizer in heard.stepped:
            self._before_step(optimizer)

    def after(self, heard: Any) -> None:
        for optimizer in heard.stepped:
            self._after_step(optimizer)


class CapturesSteps(SessionView):
    """``Session.capture``."""

    @abstractmethod
    def _begin_epoch(self, *, is_late: bool = False) -> None:
        """Begin an epoch that is due."""

    @abstractmethod
    def _before_step(self, *_: Any) -> None:
        """An optimizer is about to step."""

    @abstractmethod
    def _after_step(self, optimizer: Optimizer, *_: Any) -> None:
        """It has."""

    @property
    def captures_steps(self) -> bool:
        """Whether ``capture`` makes graphs of steps here, as far as is known before one has run.

        Example:
            >>> session = spfde.attach(model, optimizer, loader, spfde.presets.static, epochs=1, engine="masked")
            >>> session.captures_steps
            False
        """
        return self._computing.engine.recorder is not None and self._beside().reason_for_good() is None

    def capture(self, step: Callable[..., Any], *, strict: bool | None = None) -> Callable[..., Any]:
        """One graph of a whole training step, for the last bit of speed on a GPU: Python and launches cost nothing.

        Each stage (frozen front, shapes, mode, autocast) is recorded when it has come twice in turn, and replayed from
        then on; mutations record nothing anew. What is more than kernels runs as the function says: the steps in which
        a method waits for dense gradients, and with ``auto`` every step of Top-KAST, STR and DeepR.

        Args:
            step: forward pass, loss, backward pass, ``optimizer.step()`` and at its end ``optimizer.zero_grad()``. It
                takes tensors on the model's device, beside numbers and strings, and returns tensors. Schedulers,
                ``observe`` and ``loss_weights`` belong around it, for its lines do not run in a replay.
            strict: what cannot be captured is an error; otherwise a line says why, and it is left to PyTorch. By
                default where an engine was asked for by name.

        Returns:
            A function of the same arguments and result, the result detached; the step itself where the engine captures
            nothing, or not with this method.

        Raises:
            InvalidArgument: under ``strict``: the engine captures nothing, or not with this method.
            UsageError: under ``strict``, from the function: the step cannot be captured, with the reason.

        Example:
            >>> session = spfde.attach(model, optimizer, loader, spfde.presets.static, epochs=1)
            >>> def train(x, y):
            ...     logits = model(x)
            ...     torch.nn.functional.cross_entropy(logits, y).backward()
            ...     optimizer.step()
            ...     optimizer.zero_grad()
            ...     return logits
            >>> step = session.capture(train)
            >>> for epoch in session.epochs():
            ...     for x, y in session.loader:
            ...         session.observe(step(x, y), y)
        """
        self._check_attached()
        if self.captures_steps:  # elsewhere nothing reads the copies, which each mutation would write
            self._masks.keep_in_place()
        return self._computing.capture(step, self._beside(), strict=strict)

    def _beside(self) -> Beside:
        passes, backward = self._bill.passes, self._sampling.backward
        return Beside(
            self._setting,
            self._masks,
            self._freezing,
            passes,
            backward,
            begin_epoch=self._begin_epoch,
            before_step=self._before_step,
            after_step=self._after_step,
            silent=(self, passes, backward, self._guards, *self._freezing.hooked),
            keeps_front=self._computing.caches_prefix,
        )
