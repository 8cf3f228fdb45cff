"""Papers that more than one technique builds on, so that each is written down once."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Source:
    """One paper.

    Attributes:
        citation: authors, title, where and when, in one line.
        bibtex: its entry.
    """

    citation: str
    bibtex: str


SPFDE = Source(
    "Geng Yuan, Yanyu Li, Sheng Li, Zhenglun Kong, Sergey Tulyakov, Xulong Tang, Yanzhi Wang, Jian Ren. "
    "Layer Freezing & Data Sieving: Missing Pieces of a Generic Framework for Sparse Training. NeurIPS 2022. "
    "arXiv:2209.11204",
    """@inproceedings{yuan2022spfde,
  title = {Layer Freezing \\& Data Sieving: Missing Pieces of a Generic Framework for Sparse Training},
  author = {Yuan, Geng and Li, Yanyu and Li, Sheng and Kong, Zhenglun and Tulyakov, Sergey and Tang, Xulong and
            Wang, Yanzhi and Ren, Jian},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2022},
  eprint = {2209.11204},
  archiveprefix = {arXiv}
}""",
)

MEST = Source(
    "G. Yuan, X. Ma, W. Niu, Z. Li, Z. Kong, N. Liu, Y. Gong, Z. Zhan, C. He, Q. Jin, S. Wang, M. Qin, B. Ren, "
    "Y. Wang, S. Liu, X. Lin: MEST: Accurate and Fast Memory-Economic Sparse Training Framework on the Edge. "
    "NeurIPS 2021. arXiv 2110.14032",
    """@inproceedings{yuan2021mest,
  title = {{MEST}: Accurate and Fast Memory-Economic Sparse Training Framework on the Edge},
  author = {Yuan, Geng and Ma, Xiaolong and Niu, Wei and Li, Zhengang and Kong, Zhenglun and Liu, Ning and Gong, Yifan
            and Zhan, Zheng and He, Chaoyang and Jin, Qing and Wang, Siyue and Qin, Minghai and Ren, Bin
            and Wang, Yanzhi and Liu, Sijia and Lin, Xue},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2021},
  eprint = {2110.14032},
  archivePrefix = {arXiv}
}""",
)

RIGL = Source(
    "U. Evci, T. Gale, J. Menick, P. S. Castro, E. Elsen: Rigging the Lottery: Making All Tickets Winners. "
    "ICML 2020. arXiv 1911.11134",
    """@inproceedings{evci2020rigl,
  title = {Rigging the Lottery: Making All Tickets Winners},
  author = {Evci, Utku and Gale, Trevor and Menick, Jacob and Castro, Pablo Samuel and Elsen, Erich},
  booktitle = {International Conference on Machine Learning},
  year = {2020},
  eprint = {1911.11134},
  archivePrefix = {arXiv}
}""",
)

CKA = Source(
    "S. Kornblith, M. Norouzi, H. Lee, G. Hinton: Similarity of Neural Network Representations Revisited. ICML 2019. "
    "arXiv 1905.00414",
    """@inproceedings{kornblith2019similarity,
  title = {Similarity of Neural Network Representations Revisited},
  author = {Kornblith, Simon and Norouzi, Mohammad and Lee, Honglak and Hinton, Geoffrey},
  booktitle = {International Conference on Machine Learning},
  year = {2019},
  eprint = {1905.00414},
  archivePrefix = {arXiv}
}""",
)

MINIBATCH_CKA = Source(
    "T. Nguyen, M. Raghu, S. Kornblith: Do Wide and Deep Networks Learn the Same Things? Uncovering How Neural Network "
    "Representations Vary with Width and Depth. ICLR 2021. arXiv 2010.15327",
    """@inproceedings{nguyen2021wide,
  title = {Do Wide and Deep Networks Learn the Same Things? Uncovering How Neural Network Representations Vary with
           Width and Depth},
  author = {Nguyen, Thao and Raghu, Maithra and Kornblith, Simon},
  booktitle = {International Conference on Learning Representations},
  year = {2021},
  eprint = {2010.15327},
  archivePrefix = {arXiv}
}""",
)

FORGETTING = Source(
    "M. Toneva, A. Sordoni, R. Tachet des Combes, A. Trischler, Y. Bengio, G. J. Gordon: An Empirical Study of Example "
    "Forgetting during Deep Neural Network Learning. ICLR 2019. arXiv 1812.05159",
    """@inproceedings{toneva2019forgetting,
  title = {An Empirical Study of Example Forgetting during Deep Neural Network Learning},
  author = {Toneva, Mariya and Sordoni, Alessandro and Tachet des Combes, Remi and Trischler, Adam and Bengio, Yoshua
            and Gordon, Geoffrey J.},
  booktitle = {International Conference on Learning Representations},
  year = {2019},
  eprint = {1812.05159},
  archivePrefix = {arXiv}
}""",
)

EL2N = Source(
    "M. Paul, S. Ganguli, G. K. Dziugaite: Deep Learning on a Data Diet: Finding Important Examples Early in Training. "
    "NeurIPS 2021. arXiv 2107.07075",
    """@inproceedings{paul2021datadiet,
  title = {Deep Learning on a Data Diet: Finding Important Examples Early in Training},
  author = {Paul, Mansheej and Ganguli, Surya and Dziugaite, Gintare Karolina},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2021},
  eprint = {2107.07075},
  archivePrefix = {arXiv}
}""",
)

INFOBATCH = Source(
    "Z. Qin, K. Wang, Z. Zheng, J. Gu, X. Peng, Z. Xu, D. Zhou, L. Shang, B. Sun, X. Xie, Y. You: InfoBatch: Lossless "
    "Training Speed Up by Unbiased Dynamic Data Pruning. ICLR 2024. arXiv 2303.04947",
    """@inproceedings{qin2024infobatch,
  title = {{InfoBatch}: Lossless Training Speed Up by Unbiased Dynamic Data Pruning},
  author = {Qin, Ziheng and Wang, Kai and Zheng, Zangwei and Gu, Jianyang and Peng, Xiangyu and Xu, Zhaopan
            and Zhou, Daquan and Shang, Lei and Sun, Baigui and Xie, Xuansong and You, Yang},
  booktitle = {International Conference on Learning Representations},
  year = {2024},
  eprint = {2303.04947},
  archivePrefix = {arXiv}
}""",
)

HORVITZ_THOMPSON = Source(
    "D. G. Horvitz, D. J. Thompson: A Generalization of Sampling Without Replacement From a Finite Universe. "
    "Journal of the American Statistical Association 47(260), 1952",
    """@article{horvitz1952generalization,
  title = {A Generalization of Sampling Without Replacement From a Finite Universe},
  author = {Horvitz, Daniel G. and Thompson, Donovan J.},
  journal = {Journal of the American Statistical Association},
  volume = {47},
  number = {260},
  pages = {663--685},
  year = {1952}
}""",
)
