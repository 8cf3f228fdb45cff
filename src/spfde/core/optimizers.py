"""One optimizer or several that step the parameters of one model, as if they were one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from spfde.core.errors import StateMismatch
from spfde.core.hooks import is_silent, mark
from spfde.core.torch_private import hook_steps, steps_running


class Optimizers:
    """Parameter groups, state and hooks of several optimizers.

    Args:
        given: the user's, in their order.

    Attributes:
        each: the same.
    """

    def __init__(self, given: Sequence[Optimizer]) -> None:
        self.each = tuple(given)
        # Some optimizers keep the state in another one inside them: ZeroRedundancyOptimizer, Lookahead.
        self._with_state = tuple(dict.fromkeys(inner for own in self.each for inner in (own, *inside(own))))
        self._owner: dict[int, Optimizer] = {}

    @classmethod
    def of(cls, given: Optimizer | Sequence[Optimizer] | Optimizers) -> Optimizers:
        """From one, several, or what is made of them already."""
        if isinstance(given, Optimizers):
            return given
        return cls([given] if isinstance(given, Optimizer) else given)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of all, in order."""
        return [group for optimizer in self.each for group in optimizer.param_groups]

    def owner(self, parameter: Tensor) -> Optimizer | None:
        """The optimizer that steps a parameter."""
        if len(self.each) == 1:
            return self.each[0]
        if id(parameter) not in self._owner:
            self._owner = {
                id(p): optimizer for optimizer in self.each for group in optimizer.param_groups for p in group["params"]
            }
        return self._owner.get(id(parameter))

    @property
    def states(self) -> list[MutableMapping[Tensor, Any]]:
        """What each remembers, by parameter; loading a state puts others in their places."""
        return [optimizer.state for optimizer in self._with_state]

    def states_of(self, parameter: Tensor) -> Iterator[dict[str, Any]]:
        """What is remembered of a parameter, by those that remember something."""
        for state in self.states:
            found = state.get(parameter)
            if found:
                yield found

    def forget(self, parameter: Tensor) -> None:
        """Free the state of a parameter."""
        for optimizer in self._with_state:
            optimizer.state.pop(parameter, None)

    def hook(self, before: Callable[..., Any], after: Callable[..., Any]) -> list[RemovableHandle]:
        """Hook the steps of all. A ``step`` that calls that of its base class is one step, though hooks run twice."""
        depth: dict[int, int] = {}
        owners = [getattr(method, "__self__", None) for method in (before, after)]

        def outer_before(optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
            within = depth.get(id(optimizer), 0)
            # A step that failed has left its depth behind.
            if within and steps_running(optimizer) > 1:
                depth[id(optimizer)] = within + 1
                return None
            depth[id(optimizer)] = 1
            return None if is_silent(owners[0]) else before(optimizer, args, kwargs)

        def outer_after(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            depth[id(optimizer)] -= 1
            if not depth[id(optimizer)] and not is_silent(owners[1]):
                after(optimizer, args, kwargs)

        for optimizer in self.each:
            hook_steps(optimizer)
        return [
            handle
            for optimizer in self.each
            for handle in (
                optimizer.register_step_pre_hook(mark(outer_before)),
                optimizer.register_step_post_hook(mark(outer_after)),
            )
        ]


class LeadingSteps:
    """Counts a step where an optimizer has stepped more often than any before: several make one step together.

    Args:
        optimizers: all of them.

    Attributes:
        counts: steps of each since ``reset``, in their order; to be saved, and set by a run that goes on.
    """

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        self._index = {id(optimizer): index for index, optimizer in enumerate(optimizers)}
        self.reset()

    def leads(self, optimizer: Optimizer) -> bool:
        """Note that it steps; whether that is a step of the loop."""
        index, most = self._index[id(optimizer)], max(self.counts)
        self.counts[index] += 1
        return self.counts[index] > most

    def reset(self) -> None:
        """Count anew: at the top of an epoch, for phases may train one and then the other."""
        self.counts = [0] * len(self._index)

    def check(self, counts: object) -> None:
        """Raise ``StateMismatch`` for counts of a saved state that cannot be taken over."""
        sound = isinstance(counts, list) and all(type(count) is int and count >= 0 for count in counts)
        if not sound or len(counts) != len(self._index):  # type: ignore[arg-type]  # a list, where it is sound
            raise StateMismatch(
                f"the state counts the optimizers' steps as {counts!r}, and there are {len(self._index)} of them here. "
                "Attach to as many as in the saved run, in the same order."
            )


def inside(optimizer: Optimizer) -> list[Optimizer]:
    """The optimizers that this one holds as attributes: those that it wraps."""
    return [value for value in vars(optimizer).values() if isinstance(value, Optimizer) and value is not optimizer]


def around_closure(args: Any, kwargs: Any, run: Callable[[Callable[[], Any]], Any]) -> tuple[Any, Any] | None:
    """For a step pre-hook: arguments of ``step`` whose closure goes by way of ``run``; None without a closure."""
    # The hook's arguments start with the optimizer itself.
    closure = args[1] if len(args) > 1 else kwargs.get("closure")
    if closure is None:
        return None

    def around() -> Any:
        return run(closure)

    return ((args[0], around, *args[2:]), kwargs) if len(args) > 1 else (args, {**kwargs, "closure": around})
