"""The baseline: a mask that never changes."""

from __future__ import annotations

from typing import ClassVar

from spfde.sparsity.methods.base import SparsityMethod


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
