"""The papers that a card cites."""

from __future__ import annotations

from typing import NamedTuple


class Paper(NamedTuple):
    """What a citation says."""

    name: str
    key: str
    authors: str
    title: str
    venue: str
    year: int
    arxiv: str


_CVPR, _ICCV, _NEURIPS, _ICLR = (
    "Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern Recognition",
    "Proceedings of the IEEE/CVF International Conference on Computer Vision",
    "Advances in Neural Information Processing Systems",
    "International Conference on Learning Representations",
)
CCSSL = Paper(
    "CCSSL",
    "yang2022ccssl",
    "Yang, Fan and Wu, Kai and Zhang, Shuyi and Jiang, Guannan and Liu, Yong and Zheng, Feng and Zhang, Wei and "
    "Wang, Chengjie and Zeng, Long",
    "Class-Aware Contrastive Semi-Supervised Learning",
    _CVPR,
    2022,
    "2203.02261",
)
ALGORITHM_PAPERS = {
    "fixmatch": Paper(
        "FixMatch",
        "sohn2020fixmatch",
        "Sohn, Kihyuk and Berthelot, David and Li, Chun-Liang and Zhang, Zizhao and Carlini, Nicholas and "
        "Cubuk, Ekin D. and Kurakin, Alex and Zhang, Han and Raffel, Colin",
        "FixMatch: Simplifying Semi-Supervised Learning with Consistency and Confidence",
        _NEURIPS,
        2020,
        "2001.07685",
    ),
    "comatch": Paper(
        "CoMatch",
        "li2021comatch",
        "Li, Junnan and Xiong, Caiming and Hoi, Steven C. H.",
        "CoMatch: Semi-supervised Learning with Contrastive Graph Regularization",
        _ICCV,
        2021,
        "2011.11183",
    ),
    "flexmatch": Paper(
        "FlexMatch",
        "zhang2021flexmatch",
        "Zhang, Bowen and Wang, Yidong and Hou, Wenxin and Wu, Hao and Wang, Jindong and Okumura, Manabu and "
        "Shinozaki, Takahiro",
        "FlexMatch: Boosting Semi-Supervised Learning with Curriculum Pseudo Labeling",
        _NEURIPS,
        2021,
        "2110.08263",
    ),
    "freematch": Paper(
        "FreeMatch",
        "wang2023freematch",
        "Wang, Yidong and Chen, Hao and Heng, Qiang and Hou, Wenxin and Fan, Yue and Wu, Zhen and Wang, Jindong and "
        "Savvides, Marios and Shinozaki, Takahiro and Raj, Bhiksha and Schiele, Bernt and Xie, Xing",
        "FreeMatch: Self-adaptive Thresholding for Semi-supervised Learning",
        _ICLR,
        2023,
        "2205.07246",
    ),
    "softmatch": Paper(
        "SoftMatch",
        "chen2023softmatch",
        "Chen, Hao and Tao, Ran and Fan, Yue and Wang, Yidong and Wang, Jindong and Schiele, Bernt and Xie, Xing and "
        "Raj, Bhiksha and Savvides, Marios",
        "SoftMatch: Addressing the Quantity-Quality Trade-off in Semi-supervised Learning",
        _ICLR,
        2023,
        "2301.10921",
    ),
    "simmatch": Paper(
        "SimMatch",
        "zheng2022simmatch",
        "Zheng, Mingkai and You, Shan and Huang, Lang and Wang, Fei and Qian, Chen and Xu, Chang",
        "SimMatch: Semi-Supervised Learning with Similarity Matching",
        _CVPR,
        2022,
        "2203.06915",
    ),
    "iomatch": Paper(
        "IOMatch",
        "li2023iomatch",
        "Li, Zekun and Qi, Lei and Shi, Yinghuan and Gao, Yang",
        "IOMatch: Simplifying Open-Set Semi-Supervised Learning with Joint Inliers and Outliers Utilization",
        _ICCV,
        2023,
        "2308.13168",
    ),
}
