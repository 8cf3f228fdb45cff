"""What training costs: each epoch of the timeline, as it was amended, priced for the samples that were seen."""

from __future__ import annotations

import dataclasses

from torch import Tensor

from spfde.cost import Ledger, LedgerRow, peak_bytes
from spfde.cost.memory import memory_of
from spfde.export.encoding import weight_bytes
from spfde.planning.bill import price, scoring_flops
from spfde.session.masks import WholeModel
from spfde.session.part import Part, Setting
from spfde.session.sampling import Sampling


class Bill(Part):
    """Enters a row for each epoch that ends.

    Args:
        setting: the session's.
        sampling: says which samples were seen.
        masks: of the weights.

    Attributes:
        ledger: the bill so far.
    """

    name = "bill"

    def __init__(self, setting: Setting, sampling: Sampling, masks: WholeModel) -> None:
        self._setting, self._sampling, self._masks = setting, sampling, masks
        cost = setting.blueprint.cost
        n_layers, batch = len(cost.layers), sampling.batch_size
        whole, unfrozen = (1.0,) * n_layers, (False,) * n_layers
        dense = memory_of(cost.layers, whole, unfrozen, batch_size=batch, accounting="actual")
        self.ledger = self.remembers = Ledger(uncounted=cost.uncounted, dense_memory_bytes=dense)

    def end_epoch(self) -> None:
        setting, sampling, clock = self._setting, self._sampling, self._setting.clock
        clock.stop_watch(setting.device)
        if self.ledger.rows and self.ledger.rows[-1].epoch == clock.epoch:
            return  # an interruption came between the entry and the next epoch
        blueprint, row = setting.blueprint, setting.timeline[clock.epoch]
        samples = sampling.samples_seen()
        overhead = clock.overhead_flops
        if clock.epoch == 0:
            overhead += scoring_flops(blueprint, samples=len(sampling.population), batch_size=sampling.batch_size)
        cost = price(
            blueprint,
            row,
            samples=samples,
            population=sampling.dense_samples,
            dense_gradient_samples=min(samples, self._masks.dense_gradient_steps * sampling.batch_size),
            overhead_flops=overhead,
        )
        memory = memory_of(
            blueprint.cost.layers,
            blueprint.density(row),
            blueprint.frozen_layers(row),
            batch_size=sampling.batch_size,
            accounting="actual",
        )
        tensors = {name: value for name, value in setting.model.state_dict().items() if isinstance(value, Tensor)}
        weights = weight_bytes(tensors, self._masks.masks)
        self.ledger.add(
            LedgerRow(
                **dataclasses.asdict(cost),
                epoch=clock.epoch,
                samples=samples,
                steps=clock.steps,
                density=self._masks.density,
                frozen_blocks=row.frozen_blocks,
                partial_samples=len(sampling.partial_set),
                seconds=clock.seconds,
                peak_memory_bytes=peak_bytes(setting.device),
                modelled_memory_bytes=memory,
                # The largest: the rate of the blocks that learn longest.
                lr=max(float(group["lr"]) for group in setting.optimizer.param_groups),
                dense_weight_bytes=weights.dense,
                compressed_weight_bytes=weights.compressed,
            )
        )

    def summarise(self) -> list[str]:
        untraced = self._setting.blueprint.untraced
        return [] if untraced is None else [f"bill: FLOPs are not known: {untraced}"]
