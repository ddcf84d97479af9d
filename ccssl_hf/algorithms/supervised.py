from __future__ import annotations

from torch import Tensor

from .base import Algorithm, PseudoLabels, SSLBatch, predict


class Supervised(Algorithm):
    """The baseline: cross-entropy on the labeled images.

    With `lambda_contrast` above 0, pseudo labels come from the weak view and are used in the contrastive loss only.
    """

    terms = ("loss_x",)
    views = ()

    def compute(self, batch: SSLBatch) -> tuple[PseudoLabels | None, dict[str, Tensor]]:
        if not self.views:
            return None, {}
        (logits_weak,) = batch.read("logits_weak")
        confidences, labels = predict(logits_weak).max(1)
        return PseudoLabels(labels, confidences), {}
