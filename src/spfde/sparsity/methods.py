"""Sparse training methods: plain data and pure rules. They say what to do; the masker does it.

A method answers four questions: how many weights a layer drops and holds at a given progress of the run, which score
decides what is dropped, which rule decides what grows, and which gradients these need.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from spfde.rounding import round_half_up
from spfde.schedules import cosine, latest_beat, steps
from spfde.sparsity import mutation
from spfde.sparsity.distribution import active_count, erk, uniform
from spfde.technique import Technique

Sparsity = Annotated[float, Field(ge=0.0, lt=1.0)]
Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
Patterns = tuple[str, ...]


class SparsityMethod(Technique):
    """What all methods share: how sparse, which layers, and how the first mask is drawn.

    Attributes:
        sparsity: share of inactive weights in the masked layers, in [0, 1).
        distribution: "uniform" (every layer alike, as SpFDE and MEST) or "erk" (small layers denser, as RigL).
        include: name patterns (``fnmatch``) of the weights to mask; empty: all that can be.
        exclude: name patterns of weights that stay dense, such as ``"*.downsample.*"``.
        overrides: sparsity by name pattern; the last pattern that matches wins.
        dense_first: the first layer in order of execution stays dense.
        dense_head: the classifier head stays dense.
        init: "random" (uniform per layer, SpFDE's random sparse structure) or "magnitude" (the largest initial
            weights, as MEST's released code; the choice for a pretrained model).
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    citation: ClassVar[str]
    bibtex: ClassVar[str]

    sparsity: Sparsity = Field(description="a number in [0, 1), the share of inactive weights")
    distribution: Literal["uniform", "erk"] = "uniform"
    include: Patterns = ()
    exclude: Patterns = ()
    overrides: dict[str, Sparsity] = Field(default_factory=dict, description="name patterns with numbers in [0, 1)")
    dense_first: bool = True
    dense_head: bool = True
    init: Literal["random", "magnitude"] = "random"

    @property
    def gradients(self) -> Literal["none", "active", "dense"]:
        """Which gradients a mutation needs: none, those of the active weights, or those of all weights."""
        return "none"

    def drop_fraction_at(self, progress: float) -> float:
        """Share of the target's active weights that a mutation drops and grows again; progress runs from 0 to 1."""
        return 0.0

    def excess_at(self, progress: float) -> float:
        """Soft bound: density above the target, in share of all weights of the layer."""
        return 0.0

    def drop_score(self, weight: Tensor, gradient: Tensor | None) -> Tensor:
        """Score by which active weights are kept, highest first; of the weight's shape."""
        return mutation.magnitude(weight)

    def grow(self, mask: Tensor, n_final: int, *, gradient: Tensor | None, generator: torch.Generator) -> Tensor:
        """A mask of ``n_final`` active weights that contains ``mask``."""
        return mutation.grow_random(mask, n_final, generator)

    def counts(self, shapes: Mapping[str, Sequence[int]]) -> dict[str, int]:
        """The target: active weights per layer, by the method's distribution and overrides."""
        distribute = uniform if self.distribution == "uniform" else erk
        return distribute(shapes, self.sparsity, overrides=self.overrides)


class StaticSparse(SparsityMethod):
    """A fixed random mask: the baseline of dynamic sparse training."""

    name: ClassVar[str] = "static"
    summary: ClassVar[str] = "A fixed random mask, never changed."
    citation: ClassVar[str] = (
        "S. Liu, T. Chen, X. Chen, L. Shen, D. C. Mocanu, Z. Wang, M. Pechenizkiy: The Unreasonable Effectiveness of "
        "Random Pruning: Return of the Most Naive Baseline for Sparse Training. ICLR 2022. arXiv 2202.02643"
    )
    bibtex: ClassVar[str] = """@inproceedings{liu2022random,
  title = {The Unreasonable Effectiveness of Random Pruning: Return of the Most Naive Baseline for Sparse Training},
  author = {Liu, Shiwei and Chen, Tianlong and Chen, Xiaohan and Shen, Li and Mocanu, Decebal Constantin
            and Wang, Zhangyang and Pechenizkiy, Mykola},
  booktitle = {International Conference on Learning Representations},
  year = {2022},
  eprint = {2202.02643},
  archivePrefix = {arXiv}
}"""


class SET(SparsityMethod):
    """Drop the smallest weights, grow as many at random.

    Departures: by magnitude, as most re-implementations, where the paper drops the weights next to zero on each side;
    grown weights start at zero, where the paper draws them at random.

    Attributes:
        drop_fraction: share of the active weights dropped at the first mutation, in [0, 1).
        decay: "cosine" to zero at ``stop_fraction``, or "constant" until then.
        stop_fraction: share of the run after which the mask stays, in (0, 1].
    """

    name: ClassVar[str] = "set"
    summary: ClassVar[str] = "Drops the smallest weights and grows random ones."
    citation: ClassVar[str] = (
        "D. C. Mocanu, E. Mocanu, P. Stone, P. H. Nguyen, M. Gibescu, A. Liotta: Scalable training of artificial "
        "neural networks with adaptive sparse connectivity inspired by network science. "
        "Nature Communications 9, 2018. arXiv 1707.04780"
    )
    bibtex: ClassVar[str] = """@article{mocanu2018set,
  title = {Scalable training of artificial neural networks with adaptive sparse connectivity inspired by
           network science},
  author = {Mocanu, Decebal Constantin and Mocanu, Elena and Stone, Peter and Nguyen, Phuong H.
            and Gibescu, Madeleine and Liotta, Antonio},
  journal = {Nature Communications},
  volume = {9},
  year = {2018},
  eprint = {1707.04780},
  archivePrefix = {arXiv}
}"""

    drop_fraction: Fraction = 0.3
    decay: Literal["cosine", "constant"] = "cosine"
    stop_fraction: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0

    def drop_fraction_at(self, progress: float) -> float:
        if progress >= self.stop_fraction:
            return 0.0
        if self.decay == "constant":
            return self.drop_fraction
        return cosine(progress / self.stop_fraction, self.drop_fraction)


class RigL(SparsityMethod):
    """Drop the smallest weights, grow those with the largest dense gradient.

    Departure: the paper skips the gradient update in a step that mutates; here the mutation follows the update.

    Attributes:
        drop_fraction: share of the active weights dropped at the first mutation, in [0, 1).
        stop_fraction: share of the run after which the mask stays, in (0, 1]; the cosine ends there.
    """

    name: ClassVar[str] = "rigl"
    summary: ClassVar[str] = "Drops the smallest weights and grows those with the largest dense gradient."
    citation: ClassVar[str] = (
        "U. Evci, T. Gale, J. Menick, P. S. Castro, E. Elsen: Rigging the Lottery: Making All Tickets Winners. "
        "ICML 2020. arXiv 1911.11134"
    )
    bibtex: ClassVar[str] = """@inproceedings{evci2020rigl,
  title = {Rigging the Lottery: Making All Tickets Winners},
  author = {Evci, Utku and Gale, Trevor and Menick, Jacob and Castro, Pablo Samuel and Elsen, Erich},
  booktitle = {International Conference on Machine Learning},
  year = {2020},
  eprint = {1911.11134},
  archivePrefix = {arXiv}
}"""

    drop_fraction: Fraction = 0.3
    stop_fraction: Annotated[float, Field(gt=0.0, le=1.0)] = 0.75

    @property
    def gradients(self) -> Literal["none", "active", "dense"]:
        return "dense"

    def drop_fraction_at(self, progress: float) -> float:
        return cosine(progress / self.stop_fraction, self.drop_fraction)

    def grow(self, mask: Tensor, n_final: int, *, gradient: Tensor | None, generator: torch.Generator) -> Tensor:
        assert gradient is not None, "RigL grows by the dense gradient"
        return mutation.grow_by_score(mask, mutation.gradient(gradient), n_final)


class MEST(SparsityMethod):
    """Elastic mutation (EM), and with a soft memory bound EM&S.

    With the soft bound a layer trains above its target density and is pruned back to it, then regrown, at each beat;
    the bound shrinks to nothing. Without it a shrinking share of the weights is dropped and regrown at random.
    Defaults are those of the released CIFAR scripts, as shares of the run; 0.2 and 0.1 of the active weights are 2 and
    1 points of density at 90 % sparsity.

    Departures: optimizer state of grown weights starts at zero (the released code lets the old momentum live on); at
    epoch 0 nothing is dropped, for untrained weights say nothing.

    Attributes:
        soft_bound: EM&S when true, EM when false.
        soft_bound_steps: density above the target, by stage.
        drop_steps: share of the target's active weights dropped at a beat, by stage (EM only).
        decay_at: progress at which the next stage starts; one fewer than stages.
        gradient_weight: λ in the importance |w| + λ|g|; 0 in the released code.
    """

    name: ClassVar[str] = "mest"
    summary: ClassVar[str] = "Elastic mutation with a soft memory bound; no dense gradient, ever."
    citation: ClassVar[str] = (
        "G. Yuan, X. Ma, W. Niu, Z. Li, Z. Kong, N. Liu, Y. Gong, Z. Zhan, C. He, Q. Jin, S. Wang, M. Qin, B. Ren, "
        "Y. Wang, S. Liu, X. Lin: MEST: Accurate and Fast Memory-Economic Sparse Training Framework on the Edge. "
        "NeurIPS 2021. arXiv 2110.14032"
    )
    bibtex: ClassVar[str] = """@inproceedings{yuan2021mest,
  title = {{MEST}: Accurate and Fast Memory-Economic Sparse Training Framework on the Edge},
  author = {Yuan, Geng and Ma, Xiaolong and Niu, Wei and Li, Zhengang and Kong, Zhenglun and Liu, Ning and Gong, Yifan
            and Zhan, Zheng and He, Chaoyang and Jin, Qing and Wang, Siyue and Qin, Minghai and Ren, Bin
            and Wang, Yanzhi and Liu, Sijia and Lin, Xue},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2021},
  eprint = {2110.14032},
  archivePrefix = {arXiv}
}"""

    soft_bound: bool = True
    soft_bound_steps: tuple[Fraction, ...] = (0.05, 0.025, 0.0)
    drop_steps: tuple[Fraction, ...] = (0.2, 0.1, 0.0)
    decay_at: tuple[Annotated[float, Field(ge=0.0, le=1.0)], ...] = (90 / 160, 120 / 160)
    gradient_weight: Annotated[float, Field(ge=0.0)] = 0.0

    @model_validator(mode="after")
    def _stages_fit(self) -> MEST:
        field = "soft_bound_steps" if self.soft_bound else "drop_steps"
        if len(getattr(self, field)) != len(self.decay_at) + 1:
            raise ValueError(f"{field} must have one value more than decay_at")
        if list(self.decay_at) != sorted(self.decay_at):
            raise ValueError("decay_at must rise")
        return self

    @property
    def gradients(self) -> Literal["none", "active", "dense"]:
        return "active" if self.gradient_weight > 0.0 else "none"

    def drop_fraction_at(self, progress: float) -> float:
        return 0.0 if self.soft_bound else steps(progress, self.drop_steps, self.decay_at)

    def excess_at(self, progress: float) -> float:
        return steps(progress, self.soft_bound_steps, self.decay_at) if self.soft_bound else 0.0

    def drop_score(self, weight: Tensor, gradient: Tensor | None) -> Tensor:
        if self.gradient_weight == 0.0:
            return mutation.magnitude(weight)
        assert gradient is not None, "the importance |w| + λ|g| needs the gradient"
        return mutation.magnitude_plus_gradient(weight, gradient, self.gradient_weight)


METHODS: dict[str, type[SparsityMethod]] = {method.name: method for method in (StaticSparse, SET, RigL, MEST)}


def planned_active(method: SparsityMethod, target: int, numel: int, *, epoch: int, interval: int, epochs: int) -> int:
    """Number of active weights of an unfrozen layer during ``epoch``: its target and, on top, the soft bound.

    Args:
        target: the layer's count by the distribution.
        numel: all weights of the layer.
        interval: epochs between two beats.
        epochs: length of the run; its last epoch is at target.
    """
    if target == numel or epoch >= epochs - 1:
        return target
    excess = method.excess_at(latest_beat(epoch, interval) / epochs)
    return min(numel, target + round_half_up(excess * numel))


def planned_keep(method: SparsityMethod, target: int, numel: int, *, epoch: int, epochs: int) -> int:
    """Number of active weights that survive the mutation of the beat ``epoch``, before anything grows.

    At epoch 0 and in the last epoch nothing below the target is dropped.
    """
    if target == numel or epoch == 0 or epoch >= epochs - 1:
        return target
    return active_count(target, method.drop_fraction_at(epoch / epochs))
