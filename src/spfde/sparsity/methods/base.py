"""What all sparse training methods share: plain data and pure rules. They say what to do; the masker does it.

A method answers four questions: how many units a layer drops and holds at a given progress of the run, which score
decides what is dropped, which rule decides what grows, and which gradients these need. A unit is what exists or not as
a whole, by the method's ``structure``: a single weight, where that is unstructured.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, SerializeAsAny, field_serializer, field_validator, model_validator
from torch import Tensor

from spfde.core.errors import InvalidArgument, Problem, Problems, nearest
from spfde.core.numbers import latest_update_epoch, round_half_up
from spfde.core.technique import Technique
from spfde.sparsity import mutation
from spfde.sparsity.distribution import active_count, erk, override_for
from spfde.sparsity.structure import STRUCTURES, Structure, Unstructured

if TYPE_CHECKING:
    from spfde.sparsity.latent import Latent

Sparsity = Annotated[float, Field(ge=0.0, lt=1.0)]
Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
NamePatterns = tuple[str, ...]
Gradients = Literal["none", "active", "dense", "smoothed"]
Turnover = tuple[int, int]
"""Active units that survive a mutation, and active units after it."""


@dataclass(frozen=True)
class LayerView:
    """What a method that moves weights between layers sees of one.

    Attributes:
        n_units: units of the layer, existing or not.
        scores: keep score of each active unit, shape (active,).
        momentum: mean magnitude of the smoothed gradient of the active units; 0 where none is kept.
    """

    n_units: int
    scores: Tensor
    momentum: float

    @property
    def active(self) -> int:
        """Number of active units."""
        return self.scores.numel()


class SparsityMethod(Technique):
    """What all methods share: how sparse, which layers, and how the first mask is drawn.

    Attributes:
        sparsity: share of inactive weights in the masked layers, in [0, 1).
        distribution: "uniform" (every layer alike, as SpFDE and MEST) or "erk" (small layers denser, as RigL).
        structure: what exists or not as a whole: ``Unstructured()``, ``Block()``, ``NM()``, ``Kernels()``,
            ``Patterns()`` or ``Channels()``.
        include: name patterns (``fnmatch``) of the weights to mask; empty: all that can be, but depthwise convolutions.
        exclude: name patterns of weights that stay dense, such as ``"*.downsample.*"``.
        overrides: sparsity by name pattern; the last pattern that matches wins.
        dense_first: the first layer in order of execution stays dense.
        dense_head: the classifier head stays dense.
        init: "random" (uniform per layer, SpFDE's random sparse structure) or "magnitude" (the largest initial
            weights, as MEST's released code; the choice for a pretrained model).
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    cost: ClassVar[str] = "3 sparse passes a step"
    """Training FLOPs of a step, in words: the sparse forward pass, the gradient of the input and of the weight."""
    groups_units: ClassVar[bool] = True
    """Whether the method can treat several weights as one unit."""
    allots: ClassVar[bool] = False
    """Whether a mutation gives one layer what it takes from another; then ``allot`` says how much."""
    rewires: ClassVar[bool] = False
    """Whether ``rewire`` changes the masks after every step."""
    changes_every_step: ClassVar[bool] = False
    """Whether masks change at every step, not at the update epochs alone."""
    only_prunes: ClassVar[bool] = False
    """Whether mutations never grow: a layer that has come to its target early, by freezing say, stays there."""
    counts_known: ClassVar[bool] = True
    """Whether each layer's number of active weights is known before training."""
    keeps_counts_with: ClassVar[str] = ""
    """The setting under which a method that varies the number of active weights does not, where there is one."""

    sparsity: Sparsity = Field(description="a number in [0, 1), the share of inactive weights")
    distribution: Literal["uniform", "erk"] = "uniform"
    structure: SerializeAsAny[Structure] = Field(
        default_factory=Unstructured, description="a structure, such as spfde.Block(rows=4, columns=1)"
    )
    include: NamePatterns = ()
    exclude: NamePatterns = ()
    overrides: dict[str, Sparsity] = Field(default_factory=dict, description="name patterns with numbers in [0, 1)")
    dense_first: bool = True
    dense_head: bool = True
    init: Literal["random", "magnitude"] = "random"

    @field_validator("structure", mode="before")
    @classmethod
    def _read_structure(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        fields = dict(value)
        kind = str(fields.pop("kind", ""))
        if kind not in STRUCTURES:
            raise InvalidArgument(Problem("structure.kind", kind, "is no structure", nearest(kind, STRUCTURES)))
        return STRUCTURES[kind](**fields)

    @field_serializer("structure")
    def _write_structure(self, structure: Structure) -> dict[str, Any]:
        return {"kind": structure.kind, **structure.model_dump(mode="json")}

    @model_validator(mode="after")
    def _structure_fits(self) -> SparsityMethod:
        if isinstance(self.structure, Unstructured):
            return self
        if not self.groups_units:
            rule = f"must be Unstructured(), for {self.name} works on single weights"
            raise InvalidArgument(
                Problem("structure", self.structure, rule, "Use another method, such as set or rigl.")
            )
        if self.structure.fixed_count and self.varies_counts:
            rule = f"keeps the number of active weights fixed, and {self.name} varies it as it is set here"
            setting = f"{self.keeps_counts_with}, or " if self.keeps_counts_with else ""
            remedy = f"Use {setting}another method, such as set or rigl."
            raise InvalidArgument(Problem("structure", self.structure, rule, remedy))
        return self

    @property
    def cited(self) -> tuple[str, ...]:
        """With where the distribution over the layers is from; uniform is common knowledge."""
        return (*self.references, *(("evci2020rigl",) if self.distribution == "erk" else ()))

    @property
    def varies_counts(self) -> bool:
        """Whether a layer's number of active weights changes over the run."""
        return self.allots

    @property
    def gradients(self) -> Gradients:
        """Which gradients a mutation needs: none, of the active weights, of all weights, or of all over many steps."""
        return "none"

    def drop_fraction_at(self, progress: float) -> float:
        """Share of the target's active units that a mutation drops and grows again; progress runs from 0 to 1."""
        return 0.0

    def excess_at(self, progress: float) -> float:
        """Soft bound: density above the target, in share of all units of the layer."""
        return 0.0

    def active_at(self, target: int, n_units: int, progress: float) -> int:
        """Active units of a layer from the update epoch at ``progress`` to the next one."""
        return min(n_units, target + round_half_up(self.excess_at(progress) * n_units))

    def keep_at(self, target: int, n_units: int, progress: float) -> int:
        """Active units of a layer that survive the mutation at ``progress``, before anything grows."""
        return active_count(target, self.drop_fraction_at(progress))

    def start_at(self, target: int, n_units: int) -> int:
        """Active units of a layer's first mask."""
        return target

    def gradient_reach_at(self, target: int, n_units: int, progress: float) -> int:
        """Units of a layer whose gradient every step computes, in the interval that starts at ``progress``."""
        return self.active_at(target, n_units, progress)

    def drop_score(self, weight: Tensor, gradient: Tensor | None) -> Tensor:
        """Score by which active weights are kept, highest first; of the weight's shape."""
        return mutation.magnitude(weight)

    def grow_score(self, gradient: Tensor | None) -> Tensor | None:
        """Score by which inactive weights grow, highest first, of the weight's shape; None: at random."""
        return None

    def allot(
        self, layers: Sequence[LayerView], *, progress: float, memory: MutableMapping[str, float]
    ) -> list[Turnover]:
        """How many units each layer keeps and then holds, for methods that move weights between layers.

        Args:
            layers: the layers that learn.
            progress: of the run, from 0 to 1.
            memory: what the method remembers from one mutation to the next; saved with the masks.
        """
        raise NotImplementedError(f"{self.name} moves nothing between layers")

    def rewire(
        self, weight: Tensor, mask: Tensor, negative: Tensor, *, learning_rate: float, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """The weight and the mask after a step, for methods that rewire.

        Args:
            weight: after the optimizer's step.
            mask: before it.
            negative: the weight's sign bits before the step.
            learning_rate: of the step.
            generator: a CPU generator.
        """
        raise NotImplementedError(f"{self.name} rewires nothing")

    @property
    def gradient_momentum(self) -> float:
        """Momentum of the smoothed gradient, where one is kept."""
        return 0.0

    def keeps_latents_at(self, progress: float) -> bool:
        """Whether inactive weights are still kept alive at the update epoch at ``progress``."""
        return False

    def latent_of(self, weight: Tensor, *, target: int) -> Latent | None:
        """What a step updates in place of the masked weight, where a method keeps inactive weights alive.

        Args:
            weight: the dense weight before it is masked.
            target: active weights of the layer by the distribution.
        """
        return None

    def scoring_flops(self, forward_flops_per_sample: int, samples: int) -> int:
        """Modelled FLOPs of choosing the first masks from ``samples`` samples; 0 where no data are looked at."""
        return 0

    def structure_of(self, sparsity: float) -> Structure:
        """The structure of a layer of that sparsity: a dense layer has none."""
        return self.structure if sparsity > 0.0 else Unstructured()

    def counts(self, shapes: Mapping[str, Sequence[int]]) -> dict[str, int]:
        """The target: active weights per layer, by the method's distribution, overrides and structure.

        Raises:
            InvalidArgument: a shape that the structure does not divide; all such layers are named.
        """
        sparsity = {name: override_for(name, self.overrides) for name in shapes}
        of_layer = {name: self.sparsity if own is None else own for name, own in sparsity.items()}
        _check_shapes(self, shapes, of_layer)
        ideal = erk(shapes, self.sparsity, overrides=self.overrides) if self.distribution == "erk" else {}
        counts = {}
        for name, shape in shapes.items():
            structure = self.structure_of(of_layer[name])
            size = structure.unit_size(shape)
            if name in ideal:
                # Whole units next to the real share; without groups the counts of the distribution themselves.
                units = min(structure.n_units(shape), max(1, round_half_up(ideal[name] / size)))
            else:
                units = structure.target_units(shape, of_layer[name])
            counts[name] = units * size
        return counts


def _check_shapes(method: SparsityMethod, shapes: Mapping[str, Sequence[int]], sparsity: Mapping[str, float]) -> None:
    problems = Problems()
    structure = method.structure
    if method.distribution == "erk" and structure.fixed_count:
        rule = f"gives layers sparsities of their own, and structure {structure.kind} allows one only"
        problems.add("distribution", method.distribution, rule, 'Use distribution="uniform".')
    for name, shape in shapes.items():
        found = method.structure_of(sparsity[name]).problem(shape, sparsity[name])
        if found is not None:
            rule = f"{name} of shape {tuple(shape)} {found}"
            remedy = f'Leave it dense with exclude=("{name}",), or use another structure or sparsity.'
            problems.add("structure", structure, rule, remedy)
    problems.raise_if_any()


def planned_active(method: SparsityMethod, target: int, n_units: int, *, epoch: int, interval: int, epochs: int) -> int:
    """Number of active units of an unfrozen layer during ``epoch``, as far as it is known beforehand.

    Args:
        target: the layer's units by the distribution.
        n_units: all units of the layer.
        interval: epochs between two update epochs.
        epochs: length of the run; its last epoch is at target.
    """
    if target == n_units or epoch >= epochs - 1:
        return target
    return method.active_at(target, n_units, latest_update_epoch(epoch, interval) / epochs)


def planned_keep(method: SparsityMethod, target: int, n_units: int, *, epoch: int, epochs: int) -> int:
    """Number of active units that survive the mutation of the update epoch ``epoch``, before anything grows.

    At epoch 0 and in the last epoch nothing below the target is dropped.
    """
    if target == n_units or epoch >= epochs - 1:
        return target
    if epoch == 0:
        return method.start_at(target, n_units)
    return method.keep_at(target, n_units, epoch / epochs)


def planned_density(
    method: SparsityMethod, target: int, shape: Sequence[int], *, epoch: int, interval: int, epochs: int
) -> tuple[float, float]:
    """Density of a layer's weights during ``epoch``, and of the gradient that its steps compute.

    Args:
        target: the layer's active weights by the distribution.
        shape: of its weight.
        epoch, interval, epochs: as in :func:`planned_active`.
    """
    numel = math.prod(shape)
    if target == numel:
        return 1.0, 1.0
    size, n_units = method.structure.unit_size(shape), method.structure.n_units(shape)
    units = target // size
    active = planned_active(method, units, n_units, epoch=epoch, interval=interval, epochs=epochs)
    reach = active
    if epoch < epochs - 1:
        reach = max(active, method.gradient_reach_at(units, n_units, latest_update_epoch(epoch, interval) / epochs))
    return active * size / numel, reach * size / numel


def mutates_after(method: SparsityMethod, epoch: int, *, interval: int, epochs: int) -> bool:
    """Is there a mutation that drops weights at an update epoch after ``epoch``? The last epoch has none."""
    later = range(latest_update_epoch(epoch, interval) + interval, epochs - 1, interval)
    return any(method.drop_fraction_at(update_epoch / epochs) > 0.0 for update_epoch in later)
