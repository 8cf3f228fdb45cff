"""The timeline: for every epoch what is masked, frozen and sieved, and the learning rate of each block.

It is worked out once, from recipe, model and run length, and it is the only place that knows when something happens:
the bill prices it, the session carries it out, the run folder stores it, the report draws it. What follows from data
(methods that move weights between layers, learnt thresholds, blocks that are frozen because they have converged)
amends it as the run goes on; the epochs to come then follow from what was amended.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from itertools import chain, groupby
from typing import TYPE_CHECKING, Any

from spfde.core.errors import StateMismatch
from spfde.core.state import check_entries
from spfde.freezing.rates import learning_rate_factor
from spfde.sparsity import SparsityMethod
from spfde.sparsity.schedule import DenseGradients, LayerPlan, MaskPlan

if TYPE_CHECKING:
    from spfde.planning.blueprint import Blueprint
    from spfde.recipe import Recipe

Layers = Mapping[str, LayerPlan]


@dataclass(frozen=True)
class Row:
    """One epoch of the timeline.

    Attributes:
        epoch: from 0.
        update: whether it is an update epoch, a multiple of Δτ.
        frozen_blocks: how many of the first blocks are frozen.
        samples: samples in use.
        sieve_update: whether samples move at its top; where all are in use then, the removed ones have come back.
        rates: learning rate of each block, and of the head last, as a factor of the base rate; empty where the caller
            drives the rates.
        masks: what happens to the masked layers.
    """

    epoch: int
    update: bool
    frozen_blocks: int
    samples: int
    sieve_update: bool
    rates: tuple[float, ...]
    masks: MaskPlan

    @property
    def layers(self) -> Layers:
        """Each masked layer, by name."""
        return self.masks.layers


@dataclass(frozen=True)
class Counts:
    """What a layer really had in an epoch, in units.

    Attributes:
        target: active units without a soft bound.
        active: active units; their mean over the steps.
        now: active units at the end.
        gradient: units whose gradient each step computed.
    """

    target: int
    active: float
    now: int
    gradient: float


class Timeline:
    """The epochs of a run, worked out when they are asked for.

    Args:
        blueprint: what the recipe means for the model.
        recipe: the recipe.
        samples: size of the whole training set.

    Attributes:
        frozen: for each epoch how many of the first blocks are frozen.
    """

    def __init__(self, blueprint: Blueprint, recipe: Recipe, samples: int) -> None:
        self._blueprint, self._recipe, self._samples = blueprint, recipe, samples
        self._epochs, self._interval = blueprint.epochs, blueprint.interval
        self.frozen = blueprint.freeze_plan.frozen
        self._stops, self._resume_epoch = blueprint.learning_stops, blueprint.freeze_plan.resume_epoch
        self._layers: list[Layers] = []
        self._amended: tuple[int, Layers] | None = None

    def __len__(self) -> int:
        return self._epochs

    def __iter__(self) -> Iterator[Row]:
        return (self[epoch] for epoch in range(self._epochs))

    def __getitem__(self, epoch: int) -> Row:
        if not 0 <= epoch < self._epochs:
            raise IndexError(f"epoch {epoch} of {self._epochs}")
        while len(self._layers) <= epoch:
            self._layers.append(self._next_layers(len(self._layers)))
        sieving, update = self._recipe.sieving, epoch % self._interval == 0
        times = {"interval": self._interval, "epochs": self._epochs}
        return Row(
            epoch=epoch,
            update=update,
            frozen_blocks=self.frozen[epoch],
            samples=self._samples if sieving is None else sieving.samples_in_use(self._samples, epoch, **times),
            sieve_update=self._recipe.sieves and sieving is not None and sieving.updates_at(epoch, **times),
            rates=self._rates(epoch),
            masks=MaskPlan(
                epoch=epoch,
                progress=epoch / self._epochs,
                update=update,
                last=epoch == self._epochs - 1,
                dense_gradients=self._dense_gradients(epoch),
                layers=self._layers[epoch],
            ),
        )

    @property
    def rows(self) -> tuple[Row, ...]:
        """All epochs."""
        return tuple(self)

    def most_active(self) -> dict[str, int]:
        """The most active weights that each layer may have in any epoch."""
        method, sizes = self._blueprint.method, self._blueprint.masked
        if method is None or not method.counts_known:
            return {name: layer.n_units * layer.unit_size for name, layer in sizes.items()}
        planned = [row.layers for row in self]
        return {
            name: max(int(layers[name].active) for layers in planned) * layer.unit_size for name, layer in sizes.items()
        }

    # --- what data decide --------------------------------------------------------------------------------------------

    def freeze(self, n_blocks: int, *, since: int) -> None:
        """Freeze the first ``n_blocks`` blocks from epoch ``since`` on, where the plan does so later.

        What happens before ``since`` may change too: a block comes to its target one update epoch before.
        """
        later = (max(count, n_blocks) for count in self.frozen[since:])
        self.frozen = (*self.frozen[:since], *later)
        self._forget(max(0, since - self._interval))

    def amend(self, epoch: int, actual: Mapping[str, Counts]) -> None:
        """Put what layers really had in ``epoch`` in the place of what was planned, and let the rest follow from it."""
        planned, layers, after = self[epoch].layers, {}, {}
        for name, plan in planned.items():
            own = actual.get(name)
            if own is None:
                layers[name] = after[name] = plan
                continue
            layers[name] = replace(plan, target=own.target, active=own.active, gradient=own.gradient)
            after[name] = replace(
                layers[name], active=own.now, gradient=max(own.now, own.gradient - own.active + own.now)
            )
        if layers != planned or after != layers:
            self._forget(epoch)
            self._layers.append(layers)
            self._amended = (epoch, after)

    def _forget(self, epoch: int) -> None:
        """Work out ``epoch`` and what follows anew."""
        del self._layers[epoch:]
        if self._amended is not None and self._amended[0] >= epoch:
            self._amended = None

    # --- one epoch after the other -----------------------------------------------------------------------------------

    def _next_layers(self, epoch: int) -> Layers:
        method = self._blueprint.method
        if method is None:
            return {}
        if epoch == 0:
            before: Layers = {name: self._first(name, method) for name in self._blueprint.masked}
        elif self._amended is not None and self._amended[0] == epoch - 1:
            before = self._amended[1]
        else:
            before = self._layers[epoch - 1]
        after = {name: self._next(name, was, epoch, method) for name, was in before.items()}
        # Most epochs are like the one before: they share what is the same.
        return self._layers[epoch - 1] if epoch and after == self._layers[epoch - 1] else after

    def _first(self, name: str, method: SparsityMethod) -> LayerPlan:
        layer = self._blueprint.masked[name]
        if layer.target == layer.n_units:
            return LayerPlan(layer.target, layer.target, layer.target, layer.target)
        first = method.first_count(layer.target, layer.n_units)
        return LayerPlan(layer.target, first, first, method.gradient_count(layer.n_units, first, 0.0))

    def _next(self, name: str, was: LayerPlan, epoch: int, method: SparsityMethod) -> LayerPlan:
        """A layer in ``epoch``, after what it was before."""
        layer = self._blueprint.masked[name]
        is_frozen = layer.block < self.frozen[epoch]
        unchanged = replace(was, survive=int(was.active), frozen=is_frozen, mutates=False, to_target=False)
        if layer.target == layer.n_units:
            return unchanged
        if is_frozen:
            # Before a short pause a block keeps the mask that it has.
            return unchanged if was.frozen or self._blueprint.freeze_plan.pauses else self._pruned(was, frozen=True)
        if epoch == self._epochs - 1:
            return self._pruned(was, frozen=False)
        if epoch % self._interval:
            return unchanged
        if not self._blueprint.freeze_plan.pauses and self._freezes(layer.block, epoch + 1, epoch + self._interval):
            # It has come to its target before, and what grew now would have less than an interval to learn.
            return self._pruned(was, frozen=False)
        progress = epoch / self._epochs
        survive, final = method.mutation_counts(was.target, layer.n_units, int(was.active), progress)
        # What has come down to its active weights for good receives no wider gradient any more.
        gradient = method.gradient_count(layer.n_units, final, progress) if was.gradient > was.active else final
        if to_target := self._is_last_update(layer.block, epoch):
            final = min(final, was.target)
            survive, gradient = min(survive, final), final
        mutates = method.mutates_at(progress) or survive < was.active or final > survive
        return LayerPlan(was.target, survive, final, gradient, mutates=mutates, to_target=to_target)

    @staticmethod
    def _pruned(was: LayerPlan, *, frozen: bool) -> LayerPlan:
        active = min(int(was.active), was.target)
        return LayerPlan(was.target, active, active, active, frozen, mutates=was.active > active, to_target=True)

    def _is_last_update(self, block: int, epoch: int) -> bool:
        """Is ``epoch`` the last update at which the block mutates before it is frozen for good?

        A block that trained under a soft bound up to the moment of freezing would lose weights that it still uses, with
        no step left to make up for them. So it comes to its target one update before, an interval or more. Through a
        pause masks stay as they are; then it is the last update of all at which the block trains, unless it trains in
        the last epoch, which prunes anyway. The sources say nothing of this case.
        """
        if self._blueprint.freeze_plan.pauses:
            later = chain(range(epoch + self._interval, self._epochs, self._interval), (self._epochs - 1,))
            return block < len(self._blueprint.partition.blocks) and not any(self.frozen[at] <= block for at in later)
        return self._freezes(block, epoch + self._interval, epoch + 2 * self._interval)

    def _freezes(self, block: int, first: int, stop: int) -> bool:
        """Is the block frozen in one of the epochs from ``first`` on, before ``stop``?"""
        return any(count > block for count in self.frozen[first:stop])

    def _dense_gradients(self, epoch: int) -> DenseGradients:
        method = self._blueprint.method
        wanted: DenseGradients = "none" if method is None or epoch >= self._epochs - 1 else method.dense_gradients
        if wanted == "every step":
            return wanted if epoch < self._last_mutation else "none"
        if wanted == "one step":
            layers = self._layers[epoch].values()
            return wanted if any(own.mutates and own.active > own.survive for own in layers) else "none"
        return wanted

    @cached_property
    def _last_mutation(self) -> int:
        """The last update epoch before the last epoch at which masks change."""
        method = self._blueprint.method
        updates = range(self._interval, self._epochs - 1, self._interval)
        return max((at for at in updates if method is not None and method.mutates_at(at / self._epochs)), default=0)

    def _rates(self, epoch: int) -> tuple[float, ...]:
        technique, stops = self._recipe.learning_rate, self._stops
        if technique is None:
            return ()
        if self._resume_epoch is not None and epoch >= self._resume_epoch:
            stops = (stops[-1],) * len(stops)
        return tuple(learning_rate_factor(epoch, stop=stop, warmup=technique.warmup_epochs) for stop in stops)

    # --- written down ------------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """The whole timeline as primitives; epochs that are alike are written once, with their number.

        A layer's numbers are those of ``LayerPlan``, in the order of ``layer_fields``.
        """
        blocks, rows = [block.name for block in self._blueprint.partition.blocks], self.rows
        return {
            "epochs": self._epochs,
            "interval": self._interval,
            "blocks": blocks,
            "layer_fields": list(_FIELDS),
            "rows": _run_lengths([_written(row) for row in rows]),
            "rates": [list(row.rates) for row in rows] if self._recipe.learning_rate is not None else [],
        }

    def state_dict(self) -> dict[str, Any]:
        """What has been amended, and what led there: the layers up to now, and the frozen blocks of all epochs."""
        return {
            "frozen": list(self.frozen),
            "layers": _run_lengths([_numbers(layers) for layers in self._layers]),
            "after": None if self._amended is None else [self._amended[0], _numbers(self._amended[1])],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state.

        Raises:
            StateMismatch: it is of another recipe, model or run length, or damaged.
        """
        check_entries(state, "the timeline", {"frozen": list, "layers": list, "after": (list, type(None))})
        frozen, n_blocks = state["frozen"], len(self._blueprint.partition.blocks)
        if len(frozen) != self._epochs or not all(type(n) is int and 0 <= n <= n_blocks for n in frozen):
            raise StateMismatch("the state's timeline has other epochs or blocks. Use the run's own recipe and length.")
        layers: list[Layers] = []
        try:
            for count, numbers in state["layers"]:
                if type(count) is not int or not 0 < count <= self._epochs - len(layers):
                    raise ValueError(f"{len(layers)} epochs, and {count!r} more")
                layers += [self._read(numbers)] * count
            amended = None if state["after"] is None else self._read_amended(*state["after"], known=len(layers))
        except (TypeError, ValueError, AttributeError) as error:
            raise StateMismatch(f"the state's timeline is damaged ({error}).") from error
        self.frozen, self._layers, self._amended = tuple(frozen), layers, amended

    def _read_amended(self, epoch: Any, numbers: Any, *, known: int) -> tuple[int, Layers]:
        if type(epoch) is not int or not 0 <= epoch < known:
            raise ValueError(f"epoch {epoch!r} of {known} is amended")
        return epoch, self._read(numbers)

    def _read(self, numbers: Mapping[str, Sequence[Any]]) -> Layers:
        masked = self._blueprint.masked
        if set(numbers) != set(masked):
            raise ValueError("it masks other layers")
        return {name: _layer_plan(values, most=masked[name].n_units) for name, values in numbers.items()}


_FIELDS = tuple(field.name for field in fields(LayerPlan))
_N_COUNTS = _FIELDS.index("frozen")


def _layer_plan(values: Sequence[Any], *, most: int) -> LayerPlan:
    """The inverse of ``_numbers``, for one layer of ``most`` units."""
    plan, flags = LayerPlan(**dict(zip(_FIELDS, values, strict=True))), values[_N_COUNTS:]
    if not all(type(n) in (int, float) and 0 <= n <= most for n in values[:_N_COUNTS]) or {*map(type, flags)} != {bool}:
        raise ValueError(f"a layer has {plan}")
    return plan


def _numbers(layers: Layers) -> dict[str, list[Any]]:
    return {name: list(vars(own).values()) for name, own in layers.items()}


def _written(row: Row) -> dict[str, Any]:
    return {
        "update": row.update,
        "frozen_blocks": row.frozen_blocks,
        "samples": row.samples,
        "sieve_update": row.sieve_update,
        "dense_gradients": row.masks.dense_gradients,
        "layers": _numbers(row.layers),
    }


def _run_lengths(values: Sequence[Any]) -> list[list[Any]]:
    return [[len(list(group)), value] for value, group in groupby(values)]
