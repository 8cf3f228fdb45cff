"""Freezing a block as soon as it has converged: the adaptive criterion of ``ProgressiveFreezing``.

At each update epoch the first block that still learns is compared with what it was at the update epoch before. Where
the two are alike it has one more interval at its target density, and is then frozen; so one block at most is frozen an
update epoch, front to back. A block of which nothing can be seen (by structure, a dense one) goes by the next one
behind it. The freeze plan stays in force as the latest time: what it saves is saved in any case.

Source: the two measures are those of SpFDE's analysis (section 2: structural similarity and CKA), there taken against
the final model. The rule is ours; the paper freezes by schedule.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from spfde.analysis import BlockOutputs, MinibatchCKA, centred_gram, output_modules
from spfde.core.errors import StateMismatch
from spfde.freezing import Block, Partition
from spfde.model.sample import Sample
from spfde.sparsity import largest_half, pack, unpack

Look = dict[str, Tensor]


class Criterion(Protocol):
    """What a block is compared by.

    Attributes:
        samples: samples that one look runs forward through the model.
    """

    samples: int

    def look(self, blocks: Sequence[Block]) -> Look:
        """What is kept of each block until the next update epoch, by the block's name."""

    def similarity(self, before: Tensor, now: Tensor) -> float:
        """How alike two looks at a block are: 1 for the same."""


class StructureCriterion:
    """Share of the largest half of a block's active weights that were among them at the update epoch before.

    Args:
        weights: the masked weights by name.
        masks: gives their masks.
    """

    samples = 0

    def __init__(self, weights: Mapping[str, nn.Parameter], masks: Callable[[], Mapping[str, Tensor]]) -> None:
        self._weights, self._masks = weights, masks

    def look(self, blocks: Sequence[Block]) -> Look:
        masks = self._masks()
        found = {}
        for block in blocks:
            names = [name for name in block.parameters if name in masks]
            if names:
                halves = [largest_half(self._weights[name], masks[name]).flatten().cpu() for name in names]
                found[block.name] = pack(torch.cat(halves))
        return found

    def similarity(self, before: Tensor, now: Tensor) -> float:
        kept, all_of_it = _bits(before & now), _bits(before)
        return kept / all_of_it if all_of_it else 1.0


class RepresentationCriterion:
    """Linear CKA between a block's outputs, now and at the update epoch before, for the same probe samples.

    Args:
        model: the model.
        partition: its blocks.
        probe: what the model is called with, four samples or more.
        samples: how many these are.
        in_pytorch: a context in which the model's modules run as modules, whatever the engine.
    """

    def __init__(
        self,
        model: nn.Module,
        partition: Partition,
        probe: Sample,
        samples: int,
        in_pytorch: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self.samples = samples
        self._model, self._probe, self._in_pytorch = model, probe, in_pytorch
        with in_pytorch():
            modules = output_modules(model, partition, probe)
        self._module_of = {
            block.name: module for block, module in zip(partition.blocks, modules, strict=False) if module is not None
        }

    def look(self, blocks: Sequence[Block]) -> Look:
        modules = {block.name: self._module_of[block.name] for block in blocks if block.name in self._module_of}
        with self._in_pytorch(), BlockOutputs(self._model, list(modules.values())) as outputs:
            features = outputs(self._probe)
            return {name: centred_gram(features[module]) for name, module in modules.items()}

    def similarity(self, before: Tensor, now: Tensor) -> float:
        cka = MinibatchCKA()
        cka.add(before, now)
        return cka.value


class Convergence:
    """Decides at each update epoch how many blocks are frozen because they have converged.

    Args:
        criterion: what blocks are compared by.
        blocks: those that the plan freezes, front to back.
        threshold: similarity from which on a block has converged.
        flops_of_look: modelled FLOPs of a look at the masks as they are.
        agreed: gives the similarity that all processes go by, from this one's.

    Attributes:
        frozen: blocks that are frozen for this reason, or by the plan.
        settles: whether the next block is frozen at the next update epoch, and so must be at its target by then.
        similarity: of the block that was looked at last; None before the first comparison.
        overhead: FLOPs of the looks of this epoch.
    """

    def __init__(
        self,
        criterion: Criterion,
        blocks: Sequence[Block],
        *,
        threshold: float,
        flops_of_look: Callable[[int], int],
        agreed: Callable[[float], float] = float,
    ) -> None:
        self._criterion, self._blocks, self._threshold = criterion, tuple(blocks), threshold
        self._flops_of_look, self._agreed = flops_of_look, agreed
        self._before: Look = {}
        self.frozen, self.settles, self.overhead = 0, False, 0
        self.similarity: float | None = None

    @property
    def settling(self) -> frozenset[str]:
        """Parameters of the block that is frozen at the next update epoch."""
        return frozenset(self._blocks[self.frozen].parameters) if self.settles else frozenset()

    def begin_epoch(self, *, planned: int, is_update_epoch: bool, decides: bool) -> int:
        """How many blocks are to be frozen in the epoch that begins.

        Args:
            planned: blocks that the plan has frozen by now.
            is_update_epoch: whether the epoch is an update epoch.
            decides: whether another update epoch follows, at which a block could be frozen.
        """
        self.overhead = 0
        if not is_update_epoch:
            return self.frozen
        if self.settles:
            self.frozen, self.settles = self.frozen + 1, False
        self.frozen = max(self.frozen, planned)
        left = self._blocks[self.frozen :]
        if not decides or not left:
            self._before = {}
            return self.frozen
        now = self._criterion.look(left)
        self.overhead = self._flops_of_look(self._criterion.samples)
        # A block of which nothing can be seen goes by the one behind it.
        name = next((block.name for block in left if block.name in now), None)
        if name in self._before:
            self.similarity = self._agreed(self._criterion.similarity(self._before[name], now[name]))
            self.settles = self.similarity >= self._threshold
        self._before = now
        return self.frozen

    def state_dict(self) -> dict[str, Any]:
        """Everything that it remembers: tensors and primitives."""
        return {
            "before": {name: value.clone() for name, value in self._before.items()},
            "frozen": self.frozen,
            "settles": self.settles,
            "similarity": self.similarity,
            "overhead": self.overhead,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state.

        Raises:
            StateMismatch: it is damaged, or of other blocks.
        """
        names = {block.name for block in self._blocks}
        frozen, before = state.get("frozen"), state.get("before")
        fits = isinstance(frozen, int) and 0 <= frozen <= len(self._blocks) and isinstance(before, Mapping)
        if not fits or not set(before or ()) <= names or not {"settles", "similarity", "overhead"} <= set(state):
            raise StateMismatch("the state of the freezing criterion is damaged, or of another model or recipe.")
        self._before = {name: value.detach().cpu().clone() for name, value in state["before"].items()}
        self.frozen, self.settles = state["frozen"], state["settles"]
        self.similarity, self.overhead = state["similarity"], state["overhead"]


def _bits(packed: Tensor) -> int:
    """Number of bits that are set."""
    return int(unpack(packed, (8 * len(packed),)).sum())
