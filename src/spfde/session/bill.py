"""What training costs: each epoch of the timeline, as it was amended, priced for the samples that were seen."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from copy import copy
from typing import Any

from torch import Tensor

from spfde.core.errors import StateMismatch
from spfde.core.numbers import round_half_up
from spfde.core.state import check_entries
from spfde.cost import Ledger, LedgerRow, peak_bytes
from spfde.cost.memory import memory_of
from spfde.engines.base import Job
from spfde.export.encoding import bytes_of_counts
from spfde.planning.bill import price, scoring_flops
from spfde.planning.timeline import Row
from spfde.session.learning import Learning
from spfde.session.masks import WholeModel
from spfde.session.part import Part, Setting
from spfde.session.passes import Passes
from spfde.session.sampling import Sampling


class Bill(Part):
    """Enters a row for each epoch that ends.

    Args:
        setting: the session's.
        sampling: says which samples were seen.
        masks: of the weights.
        learning: says which parameters learn.
        job: the model, and what it is called with.

    Attributes:
        ledger: the bill so far.
        passes: what was computed in this epoch.
    """

    name = "bill"

    def __init__(self, setting: Setting, sampling: Sampling, masks: WholeModel, learning: Learning, job: Job) -> None:
        self._setting, self._sampling, self._masks = setting, sampling, masks
        self._learning, self._sample = learning, job.sample
        cost = setting.blueprint.cost
        n_layers, batch = len(cost.layers), sampling.batch_size
        whole, unfrozen = (1.0,) * n_layers, (False,) * n_layers
        dense = memory_of(cost.layers, whole, unfrozen, batch_size=batch, accounting="actual")
        self.ledger = Ledger(uncounted=cost.uncounted, dense_memory_bytes=dense)
        is_known = setting.blueprint.untraced is None
        self._is_warned = self._is_change_told = False
        self._estimated = 0  # samples of shapes that were not measured, in the epochs that ended
        self.passes = Passes(job.given, setting.model, cost, job.sample, is_known=is_known)
        sampling.unended.computed = self.passes.total
        sampling.backward.tell(self.passes.on_backward)

    def begin_epoch(self, row: Row) -> None:
        if not self._setting.clock.is_late:
            self.passes.clear()  # what ran before the epoch is no part of it

    def on_step(self) -> None:
        """A step was taken."""
        self.passes.on_step()

    def end_epoch(self) -> None:
        setting, sampling, clock = self._setting, self._sampling, self._setting.clock
        clock.stop_watch(setting.device)
        if self.ledger.rows and self.ledger.rows[-1].epoch == clock.epoch:
            return  # an interruption came between the entry and the next epoch
        blueprint = self._learning.priced(setting.blueprint, self._sample)
        row = setting.timeline[clock.epoch]
        samples = sampling.samples_seen()
        overhead = clock.overhead_flops
        if clock.epoch == 0:
            overhead += scoring_flops(blueprint, samples=len(sampling.population), batch_size=sampling.batch_size)
        self._say_unseen()
        self._say_changed()
        passed, computed, flops = self._passed(samples)
        cost = price(
            blueprint,
            row,
            samples=computed,
            population=self._dense_samples(computed, samples),
            dense_gradient_samples=min(computed, self._masks.dense_gradient_steps * self._samples_of_step(computed)),
            overhead_flops=overhead,
            computed=flops,
        )
        if passed and not clock.samples_drawn and not sampling.samples_observed:
            samples = passed  # batches from elsewhere
        self._estimated += self.passes.estimated
        self.passes.clear()
        memory = memory_of(
            blueprint.cost.layers,
            blueprint.density(row),
            blueprint.frozen_layers(row),
            batch_size=sampling.batch_size,
            accounting="actual",
        )
        seconds, peak = self._most()
        tensors = {name: value for name, value in setting.model.state_dict().items() if isinstance(value, Tensor)}
        active = {name: layer.active * layer.unit_size for name, layer in self._masks.layers.items()}
        weights = bytes_of_counts(tensors, active)
        self.ledger.add(
            LedgerRow(
                **dataclasses.asdict(cost),
                epoch=clock.epoch,
                samples=samples,
                steps=clock.steps,
                density=self._masks.density,
                frozen_blocks=row.frozen_blocks,
                partial_samples=len(sampling.partial_set),
                seconds=seconds,
                peak_memory_bytes=peak,
                modelled_memory_bytes=memory,
                # The largest: the rate of the blocks that learn longest.
                lr=max(float(group["lr"]) for group in setting.optimizer.param_groups),
                dense_weight_bytes=weights.dense,
                compressed_weight_bytes=weights.compressed,
            )
        )

    def _say_unseen(self) -> None:
        """Warn, once in a session, where steps were taken on passes that nobody has seen."""
        unseen = self.passes.unseen
        if unseen and not self._is_warned and self._setting.blueprint.untraced is None:
            self._is_warned = True
            warnings.warn(
                f"before {unseen} optimizer steps no forward pass of the model was seen: it was compiled after attach, "
                "or is called by another method than model(...). Each backward pass is billed as a batch of the shape "
                "that attach saw. Where shapes or batches vary, attach to what torch.compile returns, and call that "
                "or model(...).",
                stacklevel=5,
            )

    def _say_changed(self) -> None:
        """Warn, once in a session, where other parameters learn than when it was attached."""
        told = self._changed()
        if told and not self._is_change_told:
            self._is_change_told = True
            warnings.warn(
                f"{'; '.join(told)}. They are billed as they are, but masks and freezing go by what attach saw: "
                "weights that learned nothing then stay dense. Set requires_grad before attach, or attach again.",
                stacklevel=5,
            )

    def _changed(self) -> list[str]:
        """Clauses on parameters whose ``requires_grad`` is not what ``attach`` saw."""
        begun, stopped = self._learning.changed()
        found = (begun, "learn, and did not when the session was attached"), (stopped, "do not learn any more")
        return [f"{_names(names)} {what}" for names, what in found if names]

    def _passed(self, seen: int) -> tuple[int, int, list[int] | None]:
        """Samples in the passes of all processes, those that were computed, and the FLOPs of these by layer.

        Where some passes were seen and others not, each sample of ``seen`` costs as much as those in the former. FLOPs
        are None where all had the usual shape.
        """
        passes = self.passes
        passes.settle()
        mine = passes.samples, passes.unseen, passes.flops, passes.dense_flops
        of_ranks = self._setting.world.gather(mine, what="the bill")
        passed = sum(own[0] for own in of_ranks)
        computed = max(passed, seen) if any(own[1] for own in of_ranks) else passed or seen
        if all(own[2] is None for own in of_ranks):
            return passed, computed, None
        flops = [sum(of_layer) for of_layer in zip(*(own[3] for own in of_ranks), strict=True)]
        return passed, computed, [of_layer * computed // max(1, passed) for of_layer in flops]

    def _most(self) -> tuple[float, int | None]:
        """Seconds of the slowest process, and bytes of the one that needed most; None where they are not known."""
        own = self._setting.clock.seconds, peak_bytes(self._setting.device)
        seconds, peaks = zip(*self._setting.world.gather(own, what="seconds and memory"), strict=True)
        return max(seconds), None if None in peaks else max(peaks)

    def _dense_samples(self, computed: int, seen: int) -> int:
        """Samples that the dense run would have computed: more by those that the sieve left out, and by no others."""
        sampling, dense = self._sampling, self._sampling.dense_samples
        if not self._setting.recipe.sieves:
            return computed
        in_use = round_half_up(dense * len(sampling.partial_set) / len(sampling.population))
        if self._setting.clock.phase == "drained" and 0 < seen <= dense:
            in_use = seen
        return (2 * computed * dense + in_use) // (2 * in_use) if in_use else dense

    def _samples_of_step(self, computed: int) -> int:
        """Samples behind an optimizer step: a batch, or several where gradients are accumulated."""
        return max(self._sampling.batch_size, -(-computed // max(1, self._setting.clock.steps)))

    def state_dict(self) -> dict[str, Any]:
        own = {"estimated": self._estimated, "passes": self.passes.state_dict()}
        return {**self.ledger.state_dict(), **own}

    def check_state(self, state: Mapping[str, Any]) -> None:
        copy(self.ledger).load_state_dict(_of_ledger(state))
        check_entries({"estimated": state["estimated"]}, "the bill", {"estimated": int})
        self.passes.check_state(state["passes"])

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.ledger.load_state_dict(_of_ledger(state))
        self._estimated = state["estimated"]
        self.passes.load_state_dict(state["passes"])

    def detach(self) -> None:
        self.passes.remove()

    def describe(self) -> list[str]:
        return ["hooked: the model's forward pass, to count what is computed in training (bill)"]

    def summarise(self) -> list[str]:
        untraced, estimated = self._setting.blueprint.untraced, self._estimated + self.passes.estimated
        lines = [] if untraced is None else [f"bill: FLOPs are not known: {untraced}"]
        if estimated:
            lines.append(
                f"bill: {estimated:,} samples of shapes that were not measured cost as much as the nearest one"
            )
        lines += [f"requires_grad: {text}" for text in self._changed()]
        if self.passes.unseen:
            lines.append(
                f"bill: {self.passes.unseen:,} steps without a forward pass that was seen: one shape is assumed"
            )
        return lines


def _names(names: list[str]) -> str:
    """A few of them, and how many."""
    few = ", ".join(names[:3])
    return f"{few} and {len(names) - 3} others" if len(names) > 3 else few


_OWN = ("estimated", "passes")


def _of_ledger(state: Mapping[str, Any]) -> dict[str, Any]:
    """The ledger's part of the state."""
    missing = [name for name in _OWN if name not in state]
    if missing:
        raise StateMismatch(f"the state of the bill lacks {missing[0]}. It is damaged, or of another version.")
    return {name: value for name, value in state.items() if name not in _OWN}
