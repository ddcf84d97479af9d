from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..losses import masked_cross_entropy
from . import hyperparameters as hp
from .base import Algorithm, Paper, PseudoLabels, SSLBatch, predict, pseudo_label


class IOMatchHyperparameters(hp.Hyperparameters):
    confidence_threshold: hp.ConfidenceThreshold = 0.95
    open_threshold: hp.OpenThreshold = 0.5
    lambda_u: hp.LambdaU = 1.0
    lambda_one_vs_all: hp.LambdaOneVsAll = 1.0
    lambda_open: hp.LambdaOpen = 1.0
    distribution_alignment_window: hp.AlignmentWindow = 128


class IOMatch(Algorithm):
    """IOMatch (arXiv 2308.13168), for unlabeled images of which many are out-of-distribution.

    Head "one_vs_all" `[., 2C]` (C negatives, then C positives) gives the probability o_c that an image belongs to class
    c, by a softmax over each pair. Head "open" `[., C + 1]` has one more class for out-of-distribution images. With
    aligned probabilities p `[U, C]` of the weak view:

        loss_one_vs_all = mean −log o_y + mean max_{c≠y} −log(1 − o_c)     over labeled images
        q = (p_1 o_1, ..., p_C o_C, Σ_c p_c (1 − o_c))                     open-set targets
        loss_u    = mean 1[max p ≥ τ_p] · 1[Σ_c p_c (1 − o_c) < 0.5] · H(p, prediction for the strong view)
        loss_open = mean 1[max q ≥ τ_q] · H(q, open-set prediction for the strong view)

    τ_p is `confidence_threshold` and τ_q is `open_threshold`. Unlike in the authors' code, the two heads do not share a
    hidden layer, and loss_open is used from the first step, not after one epoch.
    """

    paper = Paper(
        name="IOMatch",
        authors="Li, Zekun and Qi, Lei and Shi, Yinghuan and Gao, Yang",
        title="IOMatch: Simplifying Open-Set Semi-Supervised Learning with Joint Inliers and Outliers Utilization",
        venue="Proceedings of the IEEE/CVF International Conference on Computer Vision",
        year=2023,
        arxiv="2308.13168",
    )
    hyperparameters_class = IOMatchHyperparameters
    settings: IOMatchHyperparameters
    terms = ("loss_x", "loss_u", "loss_one_vs_all", "loss_open")

    def __init__(self, settings: IOMatchHyperparameters, *, num_classes: int) -> None:
        super().__init__(settings, num_classes=num_classes)
        self.heads = {"one_vs_all": partial(_head, 2 * num_classes), "open": partial(_head, num_classes + 1)}

    def open_set_score(self, logits: Tensor, heads: Mapping[str, Tensor] | None = None) -> Tensor:
        """The paper's inlier score Σ_c p_c o_c, `[N]`, without alignment. Needs the output of the head "one_vs_all"."""
        if heads is None or "one_vs_all" not in heads:
            raise ValueError("IOMatch computes the score from its head 'one_vs_all': pass the model's heads.")
        return (predict(logits) * self._inlier_odds(heads["one_vs_all"].detach()).sigmoid()).sum(1)

    def compute(self, batch: SSLBatch) -> tuple[PseudoLabels, dict[str, Tensor]]:
        logits_weak, logits_strong = batch.read("logits_weak", "logits_strong")
        heads = batch.heads or {}  # forward has checked that both exist
        labeled_odds, weak_odds = map(self._inlier_odds, heads["one_vs_all"][:2])
        probabilities, weak_odds = self.alignment(predict(logits_weak)), weak_odds.detach()
        ood = (probabilities * (-weak_odds).sigmoid()).sum(1, keepdim=True)
        open_targets = torch.cat([probabilities * weak_odds.sigmoid(), ood], dim=1)
        open_mask = pseudo_label(open_targets, self.settings.open_threshold).mask
        pseudo = pseudo_label(probabilities, self.settings.confidence_threshold)
        pseudo = pseudo._replace(mask=pseudo.mask * (ood.squeeze(1) < 0.5))
        labels = batch.labels[:, None]
        positive = F.softplus(-labeled_odds.gather(1, labels))
        hardest_negative = F.softplus(labeled_odds.scatter(1, labels, -torch.inf)).amax(1)
        return pseudo, {
            "loss_u": masked_cross_entropy(logits=logits_strong, targets=probabilities, mask=pseudo.mask),
            "loss_one_vs_all": positive.mean() + hardest_negative.mean(),
            "loss_open": masked_cross_entropy(logits=heads["open"][2], targets=open_targets, mask=open_mask),
        }

    def _inlier_odds(self, one_vs_all: Tensor) -> Tensor:
        """Log odds `[N, C]` that an image belongs to a class, from `[N, 2C]`."""
        negative, positive = one_vs_all.split(self.num_classes, dim=1)
        return positive - negative


def _head(outputs: int, features: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(features, features), nn.ReLU(), nn.Linear(features, outputs))
