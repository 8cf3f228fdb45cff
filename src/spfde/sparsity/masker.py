"""The thin object of the room: finds the tensors, asks whether it is time, and calls the pure functions."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from spfde.errors import StateMismatch, UsageError
from spfde.sparsity import masks as masking
from spfde.sparsity import mutation
from spfde.sparsity.gradients import DenseGradients
from spfde.sparsity.layers import MaskedWeight, shapes_of
from spfde.sparsity.methods import SparsityMethod, planned_active, planned_keep
from spfde.sparsity.state import check_state, check_weights

_Turnover = tuple[int, int]  # (active weights that survive, active weights in the end)


class Masker:
    """Keeps the inactive weights of a model at zero, with all optimizer state, and mutates the masks on their beats.

    A mutation drops to the number that survives and grows to the number that the method plans; what is dropped or
    grown has weight zero and optimizer state zero. Methods that need gradients mutate right after the first step of
    the beat that has them.

    Args:
        layers: weights to mask by name, in order of execution, from :func:`select_layers`.
        optimizer: the user's optimizer; its ``param_groups`` are not touched.
        method: the rules.
        generator: a CPU generator, the only source of randomness.
        interval: epochs between two beats.
        epochs: length of the run; in its last epoch the masks are at target and stay.

    The masks are drawn, and the weights outside set to zero, at once; the hooks wait for :meth:`install`.
    """

    def __init__(
        self,
        layers: Mapping[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        method: SparsityMethod,
        *,
        generator: torch.Generator,
        interval: int,
        epochs: int,
    ) -> None:
        assert interval >= 1, "an interval is at least one epoch"
        assert epochs >= 1, "a run is at least one epoch"
        self.method = method
        self.optimizer = optimizer
        self.generator = generator
        self.interval = interval
        self.epochs = epochs
        self.target = method.counts(shapes_of(layers))
        self._layers = {name: MaskedWeight(name, p, self.target[name]) for name, p in layers.items()}
        self._live: list[MaskedWeight] = []
        self._pending: dict[str, _Turnover] = {}
        self._dense = DenseGradients()
        self._snapshots: dict[str, Tensor] = {}
        self._handles: list[RemovableHandle] = []
        #: With several processes: replaces tensors by their mean over the ranks.
        self.average: Callable[[Iterable[Tensor]], None] | None = None
        for layer in self._layers.values():
            layer.set_mask(self._initial_mask(layer), layer.target)
            self._clear_outside(layer, layer.bits)
        self._set_live(frozen=())

    @property
    def masks(self) -> dict[str, Tensor]:
        """Boolean masks by layer, True where the weight exists; replaced, never changed, by a mutation."""
        return {name: layer.mask for name, layer in self._layers.items()}

    @property
    def pending(self) -> tuple[str, ...]:
        """Layers whose mutation waits for a gradient."""
        return tuple(self._pending)

    @property
    def wants_dense_gradients(self) -> frozenset[str]:
        """Layers whose next gradient must hold the inactive weights too, for a mutation waits for it."""
        return frozenset(self._pending) if self.method.gradients == "dense" else frozenset()

    @property
    def dense_gradient_steps(self) -> int:
        """Backward passes whose dense gradient was used since :meth:`reset_epoch_counters`."""
        return max(self._dense.passes.values(), default=0)

    def reset_epoch_counters(self) -> None:
        self._dense.passes.clear()

    def n_active(self, name: str) -> int:
        """Number of active weights of a layer."""
        return self._layers[name].active

    def density(self, name: str) -> float:
        """Share of active weights of a layer."""
        return self._layers[name].active / self._layers[name].numel

    def densities(self) -> dict[str, float]:
        """Share of active weights by layer."""
        return {name: self.density(name) for name in self._layers}

    def install(self) -> None:
        """Hook the gradients and the optimizer's steps.

        Raises:
            UsageError: the hooks are there already.
        """
        if self._handles:
            raise UsageError("The masks are hooked already. Call remove() first.")
        for layer in self._layers.values():
            if layer.target < layer.numel:
                hook = partial(self._on_gradient, layer)
                handle = layer.parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
                self._handles.append(handle)
        if self._handles:
            self._handles.append(self.optimizer.register_step_pre_hook(self._before_step))
            self._handles.append(self.optimizer.register_step_post_hook(self._after_step))

    def remove(self) -> None:
        """Take the hooks away; weights stay as they are. Without hooks it does nothing."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._dense.clear()
        self._snapshots.clear()

    def begin_epoch(self, epoch: int, frozen: Container[str], settling: Container[str] = ()) -> None:
        """Mutate if it is time; call it once at the top of each epoch.

        On a beat every layer that is not frozen mutates, or is set pending when the method needs a gradient for it.
        The last epoch only prunes to target.

        Args:
            epoch: from 0.
            frozen: names of frozen weights; neither their masks nor their values are touched.
            settling: names of weights that are frozen at the next beat: nothing is grown above their target any more.
        """
        self._set_live(frozen)
        self._dense.clear()
        self._snapshots.clear()
        for layer in self._live:
            layer.follow(layout=True)
        names = {layer.name for layer in self._live}
        if epoch >= self.epochs - 1:
            self._pending.clear()
            self.prune_to_target(names)
        elif epoch % self.interval == 0:
            self._pending = {}
            for layer in self._live:
                keep, final = self._turnover(layer, epoch)
                if layer.name in settling:
                    final = min(final, layer.target)
                self._turn_over_or_wait(layer, (keep, final))
        else:
            self._pending = {name: turnover for name, turnover in self._pending.items() if name in names}

    def prune_to_target(self, names: Iterable[str]) -> None:
        """Drop what these layers hold above their target, by magnitude, and cancel their pending mutation.

        Names of parameters that are not masked are passed over.
        """
        for name in names:
            self._pending.pop(name, None)
            layer = self._layers.get(name)
            if layer is not None and layer.active > layer.target:
                mask = mutation.drop(layer.mask, mutation.magnitude(layer.parameter), layer.target)
                layer.set_mask(mask, layer.target)
                self._clear_outside(layer, layer.bits)

    def infer_masks(self) -> None:
        """Take the masks from the zeros of the weights, after a sparse checkpoint without masks was loaded.

        A layer with fewer non-zeros than its target is filled up with weights drawn at random, for grown weights may
        be zero still; one with more, up to the largest soft bound, keeps them until it is pruned.

        Raises:
            StateMismatch: a layer has more non-zeros than the method ever allows.
        """
        found = {}
        for layer in self._layers.values():
            n_nonzero = int(torch.count_nonzero(layer.parameter.detach()))
            most = self._most(layer)
            if n_nonzero > most:
                raise StateMismatch(
                    f"{layer.name} has {n_nonzero} non-zero weights; sparsity {self.method.sparsity} allows {most}. "
                    "Load a checkpoint that was trained at this sparsity, or lower the recipe's sparsity."
                )
            found[layer.name] = max(n_nonzero, layer.target)
        for layer in self._layers.values():
            n_active = found[layer.name]
            layer.set_mask(masking.infer_mask(layer.parameter, n_active, self.generator), n_active)
            self._clear_outside(layer, layer.bits)
        self._pending.clear()

    def state_dict(self) -> dict[str, Any]:
        """Masks (packed), pending mutations, counters and the generator, as tensors and primitives.

        A gradient collected for a mutation that has not happened yet is not part of it: take the state at the top of
        an epoch or after the last step of one.
        """
        return {
            "masks": {name: masking.pack(layer.mask) for name, layer in self._layers.items()},
            "shapes": {name: list(layer.parameter.shape) for name, layer in self._layers.items()},
            "target": dict(self.target),
            "pending": {name: list(turnover) for name, turnover in self._pending.items()},
            "dense_gradient_passes": dict(self._dense.passes),
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state. Load the model's and the optimizer's state first.

        Raises:
            StateMismatch: the state is damaged, belongs to another model, sparsity or method, or the model's weights
                are not those of the state. Nothing has changed then.
        """
        most = {name: self._most(layer) for name, layer in self._layers.items()}
        shapes = shapes_of({name: layer.parameter for name, layer in self._layers.items()})
        loaded = check_state(state, shapes=shapes, target=self.target, most=most)
        check_weights({name: layer.parameter for name, layer in self._layers.items()}, loaded)
        try:
            self.generator.set_state(state["generator"])
        except (RuntimeError, TypeError) as error:
            raise StateMismatch(f"The state's generator cannot be used here: {error}") from error
        for name, layer in self._layers.items():
            layer.set_mask(loaded[name], int(loaded[name].sum()))
            self._clear_outside(layer, layer.bits)
        self._pending = {name: (int(keep), int(final)) for name, (keep, final) in state["pending"].items()}
        self._dense.clear()
        self._dense.passes = dict(state["dense_gradient_passes"])
        self._snapshots.clear()

    def _initial_mask(self, layer: MaskedWeight) -> Tensor:
        if layer.target == layer.numel:
            return layer.mask
        if self.method.init == "magnitude":
            return masking.magnitude_mask(layer.parameter, layer.target)
        return masking.random_mask(layer.parameter.shape, layer.target, self.generator)

    def _set_live(self, frozen: Container[str]) -> None:
        """Note the layers that the steps have to look after: those that are masked at all and not frozen."""
        layers = self._layers.values()
        self._live = [layer for layer in layers if layer.target < layer.numel and layer.name not in frozen]

    def _turnover(self, layer: MaskedWeight, epoch: int) -> _Turnover:
        method, target, numel = self.method, layer.target, layer.numel
        keep = planned_keep(method, target, numel, epoch=epoch, epochs=self.epochs)
        final = planned_active(method, target, numel, epoch=epoch, interval=self.interval, epochs=self.epochs)
        return min(keep, layer.active), final

    def _most(self, layer: MaskedWeight) -> int:
        """The most active weights that the layer ever has in this run."""
        method, target, numel = self.method, layer.target, layer.numel
        beats = range(0, self.epochs, self.interval)
        return max(
            planned_active(method, target, numel, epoch=beat, interval=self.interval, epochs=self.epochs)
            for beat in beats
        )

    def _turn_over_or_wait(self, layer: MaskedWeight, turnover: _Turnover) -> None:
        keep, final = turnover
        if keep == final == layer.active:
            return
        drops, grows = keep < layer.active, final > keep
        needed = self.method.gradients
        if (needed == "active" and drops) or (needed == "dense" and grows):
            self._pending[layer.name] = turnover
        else:
            self._mutate(layer, turnover, gradient=None)

    def _mutate(self, layer: MaskedWeight, turnover: _Turnover, *, gradient: Tensor | None) -> None:
        keep, final = turnover
        kept = layer.mask
        if keep < layer.active:
            kept = mutation.drop(kept, self.method.drop_score(layer.parameter.detach(), gradient), keep)
        # A dropped weight may come back at once, and then starts from zero like any other that is grown.
        self._clear_outside(layer, masking.keep_bits(kept))
        if final > keep:
            kept = self.method.grow(kept, final, gradient=gradient, generator=self.generator)
        layer.set_mask(kept, final)

    def _clear_outside(self, layer: MaskedWeight, bits: Tensor) -> None:
        """Zero the weight and its optimizer state where ``bits`` has no weight."""
        p = layer.parameter
        masking.apply_(p, bits)
        state = self.optimizer.state.get(p)
        if state:
            shape = p.shape
            for value in state.values():
                # Integer state (a quantised moment) has no zero that could be told from its bits.
                if isinstance(value, Tensor) and value.shape == shape and value.is_floating_point():
                    masking.apply_(value, bits)

    def _on_gradient(self, layer: MaskedWeight, parameter: Tensor) -> None:
        """After a backward pass: mask the gradient, so that clipping and scaling see the sparse one."""
        grad = parameter.grad
        if grad is None:
            return
        layer.follow()
        layer.arrived = True
        collects = layer.name in self._pending and self.method.gradients == "dense"
        if collects:
            self._dense.collect(layer.name, grad, layer.mask)
        masking.apply_(grad, layer.bits)
        layer.clean = (id(grad), grad._version)
        if collects:
            self._dense.note(layer.name, grad)

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """Before a step: mask gradients that were set by hand, and note those of a pending mutation."""
        for layer in self._live:
            grad = layer.parameter.grad
            if grad is None:
                continue
            layer.follow()
            if self._pending and layer.name in self._pending:
                if self.method.gradients == "active":
                    self._snapshots[layer.name] = _unscaled(grad, optimizer)
                elif layer.name not in self._dense and not layer.arrived:
                    self._dense.collect(layer.name, grad, layer.mask)
            # Nothing has written to the gradient since its backward pass: it is masked already.
            if layer.clean != (id(grad), grad._version):
                masking.apply_(grad, layer.bits)

    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """After a step: whatever the optimizer did, inactive weights and their state are zero; then mutate."""
        for layer in self._live:
            layer.follow()
            layer.clean, layer.arrived = None, False
            self._clear_outside(layer, layer.bits)
        if not self._pending:
            return
        # The hook's arguments start with the optimizer itself.
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        gradients = self._take_gradients(has_closure=closure is not None)
        if self.average is not None:
            self.average([gradients[layer.name] for layer in self._live if layer.name in gradients])
        if _was_skipped(optimizer) or not all(bool(g.isfinite().all()) for g in gradients.values()):
            return
        # In the order of the layers, so that the generator's draws do not depend on the backward pass.
        for layer in self._live:
            if layer.name in self._pending and layer.name in gradients:
                self._mutate(layer, self._pending.pop(layer.name), gradient=gradients[layer.name])

    def _take_gradients(self, *, has_closure: bool) -> dict[str, Tensor]:
        if self.method.gradients == "dense":
            return self._dense.take()
        taken, self._snapshots = self._snapshots, {}
        if has_closure:
            # The step itself ran the backward pass: what was there before it is stale.
            live = [layer for layer in self._live if layer.name in self._pending]
            taken = {layer.name: layer.parameter.grad for layer in live if layer.parameter.grad is not None}
        return taken


def _unscaled(grad: Tensor, optimizer: torch.optim.Optimizer) -> Tensor:
    """A copy of the gradient, without the loss scale that ``GradScaler`` leaves to a fused optimizer."""
    scale = getattr(optimizer, "grad_scale", None)
    return grad.detach().clone() if scale is None else grad.detach() / scale.to(grad.device)


def _was_skipped(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a fused optimizer skipped its update because ``GradScaler`` found an infinite gradient."""
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found > 0)
