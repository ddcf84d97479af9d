from __future__ import annotations

from torch import Tensor

from ..losses import masked_cross_entropy
from . import hyperparameters as hp
from .base import Algorithm, Paper, PseudoLabels, SSLBatch, predict, pseudo_label


class FixMatchHyperparameters(hp.Hyperparameters):
    confidence_threshold: hp.ConfidenceThreshold = 0.95
    lambda_u: hp.LambdaU = 1.0
    sharpen_temperature: hp.SharpenTemperature = 1.0
    distribution_alignment_window: hp.AlignmentWindow = 0


class FixMatch(Algorithm):
    """FixMatch (arXiv 2001.07685, equation 4): confident predictions for the weak view are targets for the strong view.

    The confidences, also those that the contrastive loss reads, are computed after sharpening and alignment.
    """

    paper = Paper(
        name="FixMatch",
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

    def compute(self, batch: SSLBatch) -> tuple[PseudoLabels, dict[str, Tensor]]:
        logits_weak, logits_strong = batch.read("logits_weak", "logits_strong")
        probabilities = self.alignment(predict(logits_weak, self.settings.sharpen_temperature))
        pseudo = pseudo_label(probabilities, self.settings.confidence_threshold)
        return pseudo, {"loss_u": masked_cross_entropy(logits=logits_strong, targets=pseudo.labels, mask=pseudo.mask)}
