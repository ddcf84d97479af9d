from __future__ import annotations

import torch
from torch import Tensor, nn

from ..distributed import all_gather
from ..losses import masked_cross_entropy
from . import hyperparameters as hp
from .base import Algorithm, Paper, PseudoLabels, SSLBatch, predict, pseudo_label


class FlexMatchHyperparameters(hp.Hyperparameters):
    confidence_threshold: hp.ConfidenceThreshold = 0.95
    lambda_u: hp.LambdaU = 1.0
    threshold_warmup: hp.ThresholdWarmup = True


class FlexMatch(Algorithm):
    """FlexMatch (arXiv 2110.08263).

    The status of an unlabeled image is the class of its last prediction with a confidence of τ or more. With σ_c images
    of status c out of N, the threshold of class c is

        T_c = τ · M(β_c),   β_c = σ_c / max(max_c σ_c, N − Σ_c σ_c),   M(x) = x / (2 − x)

    N − Σ_c σ_c is left out if `threshold_warmup` is off. A step uses the statuses from before the step.

    Statuses cover the images of all processes. σ is updated incrementally, so the cost of a step does not depend on N.
    If an image occurs several times in a batch, its last confident occurrence (in the order of ranks) counts. If one
    class has all N images, β is updated; the authors' code keeps the old β.
    """

    paper = Paper(
        name="FlexMatch",
        authors="Zhang, Bowen and Wang, Yidong and Hou, Wenxin and Wu, Hao and Wang, Jindong and Okumura, Manabu and "
        "Shinozaki, Takahiro",
        title="FlexMatch: Boosting Semi-Supervised Learning with Curriculum Pseudo Labeling",
        venue="Advances in Neural Information Processing Systems",
        year=2021,
        arxiv="2110.08263",
    )
    hyperparameters_class = FlexMatchHyperparameters
    settings: FlexMatchHyperparameters
    terms = ("loss_x", "loss_u")
    needs_index = True

    def __init__(self, settings: FlexMatchHyperparameters, *, num_classes: int, num_unlabeled: int) -> None:
        super().__init__(settings, num_classes=num_classes)
        self.unused = num_classes  # status of an image without a confident prediction so far
        dtype = torch.int16 if self.unused <= torch.iinfo(torch.int16).max else torch.int32
        self.status = nn.Buffer(torch.full((num_unlabeled,), self.unused, dtype=dtype))
        self.counts = nn.Buffer(torch.tensor([0] * num_classes + [num_unlabeled]))  # images of each status

    @property
    def class_status(self) -> Tensor:
        """The learning status β of each class, `[C]`, in [0, 1]."""
        used = self.counts[: self.unused]
        return used / (self.counts if self.settings.threshold_warmup else used).max().clamp(min=1)

    def compute(self, batch: SSLBatch) -> tuple[PseudoLabels, dict[str, Tensor]]:
        threshold = self.settings.confidence_threshold
        logits_weak, logits_strong, index = batch.read("logits_weak", "logits_strong", "index")
        status = self.class_status
        pseudo = pseudo_label(predict(logits_weak), threshold * status / (2 - status))
        self._update(index, pseudo.labels, pseudo.confidences >= threshold)
        return pseudo, {"loss_u": masked_cross_entropy(logits=logits_strong, targets=pseudo.labels, mask=pseudo.mask)}

    def _update(self, index: Tensor, pseudo_labels: Tensor, confident: Tensor) -> None:
        """Updates the status of the confident images `[U]` of all processes."""
        index, pseudo_labels, confident = all_gather(torch.stack([index, pseudo_labels, confident.long()], 1)).unbind(1)
        # Sort by image, then confidence, then position: the last row of each image decides.
        position = torch.arange(len(index), device=index.device)
        order = ((index * 2 + confident) * len(index) + position).argsort()
        index, pseudo_labels, confident = index[order], pseudo_labels[order], confident[order]
        decides = confident.bool()
        decides[:-1] &= index[1:] != index[:-1]

        before = self.status[index].long()
        after = torch.where(decides, pseudo_labels, before)
        # Add differences: other rows of the same image add zero, where an assignment would race.
        self.status.index_add_(0, index, (after - before).to(self.status.dtype))
        self.counts.index_add_(0, before, -torch.ones_like(before)).index_add_(0, after, torch.ones_like(after))
