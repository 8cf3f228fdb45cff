"""What nobody can see when it happens, looked for while little is lost: ``docs/guards.md`` has the table."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from operator import is_
from typing import Any

from torch import Tensor

from spfde.core.checksum import checksums
from spfde.core.errors import StateMismatch, UsageError
from spfde.core.optimizers import inside
from spfde.core.say import counted
from spfde.core.sharding import reshard
from spfde.core.state import check_entries
from spfde.core.torch_private import PARAMETERS
from spfde.planning.timeline import Row
from spfde.session.backward import BackwardPasses
from spfde.session.freezing import Freezing
from spfde.session.masks import WholeModel
from spfde.session.part import Part, Setting
from spfde.session.passes import Passes
from spfde.session.reducing import Reducing
from spfde.session.sharding import agreed_on, check_counts, own_counts, whole_checksums

_LOOKS = (16, 256, 4096)
"""After so many backward passes without a step it is looked whether the weights move all the same."""


class Guards(Part):
    """Looks at the bottom and at the top of each epoch, and before each step at what costs nothing.

    Args:
        setting: the session's.
        masks: of the weights.
        freezing: of the blocks.
        backward: tells of backward passes.
        passes: tells of forward passes.

    Attributes:
        reducing: has DistributedDataParallel follow what is frozen and masked.
        trusts_weights: whether a state is loaded whatever weights the model has, as long as its masks hold for them.
    """

    name = "guards"

    def __init__(
        self, setting: Setting, masks: WholeModel, freezing: Freezing, backward: BackwardPasses, passes: Passes
    ) -> None:
        self._setting, self._masks, self._freezing = setting, masks, freezing
        self.trusts_weights = False
        modules = dict(setting.model.named_modules())
        self._parameters = dict(setting.model.named_parameters())
        # Where they are: the tables of the modules, and the keys.
        self._tables = [vars(modules[name.rpartition(".")[0]])[PARAMETERS] for name in self._parameters]
        self._leaves = [name.rpartition(".")[2] for name in self._parameters]
        self._held = {id(p) for group in setting.optimizer.param_groups for p in group["params"]}
        self._said = self._has_said_idle = False
        self._has_step_begun = False
        self._before = self._content()
        self._backward, self._passes = backward, passes
        backward.tell(self._on_gradient)
        self.reducing = Reducing(setting, masks, freezing)

    # --- when it looks -----------------------------------------------------------------------------------------------

    def begin_epoch(self, row: Row) -> None:
        self._before = self._content()
        self._has_step_begun = False
        self.reducing.follow()

    def before_masks(self) -> None:
        """The top of an epoch, before the masks mutate: what was written since the bottom of the last one."""
        self._check_parameters()
        self._check_groups()
        self._enforce_masks()

    def before_step(self) -> None:
        """An optimizer is about to step."""
        self._has_step_begun = True
        self._freezing.learning.before_step()
        self._check_parameters()
        if not self._setting.clock.steps:
            self._check_groups()

    def verify(self) -> None:
        self._check_parameters()
        self._check_groups()
        self._check_steps()
        self._enforce_masks()

    def detach(self) -> None:
        self.reducing.close()

    def describe(self) -> list[str]:
        return self.reducing.describe()

    # --- what it looks for -------------------------------------------------------------------------------------------

    def _check_parameters(self) -> None:
        """Are the model's parameters those that the masks and the optimizer hold?"""
        found = map(dict.get, self._tables, self._leaves)  # before each step: no line of Python for each of them
        are_same = list(map(is_, found, self._parameters.values()))
        if not all(are_same) and self._setting.is_sharded:
            # Modules that FSDP has sharded hold whole parameters behind a forward pass without a backward pass.
            reshard(self._setting.model)
            are_same = list(map(is_, map(dict.get, self._tables, self._leaves), self._parameters.values()))
        if not all(are_same):
            self._raise_replaced(f"'{list(self._parameters)[are_same.index(False)]}' of the model")

    def _check_groups(self) -> None:
        now = {id(p) for group in self._setting.optimizer.param_groups for p in group["params"]}
        if not self._held <= now:
            missing = counted(len(self._held - now), "parameter")
            self._raise_replaced(f"{missing} of the optimizer")
        current = dict(self._setting.model.named_parameters())
        for name, parameter in self._parameters.items():
            if current.get(name) is not parameter:
                self._raise_replaced(f"'{name}' of the model")

    def _raise_replaced(self, what: str) -> None:
        raise UsageError(
            f"replaced by other tensors since attach: {what}. load_state_dict(assign=True), fully_shard, "
            "parametrizations and copies of modules do that, and the masks and the optimizer hold what is gone. Do it "
            "before the optimizer is made, and attach again; or write into the parameters, as load_state_dict does."
        )

    def _check_steps(self) -> None:
        """Have the weights moved in an epoch without a step of the optimizer that was attached?"""
        clock, passes = self._setting.clock, self._backward.count
        # Gradients may be taken by autograd.grad, which leaves no trace, of a model whose calls nobody sees.
        if clock.steps or clock.phase == "between" or not (passes or self._passes.total() or clock.samples_drawn):
            return
        if self._content() == self._before:
            return  # evaluated, accumulated, or skipped by a scaler
        names = [type(optimizer).__name__ for optimizer in self._setting.optimizer.each]
        inner = [
            f"{type(optimizer).__name__}.{name}"
            for optimizer in self._setting.optimizer.each
            for name, value in vars(optimizer).items()
            if any(value is each for each in inside(optimizer))
        ]
        what = f"in {passes} backward passes" if passes else "without a backward pass"
        remedy = f"Attach to {inner[0]}, whose step() runs" if inner else "Attach to the optimizer whose step() runs"
        raise UsageError(
            f"the weights have moved {what}, but step() of {', '.join(names)} was never called: another optimizer "
            "steps, around the hooks, or they are updated by hand, and nothing is masked or counted. "
            f"{remedy}; where gradients are taken by hand, put them in each parameter's .grad, and call step()."
        )

    def check_complete(self) -> None:
        """Warn, once in a session, where batches were drawn, and nobody has called the model or trained it."""
        clock = self._setting.clock
        if self._has_said_idle or clock.steps or not clock.samples_drawn:
            return
        if self._passes.is_called or self._backward.count:
            return
        self._has_said_idle = True
        warnings.warn(
            f"{clock.samples_drawn:,} samples were drawn from session.loader, and the model that the session is "
            "attached to was not called once, nor its weights moved: is it a copy that is trained? Attach to the model "
            "and the optimizer of the loop.",
            stacklevel=6,
        )

    def _enforce_masks(self) -> None:
        found = self._masks.enforce()
        if found and not self._said:
            self._said = True
            warnings.warn(
                f"weights outside the masks were not zero in {_some(found)}, or are not those that "
                "the last step left: something has loaded, averaged or moved them beside the optimizer. They are "
                "masked again, now and from here on. Average and load masked weights, or attach to what steps.",
                stacklevel=6,
            )

    def compare_ranks(self, found: Exception | None, *, what: str) -> None:
        """Raise what this rank's parts have found; ``UsageError`` where others have, or have drifted apart.

        Args:
            found: the error.
            what: when it is looked, for ranks that do not do the same.
        """
        world = self._setting.world
        layers = self._masks.layers
        mine = (*agreed_on(self._setting, layers, self._parameters), own_counts(layers)) if world.is_shared else None
        every = world.gather(mine, found, what=what)
        if not world.is_shared:
            return
        for what, at, remedy in (
            ("masks", 0, "Attach with one seed and one recipe, to equal weights, and let every rank take each step"),
            (
                "weights",
                1,
                "Wrap the model in DistributedDataParallel on every rank, and call the wrapped model",
            ),
        ):
            first = every[0][at]
            names = [name for name in first if any(other[at].get(name) != first[name] for other in every)]
            if names:
                raise UsageError(
                    f"the {what} of {_some(names)} differ between the ranks: each trains on "
                    f"gradients of its own. {remedy}."
                )
        check_counts(layers, [own[2] for own in every])

    # --- state -------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        return {"weights": self._masked_content()}

    def check_state(self, state: Mapping[str, Any]) -> None:
        check_entries(state, "the guards", {"weights": dict})
        if self.trusts_weights:
            return
        now = self._masked_content()
        other = [name for name, number in now.items() if state["weights"].get(name) != number]
        if other:
            raise StateMismatch(
                f"the weights of {_some(other)} are not those that the state was saved with. "
                "Either attach first, then load the model, the optimizer and the session, in this order; or load the "
                "model first and pass the session's state to attach(state=...)."
            )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._before = self._content()
        self.reducing.follow()

    # --- helpers -----------------------------------------------------------------------------------------------------

    def _on_gradient(self, parameter: Tensor) -> None:
        # Closures run many passes within one step, and its hook comes behind them.
        if self._backward.count in _LOOKS and not self._has_step_begun:
            self._check_steps()

    def _content(self) -> dict[str, int]:
        return checksums({name: p for name, p in self._parameters.items() if not p.is_meta})

    def _masked_content(self) -> dict[str, int]:
        return whole_checksums(self._masks.layers)


def _some(names: Sequence[str]) -> str:
    """How many tensors, and the first one's name."""
    return f"{counted(len(names), 'tensor')} ('{names[0]}')"
