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
from typing import Any

import torch
from torch import Tensor, nn

from spfde.analysis import BlockOutputs, output_modules
from spfde.analysis.cka import MinibatchCKA, centred_gram
from spfde.core.errors import StateMismatch
from spfde.core.numbers import round_half_up
from spfde.core.state import check_all, check_entries
from spfde.model.blocks import Block, Partition
from spfde.model.sample import Sample
from spfde.planning.timeline import Row
from spfde.session.computing import Computing
from spfde.session.masks import WholeModel
from spfde.session.part import Part, Setting
from spfde.sparsity.masks import largest_half, pack, unpack

Look = dict[str, Tensor]


class StructureCriterion:
    """Share of the largest half of a block's active weights that were among them at the update epoch before.

    Args:
        weights: the masked weights by name.
        masks: gives their masks.

    Attributes:
        samples: samples that one look runs forward through the model.
    """

    samples = 0

    def __init__(self, weights: Mapping[str, nn.Parameter], masks: Callable[[], Mapping[str, Tensor]]) -> None:
        self._weights, self._masks = weights, masks

    def look(self, blocks: Sequence[Block]) -> Look:
        """What is kept of each block until the next update epoch, by the block's name."""
        masks = self._masks()
        found = {}
        for block in blocks:
            names = [name for name in block.parameters if name in masks]
            if names:
                halves = [largest_half(self._weights[name], masks[name]).flatten().cpu() for name in names]
                found[block.name] = pack(torch.cat(halves))
        return found

    def similarity(self, before: Tensor, now: Tensor) -> float:
        """How alike two looks at a block are: 1 for the same."""
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


class Convergence(Part):
    """At each update epoch: amends the timeline, so that the next block is frozen one update later if it has converged.

    Args:
        setting: the session's.
        masks: of the weights.
        computing: whose engine is passed over for a look.
        probe: the samples that representations are compared on.

    Attributes:
        similarity: of the block that was looked at last; None before the first comparison.
    """

    name = "convergence"

    def __init__(self, setting: Setting, masks: WholeModel, computing: Computing, probe: Sample | None) -> None:
        technique, blueprint = setting.recipe.freezing, setting.blueprint
        assert technique is not None, "made for recipes that freeze"
        self._setting, self._masks = setting, masks
        self._criterion: StructureCriterion | RepresentationCriterion
        if technique.criterion == "structure":
            self._criterion = StructureCriterion(blueprint.sparse_layers, lambda: masks.masks)
        else:
            assert probe is not None, "attach draws the probe samples"
            self._criterion = RepresentationCriterion(
                setting.model,
                blueprint.partition,
                probe,
                technique.probe_samples,
                lambda: computing.engine.bypass(),
            )
        self._threshold = technique.threshold
        self._blocks = blueprint.partition.blocks[: max(blueprint.freeze_plan.frozen)]
        self._before: Look = {}
        self.similarity: float | None = None

    def begin_epoch(self, row: Row) -> None:
        if not row.update:
            return
        timeline, next_update = self._setting.timeline, row.epoch + self._setting.blueprint.interval
        left = self._blocks[row.frozen_blocks :]
        if next_update >= len(timeline) or not left:
            self._before = {}
            return
        now = self._criterion.look(left)
        self._setting.clock.overhead_flops += self._forward_flops(self._criterion.samples)
        # A block of which nothing can be seen goes by the one behind it.
        name = next((block.name for block in left if block.name in now), None)
        if name in self._before:
            similarity = self._criterion.similarity(self._before[name], now[name])
            # Ranks on other hardware may round otherwise: they all go by the first one's figure.
            self.similarity = float(self._setting.world.gather(similarity, what="how far blocks have converged")[0])
            if self.similarity >= self._threshold:
                timeline.freeze(row.frozen_blocks + 1, since=next_update)
        self._before = now

    def state_dict(self) -> dict[str, Any]:
        return {"before": {name: value.clone() for name, value in self._before.items()}, "similarity": self.similarity}

    def check_state(self, state: Mapping[str, Any]) -> None:
        check_entries(state, "the freezing criterion", {"before": dict, "similarity": (float, type(None))})
        check_all(state["before"], "what the freezing criterion looked at", Tensor)
        if not set(state["before"]) <= {block.name for block in self._blocks}:
            raise StateMismatch("the state of the freezing criterion is of another model or recipe.")

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._before = {name: value.detach().cpu().clone() for name, value in state["before"].items()}
        self.similarity = state["similarity"]

    def _forward_flops(self, samples: int) -> int:
        """Of the forward pass of so many samples under the masks as they are."""
        cost = self._setting.blueprint.cost
        density = cost.densities(self._masks.densities())
        return sum(round_half_up(samples * flops * share) for flops, share in zip(cost.forward, density, strict=True))


def _bits(packed: Tensor) -> int:
    """Number of bits that are set."""
    return int(unpack(packed, (8 * len(packed),)).sum())
