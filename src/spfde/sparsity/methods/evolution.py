"""Sparse evolutionary training."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from spfde.schedules import cosine
from spfde.sparsity.methods.base import Fraction, SparsityMethod


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
