"""The thin object of the room: finds the tensors, asks whether it is time, and calls the pure functions."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Container, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from spfde.core.errors import StateMismatch, UsageError
from spfde.sparsity import latent as behind
from spfde.sparsity import masks as masking
from spfde.sparsity import mutation
from spfde.sparsity.gradients import DenseGradients, SmoothedGradients
from spfde.sparsity.layers import shapes_of
from spfde.sparsity.methods.base import (
    LayerView,
    SparsityMethod,
    Turnover,
    mutates_after,
    planned_active,
    planned_keep,
)
from spfde.sparsity.state import Bounds, check_state, check_weights
from spfde.sparsity.structure import Unstructured
from spfde.sparsity.weight import MaskedWeight


class Masker:
    """Keeps the inactive weights of a model at zero, with all optimizer state, and mutates masks on update epochs.

    A mutation drops to the number that survives and grows to the number that the method plans; what is dropped or
    grown has weight zero and optimizer state zero. Methods that need gradients mutate right after the first step of
    the update epoch that has them.

    Args:
        layers: weights to mask by name, in order of execution, from :func:`select_layers`.
        optimizer: the user's optimizer; its ``param_groups`` are not touched.
        method: the rules.
        generator: a CPU generator, the only source of randomness.
        interval: epochs between two update epochs.
        epochs: length of the run; in its last epoch the masks are at target and stay.
        masks: the first masks, for methods that choose them from data; they say how many weights each layer has.

    The masks are drawn, and the weights outside set to zero, at once; the hooks wait for :meth:`install`.
    """

    def __init__(
        self,
        layers: Mapping[str, nn.Parameter],
        optimizer: Optimizer,
        method: SparsityMethod,
        *,
        generator: torch.Generator,
        interval: int,
        epochs: int,
        masks: Mapping[str, Tensor] | None = None,
    ) -> None:
        assert interval >= 1, "an interval is at least one epoch"
        assert epochs >= 1, "a run is at least one epoch"
        self.method = method
        self.optimizer = optimizer
        self.generator = generator
        self.interval = interval
        self.epochs = epochs
        self._layers = _masked_weights(layers, method)
        self._live: list[MaskedWeight] = []
        self._pending: dict[str, Turnover] = {}
        self._dense = DenseGradients()
        self._smoothed = SmoothedGradients()
        self._smooths = self._rewires = False
        self._memory: dict[str, float] = {}
        self._snapshots: dict[str, Tensor] = {}
        self._handles: list[RemovableHandle] = []
        self.reset_epoch_counters()
        #: With several processes: replaces tensors by their mean over the ranks.
        self.average: Callable[[Iterable[Tensor]], None] | None = None
        for name, layer in self._layers.items():
            self._draw(layer, None if masks is None else masks.get(name))
        self._set_live(frozen=())

    @property
    def masks(self) -> dict[str, Tensor]:
        """Boolean masks by layer, True where the weight exists; replaced, never changed, by a mutation."""
        return {name: layer.mask for name, layer in self._layers.items()}

    @property
    def target(self) -> dict[str, int]:
        """Active weights of each layer without a soft bound."""
        return {name: layer.target * layer.unit_size for name, layer in self._layers.items()}

    @property
    def pending(self) -> tuple[str, ...]:
        """Layers whose mutation waits for a gradient."""
        return tuple(self._pending)

    @property
    def wants_dense_gradients(self) -> frozenset[str]:
        """Layers whose next gradient must hold inactive weights too."""
        if self._smooths:
            return frozenset(layer.name for layer in self._live)
        waiting = self._pending if self.method.gradients == "dense" else ()
        return frozenset([*waiting, *(layer.name for layer in self._live if layer.reaches_beyond_mask)])

    @property
    def dense_gradient_steps(self) -> int:
        """Backward passes whose dense gradient was used since :meth:`reset_epoch_counters`."""
        return max(self._dense.passes.values(), default=0)

    @property
    def explored(self) -> float:
        """Share of the masked weights that have been active at some time: ITOP's over-parameterisation rate."""
        weights = sum(layer.numel for layer in self._layers.values())
        return sum(layer.explored.count for layer in self._layers.values()) / weights

    def reset_epoch_counters(self) -> None:
        """Count anew: the passes with a dense gradient, and what :meth:`mean_densities` is the mean of."""
        self._dense.passes.clear()
        self._steps, self._active_over_steps = 0, dict.fromkeys(self._layers, 0)

    def n_active(self, name: str) -> int:
        """Number of active weights of a layer."""
        return self._layers[name].active * self._layers[name].unit_size

    def density(self, name: str) -> float:
        """Share of active weights of a layer."""
        return self._layers[name].density

    def densities(self) -> dict[str, float]:
        """Share of active weights by layer."""
        return {name: layer.density for name, layer in self._layers.items()}

    def mean_densities(self) -> dict[str, float]:
        """Share of active weights by layer over the steps since :meth:`reset_epoch_counters`.

        Where masks change on update epochs alone, and without steps, it is that of now.
        """
        if not self._steps:
            return self.densities()
        return {
            name: self._active_over_steps[name] * layer.unit_size / (self._steps * layer.numel)
            for name, layer in self._layers.items()
        }

    def gradient_densities(self) -> dict[str, float]:
        """Share of the weights whose gradient each step computes, for layers where that is more than the mask."""
        return {name: layer.reach for name, layer in self._layers.items() if layer.reaches_beyond_mask}

    def install(self) -> None:
        """Hook the gradients and the optimizer's steps.

        Raises:
            UsageError: the hooks are there already.
        """
        if self._handles:
            raise UsageError("The masks are hooked already. Call remove() first.")
        for layer in self._layers.values():
            if not layer.is_dense:
                hook = _gradient_hook(self, layer.name)
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
        self._smoothed.clear()
        self._snapshots.clear()

    # --- epochs ------------------------------------------------------------------------------------------------------

    def begin_epoch(self, epoch: int, frozen: Container[str], settling: Container[str] = ()) -> None:
        """Mutate if it is time; call it once at the top of each epoch.

        On an update epoch every layer that is not frozen mutates, or is set pending when the method needs a gradient
        for it. The last epoch only prunes to target.

        Args:
            epoch: from 0.
            frozen: names of frozen weights; neither their masks nor their values are touched.
            settling: names of weights that are frozen at the next update epoch: nothing is grown above their target
            any more.
        """
        self._set_live(frozen)
        self._dense.clear()
        self._snapshots.clear()
        for layer in self._live:
            layer.follow(layout=True)
        names = {layer.name for layer in self._live}
        self._smoothed.keep(names)
        is_last = epoch >= self.epochs - 1
        self._rewires = self.method.rewires and not is_last
        if is_last:
            self._pending.clear()
            self.prune_to_target(names)
        elif epoch % self.interval == 0:
            self._pending = {}
            self._update_epoch(epoch, settling)
        else:
            self._pending = {name: turnover for name, turnover in self._pending.items() if name in names}
        self._smooths = self.method.gradients == "smoothed" and mutates_after(
            self.method, epoch, interval=self.interval, epochs=self.epochs
        )
        if not self._smooths:
            self._smoothed.clear()

    def prune_to_target(self, names: Iterable[str]) -> None:
        """Drop what these layers hold above their target, by magnitude, and cancel their pending mutation.

        Names of parameters that are not masked are passed over.
        """
        layers = [self._layers[name] for name in names if name in self._layers]
        self._settle(layers)
        for layer in layers:
            self._pending.pop(layer.name, None)
            if layer.active > layer.target:
                self._mutate(layer, (layer.target, layer.target), gradient=None, by_magnitude=True)

    def infer_masks(self) -> None:
        """Take the masks from the zeros of the weights, after a sparse checkpoint without masks was loaded.

        A layer with fewer non-zeros than its target is filled up with weights drawn at random, for grown weights may
        be zero still; one with more, up to the largest soft bound, keeps them until it is pruned.

        Raises:
            StateMismatch: a layer has more non-zeros than the method ever allows.
            UsageError: the masks are structured, and zeros do not tell the units that exist.
        """
        if not isinstance(self.method.structure, Unstructured):
            raise UsageError("Masks of groups cannot be told from zeros. Load the session's state.")
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
            layer.latent = self.method.latent_of(layer.parameter, target=layer.target) if layer.latent else None
            layer.clear_outside(self.optimizer)
            layer.note_explored()
        self._pending.clear()

    # --- state -------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Masks (packed), pending mutations, counters and the generator, as tensors and primitives.

        A gradient collected for a mutation that has not happened yet is not part of it: take the state at the top of
        an epoch or after the last step of one.
        """
        layers = self._layers
        return {
            "masks": {name: masking.pack(layer.mask) for name, layer in layers.items()},
            "shapes": {name: list(layer.parameter.shape) for name, layer in layers.items()},
            "target": self.target,
            "explored": {name: layer.explored.packed.clone() for name, layer in layers.items()},
            "pending": {name: list(turnover) for name, turnover in self._pending.items()},
            "dense_gradient_passes": dict(self._dense.passes),
            "steps": self._steps,
            "active_over_steps": dict(self._active_over_steps),
            "latents": {name: layer.latent.state_dict() for name, layer in layers.items() if layer.latent is not None},
            "smoothed": self._smoothed.state_dict(),
            "memory": dict(self._memory),
            "running": {"smooths": self._smooths, "rewires": self._rewires},
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state. Load the model's and the optimizer's state first.

        Raises:
            StateMismatch: the state is damaged, belongs to another model, sparsity or method, or the model's weights
                are not those of the state. Nothing has changed then.
        """
        bounds = {name: self._bounds(layer) for name, layer in self._layers.items()}
        loaded = check_state(state, bounds=bounds, counts_known=self.method.counts_known)
        check_weights({name: layer.parameter for name, layer in self._layers.items()}, loaded)
        latents = {name: self._latent_from(state, layer, loaded[name]) for name, layer in self._layers.items()}
        try:
            self.generator.set_state(state["generator"])
        except (RuntimeError, TypeError) as error:
            raise StateMismatch(f"The state's generator cannot be used here: {error}") from error
        for name, layer in self._layers.items():
            layer.target = state["target"][name] // layer.unit_size
            layer.set_mask(loaded[name], int(loaded[name].sum()) // layer.unit_size)
            layer.explored.packed = state["explored"][name].clone()
            layer.latent = latents[name]
            masking.apply_(layer.parameter, layer.mask)
            layer.clear_idle_state(self.optimizer)
        self._pending = {name: (int(keep), int(final)) for name, (keep, final) in state["pending"].items()}
        self._memory = dict(state["memory"])
        self._smooths, self._rewires = state["running"]["smooths"], state["running"]["rewires"]
        self._dense.clear()
        self._dense.passes = dict(state["dense_gradient_passes"])
        self._steps, self._active_over_steps = int(state["steps"]), dict(state["active_over_steps"])
        self._smoothed.load_state_dict(state["smoothed"])
        self._snapshots.clear()
        # A state from amid an epoch: what is frozen in it does not step.
        self._set_live([name for name, layer in self._layers.items() if not layer.parameter.requires_grad])

    # --- masks -------------------------------------------------------------------------------------------------------

    def _draw(self, layer: MaskedWeight, given: Tensor | None) -> None:
        """The layer's first mask."""
        if layer.is_dense and given is None:
            layer.note_explored()
            return
        layer.latent = self.method.latent_of(layer.parameter, target=layer.target)
        if layer.latent is not None:
            layer.set_mask(layer.latent.mask, int(layer.latent.mask.sum()))
        elif given is not None:
            layer.target = int(given.sum()) // layer.unit_size
            layer.set_mask(given, layer.target)
        else:
            layer.draw(self.method.start_at(layer.target, layer.n_units), by=self.method.init, generator=self.generator)
        layer.clear_outside(self.optimizer)
        layer.note_explored()

    def _set_live(self, frozen: Container[str]) -> None:
        """Note the layers that the steps have to look after: those that are masked at all and not frozen."""
        self._live = [layer for layer in self._layers.values() if not layer.is_dense and layer.name not in frozen]

    def _update_epoch(self, epoch: int, settling: Container[str]) -> None:
        progress = epoch / self.epochs
        if self.method.allots:
            if epoch > 0:
                self._redistribute(progress)
            return
        stays = not self.method.keeps_latents_at(progress)
        self._settle(layer for layer in self._live if stays or layer.name in settling)
        for layer in self._live:
            if layer.latent is not None:
                layer.latent.turn(progress)
                self._follow_latent(layer)
                continue
            keep, final = self._turnover(layer, epoch)
            if layer.name in settling:
                final = min(final, layer.target)
            self._turn_over_or_wait(layer, (min(keep, final), final))

    def _turnover(self, layer: MaskedWeight, epoch: int) -> Turnover:
        method, target, n_units = self.method, layer.target, layer.n_units
        keep = planned_keep(method, target, n_units, epoch=epoch, epochs=self.epochs)
        final = planned_active(method, target, n_units, epoch=epoch, interval=self.interval, epochs=self.epochs)
        return min(keep, layer.active), min(final, layer.active) if method.only_prunes else final

    def _most(self, layer: MaskedWeight) -> int:
        """The most active weights that the layer ever has in this run."""
        method, target, n_units = self.method, layer.target, layer.n_units
        if not method.counts_known:
            return n_units * layer.unit_size
        update_epochs = range(0, self.epochs, self.interval)
        planned = [
            planned_active(method, target, n_units, epoch=update_epoch, interval=self.interval, epochs=self.epochs)
            for update_epoch in update_epochs
        ]
        return max(*planned, method.start_at(target, n_units)) * layer.unit_size

    def _bounds(self, layer: MaskedWeight) -> Bounds:
        target = layer.target * layer.unit_size
        return Bounds(
            shape=tuple(layer.parameter.shape),
            unit_size=layer.unit_size,
            target=target,
            least=target if self.method.counts_known else layer.unit_size,
            most=self._most(layer),
        )

    def _turn_over_or_wait(self, layer: MaskedWeight, turnover: Turnover) -> None:
        keep, final = turnover
        if keep == final == layer.active:
            return
        drops, grows = keep < layer.active, final > keep
        needed = self.method.gradients
        if (needed == "active" and drops) or (needed == "dense" and grows):
            self._pending[layer.name] = turnover
        else:
            self._mutate(layer, turnover, gradient=None)

    def _mutate(
        self, layer: MaskedWeight, turnover: Turnover, *, gradient: Tensor | None, by_magnitude: bool = False
    ) -> None:
        keep, final = turnover
        weight = layer.parameter.detach()
        score = None
        if keep < layer.active:
            score = mutation.magnitude(weight) if by_magnitude else self.method.drop_score(weight, gradient)
        layer.turn_over(
            keep,
            final,
            drop_score=score,
            grow_score=self.method.grow_score(gradient) if final > keep else None,
            optimizer=self.optimizer,
            generator=self.generator,
        )

    def _redistribute(self, progress: float) -> None:
        """One mutation of all layers together: what some lose others gain."""
        smoothed = self._smoothed.values
        layers = [layer for layer in self._live if self.method.gradients != "smoothed" or layer.name in smoothed]
        views = [self._view(layer, smoothed.get(layer.name)) for layer in layers]
        turnovers = self.method.allot(views, progress=progress, memory=self._memory)
        for layer, turnover in zip(layers, turnovers, strict=True):
            if turnover != (layer.active, layer.active):
                self._mutate(layer, turnover, gradient=smoothed.get(layer.name))
            layer.target = layer.active

    def _view(self, layer: MaskedWeight, smoothed: Tensor | None) -> LayerView:
        units = layer.structure.units_of(layer.mask)
        scores = layer.unit_scores(self.method.drop_score(layer.parameter.detach(), None))[units]
        momentum = 0.0 if smoothed is None else float(smoothed.abs()[layer.mask].mean())
        return LayerView(layer.n_units, scores, momentum)

    # --- weights behind the masks ------------------------------------------------------------------------------------

    def _latent_from(self, state: Mapping[str, Any], layer: MaskedWeight, mask: Tensor) -> behind.Latent | None:
        """The latent that a saved state has for a layer, whether or not the layer has one now; None: it has settled."""
        kept = state["latents"].get(layer.name)
        if kept is None:
            return None
        latent = self.method.latent_of(layer.parameter, target=state["target"][layer.name] // layer.unit_size)
        if latent is None:
            raise StateMismatch(
                f"The state has weights behind the mask of {layer.name}, and {self.method.name} keeps none. "
                "Attach with the recipe that the state was saved with."
            )
        latent.load_state_dict(kept, mask)
        return latent

    def _follow_latent(self, layer: MaskedWeight) -> None:
        """Take over the mask and the sparse weight that the latent gives."""
        assert layer.latent is not None
        layer.set_mask(layer.latent.mask, int(layer.latent.mask.sum()))
        layer.parameter.detach().copy_(layer.latent.sparse)
        layer.note_explored()

    def _settle(self, layers: Iterable[MaskedWeight]) -> None:
        """Give up the latents of these layers: from now on their masks stay, at the target's total."""
        layers = [layer for layer in layers if layer.latent is not None]
        latents = [layer.latent for layer in layers if layer.latent is not None]
        if not layers:
            return
        masks = behind.settled_masks(latents, sum(layer.target for layer in layers))
        for layer, latent, mask in zip(layers, latents, masks, strict=True):
            layer.parameter.detach().copy_(latent.sparse)
            layer.latent = None
            layer.target = int(mask.sum())
            layer.set_mask(mask, layer.target)
            layer.clear_outside(self.optimizer)
            layer.note_explored()

    def _settle_if_reached(self) -> None:
        """Latents whose masks shrink by themselves settle once they are small enough together."""
        layers = [layer for layer in self._live if layer.latent is not None]
        if layers and sum(layer.active for layer in layers) <= sum(layer.target for layer in layers):
            self._settle(layers)

    # --- steps -------------------------------------------------------------------------------------------------------

    def _on_gradient(self, layer: MaskedWeight, parameter: Tensor) -> None:
        """After a backward pass: mask the gradient, so that clipping and scaling see the sparse one."""
        grad = parameter.grad
        if grad is None:
            return
        layer.follow()
        layer.arrived = True
        collects = self._collects(layer)
        if collects:
            self._dense.collect(layer.name, grad, layer.mask)
        masking.apply_(grad, layer.gradient_mask)
        layer.clean = (id(grad), grad._version)
        if collects:
            self._dense.note(layer.name, grad)

    def _collects(self, layer: MaskedWeight) -> bool:
        return self._smooths or (layer.name in self._pending and self.method.gradients == "dense")

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """Before a step: mask gradients that were set by hand, and note those of a pending mutation."""
        if self.method.changes_every_step:
            self._steps += 1
            for name, layer in self._layers.items():
                self._active_over_steps[name] += layer.active
        for layer in self._live:
            grad = layer.parameter.grad
            if grad is not None:
                layer.follow()
                if layer.name in self._pending and self.method.gradients == "active":
                    self._snapshots[layer.name] = _unscaled(grad, optimizer)
                elif self._collects(layer) and layer.name not in self._dense and not layer.arrived:
                    self._dense.collect(layer.name, grad, layer.mask)
                # Nothing has written to the gradient since its backward pass: it is masked already.
                if layer.clean != (id(grad), grad._version):
                    masking.apply_(grad, layer.gradient_mask)
            # Nothing moves a weight that has no gradient (a frozen one).
            layer.negative = torch.signbit(layer.parameter.detach()) if self._rewires and grad is not None else None
            if layer.latent is not None:
                if _closure_of(args, kwargs) is not None:
                    raise UsageError(f"{self.method.name} cannot follow optimizer.step(closure). Call step() alone.")
                behind.swap_in(layer.parameter, layer.latent, None if grad is None else _unscaled(grad, optimizer))

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """After a step: whatever the optimizer did, inactive weights and their state are zero; then mutate."""
        skipped = _was_skipped(optimizer)
        group_of = self._groups() if self._rewires or any(layer.latent is not None for layer in self._live) else {}
        for layer in self._live:
            layer.follow()
            layer.clean, layer.arrived = None, False
            if layer.latent is not None:
                self._leave_latent(layer, None if skipped else group_of[id(layer.parameter)])
                continue
            if layer.negative is not None and not skipped:
                self._rewire(layer, layer.negative, float(group_of[id(layer.parameter)]["lr"]))
            layer.clear_outside(optimizer)
        if self.method.changes_every_step:
            self._settle_if_reached()
        if not self._pending and not self._smooths:
            return
        gradients = self._take_gradients(has_closure=_closure_of(args, kwargs) is not None)
        if self.average is not None:
            self.average([gradients[layer.name] for layer in self._live if layer.name in gradients])
        if skipped or not all(bool(g.isfinite().all()) for g in gradients.values()):
            return
        if self._smooths:
            self._smoothed.add(gradients, momentum=self.method.gradient_momentum)
        # In the order of the layers, so that the generator's draws do not depend on the backward pass.
        for layer in self._live:
            if layer.name in self._pending and layer.name in gradients:
                self._mutate(layer, self._pending.pop(layer.name), gradient=gradients[layer.name])

    def _groups(self) -> dict[int, dict[str, Any]]:
        return {id(p): group for group in self.optimizer.param_groups for p in group["params"]}

    def _leave_latent(self, layer: MaskedWeight, group: Mapping[str, Any] | None) -> None:
        assert layer.latent is not None
        if group is not None:
            layer.latent.after_step(layer.parameter.detach(), group)
        layer.clear_idle_state(self.optimizer)
        if self.method.changes_every_step:
            self._follow_latent(layer)
        else:
            layer.parameter.detach().copy_(layer.latent.sparse)

    def _rewire(self, layer: MaskedWeight, negative: Tensor, learning_rate: float) -> None:
        weight, mask = self.method.rewire(
            layer.parameter.detach(), layer.mask, negative, learning_rate=learning_rate, generator=self.generator
        )
        layer.parameter.detach().copy_(weight)
        layer.negative = None
        layer.set_mask(mask, layer.active)
        layer.note_explored()

    def _take_gradients(self, *, has_closure: bool) -> dict[str, Tensor]:
        if self.method.gradients in ("dense", "smoothed"):
            return self._dense.take()
        taken, self._snapshots = self._snapshots, {}
        if has_closure:
            # The step itself ran the backward pass: what was there before it is stale.
            live = [layer for layer in self._live if layer.name in self._pending]
            taken = {layer.name: layer.parameter.grad for layer in live if layer.parameter.grad is not None}
        return taken


def _masked_weights(layers: Mapping[str, nn.Parameter], method: SparsityMethod) -> dict[str, MaskedWeight]:
    shapes, counts = shapes_of(layers), method.counts(shapes_of(layers))
    weights = {}
    for name, parameter in layers.items():
        is_dense = counts[name] == parameter.numel()
        structure = Unstructured() if is_dense else method.structure
        weights[name] = MaskedWeight(name, parameter, structure, counts[name] // structure.unit_size(shapes[name]))
    return weights


def _closure_of(args: Any, kwargs: Any) -> Any:
    # The hook's arguments start with the optimizer itself.
    return args[1] if len(args) > 1 else kwargs.get("closure")


def _unscaled(grad: Tensor, optimizer: Optimizer) -> Tensor:
    """A copy of the gradient, without the loss scale that ``GradScaler`` leaves to a fused optimizer."""
    scale = getattr(optimizer, "grad_scale", None)
    return grad.detach().clone() if scale is None else grad.detach() / scale.to(grad.device)


def _was_skipped(optimizer: Optimizer) -> bool:
    """Whether a fused optimizer skipped its update because ``GradScaler`` found an infinite gradient."""
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found > 0)


def _gradient_hook(masker: Masker, name: str) -> Callable[[Tensor], None]:
    """What masks a layer's gradient. Python's collector does not look into a parameter's hooks: it holds nothing."""
    of_masker = weakref.ref(masker)

    def hook(parameter: Tensor) -> None:
        alive = of_masker()
        if alive is not None:
            alive._on_gradient(alive._layers[name], parameter)

    return hook
