"""ITOP: dynamic sparse training that tries many weights in its course."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from spfde.sparsity.methods.base import Fraction
from spfde.sparsity.methods.evolution import SET
from spfde.sparsity.methods.rigl import RigL

_CITATION = (
    "S. Liu, L. Yin, D. C. Mocanu, M. Pechenizkiy: Do We Actually Need Dense Over-Parameterization? In-Time "
    "Over-Parameterization in Sparse Training. ICML 2021. arXiv 2102.02887"
)
_BIBTEX = """@inproceedings{liu2021itop,
  title = {Do We Actually Need Dense Over-Parameterization? In-Time Over-Parameterization in Sparse Training},
  author = {Liu, Shiwei and Yin, Lu and Mocanu, Decebal Constantin and Pechenizkiy, Mykola},
  booktitle = {International Conference on Machine Learning},
  year = {2021},
  eprint = {2102.02887},
  archivePrefix = {arXiv}
}"""


class SETITOP(SET):
    """SET as ITOP sets it: half of the active weights change places at first, layers by ERK.

    What counts is how many weights are tried over the run (``session.explored``): small batches, a long run, and an
    update interval long enough for a grown weight to show its worth. The authors mutate every 1,500 steps of 128
    samples on CIFAR, about four epochs; give Δτ to match.
    """

    name: ClassVar[str] = "set-itop"
    summary: ClassVar[str] = "SET that tries many weights in its course: half of them change places, layers by ERK."
    citation: ClassVar[str] = _CITATION
    bibtex: ClassVar[str] = f"{SET.bibtex}\n\n{_BIBTEX}"

    distribution: Literal["uniform", "erk"] = "erk"
    drop_fraction: Fraction = 0.5


class RigLITOP(RigL):
    """RigL as ITOP sets it: half of the active weights change places at first, layers by ERK, to the end of the run.

    As :class:`SETITOP`, with an interval of 4,000 steps in the authors' CIFAR runs, about ten epochs.
    """

    name: ClassVar[str] = "rigl-itop"
    summary: ClassVar[str] = "RigL that tries many weights in its course: half of them change places, layers by ERK."
    citation: ClassVar[str] = _CITATION
    bibtex: ClassVar[str] = f"{RigL.bibtex}\n\n{_BIBTEX}"

    distribution: Literal["uniform", "erk"] = "erk"
    drop_fraction: Fraction = 0.5
    stop_fraction: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
