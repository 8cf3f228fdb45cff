"""The masks of a model in training: what is masked stays zero, whatever backward passes and steps do."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from spfde.core.checksum import together
from spfde.core.errors import StateMismatch, UsageError
from spfde.core.optimizers import LeadingSteps, Optimizers, around_closure
from spfde.core.sharding import is_dtensor
from spfde.sparsity import masks as masking
from spfde.sparsity.arriving import ArrivingGradients
from spfde.sparsity.gradients import DenseGradients, Skipped
from spfde.sparsity.schedule import MaskPlan
from spfde.sparsity.sharded import ShardedWeight
from spfde.sparsity.state import check_state, check_weights
from spfde.sparsity.structure import Unstructured
from spfde.sparsity.together import Clearing, Clears, GradientMasking
from spfde.sparsity.weight import MaskedWeight

if TYPE_CHECKING:
    from spfde.sparsity.methods.base import SparsityMethod


class Masker:
    """Keeps the inactive weights of a model at zero, with all optimizer state, and has a strategy change the masks.

    What is dropped or grown has weight zero and optimizer state zero. The masks are drawn, and the weights outside set
    to zero, at once; the hooks wait for :meth:`install`.

    Args:
        layers: weights to mask by name, in order of execution, from :func:`select_layers`.
        optimizer: the user's, one or several; ``param_groups`` are not touched.
        method: the rules.
        generator: a CPU generator, the only source of randomness.
        masks: the first masks, for methods that choose them from data; they say how many weights each layer has.

    Attributes:
        layers: the masked weights by name.
        live: those that the steps look after: masked at all, and not frozen.
        optimizers: the user's.
        stepping: that of them which steps now, or did last.
        average: with several processes: replaces tensors by their mean over the ranks.
    """

    def __init__(
        self,
        layers: Mapping[str, nn.Parameter],
        optimizer: Optimizer | Sequence[Optimizer] | Optimizers,
        method: SparsityMethod,
        *,
        generator: torch.Generator,
        masks: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.method, self.generator, self.optimizers = method, generator, Optimizers.of(optimizer)
        self.stepping = self.optimizers.each[0]
        self.layers = _masked_weights(layers, method, self.optimizers, generator)
        self.live: list[MaskedWeight] = []
        self.average: Callable[[Iterable[Tensor]], None] | None = None
        self._dense = DenseGradients()
        self._arriving = ArrivingGradients(self.layers, self._on_gradient, self._may_want_dense)
        self._clears: Clears | None = None
        self._clearing: dict[int, Clearing] = {}  # by the optimizer that steps
        self._mask_written = GradientMasking()
        self._handles: list[RemovableHandle] = []
        self._groups: dict[int, dict[str, Any]] = {}
        self._leading = LeadingSteps(self.optimizers.each)
        self.reset_epoch_counters()
        self.strategy = method.strategy(self)
        for name, layer in self.layers.items():
            self._draw(layer, None if masks is None else masks.get(name))
        self._set_live(frozen=())

    # --- what there is to see ----------------------------------------------------------------------------------------

    @property
    def masks(self) -> dict[str, Tensor]:
        """Boolean masks by layer, True where the weight exists; replaced, never changed, by a mutation."""
        return {name: layer.shown for name, layer in self.layers.items()}

    @property
    def wants_dense_gradients(self) -> frozenset[str]:
        """Layers whose next gradient must hold inactive weights too."""
        wider = [layer.name for layer in self.live if layer.wider is not None]
        if not self.strategy.may_want_dense():
            return frozenset(wider)
        return frozenset(wider).union(layer.name for layer in self.live if self.strategy.wants_dense(layer))

    @property
    def dense_gradient_steps(self) -> int:
        """Backward passes whose dense gradient was used since :meth:`reset_epoch_counters`."""
        return max(self._dense.passes.values(), default=0)

    @property
    def explored(self) -> float:
        """Share of the masked weights that have been active at some time: ITOP's over-parameterisation rate."""
        weights = sum(layer.numel for layer in self.layers.values())
        return sum(layer.n_explored for layer in self.layers.values()) / weights

    @property
    def density(self) -> float:
        """Share of active weights over all masked layers."""
        weights = sum(layer.numel for layer in self.layers.values())
        return sum(layer.active * layer.unit_size for layer in self.layers.values()) / weights

    def densities(self) -> dict[str, float]:
        """Share of active weights by layer."""
        return {name: layer.density for name, layer in self.layers.items()}

    def mean_active(self) -> dict[str, float]:
        """Active units of each layer: their mean over the steps since :meth:`reset_epoch_counters`.

        Where masks change on update epochs alone, and without steps, it is the number of now.
        """
        if not self._steps:
            return {name: layer.active for name, layer in self.layers.items()}
        return {name: total / self._steps for name, total in self._active_over_steps.items()}

    def reset_epoch_counters(self) -> None:
        """Count anew: the passes with a dense gradient, and what :meth:`mean_active` is the mean of."""
        self._dense.passes.clear()
        self._leading.reset()
        self._steps, self._active_over_steps = 0, dict.fromkeys(self.layers, 0)

    # --- hooks -------------------------------------------------------------------------------------------------------

    def install(self) -> None:
        """Hook the gradients and the optimizer's steps.

        Raises:
            UsageError: the hooks are there already.
        """
        if self._handles:
            raise UsageError("The masks are hooked already. Call remove() first.")
        self._handles = self._arriving.install()
        if self._handles:
            self._handles += self.optimizers.hook(self._before_step, self._after_step)

    def remove(self) -> None:
        """Take the hooks away; weights stay as they are. Without hooks it does nothing."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._clearing.clear()
        self._dense.clear()
        self.strategy.clear()

    # --- epochs ------------------------------------------------------------------------------------------------------

    def begin_epoch(self, plan: MaskPlan) -> None:
        """Carry out the plan of an epoch; call it once at its top, before the blocks of the epoch are frozen."""
        self.reset_epoch_counters()
        frozen = [name for name, own in plan.layers.items() if own.frozen]
        self.strategy.prune_to_target([x for x in self.live if x.name in frozen and plan.layers[x.name].to_target])
        self._set_live(frozen)
        self._dense.clear()
        for layer in self.live:
            layer.follow(layout=True)
        if plan.last:
            self.strategy.prune_to_target(self.live)
        self.strategy.begin_epoch(plan, self.live)

    def enforce(self) -> list[str]:
        """Zero what somebody has written outside the masks, state included, and take over what is within.

        Returns:
            The names of the layers in which there was something.
        """
        layers = [layer for layer in self.layers.values() if not layer.is_dense]
        for layer in layers:
            layer.follow()
        outside = together(torch.count_nonzero(x.local.detach().masked_fill(x.mask, 0)) for x in layers)
        found = [layer for layer, count in zip(layers, outside, strict=True) if self.strategy.take_over(layer) or count]
        for layer in found:
            masking.apply_(layer.local, layer.mask)
            self.strategy.clear_idle_state(layer)
        return [layer.name for layer in found]

    def infer_masks(self, most: Mapping[str, int]) -> None:
        """Take the masks from the zeros of the weights, after a sparse checkpoint without masks was loaded.

        A layer with fewer non-zeros than its target is filled up with weights drawn at random, for grown weights may
        be zero still; one with more, up to the largest soft bound, keeps them until it is pruned.

        Args:
            most: the most active weights that each layer ever has in this run.

        Raises:
            StateMismatch: a layer has more non-zeros than that.
            UsageError: the masks are structured, and zeros do not tell the units that exist.
        """
        if not isinstance(self.method.structure, Unstructured):
            raise UsageError("Masks of groups cannot be told from zeros. Load the session's state.")
        found = {}
        for name, layer in self.layers.items():
            n_nonzero = layer.total(int(torch.count_nonzero(layer.local.detach())))
            if n_nonzero > most[name]:
                raise StateMismatch(
                    f"{name} has {n_nonzero} non-zero weights; sparsity {self.method.sparsity} allows {most[name]}. "
                    "Load a checkpoint that was trained at this sparsity, or lower the recipe's sparsity."
                )
            found[name] = max(n_nonzero, layer.target)
        for name, layer in self.layers.items():
            weight = layer.whole(layer.local.detach())
            layer.set_mask(masking.infer_mask(weight, found[name], self.generator), found[name])
            self.strategy.adopt(layer)
            layer.clear_outside()

    # --- state -------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Masks (packed), counters and the strategy's state, as tensors and primitives.

        A gradient collected for a mutation that has not happened yet is not part of it: take the state at the top of
        an epoch or after the last step of one.
        """
        layers = self.layers
        return {
            "masks": {name: masking.pack(layer.whole(layer.mask)) for name, layer in layers.items()},
            "target": {name: layer.target * layer.unit_size for name, layer in layers.items()},
            "explored": {name: layer.saved_explored() for name, layer in layers.items()},
            "dense_gradient_passes": {name: self._dense.passes.get(name, 0) for name in layers},
            "steps": self._steps,
            "optimizer_steps": list(self._leading.counts),
            "active_over_steps": dict(self._active_over_steps),
            "strategy": self.strategy.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state. Load the model's and the optimizer's state first.

        Raises:
            StateMismatch: the state is damaged, belongs to another model, sparsity or method, or the model's weights
                are not those of the state. Nothing has changed then.
        """
        loaded = self.check_state(state)
        for name, layer in self.layers.items():
            layer.target = state["target"][name] // layer.unit_size
            layer.wider = None
            layer.set_mask(loaded[name], int(loaded[name].sum()) // layer.unit_size)
            layer.load_explored(state["explored"][name])
            masking.apply_(layer.local, layer.mask)
        self._dense.clear()
        self._dense.passes = dict(state["dense_gradient_passes"])
        self._steps, self._active_over_steps = state["steps"], dict(state["active_over_steps"])
        self._leading.counts = list(state["optimizer_steps"])
        self.strategy.clear()
        self.strategy.load_state_dict(state["strategy"])
        for layer in self.layers.values():
            self.strategy.clear_idle_state(layer)
        # A state from amid an epoch: what is frozen in it does not step.
        self._set_live([name for name, layer in self.layers.items() if not layer.parameter.requires_grad])

    def check_state(self, state: Mapping[str, Any]) -> dict[str, Tensor]:
        """The masks of a saved state, if it can be loaded; otherwise raise ``StateMismatch``."""
        loaded = check_state(state, self.layers, counts_known=self.method.counts_known)
        check_weights(self.layers, loaded)
        self.strategy.check_state(state["strategy"], loaded)
        self._leading.check(state["optimizer_steps"])
        return loaded

    # --- for engines -------------------------------------------------------------------------------------------------

    def masked_already(self, gradients: Mapping[str, Tensor]) -> None:
        """These gradients come masked in the backward pass that runs; see ``Parts.masked_already``."""
        self._arriving.announce(gradients)

    def clear_by(self, clears: Clears | None) -> None:
        """Zero weights and optimizer state after a step by what this makes; see ``Engine.clears``."""
        self._clears = clears
        self._clearing.clear()

    # --- for strategies ----------------------------------------------------------------------------------------------

    def clear_outside(self, layers: Sequence[MaskedWeight]) -> None:
        """Zero weights and optimizer state outside the masks, after a step: all layers in a few operations."""
        self._clearing.setdefault(id(self.stepping), Clearing(self._clears))(layers)

    def take_dense_gradients(self) -> dict[str, Tensor]:
        """The dense gradients of the layers that step, which are forgotten; their mean over the ranks."""
        gradients = self._dense.take({layer.name for layer in self._own(self.stepping)})
        self.average_over_ranks(gradients)
        return gradients

    def average_over_ranks(self, gradients: Mapping[str, Tensor]) -> None:
        """With several processes: replace the gradients by their mean over the ranks."""
        if self.average is not None:
            self.average([gradients[layer.name] for layer in self.live if layer.name in gradients])

    def group_of(self, layer: MaskedWeight) -> Mapping[str, Any]:
        """The optimizer's options for a layer, in the step that is taken."""
        if not self._groups:
            self._groups = {id(p): group for group in self.stepping.param_groups for p in group["params"]}
        return self._groups[id(layer.parameter)]

    # --- masks -------------------------------------------------------------------------------------------------------

    def _draw(self, layer: MaskedWeight, given: Tensor | None) -> None:
        """The layer's first mask."""
        if given is not None:
            layer.target, layer.is_dense = int(given.sum()) // layer.unit_size, False
            layer.explored.zero_()
            layer.set_mask(given, layer.target)
        elif layer.is_dense:
            return
        elif not self.strategy.start(layer):
            first = self.method.first_count(layer.target, layer.n_units)
            layer.draw(first, by=self.method.init)
        layer.clear_outside()

    def _set_live(self, frozen: Sequence[str]) -> None:
        self.live = [layer for layer in self.layers.values() if not layer.is_dense and layer.name not in frozen]
        self._clearing.clear()  # it holds on to optimizer state, which is freed of what is frozen

    # --- steps -------------------------------------------------------------------------------------------------------

    def _may_want_dense(self) -> bool:
        return self.strategy.may_want_dense()

    def _on_gradient(self, layer: MaskedWeight) -> None:
        """After a backward pass: mask the gradient, so that clipping and scaling see the sparse one."""
        if (grad := layer.grad) is None:
            return
        layer.follow()
        if self.strategy.wants_dense(layer):
            # A gradient that was reset, replaced or unscaled since the last pass (zero_grad, a step that GradScaler
            # skipped) has another version, and starts anew.
            self._dense.collect(layer.name, grad, layer.mask, accumulates=layer.adds_up(grad))
        layer.mask_gradient()

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        """Before a step: mask gradients that were set by hand, and those that its closure leaves."""
        self._groups, self.stepping = {}, optimizer
        if self.strategy.changes_every_step and self._leading.leads(optimizer):
            self._steps += 1
            for name, layer in self.layers.items():
                self._active_over_steps[name] += layer.active
        own = self._own(optimizer)
        self.strategy.begin_steps(own)
        replaced = around_closure(args, kwargs, self._run_closure)
        self._prepare(own, is_new=replaced is None)  # a closure finds the last step's gradients, and leaves its own
        return replaced

    def _prepare(self, layers: Sequence[MaskedWeight], *, is_new: bool = True) -> None:
        """The layers' gradients are what the optimizer will use: mask those that somebody has written to since."""
        written = [layer for layer in layers if not layer.is_masked]
        for layer in written:
            grad = layer.grad
            is_unknown = is_new and not layer.arrived and layer.name not in self._dense
            if is_unknown and grad is not None and self.strategy.wants_dense(layer):
                layer.follow()
                self._dense.collect(layer.name, grad, layer.mask, accumulates=False)
        self._mask_written(written)
        self.strategy.before_steps(layers)

    def _run_closure(self, closure: Callable[[], Any]) -> Any:
        """What the optimizer calls in place of its closure: the model computes with its sparse weights."""
        own = self._own(self.stepping)
        for layer in own:
            self.strategy.before_closure(layer)
        result = closure()
        self._prepare(own)
        return result

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """After a step: whatever the optimizer did, inactive weights and their state are zero; then mutate."""
        was_skipped, own = Skipped(optimizer), self._own(optimizer)
        for layer in own:
            layer.clean, layer.arrived = None, False
        self.strategy.after_steps(own, was_skipped=was_skipped)
        self.strategy.end_step(was_skipped=was_skipped)

    def _own(self, optimizer: Optimizer) -> Sequence[MaskedWeight]:
        """The live layers that this optimizer steps."""
        if len(self.optimizers.each) == 1:
            return self.live
        return [layer for layer in self.live if self.optimizers.owner(layer.parameter) is optimizer]


def _masked_weights(
    layers: Mapping[str, nn.Parameter], method: SparsityMethod, optimizer: Optimizers, generator: torch.Generator
) -> dict[str, MaskedWeight]:
    counts = method.counts({name: tuple(parameter.shape) for name, parameter in layers.items()})
    weights = {}
    for name, parameter in layers.items():
        structure = Unstructured() if counts[name] == parameter.numel() else method.structure
        target = counts[name] // structure.unit_size(tuple(parameter.shape))
        kind = ShardedWeight if is_dtensor(parameter) else MaskedWeight
        weights[name] = kind(name, parameter, structure, target, optimizer=optimizer, generator=generator)
    return weights
