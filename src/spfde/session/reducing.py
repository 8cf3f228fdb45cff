"""DistributedDataParallel under a session: it averages what trains, and of masked weights the active entries alone.

A wrapper fixes what it averages when it is made. So whenever other blocks are frozen, it is made to look again, in the
first forward pass of the new stage: then it waits for no gradient that does not come, and misses none that does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from spfde.core.errors import Problem, UsageError
from spfde.core.hooks import weakly
from spfde.core.torch_private import (
    active_ddp,
    comm_hook_of,
    install_comm_hook,
    rebuild_reducer,
    why_not_rebuilt,
)
from spfde.session.freezing import Freezing
from spfde.session.masks import WholeModel
from spfde.session.part import Setting

if TYPE_CHECKING:
    from spfde.session.allreduce import SparseAllReduce


class Reducing:
    """Follows the wrappers that the model is called in: made before ``attach`` or after, one or more.

    Args:
        setting: the session's.
        masks: of the weights.
        freezing: of the blocks.
    """

    def __init__(self, setting: Setting, masks: WholeModel, freezing: Freezing) -> None:
        self._setting, self._masks, self._freezing = setting, masks, freezing
        self._learned = frozenset(id(p) for p in setting.model.parameters() if p.requires_grad)
        #: What each wrapper averages: identities of parameters.
        self._averaged: WeakKeyDictionary[DistributedDataParallel, frozenset[int]] = WeakKeyDictionary()
        self._hooks: WeakKeyDictionary[DistributedDataParallel, SparseAllReduce] = WeakKeyDictionary()
        self._look: RemovableHandle | None = None
        self.follow()

    @property
    def has_something_to_do(self) -> bool:
        """Whether blocks are frozen, or gradients masked, in a run with a process group."""
        is_there = torch.distributed.is_available() and torch.distributed.is_initialized()
        return is_there and not self._setting.is_sharded and (self._setting.recipe.freezes or self._packs)

    @property
    def _packs(self) -> bool:
        return self._setting.sparse_allreduce and self._setting.world.is_shared and bool(self._masks.layers)

    @property
    def bytes_averaged(self) -> tuple[int, int]:
        """Bytes that this process has handed over to be averaged by the hooks, and those of whole gradients."""
        hooks = list(self._hooks.values())
        return sum(hook.sent for hook in hooks), sum(hook.whole for hook in hooks)

    def follow(self) -> None:
        """What is frozen may have changed: look in the next forward pass which wrapper it runs in, and have it follow.

        Not at once: between a forward pass and its backward pass a wrapper must stay as it is.
        """
        if not self.has_something_to_do or self._look is not None:
            return
        known = list(self._averaged.items())
        if known and all(averaged == self._wanted(wrapper) for wrapper, averaged in known):
            return
        look = torch.compiler.disable(weakly(self._on_forward))  # type: ignore[no-untyped-call]
        self._look = self._setting.model.register_forward_pre_hook(look)

    def close(self) -> None:
        """Have the wrappers average all that trains, and whole gradients: the session is detached, and nothing frozen.

        They do in any case from the next forward pass on. Hooks find no masks any more, and let whole buckets travel.
        """
        self._stop_looking()
        for wrapper in list(self._averaged):
            rebuild_reducer(wrapper)
        self._averaged.clear()
        self._hooks.clear()

    def describe(self) -> list[str]:
        """Lines that say what is hooked."""
        lines = []
        if self._look is not None:
            lines.append("hooked: the model's forward pass, once, to see the DistributedDataParallel that it is in")
        if self._hooks:
            sent, whole = self.bytes_averaged
            share = f", {sent / whole:.1%} of the bytes so far" if whole else ""
            lines.append(f"hooked: DistributedDataParallel, to average the active entries of gradients alone{share}")
        others = [name for wrapper in self._averaged if wrapper not in self._hooks and (name := comm_hook_of(wrapper))]
        if others and self._packs:
            lines.append(f"left alone: the communication hook {others[0]}, so that gradients travel as it sends them")
        return lines

    # --- one wrapper -------------------------------------------------------------------------------------------------

    def _on_forward(self, model: nn.Module, _: Any = None) -> None:
        wrapper = active_ddp()
        if wrapper is None or not model.training or not torch.is_grad_enabled():
            return
        self._stop_looking()
        if self._averaged.get(wrapper) != self._wanted(wrapper):
            self._renew(wrapper)

    def _renew(self, wrapper: DistributedDataParallel) -> None:
        problem = find_problem(wrapper)
        if problem is not None and self._setting.recipe.freezes:
            raise UsageError(str(problem))
        if problem is not None:
            return
        hook = self._hooks.pop(wrapper, None)
        wanted = self._wanted(wrapper)
        # What the loop has switched off for this moment is in use in others, or nobody could train it.
        off = [p for p in wrapper.module.parameters() if id(p) in wanted and not p.requires_grad]
        for parameter in off:
            parameter.requires_grad_(True)
        try:
            self._averaged[wrapper] = rebuild_reducer(wrapper)
        finally:
            for parameter in off:
                parameter.requires_grad_(False)
        if self._packs and not comm_hook_of(wrapper) and wrapper.process_group.size() > 1:
            self._hooks[wrapper] = self._pack(wrapper, hook)

    def _pack(self, wrapper: DistributedDataParallel, before: SparseAllReduce | None) -> SparseAllReduce:
        from spfde.session.allreduce import SparseAllReduce, reduce_sparse  # not every torch has process groups

        hook = SparseAllReduce(self._masks.layers, wrapper.process_group)
        if before is not None:
            hook.sent, hook.whole = before.sent, before.whole
        install_comm_hook(wrapper, reduce_sparse, hook)
        return hook

    def _wanted(self, wrapper: DistributedDataParallel) -> frozenset[int]:
        """What a wrapper is to average now. It need not know what never trains, nor what is frozen.

        One that finds out itself what a pass did not use may know all that trained at ``attach``.
        """
        frozen = self._freezing.freezer.paused
        ignored = wrapper.parameters_to_ignore
        found = {id(p) for name, p in wrapper.module.named_parameters() if p.requires_grad and name not in ignored}
        if wrapper.find_unused_parameters:
            held = {id(p) for name, p in wrapper.module.named_parameters() if name not in ignored}
            found |= held & self._learned
        return frozenset(found - frozen)

    def _stop_looking(self) -> None:
        if self._look is not None:
            self._look.remove()
        self._look = None


def find_problem(wrapper: DistributedDataParallel) -> Problem | None:
    """What keeps a DistributedDataParallel from following what is frozen."""
    reason = why_not_rebuilt(wrapper)
    if reason is None:
        return None
    rule = f"cannot follow what is frozen, for it has {reason}"
    remedy = "Make it without that, or leave freezing out of the recipe."
    return Problem("model", "DistributedDataParallel", rule, remedy)
