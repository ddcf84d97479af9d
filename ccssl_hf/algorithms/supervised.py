"""The labeled images alone: the baseline."""

from __future__ import annotations

import torch.nn.functional as F

from .base import Algorithm, SSLBatch, SSLLoss, predict


class Supervised(Algorithm):
    """Cross-entropy on the labeled images.

    With CCSSL composed on it, pseudo labels come from the weak view and steer the contrastive loss only.
    """

    terms = ("loss_x",)
    views = ()

    def compute(self, batch: SSLBatch) -> SSLLoss:
        loss_x = F.cross_entropy(batch.logits_labeled, batch.labels)
        result = SSLLoss(loss=loss_x, terms={"loss_x": loss_x})
        if self.views:
            (logits_weak,) = batch.read("logits_weak")
            result.confidences, result.pseudo_labels = predict(logits_weak).max(1)
        return result
