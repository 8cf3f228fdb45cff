"""What all sparse training methods share: plain data and pure rules.

A method says two things: how many units of a layer are active at a given progress of the run, of which the timeline is
made, and which strategy changes the masks, which the masker calls. A unit is what exists or not as a whole, by the
method's ``structure``: a single weight, where that is unstructured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, SerializeAsAny, field_serializer, field_validator, model_validator

from spfde.core.errors import InvalidArgument, Problem, Problems
from spfde.core.numbers import round_half_up
from spfde.core.technique import Technique, read_named, write_named
from spfde.sparsity.distribution import erk, override_for
from spfde.sparsity.masker import Masker
from spfde.sparsity.schedule import DenseGradients
from spfde.sparsity.strategy import Strategy
from spfde.sparsity.structure import Structure, Unstructured

Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
NamePatterns = tuple[str, ...]


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

    Example:
        >>> isinstance(spfde.SET(sparsity=0.9), spfde.sparsity.SparsityMethod)
        True
        >>> spfde.SET(sparsity=0.9, overrides={"head*": 0.5}).overrides
        {'head*': 0.5}
    """

    summary: ClassVar[str]
    cost: ClassVar[str] = "3 sparse passes a step"
    """Training FLOPs of a step, in words: the sparse forward pass, the gradient of the input and of the weight."""
    structured: ClassVar[bool] = True
    """Whether the method can treat several weights as one unit."""
    refuses_closures: ClassVar[bool] = False
    """Whether a closure must run before the optimizer moves the weights, which that of LBFGS does not."""
    by_layer: ClassVar[bool] = False
    """Whether a mask follows from its layer's weight and gradient alone, at the times that the plan says, by way of
    ``MaskedWeight``: then weights may be sharded over ranks (FSDP), and each is gathered while it is decided on."""
    counts_known: ClassVar[bool] = True
    """Whether each layer's number of active weights is known before training."""
    _count_remedy: ClassVar[str] = "Use another method, such as set or rigl."
    """What to do where the number of active weights varies and the structure fixes it."""

    sparsity: Fraction = Field(description="a number in [0, 1), the share of inactive weights")
    distribution: Literal["uniform", "erk"] = "uniform"
    structure: SerializeAsAny[Structure] = Field(
        default_factory=Unstructured, description="a structure, such as spfde.Block(rows=4, columns=1)"
    )
    include: NamePatterns = ()
    exclude: NamePatterns = ()
    overrides: dict[str, Fraction] = Field(default_factory=dict, description="name patterns with numbers in [0, 1)")
    dense_first: bool = True
    dense_head: bool = True
    init: Literal["random", "magnitude"] = "random"

    @field_validator("structure", mode="before")
    @classmethod
    def _read_structure(cls, value: Any) -> Any:
        return read_named("structure", value, argument="structure", key="kind")

    @field_serializer("structure")
    def _write_structure(self, structure: Structure) -> dict[str, Any]:
        return write_named(structure, key="kind")

    @model_validator(mode="after")
    def _structure_fits(self) -> SparsityMethod:
        if isinstance(self.structure, Unstructured):
            return self
        if not self.structured:
            rule = f"must be Unstructured(), for {self.name} works on single weights"
            remedy = "Use another method, such as set or rigl."
            raise InvalidArgument(Problem("structure", self.structure, rule, remedy))
        if self.structure.fixed_count and self.varies_counts:
            rule = f"keeps the number of active weights fixed, and {self.name} varies it as it is set here"
            raise InvalidArgument(Problem("structure", self.structure, rule, self._count_remedy))
        return self

    @property
    def cited(self) -> tuple[str, ...]:
        """With where the distribution over the layers is from; uniform is common knowledge."""
        return (*self.references, *(("evci2020rigl",) if self.distribution == "erk" else ()))

    @property
    def varies_counts(self) -> bool:
        """Whether a layer's number of active weights changes over the run."""
        return False

    @property
    def dense_gradients(self) -> DenseGradients:
        """In which steps gradients of inactive weights are computed: in one of each mutation that grows, or in all."""
        return "none"

    # How many units of a layer are active, when: pure functions of counts and of the run's progress from 0 to 1, which
    # the timeline is made of.

    def first_count(self, target: int, n_units: int) -> int:
        """Active units of a layer's first mask."""
        return target

    def mutation_counts(self, target: int, n_units: int, active: int, progress: float) -> tuple[int, int]:
        """Active units that survive the mutation of an update epoch, and active units after it.

        Args:
            target: active units by the distribution.
            n_units: all units of the layer.
            active: active units before.
            progress: of the run; at 0 nothing is trained yet, and nothing is dropped.
        """
        return active, active

    def gradient_count(self, n_units: int, active: int, progress: float) -> int:
        """Units whose gradient every step computes while ``active`` are active, from ``progress`` on."""
        return active

    def mutates_at(self, progress: float) -> bool:
        """Whether the mutation at ``progress`` exchanges units, also where their number stays."""
        return False

    def strategy(self, masker: Masker) -> Strategy:
        """What changes the masks while training goes on."""
        return Strategy(masker)

    def scoring_flops(self, forward_flops: int, *, samples: int, batch_size: int) -> int:
        """Modelled FLOPs of choosing the first masks from data; 0 where no data are looked at.

        Args:
            forward_flops: dense, of one sample.
            samples: size of the whole training set.
            batch_size: samples of a batch.
        """
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
        rule = f"gives layers sparsities of their own, and structure {structure.name} allows one only"
        problems.add("distribution", method.distribution, rule, 'Use distribution="uniform".')
    for name, shape in shapes.items():
        found = method.structure_of(sparsity[name]).problem(shape, sparsity[name])
        if found is not None:
            rule = f"{name} of shape {tuple(shape)} {found}"
            remedy = f'Leave it dense with exclude=("{name}",), or use another structure or sparsity.'
            problems.add("structure", structure, rule, remedy)
    problems.raise_if_any()
