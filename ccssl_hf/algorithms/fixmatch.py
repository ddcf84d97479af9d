"""FixMatch, with distribution alignment if asked for."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F

from ..losses import masked_cross_entropy
from .alignment import distribution_alignment
from .base import Algorithm, Paper, SSLBatch, SSLLoss, predict, pseudo_label
from .hyperparameters import AlignmentWindow, ConfidenceThreshold, Hyperparameters, LambdaU, SharpenTemperature


@dataclass(frozen=True, kw_only=True)
class FixMatchHyperparameters(Hyperparameters):
    confidence_threshold: ConfidenceThreshold = 0.95
    lambda_u: LambdaU = 1.0
    sharpen_temperature: SharpenTemperature = 1.0
    distribution_alignment_window: AlignmentWindow = 0


class FixMatch(Algorithm):
    """FixMatch: Simplifying Semi-Supervised Learning with Consistency and Confidence (arXiv 2001.07685).

    What the weak view is confidently taken for is the target of the strong view (equation 4). The confidence is that
    after sharpening and alignment, for the mask as for the contrastive loss.
    """

    paper = Paper(
        name="FixMatch",
        key="sohn2020fixmatch",
        authors="Sohn, Kihyuk and Berthelot, David and Li, Chun-Liang and Zhang, Zizhao and Carlini, Nicholas and "
        "Cubuk, Ekin D. and Kurakin, Alex and Zhang, Han and Raffel, Colin",
        title="FixMatch: Simplifying Semi-Supervised Learning with Consistency and Confidence",
        venue="Advances in Neural Information Processing Systems",
        year=2020,
        arxiv="2001.07685",
    )
    hyperparameters_class = FixMatchHyperparameters
    settings: FixMatchHyperparameters
    terms = ("loss_x", "loss_u")

    def __init__(self, settings: FixMatchHyperparameters, *, num_classes: int) -> None:
        super().__init__(settings, num_classes=num_classes)
        self.alignment = distribution_alignment(num_classes, settings.distribution_alignment_window)

    def compute(self, batch: SSLBatch) -> SSLLoss:
        settings = self.settings
        logits_weak, logits_strong = batch.read("logits_weak", "logits_strong")
        probabilities = self.alignment(predict(logits_weak, settings.sharpen_temperature))
        confidences, pseudo_labels, mask = pseudo_label(probabilities, settings.confidence_threshold)

        loss_x = F.cross_entropy(batch.logits_labeled, batch.labels)
        loss_u = masked_cross_entropy(logits=logits_strong, targets=pseudo_labels, mask=mask)
        return SSLLoss(
            loss=loss_x + settings.lambda_u * loss_u,
            terms={"loss_x": loss_x, "loss_u": loss_u},
            pseudo_labels=pseudo_labels,
            confidences=confidences,
            mask=mask,
        )
