"""Which weights exist: the masker under the timeline."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from spfde.core.errors import UsageError
from spfde.core.say import counted
from spfde.planning.timeline import Counts, Row
from spfde.session.part import Part, Setting
from spfde.sparsity import SparsityMethod
from spfde.sparsity.masker import Masker
from spfde.sparsity.together import Clears
from spfde.sparsity.weight import MaskedWeight


class WholeModel(Part):
    """A model without masks: every weight exists. ``Masks`` has the same properties."""

    name = "masks"
    masks: Mapping[str, Tensor] = {}
    layers: Mapping[str, MaskedWeight] = {}
    density = target_density = 1.0
    explored = 1.0
    dense_gradient_steps = 0
    wants_dense_gradients: frozenset[str] = frozenset()

    def densities(self) -> dict[str, float]:
        """Active share of each masked tensor, by name."""
        return {}

    def install(self) -> None:
        """Hook what has to be hooked."""

    @property
    def follows_next_step(self) -> bool:
        """Whether more is done in the next step than to mask."""
        return False

    @property
    def follows_every_step(self) -> bool:
        """Whether that holds for all steps."""
        return False

    def keep_in_place(self) -> None:
        """Have steps read masks from memory that stays where it is, whatever mutates."""

    def masked_already(self, gradients: Mapping[str, Tensor]) -> None:
        """These gradients come masked; see ``engines.base.Parts``."""

    def clear_by(self, clears: Clears | None) -> None:
        """Zero weights and optimizer state after a step by what this makes; see ``Engine.clears``."""

    def enforce(self) -> list[str]:
        """Mask again what somebody has written; the names of the tensors."""
        return []

    def infer_masks(self) -> None:
        """Take the masks from the model's zeros."""
        raise UsageError("infer_masks() needs a recipe with sparsity. Attach with Recipe(sparsity=...).")

    def summarise(self) -> list[str]:
        return ["sparsity: none"]


class Masks(WholeModel):
    """Carries out the timeline's mutations, and amends it by what the masks really had.

    Args:
        setting: the session's.
        masks: the first masks, for methods that choose them from data.
    """

    def __init__(self, setting: Setting, method: SparsityMethod, masks: Mapping[str, Tensor] | None) -> None:
        layers = setting.blueprint.sparse_layers
        self._setting = setting
        self.masker = masker = Masker(layers, setting.optimizer, method, generator=setting.generator, masks=masks)
        self.remembers = masker
        if setting.world.is_shared and not setting.is_sharded:  # FSDP averages gradients before they arrive
            masker.average = setting.world.average_
        if any(layer.target != setting.blueprint.masked[name].target for name, layer in masker.layers.items()):
            self._amend(epoch=0)  # the first masks were chosen from data

    @property
    def masks(self) -> Mapping[str, Tensor]:  # type: ignore[override]  # read-only here, empty there
        """Masks by parameter name; True where the weight exists."""
        return self.masker.masks

    @property
    def layers(self) -> Mapping[str, MaskedWeight]:  # type: ignore[override]
        """The masked weights by parameter name."""
        return self.masker.layers

    @property
    def density(self) -> float:  # type: ignore[override]
        """Active share of the masked tensors."""
        return self.masker.density

    @property
    def target_density(self) -> float:  # type: ignore[override]
        """Active share of the masked tensors that the recipe asks for."""
        layers, masked = self.masker.layers, self._setting.blueprint.masked
        active = sum(masked[name].target * layer.unit_size for name, layer in layers.items())
        return active / sum(layer.numel for layer in layers.values())

    @property
    def explored(self) -> float:  # type: ignore[override]
        """Share of the masked weights that have been active at some time."""
        return self.masker.explored

    @property
    def dense_gradient_steps(self) -> int:  # type: ignore[override]
        """Backward passes of this epoch that computed gradients of all weights."""
        return self.masker.dense_gradient_steps

    @property
    def wants_dense_gradients(self) -> frozenset[str]:  # type: ignore[override]
        """Names of the parameters whose next gradient must be dense."""
        return self.masker.wants_dense_gradients

    def densities(self) -> dict[str, float]:
        return self.masker.densities()

    def install(self) -> None:
        self.masker.install()

    @property
    def follows_next_step(self) -> bool:
        return self.masker.strategy.follows_next_step()

    @property
    def follows_every_step(self) -> bool:
        return self.masker.strategy.follows_every_step()

    def keep_in_place(self) -> None:
        for layer in self.masker.layers.values():
            layer.keep_in_place()

    def masked_already(self, gradients: Mapping[str, Tensor]) -> None:
        self.masker.masked_already(gradients)

    def clear_by(self, clears: Clears | None) -> None:
        self.masker.clear_by(clears)

    def enforce(self) -> list[str]:
        return self.masker.enforce()

    def begin_epoch(self, row: Row) -> None:
        self.masker.begin_epoch(row.masks)

    def end_epoch(self) -> None:
        self._amend(self._setting.clock.epoch)

    def infer_masks(self) -> None:
        """Take the masks from the model's zeros."""
        self.masker.infer_masks(self._setting.timeline.most_active())

    def check_state(self, state: Mapping[str, Any]) -> None:
        self.masker.check_state(state)

    def detach(self) -> None:
        self.masker.remove()

    def summarise(self) -> list[str]:
        lines = [f"sparsity: {self._setting.recipe.sparsity!r}, density now {self.density:.4f}"]
        left = self._setting.blueprint.left_dense
        if left:
            lines.append(f"  dense: {sum(weight.numel for weight in left):,} weights that could be sparse:")
            lines += [f"    {weight.name}: {weight.numel:,}, {weight.reason}" for weight in left]
        return lines

    def describe(self) -> list[str]:
        names = list(self.layers)
        sharded = "sharded: each rank has its rows of the masks, and gathers a layer where its mask changes"
        return [
            *([sharded] if self._setting.is_sharded else []),
            f"hooked: the optimizer's steps and the gradients of {counted(len(names), 'tensor')} (masks):",
            *(f"  {name}" for name in names),
        ]

    def _amend(self, epoch: int) -> None:
        mean = self.masker.mean_active()
        self._setting.timeline.amend(
            epoch,
            {
                name: Counts(
                    target=layer.target,
                    active=mean[name],
                    now=layer.active,
                    gradient=mean[name] if layer.wider is None else layer.n_gradient,
                )
                for name, layer in self.masker.layers.items()
            },
        )
